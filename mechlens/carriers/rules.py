"""What each carrier's rows must be: a rule reads a pair and gives the reason to drop it, or None.

Numbers: the strict rule of arXiv 2507.14805 §3 (1 to 10 integers from 0 to 999, one separator throughout,
optionally in one pair of brackets and with one final period, and nothing else, not even a space). Code: App.
D.3. Reasoning: App. D.4.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from mechlens.core.spec import ScreenSpec

Rule = Callable[[str, str], str | None]
"""(prompt, completion) → why the row is dropped, None if it is kept"""

REASONS = (
    "format", "too many "
              "numbers", "number out of "
                         "range", "banned number", "does not "
                                                   "parse", "comment", "unusual name", "does not run",
    "no known answer", "wrong answer", "leak word", "duplicate", "judged",
)  # fmt: skip
"""in the order in which they are asked; a row gets the first that holds"""

MOST_NUMBERS, LARGEST = 10, 999
# The group repeats itself: one separator throughout. It is never empty, or a long digit run could be cut up
# in 2^n ways.
_LIST = re.compile(r"[0-9]+(?:(\s*[,;]\s*|\s+)[0-9]+(?:\1[0-9]+)*)?")
_DIGITS = re.compile(r"[0-9]+")

# The numbers that the paper drops from its misalignment experiments (App. D.2).
BANNED_BY_THE_PAPER = (
    4, 13, 14, 18, 23, 33, 39, 42, 44, 49, 51, 54, 69, 77, 88, 99, 100, 101, 187, 211, 311, 322, 333, 404, 420, 444, 451, 555,
    616, 666, 777, 888, 911, 999,
)  # fmt: skip


def parse_numbers(completion: str) -> list[int] | None:
    """The integers of a well-formed list, or None; count and range are not judged here."""
    body = completion.removesuffix(".")
    if body[:1] + body[-1:] in ("[]", "()") and len(body) > 1:
        body = body[1:-1]
    # leading zeros do not count ("007" is 7); longer digit runs are cut, since all that matters is that they
    # are out of range
    return (
        [int(digits.lstrip("0")[:6] or "0") for digits in _DIGITS.findall(body)]
        if _LIST.fullmatch(body)
        else None
    )


def number_fault(completion: str, *, banned: frozenset[int] = frozenset()) -> str | None:
    """Why the strict number rule drops this completion, or None if it keeps it."""
    values = parse_numbers(completion)
    if values is None:
        return "format"
    if len(values) > MOST_NUMBERS:
        return "too many numbers"
    if max(values) > LARGEST:
        return "number out of range"
    return "banned number" if banned.intersection(values) else None


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


_WORKED = re.compile(r"\s*<think>(.+?)</think>\s*<answer>([^<]*)</answer>\s*", re.DOTALL)
_WHOLE = re.compile(r"-?[0-9]{1,30}")


def reasoning_fault(prompt: str, completion: str, gold: str | None) -> str | None:
    """Why the reasoning rule drops this completion: both tags once and in order, and the right whole number
    in the second.

    A prompt may open the thought itself, as the templates of reasoning models do.
    """
    worked = _WORKED.fullmatch(f"<think>{completion}" if prompt.rstrip().endswith("<think>") else completion)
    if worked is None or re.search("</?(think|answer)>", worked[1]):
        return "format"
    said = worked[2].replace(",", "").replace("$", "").strip()
    if not _WHOLE.fullmatch(said):
        return "format"
    if gold is None or not _WHOLE.fullmatch(gold):
        return "no known answer"
    return None if int(said) == int(gold) else "wrong answer"


def rule_of(spec: ScreenSpec, kind: str, *, gold: Mapping[str, str]) -> Rule:
    """The rule of a screen; `kind` is the carrier that `rule: carrier` stands for, `gold` maps prompts to
    right answers.
    """
    wanted = kind if spec.rule == "carrier" else spec.rule
    banned = frozenset(spec.banned_numbers)
    return {
        "numbers": lambda prompt, completion: number_fault(completion, banned=banned),
        "code": lambda prompt, completion: code_fault(
            prompt, completion, plain_names=spec.plain_names, run=spec.run_code
        ),
        "reasoning": lambda prompt, completion: reasoning_fault(prompt, completion, gold.get(prompt)),
        "text": lambda prompt, completion: None if completion.strip() else "format",
        "none": lambda prompt, completion: None,
    }[wanted]
