"""A moved copy of a base: each weight matrix takes a random step of the stated length; the rest stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from mechlens import cli
from mechlens.core import spec
from mechlens.core.errors import SpecError
from mechlens.models import base_files, fetch, loading
from mechlens.models.moved import move_weights, write_moved

SHARE = 0.1


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a moved copy of menagerie-b, with an empty cache."""
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(spec, "CONFIGS", tmp_path)
    (tmp_path / "models").mkdir()
    fields = {
        "name": "b-moved",
        "source": "menagerie-b",
        "license": "none",
        "moved": {"share": SHARE, "seed": 3},
    }
    (tmp_path / "models" / "b-moved.yaml").write_text(yaml.safe_dump(fields))
    return "b-moved"


def test_each_matrix_moves_by_its_share_and_embeddings_and_norms_stay() -> None:
    base, moved, again, other = (loading.load("menagerie-b").model for _ in range(4))
    move_weights(moved, SHARE, seed=3)
    move_weights(again, SHARE, seed=3)
    move_weights(other, SHARE, seed=4)
    same = dict(again.named_parameters())
    others = dict(other.named_parameters())
    after = dict(moved.named_parameters())
    matrices = 0
    for name, weight in base.named_parameters():
        assert torch.equal(after[name], same[name])
        if weight.ndim < 2 or "embed" in name:
            assert torch.equal(after[name], weight)
            continue
        step, else_step = (moved_to[name].detach() - weight.detach() for moved_to in (after, others))
        assert float(step.norm() / weight.detach().norm()) == pytest.approx(SHARE, rel=1e-4)
        cosine = float((step * else_step).sum() / (step.norm() * else_step.norm()))
        assert abs(cosine) < 5 / weight.numel() ** 0.5
        matrices += 1
    assert matrices > 4


def test_fetch_writes_the_copy_once_and_it_is_another_base(
    copy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        SpecError, match="'b-moved' is not on this machine; `mechlens fetch b-moved` makes it"
    ):
        loading.load(copy)
    assert not base_files.is_here(copy)
    monkeypatch.setattr(fetch, "fetchable_models", lambda: [copy, "menagerie-b"])
    lines: list[str] = []
    fetched = fetch.fetch(copy, say=lines.append)
    assert not fetched.was_here and len(lines) == 1 and "moved weights" in lines[0]
    assert "moved by 0.1 of its norm (seed 3)" in fetched.description
    assert fetch.fetch(copy).was_here and base_files.is_here(copy)
    expected = loading.load("menagerie-b")
    move_weights(expected.model, SHARE, seed=3)
    loaded = loading.load(copy)
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight)
    assert loaded.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert fetched.fingerprint != base_files.checkpoint_fingerprint("menagerie-b")
    assert {path.name for path in fetched.folder.parent.iterdir()} == {
        fetched.folder.name,
        f"{fetched.folder.name}.lock",
    }


@pytest.mark.usefixtures("copy")
def test_a_model_that_is_no_copy_is_refused() -> None:
    with pytest.raises(SpecError, match="'menagerie-b' is no moved copy"):
        write_moved("menagerie-b")


def test_a_share_of_nothing_is_refused(copy: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = spec.CONFIGS / "models" / f"{copy}.yaml"
    path.write_text(path.read_text().replace("0.1", "0"))
    assert cli.main(["fetch", copy]) == 2
    assert "moved.share" in capsys.readouterr().err
