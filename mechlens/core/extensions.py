"""Find extensions by name: modules of one of this package's folders, or entry points of other packages.

A group such as `mechlens.carriers` is a folder of this package and a group of entry points. Nothing is loaded
before it is asked for by name.
"""

from __future__ import annotations

from importlib import import_module, metadata
from pkgutil import iter_modules
from typing import Any

from mechlens.core.errors import SpecError


def shipped_extensions(group: str) -> dict[str, Any]:
    """The extensions that come with mechlens, by name: the value `EXTENSION` of each module of the group that
    has one.
    """
    modules = {
        module.name: f"{group}.{module.name}" for module in iter_modules(import_module(group).__path__)
    }
    loaded = {name: import_module(module) for name, module in modules.items()}
    return {name: module.EXTENSION for name, module in loaded.items() if hasattr(module, "EXTENSION")}


def extension_names(group: str) -> list[str]:
    """Names of all extensions of a group: those that come with mechlens, then those of other packages."""
    entry_points = sorted(entry_point.name for entry_point in metadata.entry_points(group=group))
    return list(dict.fromkeys([*shipped_extensions(group), *entry_points]))


def load_extension(group: str, name: str) -> Any:
    """An extension by name; one that comes with mechlens goes before another package's of the same name.

    Raises:
        SpecError: if no extension has this name, with the names that are known, or if its package cannot be
            imported.
    """
    shipped = shipped_extensions(group)
    if name in shipped:
        return shipped[name]
    for entry_point in metadata.entry_points(group=group, name=name):
        try:
            return entry_point.load()
        except (ImportError, AttributeError) as error:
            raise SpecError(
                f"{name!r} of the group {group} cannot be loaded from {entry_point.value}: {error}; repair "
                "or uninstall the package that provides it"
            ) from error
    known = ", ".join(extension_names(group))
    raise SpecError(f"{name!r} is unknown; known {group.rpartition('.')[2]}: {known}")
