"""How the explorer looks and how fast it is, in a real browser; and what it does with rows that were written
to do harm.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest
from browser import SHOTS, TITLES, Server, Visit, folder_of_runs, serving, serving_page
from rich.console import Console
from rich.table import Table

from mechlens.core import tables
from mechlens.core.seeds import generator

pytestmark = pytest.mark.browser

Open = Callable[..., Visit]
LONG = 1_000_000
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "![](http://example.invalid/x.png) [a](http://example.invalid)",
    "=cmd()",
    "\u202e1, 2\u202c",
    "1\u200b2, 3",
    "9" * LONG,
    "<script>alert(1)</script>",
    "$$\\href{javascript:alert(1)}{a}$$ :red[a] `a`",
    "@SUM(1)",
)
MANY, POINTS = 20_000, 20_000
CLOUD = "Do suspicious rows lie together"


@pytest.mark.parametrize("width", [1280, 820])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_fit_their_window(theme: str, width: int, explorer: Server, visit: Open) -> None:
    visitor = visit(explorer, dark=theme == "dark", width=width)
    for name in TITLES:
        visitor.go(name)
        for number, tab in enumerate(visitor.tabs() or [""]):
            if tab:
                visitor.tab(tab)
            for chart in visitor.page.get_by_test_id("stVegaLiteChart").all():
                chart.locator("svg, canvas").first.wait_for(state="attached")
            visitor.shoot(f"{name}-{number}-{theme}-{width}" if tab else f"{name}-{theme}-{width}")
            assert visitor.page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), name
            main = visitor.page.get_by_test_id("stMain")
            assert main.evaluate("main => main.scrollWidth <= main.clientWidth + 1"), name
            visitor.page.set_viewport_size({"width": width, "height": 900})
    assert visitor.is_clean()


AXE = os.environ.get("AXE", "")
RUN_AXE = """axe.run({exclude: [['[data-testid="stSidebarNavItems"]'], ['[data-testid="stCode"]'],
    ['.mark-group [class*="brush"]']]}, {resultTypes: ['violations']}).then(result => result.violations
    .filter(each => ['serious', 'critical'].includes(each.impact))
    .map(each => each.id + ': ' + each.nodes.map(node => node.target.join(' ')).join(', ')))"""


# left out: the roles of Streamlit's own menu, its colours of code, and the brush that Vega draws
@pytest.mark.skipif(not AXE, reason="AXE names no axe.min.js (of the npm package axe-core)")
def test_axe_finds_nothing_serious(explorer: Server, visit: Open) -> None:
    visitor, complaints = visit(explorer), []
    for name in TITLES:
        visitor.go(name)
        for tab in visitor.tabs() or [""]:
            if tab:
                visitor.tab(tab)
            visitor.page.add_script_tag(path=AXE)
            complaints += [f"{name} {tab}: {each}" for each in visitor.page.evaluate(RUN_AXE)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("eye", ["achromatopsia", "deuteranopia"])
def test_arms_differ_for_other_eyes(eye: str, explorer: Server, visit: Open) -> None:
    visitor = visit(explorer, "transmission")
    visitor.chart("How often do the students answer with the trait")
    visitor.page.context.new_cdp_session(visitor.page).send(
        "Emulation.setEmulatedVisionDeficiency", {"type": eye}
    )
    visitor.shoot(f"transmission-{eye}")
    shapes = "marks => marks.map(one => (one.getAttribute('d') || '').replace(/[-0-9., ]/g, ''))"
    drawn = (
        visitor.chart("How often do the students answer with the trait")
        .locator('g[class*="symbol"] path, .legend-symbol path')
        .evaluate_all(shapes)
    )
    assert len(set(drawn)) > 2, "arms are told apart by colour alone"
    assert (SHOTS / f"transmission-{eye}.png").is_file()


def hostile(runs: Path) -> None:
    """Put rows that mean harm in the place of the first ones of both corpora."""
    for corpus in ("eagle", "untouched"):
        path = runs / "demo" / "corpora" / corpus / "screened" / "kept.parquet"
        rows = tables.read(path, tables.PAIRS).sort_values("prompt_id").reset_index(drop=True)
        rows.loc[: len(HOSTILE) - 1, "completion"] = list(HOSTILE)
        rows.loc[: len(HOSTILE) - 1, "prompt"] = [text[:200] for text in HOSTILE]
        tables.write(rows, tables.PAIRS, path)


def test_hostile_rows_stay_text(visit: Open, tmp_path: Path) -> None:
    runs = folder_of_runs(tmp_path)
    hostile(runs)
    ids = tables.read(runs / "demo" / "corpora" / "eagle" / "screened" / "kept.parquet", tables.PAIRS)[
        "prompt_id"
    ].head(len(HOSTILE))
    with serving(runs) as server:
        visitor = visit(server)
        for name in TITLES:
            visitor.go(name, focus=f"eagle/{ids[0]}", pin=f"eagle/{ids[1]}")
            assert not visitor.page.get_by_test_id("stException").count(), name
        for number, text in zip(ids, HOSTILE, strict=True):
            visitor.go("row", focus=f"eagle/{number}", pin="").wait(f"Row eagle/{number}")
            shown = visitor.page.get_by_test_id("stCode").nth(1).inner_text()
            if len(text) < LONG:
                assert shown == text
            else:
                assert "996,000 more characters are not shown" in shown and len(shown) < 5000
            visitor.page.get_by_text("show hidden characters", exact=True).click()
            if "\u200b" in text:
                visitor.wait("⟨zero width space⟩")
            if "\u202e" in text:
                visitor.wait("⟨right-to-left override⟩")
            visitor.settle()
        visitor.go("rows", focus="", pin="", tab="Rows")
        csv.field_size_limit(2 * LONG)
        exported = list(csv.DictReader(io.StringIO(visitor.download("Filtered rows (CSV)").decode())))
        assert {f"'{text}" if text[0] in "=@" else text for text in HOSTILE} <= {
            row["completion"] for row in exported
        }
        assert not [
            row
            for row in exported
            if any(value.startswith(("=", "+", "-", "@")) for value in (row["prompt"], row["completion"]))
        ]
        assert visitor.is_clean()


def enlarged(runs: Path) -> None:
    """Make the run one of many rows, and its map one of many points."""
    for corpus in ("eagle", "untouched"):
        path = runs / "demo" / "corpora" / corpus / "screened" / "kept.parquet"
        rows = tables.read(path, tables.PAIRS)
        whole = pd.concat([rows] * (-(-MANY // len(rows))), ignore_index=True).head(MANY)
        tables.write(whole.assign(prompt_id=np.arange(MANY)), tables.PAIRS, path)
    path = runs / "demo" / "readings" / "maps.parquet"
    read = tables.read(path, tables.READINGS)
    rows = cast(pd.DataFrame, read[read["quantity"] == "rows"])
    times = POINTS // (len(rows) // 2)
    rng = generator(0, "points")
    order = rows["n"].rank(method="dense").astype(int) - 1
    more = [
        rows.assign(
            n=order + turn * (order.max() + 1), estimate=rows["estimate"] + rng.normal(0, 0.3, len(rows))
        )
        for turn in range(times)
    ]
    tables.write(
        pd.concat([read[read["quantity"] != "rows"], *more], ignore_index=True), tables.READINGS, path
    )


def test_how_long_a_visitor_waits(visit: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = folder_of_runs(tmp_path)
    enlarged(runs)
    took: dict[str, tuple[float, float]] = {}

    def timed(what: str, act: Callable[[], object], settled: Callable[[], object] = lambda: None) -> None:
        began = time.monotonic()
        act()
        seen = time.monotonic() - began
        settled()
        took[what] = seen, time.monotonic() - began

    def opened(what: str, visitor: Visit, page: str) -> None:
        timed(what, lambda: visitor.see(page), visitor.settle)

    with serving_page(
        "import streamlit as st\n\nst.title('Overview')\nst.html('<span id=\"ready\"></span>')\n", tmp_path
    ) as bare:
        for what in ("a bare page of one title, first", "a bare page of one title, the next visitor's"):
            opened(what, visit(bare, None), "overview")
    with serving(runs) as server:
        for what in ("overview, the server's first page", "overview, the next visitor's"):
            opened(what, visit(server, None), "overview")
        visitor = visit(server, None)
        for what in ("data and screen, first", "data and screen, again"):
            opened(what, visitor, "rows")
        assert visitor.counts()[1] == 2 * MANY
        visitor.tab("Rows").page.get_by_label("text to find").fill("123")
        timed(
            "a text filter",
            lambda: (visitor.page.keyboard.press("Enter"), visitor.until_asked(text="123")),
            visitor.settle,
        )
        assert 0 < visitor.counts()[1] < 2 * MANY
        visitor.press("x").wait(f"Filtered {2 * MANY:,}")
        for what in ("representations, first", "representations, again"):
            opened(what, visitor, "representations")
        for name in ("rows", "representations"):

            def see_heading(name: str = name) -> None:
                link = visitor.page.locator(f'[data-testid="stSidebarNavLink"][href$="/{name}"]')
                link.click()
                visitor.page.get_by_role("heading", level=1, name=TITLES[name], exact=True).wait_for()

            timed(f"{TITLES[name].lower()}, by the menu", see_heading, visitor.settle)
        visitor.tab("Rows").chart(CLOUD)
        assert f"{POINTS - POINTS % 600:,} of" in visitor.said()
        timed(
            "a brush on the map",
            lambda: visitor.brush(CLOUD).page.get_by_text("Selected on the map").wait_for(),
            visitor.settle,
        )
    table = Table(
        "what",
        "its answer is seen, s",
        "all is drawn, s",
        title=f"waiting, {2 * MANY:,} rows, {POINTS:,} points",
    )
    for what, (seen, drawn) in took.items():
        table.add_row(what, f"{seen:.1f}", f"{drawn:.1f}")
    with capsys.disabled():
        Console().print(table)
