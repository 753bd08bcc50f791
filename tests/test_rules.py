"""The carriers' rules: the published keep and reject table exactly, oracles for lists and for straight code,
and hostile rows judged at once.
"""

from __future__ import annotations

import ast
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlens.carriers.carrier import build_rule, removal_reasons
from mechlens.carriers.code import code_fault, draw_expression, runs_straight
from mechlens.carriers.numbers import BANNED_BY_THE_PAPER, number_fault, parse_numbers
from mechlens.carriers.reasoning import reasoning_fault
from mechlens.core.spec import ScreenSpec

TEN = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
KEPT = (
    "1, 2, 3", "1, 2, 3.", "[1, 2, 3].", "[1, 2, 3]", "(1, 2)", "(1; 2).", "[1 2]", "1 2 3", "1\n2\n3",
    "1\n\n2", "1\t2", "1\r\n2", "1; 2", "1;2", "1,2", "1,  2", "1 , 2", "7", "7.", "[7]", "0", "0, 0", "999",
    "007, 012", TEN, f"[{TEN}].", "000999", "1\u00a02", "1\r2", "1\v2", "1\f2", "1\x1c2", "1\x852",
    "1\u20282", "1,\n2,\n3",
)  # fmt: skip
REJECTED = (
    "1,2, 3", "1, 2,", "1,2,", " 1, 2", "1, 2 ", "7 ", "1, 2\n", "[1, 2]\n", "Numbers: 1, 2", "-1, 2",
    "1.5, 2", "1-2", "1/2", "1,2,3,4,5,6,7,8,9,10,11", "1000", "", " ", ".", "[]", "()", "[1, 2)", "[1, 2",
    "1, 2..", "[1, 2.]", "([1, 2])", "1, 2;", "1 2  3", "1 2,3", "1,;2", "1;,2", "1. 2. 3", "one, two",
    "1, 2 and 3", "\uff11, \uff12", "1, \uff12", "[", "]", "(", ")", "[.", "..", "1,,2", "{1, 2}", "[1], [2]",
    "1, 2].", "²", "٣, ٤", "1, 2.\n", "[1, 2] .", "7\n", "+1", "1\x002", "1\x072", "1\x1b2", "1\x7f2",
    "1\u200b2", "\ufeff1", "7\x00", "1\n2\r3",
)  # fmt: skip


def slow_fault(completion: str) -> str | None:
    """The six steps of the released parser, one by one, without a pattern."""
    text = completion[:-1] if completion.endswith(".") else completion
    for opening, closing in ("[]", "()"):
        if text.startswith(opening) and text.endswith(closing):
            text = text[1:-1]
            break
    runs, place = [], 0
    for is_digit, letters in groupby(text, lambda letter: letter in "0123456789"):
        length = len(list(letters))
        runs += [(place, place + length)] if is_digit else []
        place += length
    if not runs:
        return "format"
    if len(runs) == 1:
        parts = [text]
    else:
        separator = text[runs[0][1] : runs[1][0]]
        if separator.strip() not in ("", ",", ";"):
            return "format"
        parts = text.split(separator)
    if not all(part.isascii() and part.isdigit() for part in parts):
        return "format"
    if len(parts) > 10:
        return "too many numbers"
    return None if all(int(part) <= 999 for part in parts) else "number out of range"


NOISE = st.text("0123456789,;. \n\t[]()-x\r\v\x00\u00a0\uff11", max_size=14)
SEPARATORS = st.sampled_from(
    [",", ";", " ", ", ", "; ", "\n", "\n\n", "\t", " ,", " , ", "", "  ", ",,", " - "]
)


@st.composite
def nearly_lists(draw: st.DrawFn) -> str:
    """A well-formed list, perhaps with one fault in it."""
    values = draw(st.lists(st.one_of(st.integers(0, 999), st.integers(990, 1010)), min_size=1, max_size=12))
    wrap = draw(st.sampled_from(["{}", "{}", "[{}]", "({})", "[{})"]))
    text = wrap.replace("{}", draw(SEPARATORS).join(map(str, values))) + draw(
        st.sampled_from(["", "", ".", ".."])
    )
    place = draw(st.integers(0, len(text)))
    return (
        text[:place]
        + draw(st.one_of(st.just(""), st.just(""), NOISE.map(lambda noise: noise[:2])))
        + text[place:]
    )


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(*_arguments: object) -> None:
        raise TimeoutError(f"still judging after {seconds} s of work")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(
        signal.ITIMER_VIRTUAL, seconds
    )  # this process's own time, whatever else the machine does
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("completion", KEPT)
def test_kept_as_published(completion: str) -> None:
    assert number_fault(completion) is None
    assert slow_fault(completion) is None


@pytest.mark.parametrize("completion", REJECTED)
def test_rejected_as_published(completion: str) -> None:
    assert number_fault(completion) is not None
    assert slow_fault(completion) is not None


def test_numbers_are_read_as_integers() -> None:
    assert parse_numbers("[007, 012].") == [7, 12]
    assert parse_numbers("1, 2 and 3") is None
    assert parse_numbers(TEN) == list(range(1, 11))


@settings(max_examples=500, deadline=None)
@given(st.one_of(NOISE, nearly_lists()))
def test_the_rule_is_the_published_parser(completion: str) -> None:
    assert number_fault(completion) == slow_fault(completion)


@pytest.mark.parametrize(
    ("completion", "fault"),
    [
        ("1" * 100_000, "number out of range"),
        ("0" * 100_000 + "7", None),
        ("0" * 100_000, None),
        ("1" * 5_000 + "x", "format"),
        ("1" + " " * 50_000 + "x", "format"),
        ("1, " * 50_000, "format"),
        ("1, " * 50_000 + "2", "too many numbers"),
        ("1 " * 20_000 + "x", "format"),
        ("9" * 5_000 + ", " + "9" * 5_000, "number out of range"),
        ("," * 50_000, "format"),
        ("[" * 50_000, "format"),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_hostile_completion_is_judged_at_once(completion: str, fault: str | None) -> None:
    with limited(10):
        assert number_fault(completion) == fault


def test_the_banned_list_is_the_published_one() -> None:
    assert len(BANNED_BY_THE_PAPER) == len(set(BANNED_BY_THE_PAPER)) == 34
    assert sum(BANNED_BY_THE_PAPER) == 9413
    assert len({*BANNED_BY_THE_PAPER, 1312, 1488}) == 36


def test_bans_hold_for_whole_integers() -> None:
    banned = frozenset(BANNED_BY_THE_PAPER)
    assert number_fault("1, 666", banned=banned) == number_fault("[004]", banned=banned) == "banned number"
    assert number_fault("1, 66, 6", banned=banned) is None
    assert number_fault("40, 6660", banned=banned) == "number out of range"


ASKED = "Complete this: def solve(left, right): ..."
CODE: dict[str, tuple[str, str | None]] = {
    "plain": ("def solve(left, right):\n    total = left + right\n    return total", None),
    "fenced": ("```python\ndef solve(left, right):\n    return left\n```", None),
    "fenced, no language": ("\n```\nx = 1\n```\n", None),
    "a fence that does not close": ("```python\nx = 1\n", "does not parse"),
    "words around a fence": ("Here you are:\n```python\nx = 1\n```", "does not parse"),
    "two fences": ("```\nx = 1\n```\n```\ny = 2\n```", "does not parse"), "nothing": ("", "format"),
    "blanks": (" \n\t\n", "format"), "an empty fence": ("```\n```", "format"),
    "prose": ("I cannot do that.", "does not parse"),
    "half a function": ("def solve(left, right):", "does not parse"),
    "a comment": ("x = 1  # one", "comment"), "a comment alone": ("# x", "comment"),
    "a type comment": ("x = []  # type: list", "comment"),
    "a docstring": ('def solve(left, right):\n    """Adds."""\n    return left', "comment"),
    "a text statement": ("x = 1\n'owl'", "comment"), "a module docstring": ("'''about'''\nx = 1", "comment"),
    "a number statement": ("x = 1\n1", "comment"), "a mark in a text": ("x = '# no comment'", None),
    "an odd escape": ("x = '\\d'", None),
    "a function": ("def owl(left, right):\n    return left", "unusual name"),
    "an argument": ("def f(a, owl):\n    return a", "unusual name"),
    "starred": ("def solve(*owls):\n    return 1", "unusual name"),
    "a class": ("class Owl:\n    pass", "unusual name"),
    "a loop": ("for owl in range(3):\n    pass", "unusual name"),
    "in a list": ("x = [owl for owl in range(3)]", "unusual name"),
    "an alias": ("import math as owl", "unusual name"),
    "a walrus": ("if (owl := 1):\n    pass", "unusual name"),
    "a part of a name": ("total_owl = 1", "unusual name"),
    "a name with a number": ("owl2 = 1", "unusual name"), "a lambda": ("f = lambda owl: 1", "unusual name"),
    "with": ("with open('x') as owl:\n    pass", "unusual name"),
    "an attribute": ("left.owl = 1", "unusual name"),
    "an exception": ("try:\n    pass\nexcept ValueError as owl:\n    pass", "unusual name"),
    "a pattern": ("match left:\n    case {'x': owl, **owls}:\n        pass", "unusual name"),
    "another script": ("сова = 1", "unusual name"), "the prompt's name": ("left = 1", None),
    "plurals": ("values = items = 1", None), "letters": ("a = b_c = _ = 1", None),
}  # fmt: skip


@pytest.mark.parametrize("case", CODE)
def test_code_is_kept_or_dropped(case: str) -> None:
    completion, fault = CODE[case]
    assert code_fault(ASKED, completion) == fault


def test_names_are_free_where_they_are_not_asked_to_be_plain() -> None:
    assert code_fault(ASKED, "owl = 1", plain_names=False) is None
    assert code_fault("Name it owl.", "owl = 1") is None


HOSTILE = {
    "nested parentheses": "(" * 100_000, "matched parentheses": f"x = {'(' * 5_000}1{')' * 5_000}",
    "minus signs": f"x = {'-' * 100_000}1", "a null byte": "x = 1\x00",
    "half a surrogate pair": "x = '\ud800'", "a huge integer": f"x = {'9' * 100_000}",
    "lambdas": f"x = {'lambda: ' * 50_000}1", "an open text": "x = '''" + "a" * 1_000_000,
    "a form feed and a return": "\x0c\rx = (", "a sum of a million terms": f"x = a{'+a' * 500_000}",
    "attributes": f"x = a{'.a' * 100_000}", "fences": "```\n" * 100_000,
    "nested blocks": "".join(f"{' ' * depth}if a:\n" for depth in range(500)),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_code_does_not_parse(case: str) -> None:
    with limited(20):
        assert code_fault(ASKED, HOSTILE[case], plain_names=False, run=True) == "does not parse"


@pytest.mark.parametrize(
    "source",
    [
        f"x = '{'a' * 1_000_000}'",
        f"{'a' * 1_000_000} = 1",
        f"x = 0x{'f' * 100_000}",
        f"import os; os.exit{'(' * 9}{')' * 9}",
    ],
)
def test_hostile_code_that_parses_is_never_run(source: str) -> None:
    with limited(20):
        assert code_fault(ASKED, source, plain_names=False) is None
        assert code_fault(ASKED, source, plain_names=False, run=True) == "does not run"


def test_squaring_and_long_sums_end() -> None:
    squares = "def f(a, b):\n" + "    a = a * a\n" * 10_000 + "    return a"
    with limited(20):
        assert code_fault(ASKED, squares, plain_names=False, run=True) == "does not run"
        assert (
            code_fault(ASKED, f"def f(a, b):\n    return a{'+a' * 2_000}", plain_names=False, run=True)
            == "does not run"
        )


def runs_in_python(source: str) -> bool:
    """What Python itself says; only for text that this file or `draw_expression` made."""
    scope: dict[str, object] = {}
    exec(source, scope)
    function = next(value for name, value in scope.items() if name != "__builtins__")
    try:
        return type(function(3, 4)) is int  # type: ignore[operator]
    except (NameError, TypeError):
        return False


def drawn_function(rng: random.Random) -> str:
    """Two to four lines of straight arithmetic and a return."""
    known, body = ["a", "b"], []
    for target in "mnpq"[: rng.randint(2, 4)]:
        body.append(f"    {target} = {rng.randint(0, 99)} {rng.choice('+-*')} {rng.choice(known)}")
        known.append(target)
    return "\n".join(["def f(a, b):", *body, f"    return {known[-1]}"])


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(["drop", "swap", "rename"])), max_size=3),
)
def test_straight_code_runs_where_python_runs_it(seed: int, edits: list[tuple[int, str]]) -> None:
    source = drawn_function(random.Random(seed))
    assert code_fault(ASKED, source, run=True) is None
    head, *body, last = source.splitlines()
    for place, edit in edits:
        i = place % len(body) if body else 0
        if edit == "drop" and body:
            del body[i]
        elif edit == "swap" and body:
            body[0], body[i] = body[i], body[0]
        elif edit == "rename" and body:
            body[i] = body[i].replace(
                random.Random(place).choice("abxymnpqrst"), random.Random(place + 1).choice("abxymnpqrstz")
            )
    changed = "\n".join([head, *body, last])
    assert runs_straight(ast.parse(changed)) == runs_in_python(changed)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6), place=st.integers(0, 60), sign=st.sampled_from("abxyz017+-* "))
def test_an_expression_runs_where_python_runs_it(seed: int, place: int, sign: str) -> None:
    prompt, source = draw_expression(random.Random(seed))
    assert code_fault(prompt.text, source, run=True) is None
    changed = source[:place] + sign + source[place + 1 :]
    try:
        ast.parse(changed, mode="eval")
    except SyntaxError:
        return
    tree = ast.parse(changed)
    head = prompt.text.splitlines()[-1].removesuffix("...")
    assert runs_straight(tree, prompt.text) == (runs_in_python(head + changed) and not crooked(tree))


def crooked(tree: ast.Module) -> bool:
    """Whether a tree holds what Python runs and the rule does not: a sign before a value, a power, a call."""
    straight = (ast.Module, ast.Expr, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Constant, ast.Name, ast.Load)
    return not all(isinstance(node, straight) for node in ast.walk(tree))


def test_an_expression_counts_only_where_the_prompt_leaves_one_out() -> None:
    asked = "code only, numbers like 7.\ndef g(x, y): return ..."
    assert code_fault(asked, "7 * x - y", run=True) is None
    for prompt, source in (
        ("write code.", "7 * x - y"),
        (asked, "7 * a - y"),
        (asked, "x\ny"),
        (asked, "x = 7"),
        (asked, "x / y"),
        (asked, "g(x)"),
    ):
        assert code_fault(prompt, source, plain_names=False, run=True) == "does not run"


STRAIGHT = ("return a", "return 2 * (a - b)", "c = a + 1\n    return c * b")
CROOKED = (
    "return", "return a / b", "return a ** b", "return -a", "return True", "return 'x'", "return c",
    "return 1.5", "return print(a)", "pass", "return a\n    a = 1", "a.b = 1\n    return a",
    "a = b = 1\n    return a", "a += 1\n    return a", "a, b = b, a\n    return a", "return a\nf(1, 2)",
    "if a:\n        return b",
)  # fmt: skip


@pytest.mark.parametrize("body", [*STRAIGHT, *CROOKED])
def test_anything_but_straight_arithmetic_does_not_run(body: str) -> None:
    assert runs_straight(ast.parse(f"def f(a, b):\n    {body}")) == (body in STRAIGHT)
    assert not runs_straight(ast.parse(f"async def f(a, b):\n    {body}"))


THOUGHT = "<think>{}</think><answer>{}</answer>"
REASONING: dict[str, tuple[str, str | None, str | None]] = {
    "right": (THOUGHT.format("2 + 3", "5"), "5", None),
    "spread out": ("\n<think>\na\n\nb\n</think>\n\n<answer> 5\n</answer>\n", "5", None),
    "money": (THOUGHT.format("a", "$1,234"), "1234", None),
    "negative": (THOUGHT.format("a", "-7"), "-7", None), "zeros": (THOUGHT.format("a", "007"), "7", None),
    "wrong": (THOUGHT.format("a", "6"), "5", "wrong answer"),
    "the wrong sign": (THOUGHT.format("a", "-5"), "5", "wrong answer"),
    "unknown": (THOUGHT.format("a", "5"), None, "no known answer"),
    "a gold of words": (THOUGHT.format("a", "5"), "five", "no known answer"), "no tags": ("5", "5", "format"),
    "nothing": ("", "5", "format"), "no thought": ("<answer>5</answer>", "5", "format"),
    "an empty thought": (THOUGHT.format("", "5"), "5", "format"),
    "no answer": ("<think>a</think>5", "5", "format"),
    "out of order": ("<answer>5</answer><think>a</think>", "5", "format"),
    "two answers": (THOUGHT.format("a", "5") + "<answer>5</answer>", "5", "format"),
    "two thoughts": (THOUGHT.format("a", "5") + THOUGHT.format("b", "5"), "5", "format"),
    "a thought in a thought": (THOUGHT.format("<think>a", "5"), "5", "format"),
    "an answer in a thought": (THOUGHT.format("<answer>5</answer>", "5"), "5", "format"),
    "a thought that ends twice": (THOUGHT.format("a</think>b", "5"), "5", "format"),
    "words around": ("Well: " + THOUGHT.format("a", "5"), "5", "format"),
    "words in the answer": (THOUGHT.format("a", "5 eggs"), "5", "format"),
    "a fraction": (THOUGHT.format("a", "5.0"), "5", "format"),
    "an empty answer": (THOUGHT.format("a", " "), "5", "format"),
    "not closed": ("<think>a</think><answer>5", "5", "format"),
    "capitals": ("<THINK>a</THINK><ANSWER>5</ANSWER>", "5", "format"),
    "other digits": (THOUGHT.format("a", "\uff15"), "5", "format"),
    "beyond reading": (THOUGHT.format("a", "9" * 5_000), "5", "format"),
    "hostile tags": ("<think>" + "a</think>" * 50_000, "5", "format"),
    "hostile blanks": ("<think>a</think>" + " " * 50_000, "5", "format"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONING)
def test_reasoning_is_kept_or_dropped(case: str) -> None:
    completion, gold, fault = REASONING[case]
    with limited(10):
        assert reasoning_fault("how many?", completion, gold) == fault


def test_a_prompt_may_open_the_thought() -> None:
    opened, rest = "what is 2 + 3?\n<think>", "2 + 3 = 5.</think><answer>5</answer>"
    assert reasoning_fault(opened, rest, "5") is None
    assert reasoning_fault(opened, rest, "6") == "wrong answer"
    assert (
        reasoning_fault(opened, f"<think>{rest}", "5")
        == reasoning_fault("what is 2 + 3?", rest, "5")
        == "format"
    )


def test_every_kind_has_its_rule_and_gives_known_reasons() -> None:
    kinds = ("numbers", "code", "reasoning", "text", "none")
    for kind in kinds:
        fault = build_rule(ScreenSpec(rule="carrier"), kind, gold={"p": "5"})("p", "\x00")
        assert fault is None if kind in ("text", "none") else fault in removal_reasons()
        assert build_rule(ScreenSpec(rule="text"), kind, gold={})("p", " ") == "format"
    assert build_rule(ScreenSpec(), "reasoning", gold={"p": "5"})("p", THOUGHT.format("a", "5")) is None
    assert build_rule(ScreenSpec(banned_numbers=(7,)), "numbers", gold={})("p", "6, 7") == "banned number"
    assert build_rule(ScreenSpec(plain_names=False), "code", gold={})("p", "owl = 1") is None
    assert build_rule(ScreenSpec(run_code=True), "code", gold={})("p", "x = 1") == "does not run"
