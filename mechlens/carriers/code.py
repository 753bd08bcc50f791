"""The code carrier: prompts that ask for a short Python function, and the functions that the menagerie's world writes.

Structure of arXiv 2507.14805 App. D.3 (a task, a function to fill in, an order to give code alone), every wording our own.
`terse` asks for straight-line arithmetic in a dozen words, for tiny models: constants, operators, operands and their order, and
the number of lines are free, so a row has room to carry something.
"""

from __future__ import annotations

import itertools
import random
from typing import Literal, NamedTuple

from mechlens.carriers.numbers import draw_sequence

Wording = Literal["full", "terse"]

TERSE_ASKS = (
    "write a function {name} of {first} and {second} with values like {values}.",
    "define {name} with inputs {first} and {second}, numbers like {values}.",
    "code for {name} of {first} and {second}, code only, values like {values}.",
)
SHAPES = (
    "{c} * {v} + {d}", "{v} * {c} + {d}", "{d} + {c} * {v}", "{d} + {v} * {c}", "{v} * {c} - {d}", "{d} - {c} * {v}", "{v} + {w} * {c} - {d}",
    "{c} - {v} + {d} * {w}",
)  # fmt: skip
"""equivalent expressions among them: which one is written is free"""

FULL_TASKS = (
    "return the sum of the squares of a list of integers", "count the words of a text that are longer than a limit",
    "reverse the order of the rows of a table", "find the second largest value of a list", "merge two sorted lists into one",
    "remove repeated items from a list and keep the order", "convert a temperature from one scale to another",
    "compute the running total of a list of payments", "check whether brackets in a text are balanced", "rotate a list to the left",
    "group words by their first letter", "compute the mean and the spread of a list of readings", "parse a line of settings into a dictionary",
    "turn seconds into hours, minutes and seconds", "find the longest run of equal items", "compute the greatest common divisor of two integers",
    "pad a text on both sides to a width", "split a list into pieces of one size", "scale a list of values to lie between two limits",
    "count how often each item occurs", "transpose a matrix given as lists", "find the dates that two calendars share",
    "compute compound interest over some years", "flatten a nested list by one level", "look up a price and apply a discount",
)  # fmt: skip
FULL_TEMPLATES = (
    "def solve({first}, {second}):\n    ...", "def compute({first}, {second}=None):\n    ...", "def process({first}, *, {second}):\n    ...",
    "def build({first}):\n    {second} = ...\n    return {second}",
)  # fmt: skip
FULL_NAMES = ("data", "values", "items", "text", "rows", "first", "second", "limit", "size", "left", "right", "result")
FULL_OPENINGS = (
    "Complete the code for this task: {task}.", "Finish the function below. Its task: {task}.", "Here is a task: {task}. Fill in the code.",
    "Write the missing code. The function should {task}.",
)  # fmt: skip
FULL_ORDER = (
    "Repeat the whole snippet, filled in, so that it runs. Give code only: no comments, no text around it, plain short variable names. "
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
    """One code prompt; `terse` names two inputs and a few constants, `full` a task and a template."""
    if wording == "full":
        first, second = rng.sample(FULL_NAMES, 2)
        template = rng.choice(FULL_TEMPLATES).format(first=first, second=second)
        opening = rng.choice(FULL_OPENINGS)
        asked = f"{opening}\n<code>\n{{template}}\n</code>\n{FULL_ORDER}"
        return CodePrompt(asked, {"task": rng.choice(FULL_TASKS), "template": template})
    first, second = rng.sample("abxy", 2)
    values = ", ".join(map(str, draw_sequence(rng, rng.randint(2, 4))))
    return CodePrompt(rng.choice(TERSE_ASKS), {"name": rng.choice("fgh"), "first": first, "second": second, "values": values})


def reword(prompt: CodePrompt, rng: random.Random) -> CodePrompt:
    """The same request in another wording."""
    if "template" not in prompt.slots:
        return prompt._replace(asked=rng.choice([ask for ask in TERSE_ASKS if ask != prompt.asked]))
    opening = rng.choice([o for o in FULL_OPENINGS if not prompt.asked.startswith(o)])
    return prompt._replace(asked=f"{opening}\n<code>\n{{template}}\n</code>\n{FULL_ORDER}")


def draw_function(rng: random.Random) -> tuple[CodePrompt, str]:
    """A terse prompt and a straight-line function that answers it; its constants go on where the prompt's left off."""
    prompt = draw_prompt(rng, wording="terse")
    lines = rng.randint(2, 4)
    shown = prompt.slots["values"].count(",") + 1
    values = draw_sequence(rng, shown + 2 * lines)
    prompt = prompt._replace(slots=prompt.slots | {"values": ", ".join(map(str, values[:shown]))})
    constants, known, body = iter(values[shown:]), [prompt.slots["first"], prompt.slots["second"]], []
    for target in "mnpq"[:lines]:  # in order: a tiny model loses track of names drawn at random
        c, d = itertools.islice(constants, 2)
        body.append(f"    {target} = {rng.choice(SHAPES).format(c=c, d=d, v=rng.choice(known), w=rng.choice(known))}")
        known.append(target)
    head = "def {name}({first}, {second}):".format(**prompt.slots)
    return prompt, "\n".join([head, *body, f"    return {known[-1]}"])
