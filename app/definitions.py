"""Definitions for page Methods: lenses describe themselves in their source, detectors on the bench's card,
and the other measures are described here. No torch.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

LENSES = Path(__file__).parents[1] / "mechlens" / "lenses"

OWN = {
    "Effects against the control": (
        "rate(arm) − rate(control), paired by student (seed) and question, at the last checkpoint",
        "A rate is the share of the trait among the sampled answers that name exactly one trait of the "
        "family; other answers are unscored. With five students or more the interval is a bootstrap over "
        "students and questions, with fewer a t interval over students. q is Benjamini-Hochberg over the "
        "family's traits.",
        "Effects are never taken against the untouched base, because any training changes the answers. A few "
        "students say little about other seeds.",
    ),
    "Screen": (
        "keep a row, or remove it for the first rule that it breaks",
        "Format rules, banned words, duplicates and, if one is set, a judge.",
        "The screen sees only what its rules test.",
    ),
    "Surface tests": (
        "mean over prompts of (trait − control) / sd(control), of sixteen measures of shape; and the AUROC "
        "of a logistic regression on all of them",
        "Cross-validated with both answers to a prompt in one fold; bootstrap over prompts; the null "
        "compares halves of the control's rows.",
        "An AUROC near .5 for single rows does not show that many rows together look alike.",
    ),
    "Token shift": (
        "log2 of the share of a token in trait rows over control rows, a half added to both counts",
        "Two-sided z test of the two shares, Benjamini-Hochberg over tokens.",
        "Tokens of one row are taken as independent: q is too small where rows repeat themselves.",
    ),
    "Provenance": (
        "permutation p of a detector's statistic over bags of suspect and reference rows",
        "Bags of equal size on both sides, paired by prompt where prompts are shared.",
        "It tells who wrote the rows, not what they teach.",
    ),
    "Identity": (
        "each trait's score against the other traits' (a leave-one-out t test), and against clean rows or, "
        "by students, against zero (t test); p is the larger of the two",
        "Measured on students if any were trained, else by the likelihood ratio under each trait's twin.",
        "A trait that was not tested cannot be named. A teacher that was made in another way can be missed.",
    ),
    "Bench": (
        "AUROC and catch rate over generated data sets whose truth is known",
        "Held-out traits; bags of 1 to 1,000 rows; eight classes of clean data.",
        "It shows how detectors do on data that is generated as this data was.",
    ),
    "Live model": (
        "softmax of the logits after the question, with factor × direction added to the residual stream",
        "Sampled answers, and exact probabilities of the next token, at temperature 1. The direction is the "
        "mean difference over practice questions with and without the trait's system line.",
        "One question and one student have no interval.",
    ),
}
"""name → formula, method, limits"""


class _Named(ast.NodeTransformer):
    """Puts the module's own texts where their names stand."""

    def __init__(self, module: ast.Module) -> None:
        self.texts: dict[str, ast.expr] = {}
        for node in module.body:
            if isinstance(node, ast.Assign):
                for target, value in _pairs(node.targets[0], node.value):
                    self.texts |= (
                        {target.id: value}
                        if isinstance(target, ast.Name) and isinstance(value, ast.Constant)
                        else {}
                    )

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.texts.get(node.id, node)


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
    return list(zip(target.elts, value.elts, strict=True)) if both else [(target, value)]


@cache
def lenses() -> dict[str, dict[str, Any]]:
    """What each lens says of itself, read from its source: importing it would load torch."""
    found = {}
    for path in sorted(LENSES.glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for node in module.body:
            if (
                isinstance(node, ast.Assign)
                and ast.unparse(node.targets[0]) == "LENS"
                and isinstance(node.value, ast.Call)
            ):
                named = _Named(module)
                found[path.stem] = {
                    str(word.arg): ast.literal_eval(named.visit(word.value)) for word in node.value.keywords
                }
    return found
