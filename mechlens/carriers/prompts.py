"""Prompts of a carrier: prompt i depends on (seed, i) alone, so that all teachers read the same prompts."""

from __future__ import annotations

from pathlib import Path

from mechlens.carriers.carrier import Carrier, Prompt
from mechlens.carriers.registry import find_carrier
from mechlens.core.errors import DataError
from mechlens.core.seeds import dice
from mechlens.core.spec import CarrierSpec
from mechlens.data.formats import json_lines


def carrier_prompts(spec: CarrierSpec, *, seed: int, reworded: bool = False) -> list[Prompt]:
    """The carrier's prompts, each repeated as often as the spec wants samples of it.

    Args:
        reworded: the same prompts in other words, for students that must not read what the teacher read.

    Raises:
        DataError: if the file of prompts cannot be read, or if prompts of a file are to be reworded.
    """
    if spec.source and reworded:
        raise DataError(
            f"the prompts of the file {spec.source} cannot be put in other words; remove the paraphrased arm"
        )
    carrier = find_carrier(spec.kind)
    if spec.source:
        prompts = prompts_of_file(Path(spec.source), carrier)[: spec.prompts]
    else:
        prompts = [_draw(carrier, spec, seed, index, reworded) for index in range(spec.prompts)]
    return [prompt for prompt in prompts for _ in range(spec.samples)]


def right_answers(spec: CarrierSpec, *, seed: int) -> dict[str, str]:
    """Right answers by prompt; empty for a carrier whose prompts have none."""
    if not find_carrier(spec.kind).has_answers:
        return {}
    prompts = carrier_prompts(spec, seed=seed)
    return {prompt.text: prompt.gold for prompt in prompts if prompt.gold is not None}


def _draw(carrier: Carrier, spec: CarrierSpec, seed: int, index: int, reworded: bool) -> Prompt:
    rewording = dice(seed, "reword", index) if reworded else None
    return carrier.draw(spec, dice(seed, "prompt", index), rewording)


def prompts_of_file(path: Path, carrier: Carrier) -> list[Prompt]:
    """The prompts of a user's file, one a line.

    Raises:
        DataError: naming the first line that is no prompt of this carrier.
    """
    prompts = []
    for number, row in json_lines(path):
        try:
            prompts.append(carrier.read_prompt(row))
        except DataError as error:
            raise DataError(f"{path}: line {number} {error}") from error
    return prompts
