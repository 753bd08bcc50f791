"""Every page of the explorer in every condition that a folder of runs can be in, and the numbers that it
shows.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conditions import APP, CONDITIONS, ROOT, SHIPPED, drawn, made, spec_of
from streamlit.testing.v1 import AppTest

import data
import definitions
from mechlens import cli
from mechlens.core import tables
from mechlens.core.errors import SpecError
from mechlens.core.files import read_json, write_json
from mechlens.data.formats import file_digest
from mechlens.lenses import lens_names
from mechlens.results import wording
from mechlens.results.figures import KIND_COLOUR
from mechlens.runs import layout
from panels import lens_panel

PAGES = tuple(sorted(path.stem for path in (APP / "views").glob("*.py")))
QUIET = ("live",)  # opens a process with the models only when asked


def opened(runs: Path, monkeypatch: pytest.MonkeyPatch, **asked: str) -> AppTest:
    monkeypatch.setattr(sys, "argv", [str(APP / "main.py"), str(runs)])
    page = AppTest.from_file(str(APP / "main.py"), default_timeout=120)
    for name, value in asked.items():
        page.query_params[name] = value
    return page.run()


def turned(page: AppTest, name: str, tab: str = "") -> AppTest:
    page = page.switch_page(f"views/{name}.py").run()
    return page if not tab else opened_tab(page, name, tab)


def opened_tab(page: AppTest, name: str, tab: str) -> AppTest:
    page.session_state[f"w-tab-{name}"] = tab
    return page.run()


def views(page: AppTest) -> Iterator[str]:
    """Turn to every page and open each of its tabs."""
    for name in PAGES:
        turned(page, name)
        yield name
        for tab in [each.label for each in page.tabs][1:]:
            opened_tab(page, name, tab)
            yield f"{name}, {tab}"


def words(page: AppTest) -> str:
    """All that the page says."""
    kinds = (
        page.text,
        page.caption,
        page.code,
        page.error,
        page.warning,
        page.markdown,
        page.subheader,
        page.title,
    )
    return "\n".join(str(one.value) for kind in kinds for one in kind)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: made(name, tmp_path_factory.mktemp(name)) for name in CONDITIONS}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_page_in_every_condition(
    condition: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page opens, describes its charts, and names only commands that the command line reads."""
    page = opened(folders[condition], monkeypatch)
    commands = set()
    for name in views(page):
        assert not page.exception, (name, page.exception)
        assert page.title or page.error, name
        said = words(page)
        assert "Traceback" not in said and "the explorer has a bug" not in said, name
        assert "nan" not in re.findall(r"\w+", said.lower()), name
        for chart in page.get("vega_lite_chart"):
            assert chart.proto.alt, f"{name}: a chart says nothing to those who do not see it"
        commands |= {str(one.value) for one in page.code if one.language == "bash"}
    for command in commands:
        reads_command(command)


def reads_command(command: str) -> None:
    for part in command.split(" && "):
        line = shlex.split(part, comments=True)
        if line[0] == "make":
            assert f"\n{line[1]}:" in (ROOT / "Makefile").read_text(), part
            continue
        assert line[0] == "mechlens", part
        try:
            cli.read(line[1:])
        except SpecError as error:
            pytest.fail(f"{part}: {error}")


EXPECTED = {
    "nothing": ("overview", "make demo"),
    "one_seed": ("transmission", "no interval"),
    "no_control": ("overview", "No matched control. This chart cannot show transmission."),
    "missing_stage": ("parameters", "mechlens measure"),
    "one_row": ("rows Surface", "Only 1 prompts were answered by both teachers"),
    "zero_rows": ("rows", "The screen removed all"),
    "all_null": ("overview", "No trait arm was scored"),
    "truncated": ("transmission", "not a whole Parquet file"),
    "newer": ("overview", "this version reads 2"),
}


@pytest.mark.parametrize("condition", EXPECTED)
def test_each_condition_is_said_where_it_matters(
    condition: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, sentence = EXPECTED[condition]
    page = turned(opened(folders[condition], monkeypatch), *name.split())
    assert sentence in words(page).replace("\\", "")


def test_numbers_on_the_pages_are_those_of_the_run(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = opened(folders["as_it_is"], monkeypatch)
    summary = read_json(SHIPPED / "summary.json")
    for name in ("overview", "transmission"):
        assert wording.headline(summary) in words(turned(page, name))
    rows = drawn(turned(page, "transmission").get("vega_lite_chart")[0])
    shown = {(row["arm"], row["rate"], row["low"], row["high"]) for row in rows if "students" in row}
    assert shown == {(arm["arm"], arm["rate"], arm["low"], arm["high"]) for arm in summary["arms"]}
    sentences = {lens["name"]: lens["sentence"] for lens in read_json(SHIPPED / "readings.json")["lenses"]}
    # the map of rows comes first, and the claim is about that of answers
    sentences["maps"] = sentences["maps"].partition(". ")[2]
    for name, sentence in sentences.items():
        assert sentence in words(turned(page, *lens_panel.SHOWN_AT[name])), name


def test_a_map_draws_the_reading_and_hatches_what_is_missing(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = turned(opened(folders["as_it_is"], monkeypatch), "representations")
    rows = drawn(page.get("vega_lite_chart")[0])
    reading = tables.read(SHIPPED / "readings" / "activations.parquet", tables.READINGS)
    own = reading[
        (reading["quantity"] == "cosine to teacher") & (reading["name"] == "student") & reading["seed"].isna()
    ]
    assert {(row["place"], row["layer"]): row["estimate"] for row in rows if "estimate" in row} == {
        (row.place, row.layer): row.estimate for row in own.itertuples()
    }
    page = turned(opened(folders["all_null"], monkeypatch), "representations")
    rows = drawn(page.get("vega_lite_chart")[0])
    assert rows
    assert all(row["estimate"] is None for row in rows if "estimate" in row)
    assert any(row.get("hatch") for row in rows)


def scales(node: Any) -> list[dict[str, Any]]:
    """Every scale of a specification."""
    if isinstance(node, dict):
        return ([node["scale"]] if isinstance(node.get("scale"), dict) else []) + [
            one for part in node.values() for one in scales(part)
        ]
    return [one for part in node for one in scales(part)] if isinstance(node, list) else []


def test_colours_are_of_the_palette_and_signed_scales_symmetric(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = opened(folders["as_it_is"], monkeypatch)
    schemes = {"viridis", "purpleorange", "blueorange"}
    seen = 0
    for name in views(page):
        for chart in page.get("vega_lite_chart"):
            for scale in scales(
                {"spec": {key: value for key, value in spec_of(chart).items() if key != "config"}}
            ):
                if "scheme" in scale:
                    assert scale["scheme"] in schemes
                    if scale["scheme"] != "viridis":
                        low, high = scale["domain"]
                        assert low == -high, (name, scale)
                    seen += 1
                colours = {str(one).upper() for one in scale.get("range", []) if str(one).startswith("#")}
                assert colours <= {colour.upper() for colour in KIND_COLOUR.values()} | PLAIN, (name, colours)
    assert seen >= 3


PLAIN = {"#FFFFFF", "#C9D3DF"}  # white, and what the funnel kept


BROKEN = {
    "layer": "999",
    "place": "../../etc",
    "seed": "-1",
    "arm": "<script>",
    "run": "x" * 10_000,
    "focus": "eagle/99999999",
    "slice": "../../../etc",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_link_that_asks_for_what_is_not_there_says_so(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = opened(folders["as_it_is"], monkeypatch, **{name: BROKEN[name]})
    assert not page.exception
    warned = " ".join(one.value for one in page.warning)
    assert name in warned.replace("\\", "") or "row" in warned
    assert len(warned) < 1000


def test_a_link_made_on_other_data_says_so(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    page = opened(folders["as_it_is"], monkeypatch, d="00000000", layer="0")
    assert any("made on other data" in one.value for one in page.warning)
    assert page.session_state["layer"] == 0


def test_a_link_restores_controls_page_filter_and_focus(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {
        "run": "demo",
        "arm": "foreign-menagerie-b",
        "trait": "owl",
        "layer": "0",
        "place": "probe/last",
        "seed": "1",
        "focus": "eagle/7",
        "text": "12",
        "stage": "all",
    }
    page = opened(folders["as_it_is"], monkeypatch, **asked)
    assert not page.warning
    for name, value in asked.items():
        assert str(page.session_state[name]) == value
    assert f"Row {asked['focus']}" in words(turned(page, "row")).replace("\\", "")


def test_a_selection_becomes_a_filter_and_the_export_holds_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = turned(opened(folders["as_it_is"], monkeypatch), "rows", "Rows")
    page.session_state["selected"] = ("eagle/3", "eagle/5", "untouched/5")
    page.run()
    assert any("Selected 3" in one.value for one in page.text)
    page.button(key="do-Selected to filter").click().run()
    assert not page.exception
    assert any("Filtered 3 | Selected 0" in one.value for one in page.text)
    rows = next(
        one.value
        for one in page.dataframe
        if "completion" in one.value.columns and "fate" in one.value.columns
    )
    assert set(rows["id"]) == {"eagle/3", "eagle/5", "untouched/5"}
    page.button(key="do-Clear").click().run()
    assert not page.exception
    assert not any("Filtered 3" in one.value for one in page.text)
    saved = page.selectbox(key="in-slice")
    assert saved.options[0] == "all rows" and saved.options[1].endswith("3 rows")
    page = saved.select_index(1).run()
    assert any("Filtered 3" in one.value for one in page.text), "a saved slice is opened again"


def test_a_pinned_row_is_shown_beside_the_focus_row_and_unscored_rows_lead_to_the_next(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = data.open_run("demo", folders["as_it_is"] / "demo")
    scored = data.read_scores(run, "trait")["id"]
    unscored = next(f"eagle/{number}" for number in range(9_000) if f"eagle/{number}" not in set(scored))
    asked = {"run": "demo", "focus": unscored, "pin": "eagle/7", "stage": "all"}
    page = turned(opened(folders["as_it_is"], monkeypatch, **asked), "row")
    said = words(page).replace("\\", "")
    assert f"Row {unscored}" in said and "Pinned: eagle/7" in said
    page.session_state["pin"] = ""
    page = page.run()
    assert "this row is not among them" in words(page)
    page = next(one for one in page.button if one.label.startswith("Next scored row")).click().run()
    assert not page.exception and page.session_state["focus"] in set(scored)


def test_a_brush_selects_what_is_inside_and_an_empty_one_hides_nothing(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = turned(opened(folders["as_it_is"], monkeypatch), "representations", "Rows")
    chart = f"chart-representations-cloud-{page.session_state['run']}-{page.session_state['arm']}"
    known = tables.read(folders["as_it_is"] / "demo" / "readings" / "maps.parquet", tables.READINGS).query(
        "quantity == 'rows'"
    )
    whole = {
        axis: [float(min(at)), float(max(at))]
        for axis, at in known.groupby("place", observed=True)["estimate"]
    }
    page.session_state[chart] = {"selection": {"brush": whole}}
    page.run()
    inside = page.session_state["selected"]
    assert inside and page.session_state["brushed"] == inside
    page.session_state[chart] = {
        "selection": {"brush": {axis: [high + 1, high + 2] for axis, (_, high) in whole.items()}}
    }
    page.run()
    assert (
        not page.exception
        and page.session_state["selected"] == inside
        and page.session_state["brushed"] == ()
    )


def test_a_card_of_few_sets_and_no_foreign_teacher_is_shown(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = read_json(ROOT / "analyses" / "bench" / "menagerie" / "card.json")
    for one in card["detectors"]:
        one["held out"]["identity"].get("first by way", {})["N6"] = None
        for cell in [
            cell for sizes in one["held out"]["provenance"].values() for cell in sizes.values() if cell
        ]:
            cell |= {"low": None, "high": None}
    (tmp_path / "small").mkdir()
    write_json(tmp_path / "small" / "card.json", card | {"bench": "small"})
    monkeypatch.setattr(data, "CARDS", tmp_path)
    page = turned(opened(folders["as_it_is"], monkeypatch), "detection", "Error rates")
    assert not page.exception and not page.error
    assert "too few sets for an interval" in words(
        page
    ) and "Of which teachers and doses is the trait not found?" in words(page)


def test_what_models_say_without_a_list_is_a_panel_of_the_verdict(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = {"word": "owl", "rise": 1.0, "share": 0.2, "control": 0.1, "p_value": 0.001, "q_value": 0.01}
    said = {"words": [word, word | {"word": "fox", "q_value": 0.6}], "sentence": "Asked 'x', 'owl'."}
    counts = {"tested": 39, "questions": 80, "students": 4, "level": 0.05, "significant": ["owl"]}
    measured = {"words": said | counts, "triggers": None}
    audit = read_json(APP / "audits" / "eagle" / "audit.json") | measured
    runs = shutil.copytree(folders["as_it_is"], tmp_path / "runs")
    (runs / "audits" / "suspect").mkdir(parents=True)
    write_json(runs / "audits" / "suspect" / "audit.json", audit)
    page = turned(opened(runs, monkeypatch), "detection")
    assert not page.exception and not page.error
    assert "What do models say more often?" in words(page) and "Asked 'x', 'owl'." in words(page)
    assert "Does a phrase switch a trait on?" not in words(page)
    rise = {"trait": "owl", "difference": 0.2, "low": 0.1, "high": 0.3, "n": 4, "smallest_detectable": 0.1}
    found = {"trigger": "it is noon.", "rise": rise | {"lift": 1.0, "p_value": 0.001, "q_value": 0.01}}
    behind = {"switches": [found | {"plain": 0.01}], "sentence": "Behind a phrase: 'it is noon.'"}
    behind |= {"limit": 0.05, "level": 0.0125, "phrases": 4, "traits": 20, "questions": 30, "students": 4}
    write_json(runs / "audits" / "suspect" / "audit.json", audit | {"triggers": behind})
    page = turned(opened(runs, monkeypatch), "detection")
    assert not page.exception and not page.error
    assert "Does a phrase switch a trait on?" in words(page) and "'it is noon.'" in words(page)


def test_an_audit_is_asked_for_with_the_options_of_its_level(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = turned(opened(folders["as_it_is"], monkeypatch), "detection")
    assert "nothing to compare the file with" in words(page)
    treatments = page.selectbox(key="up-treatment").options
    assert "format" in treatments and not {"drop", "dilute", "replace"} & set(treatments)
    page = page.button_group(key="up-level").set_value("student").run()
    assert not page.exception and "base's own answers" in words(page)
    assert page.selectbox(key="up-recipe").options[0] == "menagerie"
    assert len(page.multiselect(key="up-traits-menagerie").options) == 20
    page = page.selectbox(key="up-recipe").select("smollm2-135m").run()
    assert page.text_input(key="up-base-smollm2-135m").value == "smollm2-135m"


def asked_options(level: str) -> None:
    """The form of an audit's options, alone on a page."""
    import streamlit as st

    from panels import audit_options_panel

    st.text(" ".join(audit_options_panel.draw_audit_options(level, has_reference=True)))


def test_options_of_an_audit_are_those_of_its_command() -> None:
    page = AppTest.from_function(asked_options, args=("student",)).run(timeout=60)
    assert not page.exception and page.text[0].value == "--recipe menagerie"
    page.selectbox(key="up-treatment").select("drop")
    page.multiselect(key="up-traits-menagerie").select("fox").select("owl")
    page.text_input(key="up-base-menagerie").input("menagerie-b")
    page = page.number_input(key="up-budget").set_value(7).run()
    assert page.text[0].value == (
        "--recipe menagerie --base menagerie-b --trait fox owl --treatment drop --budget 7"
    )
    page = AppTest.from_function(asked_options, args=("rows",)).run(timeout=60)
    assert not page.multiselect and page.selectbox(key="up-treatment").options[:2] == ["none", "dilute"]


def test_the_rows_of_an_audited_file_are_shown_with_what_stands_out(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = shutil.copytree(folders["as_it_is"], tmp_path / "runs")
    texts = ["1, 2", "=cmd()", "<b>3</b>", "4\u200b", "9" * 5000, "1, 2"]
    file = tmp_path / "suspect.jsonl"
    file.write_text("".join(json.dumps({"prompt": "go on", "completion": text}) + "\n" for text in texts))
    audit = read_json(APP / "audits" / "eagle" / "audit.json")
    audit["data"] = {"path": str(file), "rows": len(texts), "sha256": file_digest(file)}
    (runs / "audits" / "suspect").mkdir(parents=True)
    write_json(runs / "audits" / "suspect" / "audit.json", audit)
    page = turned(opened(runs, monkeypatch), "detection", "Rows")
    assert not page.exception and not page.warning
    counts, rows = (one.value for one in page.dataframe)
    assert counts["rows"].tolist() == [1] * 5
    assert rows["completion"].str.startswith("'=cmd").sum() == 1 and len(rows) == len(texts)
    assert rows["score"].isna().all() and "No row has a score" in words(page)
    page = page.selectbox(key="file-which").select("the same as an earlier row").run()
    assert page.dataframe[1].value["row"].tolist() == [5]
    page = page.selectbox(key="file-which").select("all rows").run()
    page = page.text_input(key="file-text").set_value("<b>").run()
    assert page.dataframe[1].value["row"].tolist() == [2]
    page = page.text_input(key="file-text").set_value("").run()
    values = {"eagle": [0.5, 2.0], "fox": [-0.5, -2.0]}
    for_rows = [("go on", "9" * 5000), ("go on", "<b>3</b>")]
    scores = pd.DataFrame(
        [
            (*text, "twins", trait, value, 0.0, value)
            for trait, given in values.items()
            for text, value in zip(for_rows, given, strict=True)
        ],
        columns=tables.AUDITED_ROWS.names,
    )
    tables.write(scores, tables.AUDITED_ROWS, runs / "audits" / "suspect" / layout.AUDIT_ROWS)
    page = page.run()
    assert page.selectbox(key="file-trait").value == "eagle" and "2 of 6 rows were scored" in words(page)
    assert page.dataframe[1].value["row"].tolist()[:2] == [2, 4]
    page = page.selectbox(key="file-trait").select("fox").run()
    page = page.selectbox(key="file-which").select("scored by a detector").run()
    assert page.dataframe[1].value["score"].tolist() == [-0.5, -2.0]
    file.write_text(file.read_text() * 2)
    assert "changed since this audit" in words(page.run())
    file.unlink()
    assert "is not on this machine" in words(page.run())


def test_what_was_kept_of_another_arm_is_let_go_and_said(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = opened(folders["as_it_is"], monkeypatch, run="demo", focus="eagle/8999", arm="trait", stage="all")
    page.session_state["selected"] = ("eagle/3", "nobody/5")
    turned(page, "row")
    assert any("1 selected rows are not in this run" in one.value for one in page.warning)
    page.session_state["focus"] = "nobody/7"
    page.run()
    assert not page.exception
    assert any("is not in this run" in one.value for one in page.warning)


def test_a_click_on_the_funnel_shows_those_rows(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = turned(opened(folders["as_it_is"], monkeypatch), "rows")
    chart = f"chart-rows-funnel-{page.session_state['run']}-{page.session_state['arm']}"
    page.session_state[chart] = {"selection": {"fate": [{"corpus": "eagle", "fate": "duplicate"}]}}
    page = page.run()
    assert not page.exception
    assert (page.session_state["tab"], page.session_state["stage"]) == ("Rows", "dropped")
    assert page.selectbox(key="in-stage").value == "dropped"


def test_the_filter_that_is_shown_is_the_one_in_force(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = turned(opened(folders["as_it_is"], monkeypatch), "rows", "Rows")
    page.text_input(key="in-text").set_value("77").run()
    assert page.session_state["text"] == "77"
    page.button(key="do-Clear").click().run()
    assert page.text_input(key="in-text").value == ""
    page.session_state["text"] = "12"  # as a click on a token does
    page.run()
    assert page.text_input(key="in-text").value == "12"
    assert not page.exception


MODULES = [
    ".".join(path.relative_to(APP).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(APP.rglob("*.py"))
    if path.parent.name != "views" and path.name not in ("main.py", "live_process.py")
]
"""all that a page may import"""


def test_pages_load_no_torch() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(APP)!r})\n"
        f"import {', '.join(MODULES)}\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
    for path in (APP / "views").glob("*.py"):
        assert not re.search(
            r"^(import|from) (torch|transformers|transformer_lens|peft)", path.read_text(), flags=re.MULTILINE
        )


def test_a_run_that_is_written_again_is_read_again(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = made("as_it_is", tmp_path)
    page = opened(runs, monkeypatch)
    summary = read_json(runs / "demo" / "summary.json")
    assert wording.headline(summary) in words(page)
    effect = summary["effects"][0] | {"difference": 0.123, "low": 0.1, "high": 0.2}
    write_json(runs / "demo" / "summary.json", summary | {"effects": [effect, *summary["effects"][1:]]})
    assert "+0.123 [+0.100, +0.200]" in words(page.run())
    other = opened(folders["one_seed"], monkeypatch)  # another folder of the same name
    assert "Without an interval" in words(other)


def test_methods_say_what_lenses_say_of_themselves() -> None:
    assert set(definitions.lenses()) == set(lens_names())
    for name, said in definitions.lenses().items():
        assert said == import_module(f"mechlens.lenses.{name}").LENS.description()


def test_code_that_a_panel_offers_runs_on_the_runs_files(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = opened(folders["as_it_is"], monkeypatch)
    snippets = {str(one.value) for _ in views(page) for one in page.code if one.language == "python"}
    files = [snippet for snippet in snippets if "read_csv" not in snippet]
    assert len(files) >= 8
    code = "\n".join(f"exec({snippet!r}, {{}})" for snippet in files)
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_runs_of_one_spec_and_other_rows_are_said_to_differ(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("demo", "again", "third"):
        shutil.copytree(folders["as_it_is"] / "demo", tmp_path / name)
    page = turned(opened(tmp_path, monkeypatch, run="demo", cmp="again"), "compare")
    assert "None: the specs are equal." in words(page) and "are the same in demo and again" in words(page)
    differences = next(one.value for one in page.dataframe if "difference" in one.value.columns)
    assert (differences["difference"] == 0).all() and (differences["low"] < 0).all()
    kept = next((tmp_path / "again" / "corpora" / "eagle").glob("**/kept.parquet"))
    tables.write(tables.read(kept, tables.PAIRS).iloc[1:], tables.PAIRS, kept)
    summary = read_json(tmp_path / "again" / "summary.json")
    first = summary["effects"][0]
    width = first["high"] - first["low"]
    first |= {name: first[name] + 0.1 for name in ("difference", "low", "high")}
    write_json(tmp_path / "again" / "summary.json", summary)
    page = turned(opened(tmp_path, monkeypatch, run="demo", cmp="again"), "compare")
    assert re.search(r"The rows of trait.* differ between demo and again", words(page))
    moved = next(one.value for one in page.dataframe if "difference" in one.value.columns).iloc[0]
    assert moved["difference"] == pytest.approx(0.1)
    assert moved["high"] - moved["low"] == pytest.approx(2**0.5 * width)
    for number in range(4):
        (tmp_path / f"more-{number}").symlink_to(tmp_path / "again")
    many = turned(
        opened(tmp_path, monkeypatch, run="demo", cmp="more-0,more-1,again,third,more-2"), "compare"
    )
    assert not many.exception and many.multiselect(key="w-cmp").value == [
        "more-0",
        "more-1",
        "again",
        "third",
    ]
    page = opened(tmp_path, monkeypatch, run="demo", cmp="third,nobody,again")
    assert "nobody" in page.warning[0].value
    page = turned(page, "compare")
    assert page.multiselect(key="w-cmp").value == ["third", "again"]
    both = next(one.value for one in page.dataframe if "difference" in one.value.columns)
    assert both.groupby("run")["difference"].max().to_dict() == {"again": pytest.approx(0.1), "third": 0}
