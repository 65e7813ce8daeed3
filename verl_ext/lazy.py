"""Imports that happen while verl imports itself."""

import sys
from importlib import import_module
from types import ModuleType


def import_whole(name: str) -> ModuleType:
    """Import one of our modules that verl's own import leads to while it is being imported itself.

    Whoever imports it first gets here in the middle of it. With verl's modules there, a second import is whole, and
    Python's import of the first returns what stands in ``sys.modules`` at its end.
    """
    if not hasattr(sys.modules.get(name), "register"):
        sys.modules.pop(name, None)
    return import_module(name)
