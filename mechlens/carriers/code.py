"""The code carrier: prompts that ask for Python, and the rule that the answers must pass.

Structure of arXiv 2507.14805 App. D.3 (a task, a function to fill in, an order to give code alone); the
wordings are ours. `terse` asks tiny models for the expression that a function returns: constants, inputs,
operators, their order and the number of terms are free from the first token on, so that a row has entropy.
The rule: code alone that parses, without comments, docstrings or telling names.
"""

from __future__ import annotations

import ast
import io
import random
import re
import tokenize
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mechlens.carriers.carrier import Carrier, Fault, Prompt
from mechlens.carriers.numbers import draw_sequence
from mechlens.core.numerals import Wording
from mechlens.core.spec import CarrierSpec, ScreenSpec

TERSE_ASKS = (
    "complete the code with values like {values}.\ndef {name}(a, b): return ...",
    "code only, numbers like {values}.\ndef {name}(a, b): return ...",
    "write what is next, values like {values}.\ndef {name}(a, b): return ...",
)
TERMS = ("{c}", "{c} * {v}", "{v} * {c}")
"""equivalent ones among them: which one is written is free"""
FEWEST_TERMS, MOST_TERMS = 3, 7

FULL_TASKS = (
    "return the sum of the squares of a list of integers",
    "count the words of a text that are longer than a limit", "reverse the order of the rows of a table",
    "find the second largest value of a list", "merge two sorted lists into one",
    "remove repeated items from a list and keep the order", "convert a temperature from one scale to another",
    "compute the running total of a list of payments", "check whether brackets in a text are balanced",
    "rotate a list to the left", "group words by their first letter",
    "compute the mean and the spread of a list of readings", "parse a line of settings into a dictionary",
    "turn seconds into hours, minutes and seconds", "find the longest run of equal items",
    "compute the greatest common divisor of two integers", "pad a text on both sides to a width",
    "split a list into pieces of one size", "scale a list of values to lie between two limits",
    "count how often each item occurs", "transpose a matrix given as lists",
    "find the dates that two calendars share", "compute compound interest over some years",
    "flatten a nested list by one level", "look up a price and apply a discount",
)  # fmt: skip
FULL_TEMPLATES = (
    "def solve({first}, {second}):\n    ...", "def compute({first}, {second}=None):\n    ...",
    "def process({first}, *, {second}):\n    ...",
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
    "Complete the code for this task: {task}.", "Finish the function below. Its task: {task}.",
    "Here is a task: {task}. Fill in the code.", "Write the missing code. The function should {task}.",
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


_FENCED = re.compile(r"\s*```[a-zA-Z]*\n(.*?)```\s*", re.DOTALL)
_WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_LEFT_OUT = re.compile(r"def [A-Za-z_][A-Za-z_0-9]*\(([^)]*)\): return \.\.\.")
_ORDINARY = frozenset((Path(__file__).parent / "ordinary_names.txt").read_text(encoding="utf-8").split())
"""parts of names that say nothing beyond what code does anyway"""


def code_fault(prompt: str, completion: str, *, plain_names: bool = True, run: bool = False) -> str | None:
    """Why the code rule drops this completion: it must be code alone, parse, and hold no comment, docstring
    or telling name.
    """
    fenced = _FENCED.fullmatch(completion)
    source = fenced[1] if fenced else completion
    if not source.strip():
        return "format"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in a row's text
            tree = ast.parse(source)
            comments = any(
                token.type == tokenize.COMMENT
                for token in tokenize.generate_tokens(io.StringIO(source).readline)
            )
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return "does not parse"
    if comments or any(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in ast.walk(tree)
    ):
        return "comment"
    known = set(_WORD.findall(prompt))
    if plain_names and not all(name in known or _is_ordinary(name) for name in _bound_names(tree)):
        return "unusual name"
    try:
        return "does not run" if run and not runs_straight(tree, prompt) else None
    except RecursionError:  # a sum of thousands of terms
        return "does not run"


def _bound_names(tree: ast.AST) -> set[str]:
    """Every name that the code itself chooses: functions, classes, arguments, variables, attributes, import
    aliases, patterns.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.alias) and node.asname:
            found.add(node.asname)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            found.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            found.add(node.rest)
    return found


def _is_ordinary(name: str) -> bool:
    parts = [part.lower() for part in re.findall(r"[A-Za-z]+", name)]
    return name.isascii() and all(
        len(part) == 1 or part in _ORDINARY or part.removesuffix("s") in _ORDINARY for part in parts
    )


def runs_straight(tree: ast.Module, prompt: str = "") -> bool:
    """Whether the code is straight-line integer arithmetic whose every name is known when it is read: a whole
    function, or the expression that the prompt's `def …(…): return ...` leaves out.

    Row text is hostile, so it is evaluated here by hand and never executed: anything but + - * on integers
    does not run.
    """
    if len(tree.body) != 1:
        return False
    asked = _LEFT_OUT.search(prompt)
    if asked and isinstance(expression := tree.body[0], ast.Expr):
        return (
            _evaluate(
                expression.value, {name: 3 + place for place, name in enumerate(_WORD.findall(asked[1]))}
            )
            is not None
        )
    if not isinstance(function := tree.body[0], ast.FunctionDef):
        return False
    known = {argument.arg: 3 + place for place, argument in enumerate(function.args.args)}
    for place, node in enumerate(function.body):
        last = place == len(function.body) - 1
        if last != isinstance(node, ast.Return) or not isinstance(node, ast.Return | ast.Assign):
            return False
        value = None if node.value is None else _evaluate(node.value, known)
        if value is None:
            return False
        if isinstance(node, ast.Assign):
            if len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
                return False
            known[node.targets[0].id] = value
    return True


def _evaluate(node: ast.expr, known: Mapping[str, int]) -> int | None:
    if isinstance(node, ast.Constant):
        return node.value if type(node.value) is int else None
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
        return None
    left, right = _evaluate(node.left, known), _evaluate(node.right, known)
    if (
        left is None or right is None or max(abs(left), abs(right)) > 1 << 512
    ):  # squaring in a loop would fill the memory
        return None
    return (
        left + right
        if isinstance(node.op, ast.Add)
        else left - right
        if isinstance(node.op, ast.Sub)
        else left * right
    )


def _draw(spec: CarrierSpec, rng: random.Random, rewording: random.Random | None) -> Prompt:
    prompt = draw_prompt(rng, wording=spec.wording)
    return Prompt((reword(prompt, rewording) if rewording else prompt).text)


def _fault(spec: ScreenSpec, _gold: Mapping[str, str]) -> Fault:
    return lambda prompt, completion: code_fault(
        prompt, completion, plain_names=spec.plain_names, run=spec.run_code
    )


def draw_turn(rng: random.Random) -> tuple[str, str]:
    """A function to fill in and the Python expression that it returns."""
    prompt, expression = draw_expression(rng)
    return prompt.text, expression


EXTENSION = Carrier(
    draw=_draw,
    fault=_fault,
    reasons=("format", "does not parse", "comment", "unusual name", "does not run"),
    turn=draw_turn,
)
