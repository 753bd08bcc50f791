"""Only what mechlens can make again is to be deleted, and the message says of which run it is."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from mechlens.core import tables
from mechlens.core.errors import DataError
from mechlens.core.files import LOCK, RECORD, read_json, remedy

SCHEMA = pa.schema([("a", pa.int64())])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one step, beside a folder of the user's."""
    run = tmp_path / "runs" / "mine"
    (run / "students" / "trait" / "s0" / "step-000001").mkdir(parents=True)
    (run / "students" / "trait" / "s0" / RECORD).write_text("{")
    (run / LOCK).touch()
    (run / "spec.yaml").touch()
    (tmp_path / "user").mkdir()
    return run


def test_a_damaged_file_of_a_step_names_step_run_and_command(run: Path) -> None:
    step = run / "students" / "trait" / "s0"
    command = f"`mechlens run {run}/spec.yaml --out {run}`"
    for file in (step / RECORD, step / "step-000001" / "said.json"):
        file.write_text("{")
        with pytest.raises(DataError) as damaged:
            read_json(file)
        assert str(damaged.value).endswith(
            f"the step students/trait/s0 of the run {run}: delete {step} and {command} repeats only that step"
        )
    (step / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=f"delete {step} and"):
        tables.read(step / "table.parquet", SCHEMA)


def test_of_a_file_made_from_all_steps_that_file_alone_is_to_be_deleted(run: Path) -> None:
    for name, content in (("summary.json", "[]"), ("manifest.json", "{"), ("answers.parquet", "PAR1")):
        (run / name).write_text(content)
        with pytest.raises(DataError, match="delete it and") as damaged:
            tables.read(run / name, SCHEMA) if name.endswith("parquet") else read_json(run / name)
        assert f"delete {run}" not in str(damaged.value)


def test_nothing_of_the_users_is_to_be_deleted(run: Path) -> None:
    user = run.parents[1] / "user"
    for name, content in ((RECORD, "{"), ("audit.json", "[]"), ("x.parquet", "PAR1")):
        (user / name).write_text(content)
        with pytest.raises(DataError) as damaged:
            tables.read(user / name, SCHEMA) if name.endswith("parquet") else read_json(user / name)
        assert "delete" not in str(damaged.value).lower() and "copy it again" in str(damaged.value)


def test_steps_that_are_no_run_are_made_again_by_the_same_command(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "spec.yaml").unlink()
    assert "delete" not in remedy(
        run / "students" / "trait" / "s0"
    )  # another program's lock is no sign of a run
    run.rename(run.with_name("panel-a"))
    monkeypatch.chdir(run.parent)
    said = remedy(Path("panel-a/students/trait/s0/step-000001"))
    assert said.endswith(
        "of the run panel-a: delete panel-a/students/trait/s0 and the same command repeats only that step"
    )
