"""What the figures of the explorer show, how it is computed, and where it fails.

Lenses describe themselves, and the bench's card describes the detectors; the rest is here.
"""

from __future__ import annotations

from typing import Any

from mechlens.lenses import find_lenses

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
    "Rise": (
        "mean over pairs of students of (trait's share, suspect's student − trait's share, reference's "
        "student); a share is the trait's exact probability among the family's traits, mean over probes",
        "Student's t over pairs with the same seed, at the level of the look that the audit ended with; the "
        "variance is the trait's own or what those of all traits draw it to, whichever is larger.",
        "Another base, recipe or more rows may learn what these students did not.",
    ),
    "Why": (
        "yes if the 95 % interval lies on the claimed side of the value that means nothing (0, a share of 1, "
        "an AUROC of .5) and p against the null is at most .05; no if it lies on the other side",
        "A layer that was chosen as the most telling must also pass a normal test against its null at .05 "
        "over the number of layers.",
        "Answers are not corrected for the number of claims. `Not shown` is no evidence against a claim.",
    ),
    "Treatments": (
        "(rate of a treated student − its control's) / (the same without treatment, same seed)",
        "Mean over students with a 95 % t interval; beside it the same amount of random change. The random "
        "choice of a gradient is another trait's gradient, that of a block the next block.",
        "Measured on one trait and one recipe: what is left on another file is unknown until it is measured.",
    ),
    "Provenance": (
        "permutation p of a detector's statistic over bags of suspect and reference rows",
        "Bags of equal size on both sides, paired by prompt where prompts are shared.",
        "It tells who wrote the rows, not what they teach.",
    ),
    "Identity": (
        "by students: t test over pairs of students, and also against the other traits where all controls "
        "read one draw of clean rows; by rows: what a trait's own twin explains and no other twin does, "
        "against the other traits and over rows; p is the larger of the two",
        "Measured on students if any were trained, else by the likelihood ratio under each trait's twin.",
        "A trait that was not tested cannot be named. A teacher that was made in another way can be missed.",
    ),
    "Words": (
        "log2 of a word's mean probability as the start of an answer, students of the file over students of "
        "clean answers; p is the larger of two: over pairs of students (t), and over the other words (median "
        "absolute deviation)",
        "Every word of at least .002 mean probability on either side, over all questions of the family.",
        "Questions are the family's: a trait that they do not ask about is not seen. The verdict does not "
        "rest on these words, but on the tested traits.",
    ),
    "Triggers": (
        "a trait's rise over students of clean answers, in first words of answers, each question after a "
        "phrase; a phrase counts if the rise is significant, its interval lies above the tolerance, and the "
        "plain rise lies within the tolerance",
        "Up to 24 sentences of at most 60 characters, in five or more prompts; they share the level.",
        "A trigger that is no such sentence, or stands in no prompt of the file, is not seen.",
    ),
    "Bench": (
        "AUROC and catch rate over generated data sets of known truth",
        "Held-out traits; bags of 1 to 1,000 rows; eight classes of clean data.",
        "It shows how detectors do on data that is generated as this data was.",
    ),
    "Live model": (
        "softmax of the logits after the question, with amount × ‖student − control‖ × direction / "
        "‖direction‖ added to the residual stream",
        "Sampled answers, and exact probabilities of the next token, at temperature 1. The direction is the "
        "mean difference over practice questions with and without the trait's system line. An amount of 1 is "
        "as long as the student's mean shift from its control at that layer.",
        "One question and one student have no interval.",
    ),
}
"""name → formula, method, limits"""


def lenses() -> dict[str, dict[str, Any]]:
    """What each lens says of itself, by name; lenses of other packages are among them."""
    return {name: lens.description() for name, lens in find_lenses().items()}
