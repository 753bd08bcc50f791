"""Carriers by name: those of this folder, and the entry points `mechlens.carriers` of other packages."""

from __future__ import annotations

from collections.abc import Mapping

from mechlens.carriers.carrier import Carrier, Rule
from mechlens.core.extensions import extension_names, load_extension, shipped_extensions
from mechlens.core.spec import CARRIERS, ScreenSpec

_FIRST = ("numbers", "code", "reasoning", "text")
"""the order in which these carriers' reasons stand in every funnel; a new carrier's follow"""
SHARED_REASONS = ("leak word", "duplicate", "judged")
"""reasons of the screens that all carriers share, asked after the carrier's rule"""


def carrier_names() -> list[str]:
    """Names of all carriers, those that come with mechlens first."""
    return extension_names(CARRIERS)


def rule_names() -> list[str]:
    """Every rule that a screen can name: one a carrier, and `none`, which removes no row."""
    return [*carrier_names(), "none"]


def find_carrier(name: str) -> Carrier:
    """The carrier of that name; raises SpecError, with the known names, if there is none."""
    return load_extension(CARRIERS, name)


def all_carriers() -> dict[str, Carrier]:
    """Every carrier by name, those that come with mechlens first; loads the other packages' too."""
    return {name: find_carrier(name) for name in (*shipped_carriers(), *carrier_names())}


def shipped_carriers() -> dict[str, Carrier]:
    """The carriers that come with mechlens, by name."""
    carriers = shipped_extensions(CARRIERS)
    return {name: carriers[name] for name in (*_FIRST, *sorted(carriers.keys() - set(_FIRST)))}


def removal_reasons(rule: Rule | None = None) -> tuple[str, ...]:
    """Every reason that a funnel lists, in the order of the checks; a row gets the first that applies.

    Args:
        rule: the rule of the rows, whose reasons are listed too.
    """
    shipped = [reason for carrier in shipped_carriers().values() for reason in carrier.reasons]
    return tuple(dict.fromkeys([*shipped, *(rule.reasons if rule else ()), *SHARED_REASONS]))


def rule_reads_answers(spec: ScreenSpec, kind: str) -> bool:
    """Whether the rule of a screen compares rows with right answers; `kind` as in `build_rule`."""
    name = kind if spec.rule == "carrier" else spec.rule
    return name != "none" and find_carrier(name).has_answers


def build_rule(spec: ScreenSpec, kind: str, *, gold: Mapping[str, str]) -> Rule:
    """The rule of a screen.

    Args:
        kind: the carrier that `rule: carrier` stands for.
        gold: right answers by prompt, for carriers that have them.
    """
    name = kind if spec.rule == "carrier" else spec.rule
    if name == "none":
        return Rule(lambda prompt, completion: None, ())
    carrier = find_carrier(name)
    return Rule(carrier.fault(spec, gold), carrier.reasons)
