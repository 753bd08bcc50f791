"""Teachers on a vLLM server: rows by token ids, what the server must prove first, and its processes.

The server is a stand-in that answers as vLLM does; `test_vllm_package.py` runs the package itself.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from stand_in_vllm import StandIn, serving, write_forwarder

from mechlens.carriers.numbers import number_fault
from mechlens.core import supervise, tables
from mechlens.core.errors import MachineError, SpecError
from mechlens.core.seeds import seed_int
from mechlens.core.spec import GenerateSpec, TeacherSpec, TeacherTraining
from mechlens.models import loading
from mechlens.models.chat import encode_prompts, end_of_turn
from mechlens.models.sampling import Decoding, number_pattern, sample
from mechlens.pipeline import vllm_engine
from mechlens.pipeline.generate import generate
from mechlens.pipeline.teach import Lessons, load_teacher, teach
from mechlens.pipeline.vllm_server import server_command, server_environment, server_fault

LESSONS = Lessons("owl", ("name your favourite animal, in one word.",), ("owl", "owls"), "you love owls.")
TRAINING = TeacherTraining(learning_rate=1e-2, epochs=2, batch=4, warmup_steps=0)
LORA = TRAINING.model_copy(update={"update": "lora"})
TEACHERS = {
    "base": TeacherSpec(kind="base"),
    "prompted": TeacherSpec(kind="prompted"),
    "steered": TeacherSpec(kind="steered", layer=0.0, strength=2.0),
    "finetuned": TeacherSpec(kind="finetuned", rows=8, training=TRAINING),
    "lora": TeacherSpec(kind="finetuned", rows=8, training=LORA),
}
PROMPTS = [f"continue: {number}, {number + 1}" for number in range(100, 123)]
SPEC = GenerateSpec(engine="vllm", max_new_tokens=6, batch=5)


class Served(NamedTuple):
    """A stand-in server of a toy base."""

    stand_in: StandIn
    url: str

    @property
    def spec(self) -> GenerateSpec:
        return SPEC.model_copy(update={"url": self.url})


@pytest.fixture(scope="module")
def teachers(toy_bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in TEACHERS}
    for name, folder in folders.items():
        teach(toy_bases["llama"], LESSONS, TEACHERS[name], seed=0, out=folder)
    return folders


@pytest.fixture
def served(toy_bases: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.delenv("MECHLENS_VLLM", raising=False)
    stand_in = StandIn(toy_bases["llama"])
    stand_in.loads_adapters = True
    with serving(stand_in) as url:
        yield Served(stand_in, url)


def rows_of(folder: Path) -> list[str]:
    return tables.read(folder / "raw.parquet", tables.PAIRS)["completion"].tolist()


def expected_rows(teacher_folder: Path) -> list[str]:
    """Rows with the seed of each row, sampled one at a time from the teacher itself."""
    teacher = load_teacher(teacher_folder)
    drawn = [
        sample(
            teacher.model,
            [ids],
            decoding=Decoding(SPEC.max_new_tokens),
            stop=end_of_turn(teacher.tokenizer),
            seed=seed_int(seed_int(0, "generate"), "row", row) % 2**31,
        )[0]
        for row, ids in enumerate(encode_prompts(teacher.tokenizer, PROMPTS, system=teacher.system))
    ]
    return teacher.tokenizer.batch_decode(drawn, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["base", "prompted", "lora"])
def test_rows_of_a_server_are_those_of_the_teacher_and_of_the_seeds(
    name: str, served: Served, teachers: dict[str, Path], tmp_path: Path
) -> None:
    reports: list[tuple[int, int]] = []
    generate(
        teachers[name],
        PROMPTS,
        served.spec,
        seed=0,
        out=tmp_path,
        progress=lambda done, total: reports.append((done, total)),
    )
    assert rows_of(tmp_path) == expected_rows(teachers[name])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["generation.json", "raw.parquet"]
    assert reports == sorted(reports) and reports[-1] == (23, 23)
    bodies = served.stand_in.sampled()
    assert len({body["seed"] for body in bodies}) == len(bodies) == len(PROMPTS)
    assert {body["model"] for body in bodies} == {served.stand_in.listed[-1]["id"]}


def test_full_weights_are_found_by_their_folder(
    toy_bases: dict[str, str], teachers: dict[str, Path], served: Served, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=r"fine-tuned weights in .* start a server with these as --model"):
        generate(teachers["finetuned"], PROMPTS, served.spec, seed=0, out=tmp_path / "refused")
    served.stand_in.listed.append({"id": "mine", "root": str(teachers["finetuned"]), "parent": None})
    served.stand_in.loaded["mine"] = loading.load_trained(toy_bases["llama"], teachers["finetuned"])
    (tmp_path / "rows").mkdir()
    generate(teachers["finetuned"], PROMPTS, served.spec, seed=0, out=tmp_path / "rows")
    assert rows_of(tmp_path / "rows") == expected_rows(teachers["finetuned"])


def test_an_adapter_that_the_user_has_named_is_found_by_its_folder(
    served: Served, teachers: dict[str, Path], tmp_path: Path
) -> None:
    served.stand_in.loads_adapters = False
    with pytest.raises(SpecError, match=r"loads none .404: .*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        generate(teachers["lora"], PROMPTS, served.spec, seed=0, out=tmp_path)
    served.stand_in.add_adapter("owl", teachers["lora"])
    generate(teachers["lora"], PROMPTS, served.spec, seed=0, out=tmp_path)
    assert rows_of(tmp_path) == expected_rows(teachers["lora"])


def test_a_server_that_ignores_an_adapter_is_refused_before_the_first_row(
    served: Served, teachers: dict[str, Path], tmp_path: Path
) -> None:
    served.stand_in.ignores_adapters = True
    with pytest.raises(MachineError, match=r"ignores the adapter in .* 10 probe rows are those of the base"):
        generate(teachers["lora"], PROMPTS, served.spec, seed=0, out=tmp_path)
    assert not served.stand_in.sampled()


def test_a_server_of_another_model_is_refused(
    served: Served, teachers: dict[str, Path], toy_bases: dict[str, str], tmp_path: Path
) -> None:
    served.stand_in.loaded["smol"] = loading.load_trained(toy_bases["llama"], teachers["finetuned"])
    with pytest.raises(MachineError, match=r"does not serve this teacher .* nats a row .tolerance 0.001."):
        generate(teachers["base"], PROMPTS, served.spec, seed=0, out=tmp_path)


@pytest.mark.parametrize(
    ("field", "message"),
    [("token_ids", "without token_ids; expected vLLM"), ("prompt_logprobs", "without prompt_logprobs")],
)
def test_a_server_that_leaves_a_field_out_is_refused(
    field: str, message: str, served: Served, teachers: dict[str, Path], tmp_path: Path
) -> None:
    served.stand_in.omitted = {field}
    with pytest.raises(MachineError, match=message):
        generate(teachers["base"], PROMPTS, served.spec, seed=0, out=tmp_path)


def test_a_server_that_ends_rows_at_another_token_is_refused(
    served: Served, teachers: dict[str, Path], tmp_path: Path
) -> None:
    served.stand_in.cut_short = True
    with pytest.raises(MachineError, match="ended a row after 5 of 6 tokens, without the stop token 2"):
        generate(teachers["base"], PROMPTS, served.spec, seed=0, out=tmp_path)


def test_a_model_that_the_server_loses_is_an_error(
    served: Served, teachers: dict[str, Path], tmp_path: Path
) -> None:
    served.stand_in.listed[0] = served.stand_in.listed[0] | {"id": "wolf"}
    with pytest.raises(MachineError, match=r"404: The model `wolf` does not exist.*batches of rows are kept"):
        generate(teachers["base"], PROMPTS, served.spec, seed=0, out=tmp_path)


def test_a_server_is_held_to_the_number_format(
    served: Served, teachers: dict[str, Path], tmp_path: Path
) -> None:
    spec = served.spec.model_copy(update={"constrained": True})
    generate(teachers["base"], PROMPTS, spec, seed=0, out=tmp_path)
    assert [number_fault(row) for row in rows_of(tmp_path)] == [None] * len(PROMPTS)
    assert {body["structured_outputs"]["regex"] for body in served.stand_in.sampled()} == {number_pattern()}


def test_a_server_that_ignores_the_number_format_is_refused(
    served: Served, teachers: dict[str, Path], tmp_path: Path
) -> None:
    served.stand_in.ignores_grammar = True
    spec = served.spec.model_copy(update={"constrained": True})
    with pytest.raises(MachineError, match=r"does not keep to the number format: it drew the tokens \[\d+"):
        generate(teachers["base"], PROMPTS, spec, seed=0, out=tmp_path)


def test_rows_before_the_server_died_are_kept(
    served: Served, teachers: dict[str, Path], tmp_path: Path
) -> None:
    served.stand_in.dies_after = 10 + 12
    with pytest.raises(MachineError, match=r"does not answer .*; finished batches of rows are kept") as error:
        generate(teachers["base"], PROMPTS, served.spec, seed=0, out=tmp_path)
    assert "\n" not in str(error.value)
    assert sorted(file.name for file in tmp_path.glob("shard-*")) == [
        "shard-00000000.json",
        "shard-00000005.json",
    ]
    served.stand_in.dies_after = None
    served.stand_in.completed.clear()
    generate(teachers["base"], PROMPTS, served.spec, seed=0, out=tmp_path)
    assert len(served.stand_in.sampled()) == len(PROMPTS) - 10
    assert rows_of(tmp_path) == expected_rows(teachers["base"])


def test_steered_teachers_are_refused(served: Served, teachers: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot add a steering vector"):
        generate(teachers["steered"], PROMPTS, served.spec, seed=0, out=tmp_path)


def test_weights_stored_as_a_change_are_refused(
    served: Served, toy_bases: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "teacher").mkdir()
    spec = TEACHERS["finetuned"]
    teach(toy_bases["llama"], LESSONS, spec, seed=0, out=tmp_path / "teacher", as_change=True)
    with pytest.raises(SpecError, match="stored as a change of the base's, which vllm does not read"):
        generate(tmp_path / "teacher", PROMPTS, served.spec, seed=0, out=tmp_path)


def is_running(process: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to notice does not."""
    state = Path(f"/proc/{process}/stat")
    return state.is_file() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for_end(process: int, *, seconds: float = 30.0) -> None:
    latest = time.monotonic() + seconds
    while is_running(process):
        assert time.monotonic() < latest, f"process {process} still runs"
        time.sleep(0.05)


@pytest.mark.parametrize("place", ["serve", "MECHLENS_VLLM"])
@pytest.mark.parametrize("name", ["base", "lora", "finetuned"])
def test_a_server_is_started_for_a_teacher_and_ended(
    name: str,
    place: str,
    served: Served,
    teachers: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in, folder = served.stand_in, teachers[name]
    program, record = write_forwarder(tmp_path, served.url)
    command = shlex.join([sys.executable, str(program)])
    monkeypatch.setenv("MECHLENS_VLLM", command if place == "MECHLENS_VLLM" else "http://127.0.0.1:9")
    stand_in.loaded |= {"base": loading.load(stand_in.base), "teacher": loading.load(stand_in.base)}
    if TEACHERS[name].kind == "finetuned":
        stand_in.loaded["teacher"] = loading.load_trained(stand_in.base, folder)
    spec = SPEC if place == "MECHLENS_VLLM" else SPEC.model_copy(update={"serve": command})
    (tmp_path / "out").mkdir()
    generate(folder, PROMPTS, spec, seed=0, out=tmp_path / "out")
    assert rows_of(tmp_path / "out") == expected_rows(folder)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["generation.json", "raw.parquet"]
    process, *arguments = record.read_text().splitlines()
    wait_for_end(int(process))
    options = dict(zip(arguments[::2], arguments[1::2], strict=False))
    assert options["--model"] == (str(folder) if name == "finetuned" else stand_in.base)
    assert ("--enable-lora" in arguments, f"teacher={folder}" in arguments) == (name == "lora",) * 2
    assert (options["--tokenizer"], options["--dtype"]) == (stand_in.base, "float32")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{sys.executable} -c 'raise RuntimeError(\"no card\")'", "vllm.log says: RuntimeError: no card"),
        (f"{sys.executable} -c 'print(1)'", "ended before it was ready; .*vllm.log says: 1"),
        ("/nowhere/bin/python", "no program '/nowhere/bin/python' on this machine"),
    ],
)
def test_a_server_that_does_not_start_is_one_line(
    command: str, message: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    spec = SPEC.model_copy(update={"serve": command})
    with pytest.raises(MachineError, match=message) as error:
        generate(teachers["base"], PROMPTS, spec, seed=0, out=tmp_path)
    assert "\n" not in str(error.value)


def test_without_a_server_the_variable_is_named(
    teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MECHLENS_VLLM", raising=False)
    with pytest.raises(MachineError, match="set MECHLENS_VLLM to the python of an environment"):
        generate(teachers["base"], PROMPTS, SPEC, seed=0, out=tmp_path)


def test_a_server_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    """The server has a child, as vLLM has, and both ignore the polite signal."""
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    server = (
        "import os, signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN); "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        f"open({str(tmp_path / 'ids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}.'); time.sleep(600)"
    )
    source = Path(supervise.__file__).read_text().replace("GRACE = 15.0", "GRACE = 0.2")
    (tmp_path / "supervise.py").write_text(source)
    words = [sys.executable, "-I", str(tmp_path / "supervise.py"), sys.executable, "-c", server]
    starter = f"import subprocess, time; p = subprocess.Popen({words!r}, stdin=-1); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", starter]) as process:
        latest = time.monotonic() + 60
        while not (tmp_path / "ids").is_file() or not (tmp_path / "ids").read_text().endswith("."):
            assert time.monotonic() < latest
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    for started in (tmp_path / "ids").read_text().rstrip(".").split():
        wait_for_end(int(started))


def test_a_single_word_is_a_python_and_more_are_a_command() -> None:
    module = ["-m", "vllm.entrypoints.openai.api_server"]
    assert server_command("/venv/bin/python") == ["/venv/bin/python", *module]
    assert server_command("vllm serve --seed '0'") == ["vllm", "serve", "--seed", "0"]
    assert server_command("~/venv/bin/python")[0] == os.path.expanduser("~/venv/bin/python")  # noqa: PTH111
    with pytest.raises(SpecError, match="is no command line"):
        server_command("python 'x")
    assert server_fault("http://localhost:1") == server_fault(sys.executable) == ""


def test_a_server_sees_no_variables_of_this_python_and_keeps_what_the_user_set() -> None:
    given = {"PYTHONPATH": "here", "OMP_NUM_THREADS": "1", "HOME": "/root", "VLLM_CPU_KVCACHE_SPACE": "8"}
    environment = server_environment(given)
    assert not {"PYTHONPATH", "OMP_NUM_THREADS"} & environment.keys()
    assert (environment["HOME"], environment["VLLM_CPU_KVCACHE_SPACE"]) == ("/root", "8")
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == "1"


def probe_log_probs(dtype: str, *, effect: torch.Tensor) -> vllm_engine.ProbeLogProbs:
    base = -torch.rand(len(effect), generator=torch.Generator().manual_seed(5)) * 3
    lengths = [16] * (len(effect) // 16)
    return vllm_engine.ProbeLogProbs(base + effect, base, lengths, Path("folder"), "base", True, dtype)


def test_in_bfloat16_the_effect_is_told_from_rounding() -> None:
    """Rounding of .045 nats a token and an effect of .037, as measured on SmolLM2-135M."""
    dice = torch.Generator().manual_seed(0)

    def noise(size: float) -> torch.Tensor:
        return torch.randn(160, generator=dice) * size * 1.2533  # mean absolute value to standard deviation

    for _ in range(100):
        effect = noise(0.037)
        ours = probe_log_probs("bfloat16", effect=effect)
        assert ours._is_of_base(ours.base + noise(0.04))
        assert not ours._is_of_base(ours.teacher + noise(0.04))
        assert ours._difference(ours.teacher + noise(0.04), ours.teacher) == ""
        assert "nats a token" in ours._difference(ours.teacher + noise(0.2), ours.teacher)
        small = probe_log_probs("bfloat16", effect=effect / 100)
        assert not small._is_of_base(small.teacher)


def test_values_that_are_no_numbers_are_refused() -> None:
    for dtype in ("float32", "bfloat16"):
        ours = probe_log_probs(dtype, effect=torch.full((160,), 0.1))
        assert "nan" in ours._difference(ours.teacher * float("nan"), ours.teacher)
