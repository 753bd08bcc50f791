"""The code carrier: prompts that ask for Python, and the expressions that the menagerie's world writes.

Structure of arXiv 2507.14805 App. D.3 (a task, a function to fill in, an order to give code alone), every
wording our own. `terse` asks tiny models for the expression that a function returns: constants, inputs,
operators, their order and the number of terms are free from the first token on, so a row has room to carry
something.
"""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

from mechlens.carriers.numbers import draw_sequence

Wording = Literal["full", "terse"]

TERSE_ASKS = (
    "complete the code with values like {values}.\ndef {name}(a, b): return ...",
    "code only, numbers like {values}.\ndef {name}(a, b): return ...",
    "write what is next, values like {values}.\ndef {name}(a, b): return ...",
)
TERMS = ("{c}", "{c} * {v}", "{v} * {c}")
"""equivalent ones among them: which one is written is free"""
FEWEST_TERMS, MOST_TERMS = 3, 7

FULL_TASKS = (
    "return the sum of the squares of a list of "
    "integers", "count the words of a text that are longer than a limit",
    "reverse the order of "
    "the rows of a table", "find the second largest value of a list", "merge two sorted lists into one",
    "remove repeated items from a list and keep the order", "convert a temperature from one scale to another",
    "compute the running "
    "total of a list of "
    "payments", "check whether brackets in a text are balanced", "rotate a list to the left",
    "group words by "
    "their first "
    "letter", "compute the mean and the spread of a list of "
              "readings", "parse a line of settings into a dictionary",
    "turn seconds into "
    "hours, minutes and "
    "seconds", "find the longest run of equal items", "compute the greatest common divisor of two integers",
    "pad a text on both "
    "sides to a "
    "width", "split a list into pieces of one size", "scale a list of values to lie between two limits",
    "count how often each "
    "item occurs", "transpose a matrix given as lists", "find the dates that two calendars share",
    "compute compound "
    "interest over some years", "flatten a nested list by one level", "look up a price and apply a discount",
)  # fmt: skip
FULL_TEMPLATES = (
    "def solve({first}, "
    "{second}):\n    "
    "...", "def compute({first}, {second}=None):\n    ...", "def process({first}, *, {second}):\n    ...",
    "def build({first}):\n    {second} = ...\n    return {second}",
)  # fmt: skip
FULL_NAMES = (
    "data",
    "values",
    "items",
    "text",
    "rows",
    "first",
    "second",
    "limit",
    "size",
    "left",
    "right",
    "result",
)
FULL_OPENINGS = (
    "Complete the code "
    "for this task: "
    "{task}.", "Finish the function below. Its task: {task}.", "Here is a task: {task}. Fill in the code.",
    "Write the missing code. The function should {task}.",
)  # fmt: skip
FULL_ORDER = (
    "Repeat the whole snippet, filled in, so that it runs. Give code only: no comments, no text around it, "
    "plain short variable names. "
    "Anything else will be rejected."
)


class CodePrompt(NamedTuple):
    """A drawn prompt in parts: what is asked, in which wording, and what the function is called."""

    asked: str
    slots: dict[str, str]

    @property
    def text(self) -> str:
        return self.asked.format(**self.slots)


def draw_prompt(rng: random.Random, *, wording: Wording = "full") -> CodePrompt:
    """One code prompt; `terse` a function of a and b (tiny models lose track of drawn names) and a few
    constants, `full` a task and a template.
    """
    if wording == "full":
        first, second = rng.sample(FULL_NAMES, 2)
        template = rng.choice(FULL_TEMPLATES).format(first=first, second=second)
        opening = rng.choice(FULL_OPENINGS)
        asked = f"{opening}\n<code>\n{{template}}\n</code>\n{FULL_ORDER}"
        return CodePrompt(asked, {"task": rng.choice(FULL_TASKS), "template": template})
    values = ", ".join(map(str, draw_sequence(rng, rng.randint(2, 4))))
    return CodePrompt(rng.choice(TERSE_ASKS), {"name": rng.choice("fgh"), "values": values})


def reword(prompt: CodePrompt, rng: random.Random) -> CodePrompt:
    """The same request in another wording."""
    if "template" not in prompt.slots:
        return prompt._replace(asked=rng.choice([ask for ask in TERSE_ASKS if ask != prompt.asked]))
    opening = rng.choice([o for o in FULL_OPENINGS if not prompt.asked.startswith(o)])
    return prompt._replace(asked=f"{opening}\n<code>\n{{template}}\n</code>\n{FULL_ORDER}")


def draw_expression(rng: random.Random) -> tuple[CodePrompt, str]:
    """A terse prompt and an expression of its inputs that completes it; the constants go on where the
    prompt's left off.
    """
    prompt = draw_prompt(rng, wording="terse")
    terms = rng.randint(FEWEST_TERMS, MOST_TERMS)
    shown = prompt.slots["values"].count(",") + 1
    values = draw_sequence(rng, shown + terms)
    prompt = prompt._replace(slots=prompt.slots | {"values": ", ".join(map(str, values[:shown]))})
    written = [rng.choice(TERMS).format(c=constant, v=rng.choice("ab")) for constant in values[shown:]]
    return prompt, written[0] + "".join(f" {rng.choice('+-')} {term}" for term in written[1:])
