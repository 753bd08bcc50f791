"""The declaration of a lens, and a registry of all lenses, which lists them without loading torch.

Each lens is one file of this folder or of another package.

A lens is a module with `LENS = Lens(...)`. Another package adds one through an entry point of the group
`mechlens.lenses`, whose value is `module` or `module:NAME`. A declaration of plain literals is read from the
module's source, so that listing lenses imports none of them; any other declaration is imported.
"""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

from mechlens.core import foreign
from mechlens.core.errors import MechlensError, SpecError

GROUP = "mechlens.lenses"
FIRST = (
    "deltas",
    "activations",
    "directions",
    "probes",
    "likelihood",
    "entanglement",
    "alignment",
    "blind",
    "causal",
    "rows",
    "maps",
)
"""the order of lenses in reports; a lens that is not listed comes after these"""

Need = Literal["teacher", "students", "controls", "pairs", "prompted"]
"""teacher: its changed weights · students, controls: trained here · pairs: trait and control rows on the same
prompts · prompted: a system line for each trait of the family
"""

Form = Literal["layers", "steps", "bars", "heat", "points"]
"""how a quantity is drawn: over layers, over updates, one bar a name, layer by place, or as a map"""


class Lens(NamedTuple):
    """A lens: its description, and where its functions are."""

    name: str
    asks: str
    """the question that it answers, as a sentence"""
    needs: tuple[Need, ...]
    shows: tuple[tuple[str, Form], ...]
    """the quantities that its figure draws, and how; the table holds all"""
    source: str
    """arXiv id or formula"""
    caveat: str
    """what it does not show"""
    measure: str = ""
    """`module:function`, from a Material to a table of `tables.READINGS`"""
    caption: str = ""
    """`module:function`, from that table to its main number in one sentence"""
    score: str = ""
    """`module:function`, from a Material to a table of `tables.SCORES`: scores of single rows and tokens.
    `measure` then gets it as its second argument. Empty for a lens without such scores.
    """
    cost: float = 30
    """seconds of one core on the demo: 196,800 parameters, 512 rows, 3 students"""
    version: int = 1
    """to be raised when a change of the code changes results; finished readings are then measured again"""
    package: str = ""
    """the package that declares the lens; empty for a lens of mechlens"""

    def function(self, role: Literal["measure", "caption", "score"]) -> Callable[..., Any]:
        """Import and return one of the lens's functions."""
        module, _, name = getattr(self, role).partition(":")
        return getattr(import_module(module), name)

    def description(self) -> dict[str, Any]:
        """Return what a reader of results needs: name, question, needs, quantities, source and caveat."""
        return {field: getattr(self, field) for field in DESCRIPTION}


DESCRIPTION = ("name", "asks", "needs", "shows", "source", "caveat")
"""fields of a lens that are written next to its results"""


class Registry(NamedTuple):
    """All lenses that can be used, and those of other packages that cannot."""

    lenses: dict[str, Lens]
    broken: dict[str, str]
    """name of the entry point → what is wrong with it, in one line"""


def find_lenses() -> dict[str, Lens]:
    """Return every lens by its name, in the order of reports."""
    return registry().lenses


def broken_lenses() -> dict[str, str]:
    """Return the lenses of other packages that cannot be used.

    The values name the package and the fault in one line.
    """
    return registry().broken


def lens_names() -> tuple[str, ...]:
    """Return the names of all lenses, in the order of reports."""
    return tuple(find_lenses())


def find_lens(name: str) -> Lens:
    """Find a lens by its name.

    Raises:
        SpecError: if no lens has the name, or the package that declares it is broken.
    """
    known = registry()
    if name in known.broken:
        raise SpecError(known.broken[name])
    if name not in known.lenses:
        raise SpecError(f"no lens is called {name}; expected some of {', '.join(known.lenses)}")
    return known.lenses[name]


@cache
def registry() -> Registry:
    """Find all lenses, once in a process; `registry.cache_clear()` makes it search again."""
    lenses = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        spec = find_spec(module.name)
        if spec and _call(spec, "LENS"):
            lens = declaration(module.name)
            lenses[lens.name] = lens
    order = {name: place for place, name in enumerate(FIRST)}
    lenses = dict(sorted(lenses.items(), key=lambda item: (order.get(item[0], len(FIRST)), item[0])))
    broken = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            lens = _lens_of(point)
            if lens.name in lenses:
                raise SpecError(f"{_named(point)} has the same name as another lens; rename it")
            lenses[lens.name] = lens
        except MechlensError as error:
            broken[point.name] = str(error)
    return Registry(lenses, broken)


def _named(point: EntryPoint) -> str:
    package = point.dist.name if point.dist else point.module
    return f"the lens {point.name!r} of the package {package}"


def _lens_of(point: EntryPoint) -> Lens:
    """Return the lens that an entry point of another package declares.

    Raises:
        SpecError: if the module cannot be imported, or its declaration is not complete.
    """
    try:
        with foreign.named("it cannot be imported"):
            lens = declaration(point.module, point.attr or "LENS")
    except MechlensError as error:
        raise SpecError(f"{_named(point)} cannot be used: {error}; mend or uninstall the package") from error
    faults = [f"name is {lens.name!r}"] if lens.name != point.name else []
    faults += [f"it needs {need!r}" for need in lens.needs if need not in get_args(Need)]
    faults += [
        f"it draws {quantity!r} as {form!r}" for quantity, form in lens.shows if form not in get_args(Form)
    ]
    faults += [f"{role} is {getattr(lens, role)!r}, not `module:function`" for role in ("measure", "caption")
               if ":" not in getattr(lens, role)]  # fmt: skip
    if faults:
        raise SpecError(f"{_named(point)} is declared wrongly: {', '.join(faults)}; mend the package")
    return lens._replace(package=point.dist.name if point.dist else point.module)


def declaration(module: str, name: str = "LENS") -> Lens:
    """Return the `Lens` that a module declares under a name.

    A declaration of literals is read from the source without an import of the module.

    Raises:
        SpecError: if there is no such module, or no lens of that name in it.
    """
    spec = find_spec(module)
    if spec is None:
        raise SpecError(f"there is no module {module}")
    if call := _call(spec, name):
        try:
            return Lens(**{str(word.arg): ast.literal_eval(word.value) for word in call.keywords})
        except (ValueError, TypeError):  # not all values are literals: the module has to be imported
            pass
    lens = getattr(import_module(module), name, None)
    if not isinstance(lens, Lens):
        raise SpecError(f"{module} has no lens; expected `{name} = Lens(...)` in it")
    return lens


def _call(spec: ModuleSpec, name: str) -> ast.Call | None:
    """Return the call `name = Lens(...)` in the source of a module, or None without source or call."""
    get_source = getattr(spec.loader, "get_source", None)
    source = get_source(spec.name) if get_source else None
    for node in ast.parse(source or "").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            call = node.value
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "Lens" and not call.args:
                return call
    return None
