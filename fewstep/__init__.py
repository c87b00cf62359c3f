"""The Python face of fewstep: distil, sample, evaluate, save and export a model of your own, without a command line.

    import fewstep as fs

    teacher = fs.Model(net, schedule="cosine", prediction="eps", shape=(3, 32, 32), classes=10, labels="y")
    teacher.probe(images, labels)
    students = fs.distil(teacher, images, labels, method="progressive", steps=[8, 4, 2, 1], out="runs/mine")
    students[1].sample(10, labels=range(10)).grid("ten.png")

The rooms behind it are `distill`, `teachers`, `eval` and `recipes`; everything there may be used as well.
"""

from importlib.metadata import PackageNotFoundError, version

from fewstep.model import Model, Samples, load
from fewstep.runs import Report, distil, evaluate
from teachers import trust

Teacher = Model  # a teacher and a student are one kind of thing
try:
    __version__ = version("fewstep")
except PackageNotFoundError:  # a clone that is not installed
    __version__ = "0+unknown"
__all__ = ["Model", "Report", "Samples", "Teacher", "distil", "evaluate", "load", "trust"]
