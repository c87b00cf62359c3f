"""The Python face of fewstep: distil, sample, evaluate, save and export a model of your own, without a command line.

    import fewstep as fs

    teacher = fs.Model(net, schedule="cosine", prediction="v", shape=(3, 32, 32), classes=10, labels="y")
    teacher.probe(images, labels)
    students = fs.distil(teacher, images, labels, method="progressive", steps=[8, 4, 2, 1], out="runs/mine")
    students[1].sample(10, labels=range(10)).grid("ten.png")

The rooms behind it are `distill`, `teachers`, `eval` and `recipes`; everything there may be used as well.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.model import Model, Samples, Teacher, load
    from fewstep.runs import Report, distil, evaluate
    from teachers import trust

try:
    __version__ = version("fewstep")
except PackageNotFoundError:  # a clone that is not installed
    __version__ = "0+unknown"
__all__ = ["Model", "Report", "Samples", "Teacher", "distil", "evaluate", "load", "trust"]
HOME = {
    **dict.fromkeys(("Model", "Samples", "Teacher", "load"), "fewstep.model"),
    **dict.fromkeys(("Report", "distil", "evaluate"), "fewstep.runs"),
    "trust": "teachers",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used (PEP 562), so that the command ``fewstep`` starts without torch."""
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOME[name]), name)
