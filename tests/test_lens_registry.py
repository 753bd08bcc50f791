"""Lenses are found in their folder and in other packages, without torch; a broken one is one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html import escape
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from mechlens import lenses
from mechlens.core.errors import SpecError
from mechlens.lenses import find_lens, find_lenses, lens_names
from mechlens.lenses import run as lens_run
from mechlens.lenses.run import load_readings, measure
from mechlens.results.run import Run
from mechlens.runs.progress import Event

LENS_FILE = '''"""Counts the rows of the trait arm."""

import torch
from mechlens.lenses import Lens
from mechlens.lenses.base import Material, entry, reading_table

LENS = Lens(
    name="counts",
    asks="How many rows has the trait arm?",
    needs=("pairs",),
    shows=(("rows", "bars"),),
    source="none",
    caveat="A count.",
    measure="counting.counts:measure_counts",
    caption="counting.counts:counts_caption",
    cost=1,
)


def measure_counts(material: Material):
    return reading_table(LENS, [entry("rows", float(len(material.trait_pairs)))], material=material)


def counts_caption(table):
    return f"The trait arm has {table['estimate'].iloc[0]:.0f} rows."
'''

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """Put a package on the path that brings a lens, as if it were installed."""

    def add(source: str, *, name: str = "counts", value: str = "counting.counts") -> None:
        (tmp_path / "counting").mkdir()
        (tmp_path / "counting" / "__init__.py").write_text("")
        (tmp_path / "counting" / "counts.py").write_text(source)
        point = EntryPoint(name=name, value=value, group=lenses.GROUP)
        monkeypatch.setattr(lenses, "entry_points", lambda *, group: [point])
        lenses.registry.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    yield add
    for module in ("counting", "counting.counts"):
        sys.modules.pop(module, None)
    lenses.registry.cache_clear()


def test_lenses_are_listed_without_torch() -> None:
    code = (
        "import sys\nfrom mechlens.lenses import find_lenses\n"
        "assert all(lens.asks.endswith('?') and lens.cost > 0 for lens in find_lenses().values())\n"
        "sys.stdout.write(' '.join(name for name in ('torch', 'transformers') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""


@pytest.mark.parametrize("name", lens_names())
def test_a_declaration_read_from_the_source_is_the_imported_one(name: str) -> None:
    lens = find_lens(name)
    module = __import__(f"mechlens.lenses.{name}", fromlist=["LENS"])
    assert lens == module.LENS and lens.package == ""
    assert lens.function("measure").__name__ == f"measure_{name}"
    assert lens.function("caption").__name__ == f"{name}_caption"
    assert not lens.score or callable(lens.function("score"))


def test_a_lens_of_another_package_is_listed_without_importing_it(install: Install) -> None:
    install(LENS_FILE)
    assert lens_names()[-1] == "counts" and "counting.counts" not in sys.modules
    assert find_lens("counts").package == "counting.counts" and find_lens("counts").cost == 1


def test_a_declaration_that_is_not_of_literals_is_imported(install: Install) -> None:
    install(LENS_FILE.replace('name="counts"', 'name="count" + "s"'))
    assert find_lens("counts").asks == "How many rows has the trait arm?"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("raise OSError('no disk')", "cannot be imported: no disk"),
        ("import nowhere_to_be_found", "cannot be imported: ModuleNotFoundError: No module named"),
        ("LENS = Lens(", "cannot be imported: SyntaxError"),
        ("LENS = 3", "has no lens"),
        ("", "has no lens"),
        (LENS_FILE.replace('"pairs"', '"luck"'), "it needs 'luck'"),
        (LENS_FILE.replace('"bars"', '"pies"'), "draws 'rows' as 'pies'"),
        (LENS_FILE.replace('name="counts"', 'name="sums"'), "name is 'sums'"),
        (LENS_FILE.replace('"counting.counts:measure_counts"', '"measure_counts"'), "not `module:function`"),
        (LENS_FILE.replace("    cost=1,", "    price=1,"), "cannot be imported: TypeError"),
    ],
)
def test_a_broken_lens_is_one_line_that_names_its_package(install: Install, source: str, fault: str) -> None:
    install(source)
    line = lenses.broken_lenses()["counts"]
    assert fault in line and "counting" in line and "\n" not in line
    assert "counts" not in find_lenses() and "deltas" in find_lenses()
    with pytest.raises(SpecError, match="counting"):
        find_lens("counts")


def test_a_lens_that_takes_a_name_is_refused(install: Install) -> None:
    install(LENS_FILE.replace('name="counts"', 'name="deltas"'), name="deltas")
    assert "the same name" in lenses.broken_lenses()["deltas"] and find_lens("likelihood")


def test_measure_returns_readings_and_prints_nothing(
    small: Path, install: Install, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    install(LENS_FILE)
    shutil.copytree(small, tmp_path / "run")
    readings = measure(tmp_path / "run", ["counts", "deltas"], rows=16, workers=0)
    assert capfd.readouterr() == ("", "")
    assert list(readings) == ["deltas", "counts"], "in the order of reports"
    assert readings["counts"].caption.startswith("The trait arm has ") and not readings["counts"].missing
    assert readings["deltas"].arm == "trait" and set(readings["deltas"].table["lens"]) == {"deltas"}
    assert set(readings["deltas"].figures()) <= {quantity for quantity, _ in find_lens("deltas").shows}
    shown = readings["deltas"]._repr_html_()
    assert "<svg" in shown and "<table" in shown and "deltas" in shown
    again = measure(Run(tmp_path / "run"), ["counts"], rows=16, workers=0)["counts"]
    assert again.table.equals(readings["counts"].table)
    assert list(load_readings(Run(tmp_path / "run"))) == ["deltas", "counts"]


def test_a_lens_of_another_package_that_fails_is_a_reading_that_says_why(
    small: Path, install: Install, tmp_path: Path
) -> None:
    install(LENS_FILE.replace("    return reading_table(", "    raise KeyError('rows')\n    print("))
    shutil.copytree(small, tmp_path / "run")
    reading = measure(tmp_path / "run", ["counts"], rows=16, workers=0)["counts"]
    assert reading.missing == ("the lens 'counts' of the package counting.counts failed: KeyError: 'rows'",)
    assert (
        reading.table.empty and reading.figures() == {} and escape(reading.caption) in reading._repr_html_()
    )


def test_a_broken_lens_is_told_to_whoever_measures_all(
    small: Path, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("LENS = 3")
    monkeypatch.setattr(lens_run, "lens_names", lambda: ("deltas",))
    shutil.copytree(small, tmp_path / "run")
    events: list[Event] = []
    assert set(measure(tmp_path / "run", rows=16, workers=0, progress=events.append)) == {"deltas"}
    assert lenses.broken_lenses()["counts"] in [event.text for event in events if event.kind == "note"]
