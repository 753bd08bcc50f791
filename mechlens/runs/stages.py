"""The stages of a run: a stable id for each stage, and the function that implements it.

A finished step is recorded under the id of its stage. The function may move; the id stays, so that finished
runs stay valid.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

PIPELINE = (
    "teach", "generate", "bring", "screen", "shuffle", "reword", "mix", "select", "label", "distill", "ask",
)  # fmt: skip
STAGES = {name: f"mechlens.pipeline.stages:{name}" for name in PIPELINE} | {
    "measure": "mechlens.lenses.run:measure_lens"
}
"""id → `module:function`, called as function(arguments, inputs, out, progress)"""
RECORDED = {name: f"mechlens.pipeline.jobs:{name}" for name in PIPELINE} | {
    "measure": "mechlens.measure:look"
}
"""id → name of the stage in fingerprints, which is the path of its function in the first release"""


def recorded(stage: str) -> str:
    """The name of a stage in fingerprints; a stage outside mechlens is recorded by its own path."""
    return RECORDED.get(stage, stage)


def function_of(stage: str) -> Callable[..., Any]:
    """The function of a stage, given by its id or as `module:function`."""
    module, function = STAGES.get(stage, stage).split(":")
    return getattr(import_module(module), function)
