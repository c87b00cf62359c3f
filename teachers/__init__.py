"""Models from anywhere as one type: a `Teacher` with a denoiser E[x0 | x_t]. Students are loaded the same way."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from teachers.load import ACCEPTED, load

if TYPE_CHECKING:
    from teachers.networks.factory import trust
    from teachers.saved import load_file, save
    from teachers.teacher import Teacher

__all__ = ["ACCEPTED", "Teacher", "load", "load_file", "save", "trust"]
HOME = {"Teacher": "teacher", "load_file": "saved", "save": "saved", "trust": "networks.factory"}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used (PEP 562): the command line needs `ACCEPTED` alone, and these need torch."""
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOME[name]}"), name)
