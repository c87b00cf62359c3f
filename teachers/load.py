"""Load a model from a spec, the text that a user gives as ``--teacher`` or ``--model``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.reading import malformed

if TYPE_CHECKING:
    from distill.source import Source
    from teachers.teacher import Teacher

FORMS = {
    "digits": "the embedded teacher, a class-conditional UNet on 8x8 digits",
    "FILE.safetensors or RUN": "a model that this project wrote, or a run's directory, which stands for its last student, or its teacher",
    "FOLDER or OWNER/NAME": "a diffusers pipeline in a folder or on the hub; of several weights, PIPELINE,variant=fp16 chooses",
    "PIPELINE,prompts=FILE": "a text-to-image model, or a student of one, for a few prompts: each line of the file is a class",
    "PIPELINE,lora=FILE,size=HEIGHTxWIDTH,guidance=W": "with a LoRA added, images of another size, an embedded guidance scale",
    "PACKAGE.MODULE:FACTORY,schedule=...,prediction=...,shape=...": "any nn.Module called as (x, t, labels); labels_as=y, "
    "order=t,x, time=reversed read others; more: teachers/custom.py",
    "guided:FILE,size=SIDE,head_channels=WIDTH": "the state dict of a guided-diffusion UNet; more: teachers/adm.py",
    "experts:SPEC|SPEC,logsnr=NUMBER": "several models, each for its own range of noise levels",
    "oracle:gaussian, oracle:mixture or oracle:digits": "exact denoisers in closed form",
}
ACCEPTED = "\n".join(f"{form}: {meaning}" for form, meaning in FORMS.items())
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")


def load(
    spec: str,
    trusted: bool = True,
    base: bool = False,
    source: Callable[[dict[str, Any]], Source] | None = None,
    weights: bool = True,
) -> Teacher:
    """Load a model from its spec, frozen and on the CPU.

    ``trusted``: the user gave the spec, so a factory in it may run, and a hub id may be downloaded. False for a spec that a file holds:
    `trust` must name its factory, and nothing is downloaded. ``base``: of a LoRA adapter, so that it may have none itself.
    ``source``: finds the images that the paths of a model start from; None refuses such a model, since most of what is done with a model
    assumes Gaussian noise.
    ``weights``: False gives a diffusers pipeline with hollow networks (`teachers.hollow`); other models have their weights.

    Raises ValueError for a spec that is not among `FORMS`, and for a factory that is not trusted.
    """
    from teachers import adm, custom, diffusers_pipeline, experts, oracle  # not above: --help shows `ACCEPTED` without torch
    from teachers.hub import quiet
    from teachers.saved import load_file as read_file

    load_file = partial(read_file, find=None if base else partial(load, trusted=False, base=True, source=source), source=source)
    prefixes = {
        "experts:": lambda text: experts.load(text, partial(load, trusted=trusted)),
        "oracle:": oracle.load,
        "guided:": adm.load,
    }
    for prefix, load_kind in prefixes.items():
        if spec.startswith(prefix):
            return load_kind(spec)
    if spec == "digits":
        return load_file(Path(__file__).parent / "digits" / "teacher.safetensors")
    path, where = Path(spec), spec.partition(",")[0]
    if not path.exists() and (given := _with_prompts(spec)) is not None:
        return given
    for name in ("student.safetensors", "teacher.safetensors"):
        if (path / name).is_file():
            return load_file(path / name)
    if students := sorted(map(str, path.glob("stages/*/student.safetensors"))):
        raise ValueError(
            f"{spec}: a run that has not ended; run its command again, or name one of its students: {', '.join(students)}"
        )
    if path.is_dir() or Path(where).is_dir():
        with quiet(), malformed(spec if path.is_dir() else where):
            return diffusers_pipeline.load(spec, weights=weights)
    if not path.is_file() and ":" in where:
        return custom.load(spec, trusted)
    if path.is_file() or path.suffix in WEIGHTS:
        return load_file(path)
    if where.count("/") == 1 and not where.startswith((".", "/")) and not Path(where).parent.is_dir():
        return diffusers_pipeline.load(spec, download=trusted, weights=weights)
    if "/" in where:
        raise ValueError(f"{where}: there is no such file or folder; accepted are paths that exist, and OWNER/NAME of the hub")
    raise ValueError(
        f"unknown model {spec!r}: accepted are digits, paths, OWNER/NAME of the hub and more; --help teacher lists all"
    )


def _with_prompts(spec: str) -> Teacher | None:
    """Load ``STUDENT,prompts=FILE``; None for any other spec."""
    where, option, file = spec.partition(",prompts=")
    if not option or not (where.endswith(".safetensors") or (Path(where) / "student.safetensors").is_file()):
        return None
    from teachers.encoder import with_prompts
    from teachers.prompts import read_prompts

    return with_prompts(load(where), read_prompts(file))
