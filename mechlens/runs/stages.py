"""What a job can do: a stable id for each stage, and where its code is.

A finished step is recorded under the id of its stage. Code may move; an id stays, so that finished runs stay
valid.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

PIPELINE = ("teach", "generate", "bring", "screen", "shuffle", "reword", "mix", "select", "distill", "ask")
STAGES = {name: f"mechlens.pipeline.stages:{name}" for name in PIPELINE} | {
    "measure": "mechlens.lenses.run:measure_lens"
}
"""id → `module:function`, called as function(arguments, inputs, out, progress)"""
RECORDED = {name: f"mechlens.pipeline.jobs:{name}" for name in PIPELINE} | {
    "measure": "mechlens.measure:look"
}
"""id → what fingerprints hold: the first release recorded a stage by the path that its function had then"""


def recorded(stage: str) -> str:
    """The name of a stage in fingerprints; a stage that is not listed is recorded as it is written."""
    return RECORDED.get(stage, stage)


def function_of(stage: str) -> Callable[..., Any]:
    """The function of a stage: that of a listed id, or the one at `module:function`."""
    module, function = STAGES.get(stage, stage).split(":")
    return getattr(import_module(module), function)
