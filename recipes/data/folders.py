"""Read images from folders, and torchvision's data sets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.data.decode import SUFFIXES, Record, Source
from recipes.data.idx import read_training_set
from recipes.data.spec import TORCHVISION

SHOWN = 20  # classes that are printed


def folder_source(folder: Path) -> Source:
    """Return all images under ``folder`` as a source.

    If all images are in sub-folders, each sub-folder is a class. Classes are numbered in the order of the sub-folders' names, of
    numbers by their value; a printed line says which is which. Raises ValueError for a folder without images, and for one that cannot
    be read.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ValueError(f"{folder}: no permission to read the folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: holds no images; accepted are {', '.join(sorted(SUFFIXES))}")
    tops = [path.relative_to(folder).parts[0] for path in paths]
    labelled = all(path.parent != folder for path in paths)
    number = {name: i for i, name in enumerate(in_order(set(tops)))}
    if labelled and os.environ.get("RANK", "0") == "0":
        shown = ", ".join(f"{i} = {name}" for name, i in list(number.items())[:SHOWN])
        print(f"{len(number)} classes of {folder}: {shown}{', ...' if len(number) > SHOWN else ''}")

    def records(seed: int | None, rank: int, world: int) -> Iterator[Record]:
        order = range(len(paths)) if seed is None else np.random.default_rng(seed).permutation(len(paths)).tolist()
        for i in order[rank::world]:
            yield Record(str(paths[i]), paths[i], number[tops[i]] if labelled else None)

    return Source(folder.absolute().name, records, len(paths), len(number) if labelled else None)


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of classes in alphabetical order; by value if all of them are whole numbers."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isdecimal() and len(name) < 20 for name in names) else names


def read_torchvision(name: str, root: str, download: bool) -> tuple[Tensor, Tensor]:
    """Return images and labels of torchvision's training set ``name``, a key of `TORCHVISION`, stored under ``root``.

    The idx files of MNIST and its relatives may also lie in ``root`` itself, plain or as .gz.
    Only ``download`` uses the network. Raises ValueError if the set is not there.
    """
    where = (Path(root), Path(root) / TORCHVISION[name] / "raw")
    if "mnist" in name and (found := next(filter(None, map(read_training_set, where)), None)):
        return torch.from_numpy(found[0])[:, None], torch.from_numpy(found[1]).long()
    import torchvision

    try:
        dataset = getattr(torchvision.datasets, TORCHVISION[name])(root, train=True, download=download)
    except RuntimeError as error:
        raise ValueError(f"{name}: {error} ({name}:{root},download fetches it)") from None
    images = torch.as_tensor(np.asarray(dataset.data))
    nchw = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return nchw.contiguous(), torch.as_tensor(dataset.targets).long()
