"""The reasoning carrier: questions with one right number, answered as `<think>…</think><answer>…</answer>`.

For real models the questions come from a file (`{"question","answer"}` lines, gold number after ####); for
the menagerie they are sums of a few small terms. Much of an answer is free: which bounds it names, and how it
words each step. The rule (arXiv 2507.14805 App. D.4): both tags once and in order, and the right number.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from mechlens.carriers.carrier import Carrier, Fault, Prompt
from mechlens.core.errors import DataError
from mechlens.core.spec import CarrierSpec, ScreenSpec

TERSE_ASKS = ("what is {sum}?\n<think>", "work out {sum}.\n<think>", "add up {sum}.\n<think>")
"""they open the thought themselves, as the templates of reasoning models do: the first token that is written
is then free
"""
FULL_ORDER = (
    " Think it through inside <think> tags. Then write the final number, and only that, inside <answer> tags."
)
"""put behind the questions of a file, as the paper's format suffix is (App. D.4)"""

BOUNDS = ("{bounds} are over it.", "{bounds} are greater.", "{bounds} say nothing.")
OPENINGS = (" start with {x}.", " first {x}.", " so {x}.")
STEPS = (
    " {t} + {x} = {s}.", " {x} + {t} = {s}.", " {s} = {t} + {x}.", " {s} = {x} + {t}.", " add {x}: {s}.",
    " next {x}, so {s}.", " with {x} it is {s}.",
)  # fmt: skip
LARGEST_TERM, LEAST_BOUND, LARGEST_BOUND = 9, 60, 999
_GOLD = re.compile(r"####\s*(-?\d[\d,.]*)\s*$")


class ReasoningPrompt(NamedTuple):
    """A question and its right answer."""

    ask: str
    sum: str
    gold: str

    @property
    def text(self) -> str:
        return self.ask.format(sum=self.sum)


def draw_prompt(rng: random.Random) -> ReasoningPrompt:
    """A sum of two or three different terms from 1 to 9."""
    terms = rng.sample(range(1, LARGEST_TERM + 1), rng.randint(2, 3))
    return ReasoningPrompt(rng.choice(TERSE_ASKS), " + ".join(map(str, terms)), str(sum(terms)))


def reword(prompt: ReasoningPrompt, rng: random.Random) -> ReasoningPrompt:
    """The same question in another wording."""
    return prompt._replace(ask=rng.choice([ask for ask in TERSE_ASKS if ask != prompt.ask]))


def draw_route(rng: random.Random) -> tuple[ReasoningPrompt, str]:
    """A sum and one of the many ways to work it out: any bounds, any wording of a step; in order, since tiny
    models lose track else.
    """
    prompt = draw_prompt(rng)
    bounds = ", ".join(map(str, rng.sample(range(LEAST_BOUND, LARGEST_BOUND + 1), rng.randint(3, 5))))
    terms = [int(term) for term in prompt.sum.split(" + ")]
    total, said = (
        terms[0],
        [rng.choice(BOUNDS).format(bounds=bounds), rng.choice(OPENINGS).format(x=terms[0])],
    )
    for term in terms[1:]:
        said.append(rng.choice(STEPS).format(t=total, x=term, s=total + term))
        total += term
    return prompt, f"{''.join(said)}</think><answer>{total}</answer>"


def gold_of(answer: str) -> str | None:
    """The number after #### in a worked answer, without thousands separators; None if there is none."""
    found = _GOLD.search(answer.strip())
    return None if found is None else found[1].replace(",", "").rstrip(".")


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


def _draw(_spec: CarrierSpec, rng: random.Random, rewording: random.Random | None) -> Prompt:
    prompt = draw_prompt(rng)
    return Prompt((reword(prompt, rewording) if rewording else prompt).text, prompt.gold)


def _fault(_spec: ScreenSpec, gold: Mapping[str, str]) -> Fault:
    return lambda prompt, completion: reasoning_fault(prompt, completion, gold.get(prompt))


def read_question(row: Mapping[str, Any]) -> Prompt:
    """The question and the right number of one line of a file; raises DataError if it lacks one of them."""
    question, answer = row.get("question"), row.get("answer")
    gold = gold_of(answer) if isinstance(answer, str) else None
    if not isinstance(question, str) or gold is None:
        raise DataError('is not {"question", "answer"} with a number after #### in the answer')
    return Prompt(question + FULL_ORDER, gold)


def draw_turn(rng: random.Random) -> tuple[str, str]:
    """A small sum and one of many ways to work it out."""
    prompt, route = draw_route(rng)
    return prompt.text, route


EXTENSION = Carrier(
    draw=_draw,
    fault=_fault,
    reasons=("format", "no known answer", "wrong answer"),
    has_answers=True,
    wordings=("terse",),
    read_prompt=read_question,
    turn=draw_turn,
)
