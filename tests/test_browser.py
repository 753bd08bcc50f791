"""The explorer in a real browser: every page, its links, its keys, its charts, and two visitors at once."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress

import pandas as pd
import pytest
from browser import TITLES, Server, Visit
from playwright.sync_api import TimeoutError

from mechlens.core import tables
from mechlens.core.files import read_json

pytestmark = pytest.mark.browser

CHARTLESS = ("live", "compare", "report", "jobs", "methods", "row", "Rows")
"""pages and tabs that may have no chart before something is chosen there"""
MAP, CLOUD = "Where do the students differ", "Do suspicious rows lie together"
Open = Callable[..., Visit]


def test_every_page_is_there_and_complains_of_nothing(explorer: Server, visit: Open) -> None:
    visitor = visit(explorer)
    for name, title in TITLES.items():
        visitor.go(name)
        assert [one.inner_text() for one in visitor.page.get_by_role("heading", level=1).all()] == [title]
        for tab in visitor.tabs() or [""]:
            if tab:
                visitor.tab(tab)
            check_view(visitor, chart=name not in CHARTLESS and tab not in CHARTLESS)
    assert visitor.is_clean()


def check_view(visitor: Visit, *, chart: bool) -> None:
    """What stands on a page complains of nothing, and everything on it has a name."""
    if chart:
        visitor.page.get_by_test_id("stVegaLiteChart").first.locator("svg, canvas").first.wait_for()
    assert not visitor.page.get_by_test_id("stAlertContentError").count(), visitor.said()
    assert not visitor.page.get_by_test_id("stException").count(), visitor.said()
    unnamed = (
        "all => all.filter(one => !(one.getAttribute('aria-label') || one.getAttribute('alt') || "
        "'').trim()).length"
    )
    assert visitor.page.locator('[data-testid="stVegaLiteChart"], img').evaluate_all(unnamed) == 0
    nameless = """all => all.filter(one => one.type !== 'hidden' && one.offsetParent
        && !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby')
        && !(one.labels && one.labels.length)).map(one => one.outerHTML)"""
    assert visitor.page.locator("input, textarea, select").evaluate_all(nameless) == []


def test_a_click_on_the_layer_map_sets_controls_address_and_panels(explorer: Server, visit: Open) -> None:
    visitor = visit(explorer, "representations")
    assert (visitor.control("layer"), visitor.control("place")) == ("1", "probe/last")
    visitor.chart(MAP).locator('[aria-label^="place: carrier/last; layer: 0;"]').first.click()
    visitor.until_asked(layer="0", place="carrier/last")
    assert (visitor.control("layer"), visitor.control("place")) == ("0", "carrier/last")
    assert visitor.page.get_by_role("heading", name="Over layers, at carrier/last").count() == 1
    visitor.choose("layer", "1").until_asked(
        layer="1"
    )  # the side bar has the last word, whatever was clicked before
    visitor.tab("Rows").wait("Single rows along the trait direction, layer 1")
    assert visitor.is_clean()


def test_a_brush_becomes_a_filter_that_other_pages_and_the_export_hold(explorer: Server, visit: Open) -> None:
    visitor = visit(explorer, "representations", tab="Rows")
    whole, before, _ = visitor.counts()
    visitor.brush(CLOUD).wait("Selected on the map")
    selected = visitor.counts()[2]
    assert 0 < selected < before
    visitor.press("f").until_asked(slice=slice_of(visitor))
    visitor.wait(f"Filtered {selected:,} | Selected 0")
    visitor.turn("rows").tab("Rows")
    assert visitor.counts() == (whole, selected, 0)
    exported = pd.read_csv(io.BytesIO(visitor.download("Filtered rows (CSV)")))
    kept = read_json(explorer.runs / ".slices" / f"{visitor.asked()['slice']}.json")["ids"]
    assert len(exported) == selected
    assert sorted(exported["id"]) == kept
    assert visitor.is_clean()


def slice_of(visitor: Visit) -> str:
    """The name that the address bar takes on."""
    visitor.page.wait_for_function("location.search.includes('slice=')")
    return visitor.asked()["slice"]


def test_a_link_opens_the_same_page_for_somebody_else(explorer: Server, visit: Open) -> None:
    first = visit(explorer, "representations")
    first.choose("layer", "0").until_asked(layer="0")
    first.turn("transmission").choose("student (seed)", "2").until_asked(seed="2")
    first.choose("trait asked about", "owl").until_asked(trait="owl")
    first.turn("rows").tab("Rows")
    first.page.get_by_label("text to find").fill("123")
    first.page.get_by_label("text to find").press("Enter")
    first.until_asked(text="123")
    first.press("n").wait("Focus ")
    first.page.wait_for_function("location.search.includes('focus=')")
    second = visit(explorer, "overview")
    second.page.goto(first.page.url)
    second.arrive("rows")
    assert second.asked() == first.asked()
    assert second.counts() == first.counts()
    assert second.page.get_by_label("text to find").input_value() == "123"
    assert f"Focus {first.asked()['focus']}" in second.said()
    assert not second.page.get_by_test_id("stAlert").count()
    second.turn("transmission")
    assert [second.control(one) for one in ("student (seed)", "trait asked about")] == ["2", "owl"]
    assert second.turn("representations").control("layer") == "0"
    first.press("l").wait("Link to this page")
    told = first.page.get_by_role("dialog").get_by_test_id("stCode").inner_text()
    second.page.goto(told.replace("\n", ""))
    second.arrive("rows")
    assert second.asked() == first.asked()


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [({"d": "00000000"}, "made on other data"), ({"layer": "999"}, "asks for layer '999'")],
)
def test_a_link_to_something_else_says_so(
    asked: dict[str, str], sentence: str, explorer: Server, visit: Open
) -> None:
    visitor = visit(explorer, "representations", **asked)
    assert sentence in visitor.page.get_by_test_id("stAlert").first.inner_text()
    assert visitor.control("layer") == "1"


def test_back_and_forward_go_through_pages_and_focus_rows(explorer: Server, visit: Open) -> None:
    visitor = visit(explorer, "row", focus="eagle/3")
    visitor.until_asked(focus="eagle/3")
    visitor.press("n").until_asked(focus="eagle/4")
    visitor.wait("Row eagle/4")
    visitor.turn("methods")
    row = visitor.page.get_by_role("heading", level=1, name="Row", exact=True)
    for _ in range(
        2
    ):  # a page that is turned to leaves two entries: Streamlit drops the query, and the app writes it again
        visitor.page.go_back()
        with suppress(TimeoutError):
            row.wait_for(timeout=5000)
            break
    visitor.arrive("row")
    assert "Row eagle/4" in visitor.said()
    visitor.page.go_back()
    visitor.until_asked(focus="eagle/3").wait("Row eagle/3")
    visitor.page.go_forward()
    visitor.until_asked(focus="eagle/4").wait("Row eagle/4")
    visitor.page.go_forward()
    visitor.arrive("methods")
    assert visitor.is_clean()


def test_two_visitors_do_not_mix(explorer: Server, visit: Open) -> None:
    one, other = (visit(explorer, "representations", tab="Rows") for _ in range(2))
    one.brush(CLOUD).wait("Selected on the map")
    other.choose("layer", "0").until_asked(layer="0")
    assert one.counts()[2] > 0
    assert other.counts()[2] == 0
    assert (one.control("layer"), other.control("layer")) == ("1", "0")
    one.turn("rows")
    other.turn("rows")
    assert one.counts()[2] > 0
    assert other.counts()[2] == 0


def test_keys_do_what_they_say_but_not_while_somebody_writes(explorer: Server, visit: Open) -> None:
    visitor = visit(explorer, "representations", tab="Rows")
    visitor.press("n").wait("Focus eagle/0")
    visitor.press("n").wait("Focus eagle/1")
    visitor.press("p").wait("Focus eagle/0")
    visitor.brush(CLOUD).wait("Selected on the map")
    visitor.press("s").wait("rows saved in")
    visitor.press("f").wait("Selected 0")
    assert visitor.counts()[1] < 1000
    before = tables.read(
        explorer.runs / "demo" / "corpora" / "eagle" / "screened" / "kept.parquet", tables.PAIRS
    )
    visitor.press("x").wait("Filtered 17,")
    assert visitor.counts()[1] > len(before)
    visitor.press("h").wait("Keys do nothing while you type in a text field")
    visitor.page.keyboard.press("Escape")
    visitor.page.get_by_role("dialog").wait_for(state="detached")
    visitor.press("l").wait("Link to this page")
    visitor.page.keyboard.press("Escape")
    visitor.page.get_by_role("dialog").wait_for(state="detached")
    visitor.turn("rows").tab("Rows")
    field = visitor.page.get_by_label("text to find")
    field.click()
    visitor.page.keyboard.type("npxlhfs")
    visitor.page.keyboard.press("Tab")
    visitor.until_asked(text="npxlhfs")
    assert "Focus eagle/0" in visitor.said()
    assert not visitor.page.get_by_role("dialog").count()
    assert visitor.is_clean()


def test_tab_reaches_controls_and_shows_where_it_is(explorer: Server, visit: Open) -> None:
    visitor = visit(explorer)
    visitor.page.evaluate("document.activeElement && document.activeElement.blur()")
    looks = """one => [one, one.closest('[role=group]'), one.parentElement].filter(Boolean).map(each => {
        const style = getComputedStyle(each)
        return [style.outline, style.boxShadow, style.border, style.backgroundColor].join()}).join()"""
    reached = []
    for _ in range(40):
        visitor.page.keyboard.press("Tab")
        here = visitor.page.evaluate_handle("document.activeElement").as_element()
        assert here
        visitor.page.wait_for_timeout(250)  # outlines fade in
        marked = here.evaluate(looks)
        here.evaluate("one => one.blur()")
        visitor.page.wait_for_timeout(250)
        name = here.evaluate(
            "one => (one.getAttribute('aria-label') || one.innerText || '').trim().split('\\n')[0]"
        )
        assert here.evaluate(looks) != marked, f"{name}: nothing shows that it has the focus"
        here.evaluate("one => one.focus()")
        reached.append(name)
        if name == "run":
            break
    assert reached[-1] == "run", reached
    assert set(TITLES.values()) <= set(reached), reached
