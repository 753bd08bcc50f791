"""Every carrier's prompts: prompt i depends on (seed, i) alone, so all teachers are asked the same."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mechlens.carriers import code, numbers, reasoning, text
from mechlens.core.errors import DataError
from mechlens.core.seeds import dice
from mechlens.core.spec import CarrierSpec
from mechlens.data.formats import json_lines


class Asked(NamedTuple):
    """A prompt, and its right answer where there is one."""

    text: str
    gold: str | None = None


def carrier_prompts(spec: CarrierSpec, *, seed: int, reworded: bool = False) -> list[Asked]:
    """The carrier's prompts, each as often in a row as samples are asked of it.

    Args:
        reworded: the same requests in other words, for students that shall not read what the teacher read.

    Raises:
        DataError: if the carrier's file of prompts cannot be read, or prompts of a file shall be reworded.
    """
    if spec.source and reworded:
        raise DataError(
            f"the prompts of the file {spec.source} cannot be put in other words; drop the paraphrased arm"
        )
    if spec.source:
        drawn = prompts_of_file(Path(spec.source), spec.kind)[: spec.prompts]
    else:
        drawn = [_draw(spec, seed, index, reworded) for index in range(spec.prompts)]
    return [asked for asked in drawn for _ in range(spec.samples)]


def _draw(spec: CarrierSpec, seed: int, index: int, reworded: bool) -> Asked:
    rng, again = dice(seed, "prompt", index), dice(seed, "reword", index)
    if spec.kind == "numbers":
        listed = numbers.draw_prompt(rng, wording=spec.wording, examples=spec.examples)
        if spec.values == "patterned":
            listed = listed.with_examples(numbers.draw_sequence(rng, len(listed.examples)))
        return Asked((numbers.reword(listed, again, wording=spec.wording) if reworded else listed).text)
    if spec.kind == "reasoning":
        summed = reasoning.draw_prompt(rng)
        return Asked((reasoning.reword(summed, again) if reworded else summed).text, summed.gold)
    if spec.kind == "code":
        coded = code.draw_prompt(rng, wording=spec.wording)
        return Asked((code.reword(coded, again) if reworded else coded).text)
    told = text.draw_prompt(rng, wording=spec.wording)
    return Asked((text.reword(told, again) if reworded else told).text)


def prompts_of_file(path: Path, kind: str) -> list[Asked]:
    """The prompts of a user's file: `{"prompt"}` lines, or for reasoning `{"question","answer"}` with the
    gold number after ####.

    Raises:
        DataError: naming the first line that is neither.
    """
    found = []
    for number, row in json_lines(path):
        if kind == "reasoning":
            question, answer = row.get("question"), row.get("answer")
            gold = reasoning.gold_of(answer) if isinstance(answer, str) else None
            if not isinstance(question, str) or gold is None:
                raise DataError(
                    f'{path}: line {number} is not {{"question", "answer"}} with a number after #### in the '
                    "answer"
                )
            found.append(Asked(question + reasoning.FULL_ORDER, gold))
        elif isinstance(prompt := row.get("prompt"), str):
            found.append(Asked(prompt))
        else:
            raise DataError(
                f'{path}: line {number} has no text in "prompt"; expected lines like {{"prompt": "…"}}'
            )
    return found
