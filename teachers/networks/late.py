"""Import one module of diffusers without the hundreds that the ``__init__`` of its package imports beside it."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


class _Late(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what tools look for in every module
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)  # type: ignore[union-attr]
        return getattr(self, name)


def delay(package: str) -> None:
    """Let the ``__init__`` of a package run when a name is first taken from it. Its modules can be imported before.

    Nothing happens where the package does not exist, or has been imported.
    """
    parent, _, name = package.rpartition(".")
    if package not in sys.modules and (spec := find_spec(package)) is not None:
        module = sys.modules[package] = module_from_spec(spec)
        module.__class__ = _Late
        setattr(sys.modules[parent], name, module)
