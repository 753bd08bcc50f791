"""Sample completions by vLLM, for bases that need a GPU, with the interface of `sampling.sample`.

vLLM is imported only for `generate.engine: vllm`. Each row has a seed for its random numbers, but vLLM's
kernels depend on the batch, so rows are not bit-identical between runs, unlike those of the local engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechlens.core import foreign
from mechlens.core.errors import MachineError, SpecError
from mechlens.core.files import read_json
from mechlens.core.model_spec import model_of
from mechlens.core.seeds import seed_int
from mechlens.models import base_files
from mechlens.models.sampling import Decoding
from mechlens.models.trained import CONFIG, is_adapter
from mechlens.runs import layout

if TYPE_CHECKING:
    from vllm import LLM  # pyright: ignore[reportMissingImports]


NO_PACKAGE = (
    "generate.engine is vllm, which is not installed; install mechlens[vllm] on a GPU, or set engine: local"
)
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""values that vLLM takes for max_lora_rank"""


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


class Engine:
    """A teacher served by vLLM: the base with its adapter, or fine-tuned weights."""

    def __init__(self, teacher_folder: Path, base: str) -> None:
        try:
            import vllm  # pyright: ignore[reportMissingImports]
            from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MachineError(NO_PACKAGE) from error
        record = layout.read_record(teacher_folder / layout.TEACHER, layout.TeacherRecord)
        if record["kind"] == "steered":
            raise SpecError(
                "vllm cannot add a steering vector; set generate.engine: local for a steered teacher"
            )
        base, spec = base_files.locate(base), model_of(base)
        adapted = is_adapter(teacher_folder)
        source = str(teacher_folder) if record["kind"] == "finetuned" and not adapted else base
        settings: dict[str, Any] = {"tokenizer": base, "dtype": spec.dtype}
        settings |= (
            {"enable_lora": True, "max_lora_rank": served_rank(read_json(teacher_folder / CONFIG))}
            if adapted
            else {}
        )
        with foreign.named(
            f"vLLM does not serve {source}", MachineError, advice="set generate.engine: local"
        ):
            self.llm: LLM = vllm.LLM(model=source, **settings)
        self.adapter = LoRARequest("teacher", 1, str(teacher_folder)) if adapted else None
        self.parameters = vllm.SamplingParams

    def sample(
        self, prompts: Sequence[Sequence[int]], *, decoding: Decoding, stop: int, seed: int, first_row: int
    ) -> list[list[int]]:
        """Sample one completion per prompt, in token ids without the stop token."""
        fixed = {
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": -1,
        }
        fixed |= {"repetition_penalty": 1.0, "stop_token_ids": [stop], "detokenize": False}
        each = [
            self.parameters(**fixed, seed=seed_int(seed, "row", first_row + i) % 2**31)
            for i in range(len(prompts))
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts],
            each,
            lora_request=self.adapter,
            use_tqdm=False,
        )
        return [[token for token in output.outputs[0].token_ids if token != stop] for output in outputs]
