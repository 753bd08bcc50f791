"""Sample completions by a vLLM server, with the interface of `sampling.sample`.

Each row has a seed for its random numbers, but vLLM's kernels depend on the batch, so rows are not
bit-identical between runs, unlike those of the local engine.

vLLM ignores an adapter whose tensors have other names than it expects, and answers as the base. Before the
first row, log-probabilities of a few probe rows are therefore compared with ours, for every teacher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechlens.core.errors import MachineError, SpecError
from mechlens.core.files import read_json
from mechlens.core.model_spec import ModelSpec, model_of
from mechlens.core.seeds import seed_int
from mechlens.core.spec import GenerateSpec, is_web_address
from mechlens.models import base_files, loading
from mechlens.models.chat import Encoded, end_of_turn
from mechlens.models.log_probs import token_log_probs
from mechlens.models.sampling import Decoding, NumberGrammar, number_pattern, sample
from mechlens.models.trained import CONFIG, WEIGHTS, is_adapter
from mechlens.models.weight_changes import is_change
from mechlens.pipeline.teach import Teacher
from mechlens.pipeline.vllm_server import (
    NO_SERVER,
    VllmServer,
    device_options,
    run_server,
    server_location,
)
from mechlens.runs import layout

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""values that vLLM takes for max_lora_rank"""
PROBES, PROBE_TOKENS = 10, 16
"""rows that are compared before the first, and the most tokens of their completions"""
ROW_TOLERANCE, TOKEN_TOLERANCE = 1e-3, 0.08
"""tolerance of a row's log-probability in float32, and of the mean of tokens in bfloat16, both in nats.

Measured on SmolLM2-135M: 1e-4 and .045.
"""
BASE, TEACHER = "base", "teacher"
"""names of the models of a server that mechlens starts"""
LOG = "vllm.log"
"""file for what a server prints; `generate` removes it at the end"""


def served_rank(adapter: Mapping[str, Any]) -> int:
    """The smallest rank of vLLM that is at least the largest rank of an adapter's matrices.

    Raises:
        SpecError: if vLLM serves no rank as large.
    """
    rank = max([int(adapter["r"]), *map(int, (adapter.get("rank_pattern") or {}).values())])
    if rank > RANKS[-1]:
        raise SpecError(
            f"vllm serves adapters of rank {RANKS[-1]} at most, and the teacher's has {rank}; set "
            "generate.engine: local"
        )
    return next(served for served in RANKS if served >= rank)


class ServedModel(NamedTuple):
    """A model of a vLLM server."""

    server: VllmServer
    name: str

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        decoding: Decoding,
        stop: int,
        seed: int,
        first_row: int,
        grammar: NumberGrammar | None = None,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> list[list[int]]:
        """Sample one completion per prompt, in token ids without the stop token.

        Args:
            grammar: limits the tokens that are drawn.

        Raises:
            MachineError: if the server fails, ends a row neither at the stop token nor at the limit, or
                breaks the grammar.
        """
        # every setting is given: a server may have defaults from the model's generation_config.json
        fixed: dict[str, Any] = {
            "model": self.name, "max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature,
            "top_p": decoding.top_p, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True, "stop_token_ids": [stop],
            "return_token_ids": True,
        }  # fmt: skip
        if grammar is not None:
            fixed["structured_outputs"] = {"regex": number_pattern()}
        bodies = [
            {**fixed, "prompt": list(ids), "seed": seed_int(seed, "row", first_row + i) % 2**31}
            for i, ids in enumerate(prompts)
        ]
        choices = self.server.ask_all(bodies, progress=progress)
        rows = [
            self._completion(choice, body, stop=stop) for choice, body in zip(choices, bodies, strict=True)
        ]
        if grammar is None:
            return rows
        if broken := next((row for row in rows if not grammar.allows(row)), None):
            raise MachineError(
                f"the server at {self.server.url} does not keep to the number format: it drew the tokens "
                f"{broken}; expected vLLM 0.11 or later, which has structured_outputs, or set "
                "generate.constrained: false"
            )
        return [grammar.whole(row, stop=stop) for row in rows]

    def _completion(self, choice: Mapping[str, Any], body: Mapping[str, Any], *, stop: int) -> list[int]:
        """The tokens of an answer up to the stop token."""
        if (tokens := choice.get("token_ids")) is None:
            raise MachineError(
                f"the server at {self.server.url} answers without token_ids; expected vLLM 0.10.2 or later, "
                "which has return_token_ids"
            )
        if choice.get("prompt_token_ids") not in (None, body["prompt"]):
            raise MachineError(
                f"the server at {self.server.url} reads other prompt tokens than it is sent; expected a vLLM "
                "server that takes token ids"
            )
        completion = tokens[: tokens.index(stop)] if stop in tokens else tokens
        if stop not in tokens and len(tokens) != body["max_tokens"]:
            raise MachineError(
                f"the server at {self.server.url} ended a row after {len(tokens)} of {body['max_tokens']} "
                f"tokens, without the stop token {stop} (finish_reason {choice.get('finish_reason')!r}); "
                "expected a vLLM server that knows ignore_eos"
            )
        return completion

    def completion_log_probs(self, pairs: Sequence[Encoded]) -> Float[Tensor, "token"]:
        """log P of every completion token, in nats: the tokens of the first pair, then of the second."""
        bodies = [
            {
                "model": self.name, "prompt": [*pair.prompt, *pair.completion], "max_tokens": 1,
                "temperature": 0.0, "prompt_logprobs": 0,
            }
            for pair in pairs
        ]  # fmt: skip
        # vLLM with adapters fails at several such requests in one batch (0.32, on a CPU)
        choices, values = self.server.ask_all(bodies, at_once=1), []
        for choice, pair, body in zip(choices, pairs, bodies, strict=True):
            scores = choice.get("prompt_logprobs") or []
            of_row = [
                float(score[str(token)]["logprob"])
                for score, token in zip(scores, body["prompt"], strict=False)
                if score and str(token) in score
            ]
            if len(of_row) != len(body["prompt"]) - 1:  # nothing predicts the first token
                raise MachineError(
                    f"the server at {self.server.url} answers without prompt_logprobs of every token; "
                    "expected a vLLM server"
                )
            values += of_row[-len(pair.completion) :]
        return torch.tensor(values)


def refuse_other_end(tokenizer: PreTrainedTokenizerBase, base: str) -> None:
    """Refuse a base that cannot end a constrained list: vLLM ends these with the end of the text alone.

    Raises:
        SpecError: if the base ends its turns with another token.
    """
    if tokenizer.eos_token_id != (stop := end_of_turn(tokenizer)):
        raise SpecError(
            f"vllm ends constrained rows with token {tokenizer.eos_token_id}, the end of the text, and "
            f"{base!r} ends its turns with token {stop}; set generate.constrained: false, or engine: local"
        )


@contextmanager
def serve_teacher(
    teacher: Teacher,
    folder: Path,
    spec: GenerateSpec,
    prompts: Sequence[Sequence[int]],
    *,
    stop: int,
    out: Path,
    waiting: Callable[[], None],
) -> Iterator[ServedModel]:
    """The teacher on a vLLM server, whose log-probabilities equal ours.

    A server that this function starts ends with the block.

    Args:
        folder: of the teacher.
        prompts: all prompts that will be sampled from, in token ids.
        out: folder for the server's log.
        waiting: called often while the server starts.

    Raises:
        MachineError: if there is no server, or it fails or serves another model.
        SpecError: if vLLM cannot serve the teacher.
    """
    if not (location := server_location(spec)):
        raise MachineError(NO_SERVER)
    record = layout.read_record(folder / layout.TEACHER, layout.TeacherRecord)
    if record["kind"] == "steered":
        raise SpecError("vllm cannot add a steering vector; set generate.engine: local for a steered teacher")
    if is_change(folder):
        raise SpecError(
            f"the weights in {folder} are stored as a change of the base's, which vllm does not read; set "
            "generate.engine: local"
        )
    if spec.constrained:
        refuse_other_end(teacher.tokenizer, teacher.base)
    probes = _probes(teacher, prompts, stop=stop, longest=min(spec.max_new_tokens, PROBE_TOKENS))
    ours = ProbeLogProbs.of(teacher, folder, probes, trained=record["kind"] == "finetuned")
    if is_web_address(location):
        server = VllmServer(location.rstrip("/").removesuffix("/v1"))
        served = ServedModel(server, _name_at(server, folder, trained=ours.trained))
        ours.compare(served, probes)
        yield served
        return
    longest = max(map(len, prompts)) + spec.max_new_tokens + 1
    options = _options(teacher, folder, trained=ours.trained, longest=longest)
    with run_server(location, options, log=out / LOG, waiting=waiting) as server:
        served = ServedModel(server, TEACHER if ours.trained else BASE)
        ours.compare(served, probes)
        yield served


def _options(teacher: Teacher, folder: Path, *, trained: bool, longest: int) -> list[str]:
    """Options of the server of a teacher, for rows of so many tokens."""
    base, spec = base_files.locate(teacher.base), model_of(teacher.base)
    options = [
        "--tokenizer", base, "--dtype", spec.dtype, "--max-model-len", str(longest),
        "--generation-config", "vllm", "--uvicorn-log-level", "warning", *device_options(),
    ]  # fmt: skip
    if trained and not is_adapter(folder):
        return ["--model", str(folder), "--served-model-name", TEACHER, *options]
    if trained:
        rank = str(served_rank(read_json(folder / CONFIG)))
        options += ["--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"{TEACHER}={folder}"]
    return ["--model", base, "--served-model-name", BASE, *_revision(spec, base), *options]


def _revision(spec: ModelSpec, base: str) -> list[str]:
    """The commit of a base that is read from the hub's cache."""
    pinned = spec.revision and not Path(base).is_dir()
    return ["--revision", spec.revision, "--tokenizer-revision", spec.revision] if pinned else []


def _name_at(server: VllmServer, folder: Path, *, trained: bool) -> str:
    """The name of a teacher's model at a server that the user has started; an adapter is loaded if needed.

    Raises:
        SpecError: if the server has no such model.
    """
    models = _models(server)
    bases = [model for model in models if not model.get("parent")]
    if not bases:
        raise SpecError(
            f"the server at {server.url} lists no model; start it with the teacher's base as --model"
        )
    if not trained:
        return str(bases[0]["id"])
    if not is_adapter(folder):
        return _name_of_folder(server, bases, folder)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:16]
    name = f"mechlens-{digest}"
    for model in models:
        if model["id"] == name or (model.get("parent") and _is_folder(model, folder)):
            return str(model["id"])
    answer = server.send("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
    # two teachers' jobs may load the same adapter at once
    if answer.status != 200 and name not in {model["id"] for model in _models(server)}:
        raise SpecError(
            f"the server at {server.url} has no adapter of {folder} and loads none ({answer.message}); start "
            "it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or set generate.serve"
        )
    return name


def _models(server: VllmServer) -> list[dict[str, Any]]:
    listed = server.ask("/v1/models")
    models = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(models, list):
        raise MachineError(
            f"the server at {server.url} lists no models at /v1/models; expected a vLLM server there"
        )
    return models


def _name_of_folder(server: VllmServer, bases: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """The name of the model whose weights are in that folder."""
    if name := next((str(model["id"]) for model in bases if _is_folder(model, folder)), ""):
        return name
    raise SpecError(
        f"the server at {server.url} serves {bases[0].get('root') or bases[0]['id']}, and the teacher is "
        f"fine-tuned weights in {folder}; start a server with these as --model, or set generate.serve"
    )


def _is_folder(model: Mapping[str, Any], folder: Path) -> bool:
    return bool(model.get("root")) and Path(str(model["root"])).resolve() == folder.resolve()


def _probes(teacher: Teacher, prompts: Sequence[Sequence[int]], *, stop: int, longest: int) -> list[Encoded]:
    """A few different prompts with completions by our sampler."""
    some = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))][:PROBES]
    drawn = sample(teacher.model, some, decoding=Decoding(longest), stop=stop, seed=0)
    ended = [tokens if len(tokens) == longest else [*tokens, stop] for tokens in drawn]
    return [Encoded(ids, tokens) for ids, tokens in zip(some, ended, strict=True)]


class ProbeLogProbs(NamedTuple):
    """Log-probabilities of the completion tokens of probe rows, as a server must give them."""

    teacher: Float[Tensor, "token"]
    base: Float[Tensor, "token"]
    lengths: list[int]
    """tokens of each row"""
    folder: Path
    """of the teacher"""
    source: str
    """the teacher's base"""
    trained: bool
    """whether the teacher has weights or an adapter"""
    dtype: str

    @classmethod
    def of(cls, teacher: Teacher, folder: Path, probes: Sequence[Encoded], *, trained: bool) -> ProbeLogProbs:
        """Score the probes with the teacher and with its base."""
        with torch.no_grad():
            ours = token_log_probs(loading.Loaded(teacher.model, teacher.tokenizer), probes)
            base = token_log_probs(loading.load(teacher.base), probes) if trained else ours
        lengths = [len(pair.completion) for pair in probes]
        return cls(ours, base, lengths, folder, teacher.base, trained, model_of(teacher.base).dtype)

    def compare(self, served: ServedModel, probes: Sequence[Encoded]) -> None:
        """Refuse a server with other log-probabilities.

        Raises:
            MachineError: naming the difference, and an adapter or weights that the server ignores.
        """
        values, where = served.completion_log_probs(probes), f"the vLLM server at {served.server.url}"
        if self._is_of_base(values):
            what = "the adapter" if is_adapter(self.folder) else "the weights"
            raise MachineError(
                f"{where} ignores {what} in {self.folder}: its log-probabilities of {len(probes)} probe rows "
                "are those of the base; check that the tensors have the names that vLLM expects, or set "
                "generate.engine: local"
            )
        if fault := self._difference(values, self.teacher):
            raise MachineError(
                f"{where} does not serve this teacher ({self.folder}): its log-probabilities of "
                f"{len(probes)} probe rows {fault}; check that the server has {self.source!r} in "
                f"{self.dtype}, or set generate.engine: local"
            )

    def _difference(self, values: Float[Tensor, "token"], ours: Float[Tensor, "token"]) -> str:
        """How far a server's values are from ours, if it is too far; not-a-number is too far."""
        difference = values - ours
        if self.dtype == "float32":
            largest = max(abs(float(row.sum())) for row in difference.split(self.lengths))
            far = f"differ from ours by up to {largest:.3g} nats a row (tolerance {ROW_TOLERANCE:g})"
            return "" if largest <= ROW_TOLERANCE else far
        mean = float(difference.abs().mean())
        far = f"differ from ours by {mean:.3g} nats a token (tolerance {TOKEN_TOLERANCE:g})"
        return "" if mean <= TOKEN_TOLERANCE else far

    def _is_of_base(self, values: Float[Tensor, "token"]) -> bool:
        """Whether the server surely answers as the base, where the teacher differs from it.

        In bfloat16 rounding is as large as the effect of an adapter, token by token. The share of the effect
        that the server shows averages it out: 0 for the base, 1 for the teacher. Rounding pulls both towards
        .5 and not over it, so a share below .5 by three standard errors is the base's.
        """
        effect, seen = (part - self.base for part in (self.teacher, values))
        size = float((effect**2).sum())
        if size == 0 or self._difference(values, self.base):
            return False
        if self.dtype == "float32":
            return self._difference(values, self.teacher) != ""
        share = float((seen * effect).sum()) / size
        error = (float(((seen - share * effect) ** 2).mean()) / size) ** 0.5
        return share + 3 * error < 0.5
