"""Parse the specs that --data accepts."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

TORCHVISION = {"mnist": "MNIST", "fashionmnist": "FashionMNIST", "cifar10": "CIFAR10"}
MAX_CLASSES = 1_000_000
FORMS = {
    "digits": "the 1,797 handwritten digits of scikit-learn, 8x8",
    "FOLDER": "a folder of images; if all of them are in sub-folders, each sub-folder is a class; transparent images are put on white",
    "FILE.npz": "images uint8 [N, H, W, C]; optionally labels [N] and captions [N]",
    "LATENTS": "a folder of latents and conditions that recipes/latents.py wrote",
    "prompts:FILE": "prompts without images, one per line, for methods that begin at pure noise",
    "hf:NAME": "a set of the Hugging Face hub (needs the package datasets)",
    "hf:FOLDER": "a folder that the package datasets can load, or saved with save_to_disk",
    "wds:PATTERN": "WebDataset shards, such as wds:a-{000..127}.tar",
    **{
        f"{name}:ROOT": f"torchvision's {title} in the folder ROOT{', or its idx files, plain or .gz' if 'mnist' in name else ''}"
        for name, title in TORCHVISION.items()
    },
}
COMMON = ("digits", "FOLDER", "FILE.npz")  # suggested if no form resembles a wrong spec
OPTION_HELP = {
    ",flip": "mirror half of the training images (all sets but latents)",
    ",bits=2": "round to 2^bits levels and train on their bits as channels of +-1 (all sets but latents and prompts)",
    ",labels=3+5": "the images of these classes alone, numbered 0, 1, ... in this order; one class has no labels (all sets with labels)",
    ",grey ,pad=32 ,box=2": "make grey; then put in the middle of black 32x32; then average blocks of 2x2 pixels (all sets but latents and"
    " prompts; not with stream)",
    ",size=32": "crop the centre square and resize it to 32x32 (FOLDER, hf, wds)",
    ",stream=10000": "read while training, through a buffer of 10,000 images in memory (FOLDER, hf, wds)",
    ",classes=1000": "the number of classes, which a labelled stream needs (hf, wds)",
    ",split=NAME ,config=NAME": "the part of the set, and its configuration (hf)",
    ",image=COLUMN ,label=COLUMN ,caption=COLUMN": "the columns; default are the usual names (hf)",
    ",download": f"download the set to ROOT ({', '.join(TORCHVISION)})",
}
ACCEPTED = "\n".join(f"{form}: {meaning}" for form, meaning in {**FORMS, **OPTION_HELP}.items())
WHOLE = frozenset({"grey", "pad", "box"})  # they need the whole set in memory
PIXELS = WHOLE | {"flip", "bits", "labels"}
DECODED = PIXELS | {"size", "stream"}
OPTIONS: dict[str, frozenset[str]] = {
    "digits": PIXELS,
    "npz": PIXELS,
    "latents": frozenset(),
    "prompts": frozenset(),
    "folder": DECODED,
    "wds": DECODED | {"classes"},
    "hf": DECODED | {"classes", "split", "config", "image", "label", "caption"},
    **dict.fromkeys(TORCHVISION, PIXELS | {"download"}),
}
SWITCHES = {"flip", "download", "grey"}
NUMBERS = {
    "bits": 8,
    "pad": 4096,
    "box": 64,
    "size": 4096,
    "stream": 10_000_000,
    "classes": MAX_CLASSES,
}  # the largest that is accepted


def parse(spec: str) -> tuple[str, str, dict[str, str]]:
    """Return kind, place and options of a spec. Raises ValueError for an unknown kind or option."""
    where, *rest = [spec] if Path(spec).exists() else re.split(r",(?![^{]*\})", spec)
    options = dict(text.partition("=")[::2] for text in rest)
    kind, where = _kind(where)
    for key, value in options.items():
        if key not in OPTIONS[kind]:
            takes = ", ".join(sorted(k if k in SWITCHES else f"{k}=..." for k in OPTIONS[kind])) or "none"
            raise ValueError(f"data {spec!r}: {key!r} is no option of {kind}; accepted are {takes}; --help data lists all")
        if key in SWITCHES and value:
            raise ValueError(f"data {spec!r}: option {key} has the value {value!r}; accepted is {key} alone")
        if key == "labels" and not re.fullmatch(r"[0-9]{1,7}(\+[0-9]{1,7})*", value):
            raise ValueError(
                f"data {spec!r}: option labels is {value!r}; accepted are classes, such as labels=3 and labels=3+5"
            )
        if key in NUMBERS and not (value.isdecimal() and len(value) < 10 and 0 < int(value) <= NUMBERS[key]):
            raise ValueError(f"data {spec!r}: option {key} is {value!r}; accepted are whole numbers from 1 to {NUMBERS[key]:,}")
        if not value and key not in SWITCHES:
            raise ValueError(f"data {spec!r}: option {key} has no value; accepted is {key}=...")
    if "stream" in options and (needs := sorted(WHOLE & options.keys())):
        raise ValueError(f"data {spec!r}: {needs[0]} needs the whole set in memory; accepted is it without stream=...")
    return kind, where, options


def _kind(where: str) -> tuple[str, str]:
    """Return the kind of a set and its place, without the prefix of the kind."""
    prefix, _, place = where.partition(":")
    path = Path(where)
    if where == "digits":
        return "digits", where
    if place and (prefix in ("hf", "wds", "prompts") or prefix in TORCHVISION):
        return prefix, place
    if where and path.is_dir():
        from recipes.data.latent_shards import is_latents  # not above: --help shows `ACCEPTED` without torch

        return "latents" if is_latents(path) else "folder", where
    if path.suffix == ".npz" and path.is_file():
        return "npz", where
    near = dict.fromkeys([*difflib.get_close_matches(where, FORMS, 3, 0.4), *COMMON])
    missing = "" if path.exists() else ", no such file or folder"
    raise ValueError(
        f"unknown data {where!r}{missing}: accepted are {', '.join(list(near)[:3])} and more; --help data lists all"
    )
