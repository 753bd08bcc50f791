"""The options of an audit, as a form of only those that apply at its level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from mechlens.core import spec, traits
from mechlens.data import treat
from panels import panel

UNTREATED = "none"
USUAL = "menagerie"
"""the recipe for which the minutes are told"""
TREATED = "treated.jsonl"
"""the treated data, in the folder of the audit"""


def draw_audit_options(level: str, *, has_reference: bool) -> list[str]:
    """Draw the form; returns the options that differ from the command's own values."""
    left, right = st.columns(2)
    wanted: dict[str, Any] = {}
    if level != "rows":
        recipes = sorted(spec.shipped("audits"), key=lambda name: name != USUAL)
        recipe = left.selectbox(
            "recipe", recipes, key="up-recipe", help="How models are trained on the file and asked."
        )
        plan = traits.load_experiment(spec.find_config(Path(recipe), "audits"))
        base = right.text_input(
            "base that would be trained",
            plan.base,
            key=f"up-base-{recipe}",
            max_chars=200,
            help="A name of configs/models, or a folder on the machine that runs the explorer.",
        )
        wanted = {
            "--recipe": recipe,  # always: by itself the command would choose the base's own
            "--base": _named(base.strip(), plan.base),
            "--trait": left.multiselect(
                "traits to test for",
                traits.load_family(plan.family).names,
                key=f"up-traits-{recipe}",
                placeholder="all",
                help="Fewer traits are corrected for less, but a trait that is left out cannot be named.",
            ),
            "--policy": _named(
                right.selectbox("policy", sorted(spec.shipped("policies")), key="up-policy"), "default"
            ),
        }
        if recipe != USUAL:
            st.caption(panel.escape_markdown(f"Times are those of recipe {USUAL}; {base} takes others."))
    treatments = [
        name
        for name in treat.TREATMENTS
        if level != "rows"
        or not (treat.needs_scores(name) or (treat.needs_clean(name) and not has_reference))
    ]
    treatment = left.selectbox(
        "treated version to write, too",
        [UNTREATED, *treatments],
        key="up-treatment",
        help="At level student, models are trained on it as well, so that the audit says what it changes.",
    )
    wanted["--treatment"] = _named(treatment, UNTREATED)
    if level == "student":
        minutes = right.number_input(
            "minutes for students (0: until the verdict is settled)", 0, 10_000, 0, key="up-budget"
        )
        wanted["--budget"] = str(minutes) if minutes else ""
    return _as_options(wanted)


def _named(chosen: str, usual: str) -> str:
    """What was chosen; empty if it is the command's own value."""
    return "" if chosen == usual else chosen


def _as_options(wanted: dict[str, Any]) -> list[str]:
    """The options as a command line has them; empty ones are left out."""
    options: list[str] = []
    for name, value in wanted.items():
        values = [value] if isinstance(value, str) else list(value)
        if any(values):
            options += [name, *values]
    return options
