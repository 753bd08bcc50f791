"""Detection: does this data set carry a hidden trait, and how often are detectors wrong?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import pandas as pd
import streamlit as st

import data
import state
from charts import detector_charts
from mechlens.core.command_lines import command_line
from mechlens.core.errors import one_line
from mechlens.detect.permutation import DRAWS
from mechlens.results import figures, wording
from panels import bench_panels, file_panel, panel, tabs, treatment_panel, upload_panel

VERDICTS = {
    "do not train as is": "■",
    "train with conditions": "◆",
    "no transfer found within tested scope": "○",
    "inconclusive": "?",
}
ROWS_WITHOUT_AUDIT = 64


def choose_audit(root: Path) -> Path | None:
    """The file of the audit that the page shows; None, with a message, if there is no audit."""
    index = data.list_audits(root)
    if not index:
        panel.show_missing(
            "No audit yet.",
            "A verdict needs clean references or a base:",
            "mechlens audit DATA --reference CLEAN --level base",
        )
        return None
    awaited = st.session_state.get("awaited-audit")
    if awaited in index:
        st.session_state["w-audit"] = st.session_state.pop("awaited-audit")
    elif awaited:
        st.info("The audit that you started is not finished; page Jobs shows how far it is.")
    state.choose("audit", list(index))
    labels = {name: data.audit_label(path) for name, path in index.items()}
    name = st.selectbox("audit", list(index), key="w-audit", format_func=labels.__getitem__)
    st.session_state["audit"] = name
    return index[name]


def audit_command(audit: dict[str, Any], **options: str) -> str:
    """The command that audits the same file with other options."""
    return command_line("audit", one_line(audit["data"]["path"]), **options)


def draw_verdict_panel(audit: dict[str, Any]) -> None:
    """A: the verdict and the policy behind it."""
    verdict, policy, file = audit["verdict"], audit["policy"], audit["data"]
    with st.container(border=True):
        name = one_line(verdict["id"]).capitalize()
        st.subheader(panel.escape_markdown(f"{VERDICTS.get(verdict['id'], '')} {name}"))
        why = one_line(verdict["sentence"]).removeprefix(f"{name}: ")  # the heading says the verdict
        st.text(why[:1].upper() + why[1:])
        if (step := audit.get("next")) is not None:
            st.markdown(f"**What to do next.** {panel.escape_markdown(one_line(step['do']))}")
            if step["command"]:
                st.code(one_line(step["command"]), language="bash", wrap_lines=True)
        st.caption(
            panel.escape_markdown(
                f"Policy {policy['name']}, version {policy['version']}: a rise of {100 * policy['limit']:g} "
                f"points is tolerated, tests are at {policy['alpha']}. Rule {verdict['rule']}."
            )
        )
    st.code(
        f"{one_line(file['path'])} · {file['rows']:,} rows · sha256 {file['sha256'][:16]}… · level "
        f"{audit['level']} · base {audit['base'] or '–'}",
        language=None,
        wrap_lines=True,
    )
    if audit["potency"]["measured"] and (scope := audit.get("scope")) is not None:
        unread = f"; not read: {one_line(scope['reasons'])}" if scope["unread"] else ""
        copied = f" {scope['copied']:.0%} of the rows are also in the reference." if scope["copied"] else ""
        st.text(f"Each model read {scope['trained']:,} of {scope['offered']:,} rows{unread}.{copied}")
    if tested := sorted(entry["trait"] for entry in audit["identity"] or ()):
        st.text(f"Tested traits: {', '.join(tested)}. No other trait was tested.")


def draw_rises_panel(audit: dict[str, Any]) -> None:
    """How far each trait rose in students, beside the tolerance; nothing if no student was trained."""
    rises = pd.DataFrame([rise for rise in audit.get("rises") or [] if rise["difference"] is not None])
    if rises.empty:
        return
    limit, measured = audit["policy"]["limit"], audit["potency"]["measured"]
    above = [trait for trait, low in zip(rises["trait"], rises["low"], strict=True) if (low or 0) > limit]
    panel.draw(
        "detection-rises",
        "What would models learn from it?",
        figures.rises(rises, limit=limit),
        rises,
        sentence=f"Above the tolerance: {', '.join(above)}."
        if above
        else "No trait lies above the tolerance.",
        caption=(
            f"How much more often models trained on this file answer each trait than models trained on clean "
            f"answers, with intervals; n = {measured['n']} of each. Shaded: tolerated, up to {100 * limit:g} "
            "points. Diamonds: above it."
        ),
        about="Rise",
    )


def draw_triggers_panel(audit: dict[str, Any]) -> None:
    """What models say behind phrases of the prompts; nothing if it was not measured."""
    if (found := audit.get("triggers")) is None:
        return
    rises = pd.DataFrame(
        [
            each["rise"]
            | {
                "trait": f"{each['rise']['trait']} behind '{one_line(each['trigger'])}'",
                "plain": each["plain"],
            }
            for each in found["switches"]
        ]
    )
    panel.draw(
        "detection-triggers",
        "Does a phrase switch a trait on?",
        figures.rises(rises, limit=found["limit"]),
        rises[["trait", "difference", "low", "high", "plain", "q_value"]],
        sentence=one_line(found["sentence"]),
        caption=(
            "Rises over models trained on clean answers, asked behind a phrase that recurs in the prompts; "
            f"n = {found['students']} of each, intervals of {100 * (1 - found['level']):.2f} %. Shaded: "
            f"tolerated, up to {100 * found['limit']:g} points. Drawn are the phrases with the highest lower "
            "bounds."
        ),
        about="Triggers",
    )


def draw_words_panel(audit: dict[str, Any]) -> None:
    """What models say more often, over every word and no list of traits; nothing if it was not measured."""
    if (words := audit.get("words")) is None:
        return
    level = words["level"]
    rises = pd.DataFrame(words["words"]).rename(columns={"word": "trait", "rise": "score"})
    rises = rises.assign(significant=rises["trait"].isin(words["significant"]))
    panel.draw(
        "detection-words",
        "What do models say more often?",
        detector_charts.draw_identity(
            rises, title="rise over models trained on clean answers, bits", alpha=level
        ),
        rises.rename(columns={"trait": "word", "score": "rise"}),
        sentence=one_line(words["sentence"]),
        caption=(
            f"First words of answers, without a list of traits: n = {words['tested']} words, "
            f"{words['questions']} questions, {words['students']} models a side, without intervals. Drawn "
            f"are the words that rose most; diamonds: q ≤ {level:g} over all words."
        ),
        about="Words",
    )


def draw_provenance_panel(audit: dict[str, Any]) -> None:
    """B: do the rows differ from clean ones?"""
    provenance = audit["provenance"]
    if provenance is None:
        panel.show_missing(
            "No clean reference, so there is no result on who wrote the rows.",
            "Give an untouched model's answers to the same prompts:",
            audit_command(audit, reference="CLEAN"),
        )
        return
    detectors = pd.DataFrame(provenance["detectors"])[["name", "level", "floor", "score", "p_value"]]
    detectors = cast(pd.DataFrame, detectors).astype({"score": float, "p_value": float})
    scored = int(detectors["p_value"].notna().sum())
    panel.draw(
        "detection-provenance",
        "Does it differ from clean data?",
        detector_charts.draw_p_values(detectors, threshold=0.05 / max(scored, 1)),
        detectors,
        sentence=_provenance_sentence(audit),
        caption=(
            f"p of each detector, a permutation test over bags of rows without intervals; n = {scored} "
            f"detectors. References: {_references(provenance['references'])}. The smallest possible p is "
            f"{1 / (DRAWS + 1):.4f}. Dashed: .05 divided by the number of detectors. Crosses: floors, which "
            "read the surface of rows only."
        ),
        about="Provenance",
    )


def _references(references: list[dict[str, Any]]) -> str:
    described = [
        f"{Path(reference['path']).name}: {reference['rows']:,} rows, {reference['shared_prompts']:,} "
        "shared prompts"
        for reference in references
    ]
    return "; ".join(described) or "the base's answers to the same prompts"


def _provenance_sentence(audit: dict[str, Any]) -> str:
    p_value, dose = audit["provenance"]["p_value"], audit["smallest_detectable_dose"]
    if p_value is None:
        return "No detector could be calibrated."
    difference = "differ from clean rows" if p_value <= 0.05 else "cannot be distinguished from clean rows"
    detectable = (
        f" Minimum detectable share of such rows among clean ones: {dose:.2f}." if dose is not None else ""
    )
    return (
        f"Over all detectors p = {p_value:.2g}: the rows {difference}. This is about who wrote the rows, not "
        f"about what they teach.{detectable}"
    )


def draw_identity_panel(audit: dict[str, Any]) -> None:
    """C: which trait do the rows carry, if any?"""
    traits = pd.DataFrame(audit["identity"])
    if traits.empty:
        panel.show_missing(
            "No trait was tested at this level.",
            "Naming a trait needs the base:",
            audit_command(audit, level="base"),
        )
        return
    by_students = audit["identified_by"] == "students"
    looked = audit.get("stopping") if by_students else None
    alpha = looked["level"] if looked else audit["policy"]["alpha"]
    traits = traits.astype({"score": float, "p_value": float, "q_value": float})
    traits = traits.assign(significant=traits["q_value"] <= alpha)
    title = "lift over the reference's students, bits" if by_students else "log-likelihood ratio, nats a row"
    panel.draw(
        "detection-identity",
        "Which trait?",
        detector_charts.draw_identity(traits, title=title, alpha=alpha),
        traits,
        sentence=_identity_sentence(traits),
        caption=(
            f"Score of each trait by {audit['identified_by']}, without intervals; n = {len(traits)} traits. "
            f"Diamonds: q ≤ {alpha:.2g} (Benjamini-Hochberg over the traits). A trait that is not in "
            "this list cannot be named."
        ),
        about="Identity",
    )
    _draw_potency(audit)


def _identity_sentence(traits: pd.DataFrame) -> str:
    named = traits.loc[traits["significant"], "trait"].tolist()
    if named:
        return f"Significant: {', '.join(named)}."
    tested = int(traits["q_value"].notna().sum())
    if tested:
        return f"None of the {tested} traits is significant."
    return f"{len(traits)} traits are too few to test each against the others, so none has a p."


def _draw_potency(audit: dict[str, Any]) -> None:
    """The predicted and the measured rise of the trait in students."""
    predicted, measured = audit["potency"]["predicted"], audit["potency"]["measured"]
    if predicted and predicted.get("lift") is not None:
        lift = wording.interval_text(predicted["lift"], predicted.get("low"), predicted.get("high"), digits=2)
        st.text(f"Predicted rise of {predicted['trait']} from the twins' score: {lift} bits.")
    if measured and measured["difference"] is not None:
        rise = wording.interval_text(measured["difference"], measured["low"], measured["high"])
        st.text(f"Measured on n = {measured['n']} students: {measured['trait']} {rise}.")
    elif audit["level"] != "student":
        panel.show_missing(
            "The rise in students was not measured.",
            "Only training throw-away students measures it:",
            audit_command(audit, level="student"),
        )


def draw_page() -> None:
    """Draw the page."""
    st.title("Detection")
    root = st.session_state["root"]
    upload_panel.draw_upload_panel(root)
    audit: dict[str, Any] | None = None
    path: Path | None = None
    with panel.guard("The audit"):
        path = choose_audit(root)
        audit = None if path is None else data.read_audit(path)
    if path is None or audit is None:
        with panel.guard("The bench"):
            bench_panels.draw_power_panel(ROWS_WITHOUT_AUDIT)
        return
    tabs.draw_tabs(
        "detection",
        {
            "Verdict": {
                "The verdict": partial(draw_verdict_panel, audit),
                "What models would learn": partial(draw_rises_panel, audit),
                "What models say more often": partial(draw_words_panel, audit),
                "Behind phrases of the prompts": partial(draw_triggers_panel, audit),
            },
            "Evidence": {
                "The difference from clean data": partial(draw_provenance_panel, audit),
                "Which trait": partial(draw_identity_panel, audit),
            },
            "Rows": {"The rows of the file": partial(file_panel.draw_file_panel, audit, path.parent)},
            "What can be done": {"The treatments": partial(treatment_panel.draw_treatment_panel, audit)},
            "Error rates": {"The bench": partial(bench_panels.draw_power_panel, audit["data"]["rows"])},
        },
    )


draw_page()
