"""What the figures of the explorer show, how it is computed, and where it fails.

Lenses describe themselves, and the bench's card describes the detectors; the rest is here.
"""

from __future__ import annotations

from typing import Any

from mechlens.lenses import find_lenses

OWN = {
    "Effects against the control": (
        "rate(arm) − rate(control), paired by student (seed) and question, at the last checkpoint",
        "Sampled answers that name exactly one trait of the family; others are unscored. From five students "
        "on the "
        "interval is a bootstrap over students and questions, below that a t interval over students. q is "
        "Benjamini-Hochberg over the family's traits.",
        "Never against the untouched base: any training moves the answers. Few students say little of other "
        "seeds.",
    ),
    "Screen": (
        "keep a row, or drop it with the first rule that it breaks",
        "Format rules, banned words, duplicates and, where one is given, a judge.",
        "What no rule looks at is not screened.",
    ),
    "Surface tests": (
        "mean over prompts of (trait − control) / sd(control), of sixteen measures of shape; and the AUROC "
        "of a logistic regression on all of them",
        "Cross-validated with both answers to a prompt in one fold; bootstrap over prompts; the null "
        "compares halves of the control's rows.",
        "An AUROC near .5 for single rows does not say that many rows together look alike.",
    ),
    "Token shift": (
        "log2 of the share of a token in trait rows over control rows, a half added to both counts",
        "Two-sided z of the two shares, Benjamini-Hochberg over tokens.",
        "Tokens of one row are taken as independent: q is too small where rows repeat themselves.",
    ),
    "Provenance": (
        "permutation p of a detector's statistic over bags of suspect and reference rows",
        "Bags equally large on both sides, prompt by prompt where prompts are shared.",
        "Who wrote the rows is not what they teach.",
    ),
    "Identity": (
        "each trait's score against the panel's others (a leave-one-out t), and against clean rows, or none "
        "over students (t); p is the larger",
        "By students where any were trained, else by the likelihood ratio under each trait's twin.",
        "A trait outside the panel cannot be named; a teacher made otherwise can pass.",
    ),
    "Bench": (
        "AUROC and catch rate over made data sets whose truth is known",
        "Held-out traits; bags of 1 to 1,000 rows; eight classes of clean data.",
        "It tells how detectors do on data made like these.",
    ),
}
"""name → formula, how it is done, where it fails"""


def lenses() -> dict[str, dict[str, Any]]:
    """What each lens says of itself, by name; lenses of other packages are among them."""
    return {name: lens.description() for name, lens in find_lenses().items()}
