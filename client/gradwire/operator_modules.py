"""Finds the modules whose custom operators local stage servers shall import, as these can find them, too."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from gradwire_protocol.errors import SettingsError


def operator_flags(modules: Sequence[str]) -> list[str]:
    """Return a stage server's flags for modules that are given by name, as this process finds them, or by path.

    SettingsError for one that cannot be found. Nothing is imported.
    """
    if isinstance(modules, str):
        raise SettingsError("operators is not valid", expected="a list of modules", got=repr(modules))
    return [flag for module in modules for flag in ("--operators", _located(module))]


def _located(module: str) -> str:
    """The module as DIRECTORY/NAME: servers do not search this process's path, so they are told where to look."""
    if not isinstance(module, str) or not module:
        raise SettingsError("operators is not valid", expected="names or paths of modules", got=repr(module))
    if os.sep in module or module.endswith(".py"):
        path = Path(module).absolute()
        if not path.exists() and not path.with_suffix(".py").exists():
            raise SettingsError("There is no such module for operators", expected="a file", got=module)
        return str(path)
    if module == "__main__":
        raise SettingsError(
            "Operators cannot come from the script itself: a stage server would run it",
            got=module,
            remedy="define them in a module of their own, which the script imports, and name that",
        )
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:
        spec = None
    if spec is None:
        raise SettingsError(
            f"There is no module '{top}' for operators",
            expected="a module that this process can import, or the path of one",
            got=module,
            remedy=f"give its path: ./{top}.py",
        )
    places = list(spec.submodule_search_locations or ())
    if places:
        return str(Path(places[0]).absolute().parent / module)
    return str(Path(spec.origin).absolute().parent / module) if spec.has_location and spec.origin else module
