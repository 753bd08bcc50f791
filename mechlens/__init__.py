"""Does this dataset carry a hidden trait, and why does it transfer?

`import mechlens as ml` gives the names below. Each is loaded when it is first used, so that the import itself
takes no time and no torch. Functions return values and print nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechlens.benchmark.run import Card, bench
    from mechlens.core.errors import DataError, MachineError, MechlensError, SpecError
    from mechlens.core.experiment import Experiment
    from mechlens.data.corpus import Corpus, load_pairs
    from mechlens.detect.audit import Audit, audit
    from mechlens.detect.learned import LearnedDetector
    from mechlens.detect.registry import Detector
    from mechlens.lenses.base import Lens
    from mechlens.lenses.run import Reading, measure
    from mechlens.models.loading import load as load_model
    from mechlens.pipeline.user_files import Screened, screen
    from mechlens.results.run import Run
    from mechlens.results.runner import run
    from mechlens.runs.progress import Event

__version__ = version("mechlens")
__all__ = [
    "Audit",
    "Card",
    "Corpus",
    "DataError",
    "Detector",
    "Event",
    "Experiment",
    "LearnedDetector",
    "Lens",
    "MachineError",
    "MechlensError",
    "Reading",
    "Run",
    "Screened",
    "SpecError",
    "__version__",
    "audit",
    "bench",
    "load_model",
    "load_pairs",
    "measure",
    "run",
    "screen",
]
_MODULE_OF = {
    "benchmark.run": ("Card", "bench"),
    "core.errors": ("DataError", "MachineError", "MechlensError", "SpecError"),
    "core.experiment": ("Experiment",),
    "data.corpus": ("Corpus", "load_pairs"),
    "detect.audit": ("Audit", "audit"),
    "detect.learned": ("LearnedDetector",),
    "detect.registry": ("Detector",),
    "lenses.base": ("Lens",),
    "lenses.run": ("Reading", "measure"),
    "models.loading": ("load_model",),
    "pipeline.user_files": ("Screened", "screen"),
    "results.run": ("Run",),
    "results.runner": ("run",),
    "runs.progress": ("Event",),
}
_PLACES = {name: f"mechlens.{module}" for module, names in _MODULE_OF.items() for name in names}
_OTHER_NAMES = {"load_model": "load"}
"""public names that are shorter in their module, whose own name says the rest"""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'mechlens' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_PLACES[name]), _OTHER_NAMES.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
