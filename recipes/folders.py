"""Images from folders and from torchvision's data sets, decoded once into uint8 [N, C, H, W]."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from eval.metrics import cores

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TORCHVISION = {"mnist": "MNIST", "fashionmnist": "FashionMNIST", "cifar10": "CIFAR10"}
MOST_CORRUPT = 0.01  # part of a folder's images that may be unreadable


def read_folder(folder: Path, size: int | None) -> tuple[Tensor, Tensor | None]:
    """All images under ``folder``, centre-cropped to squares and resized (Lanczos) to ``size``, that of the first where not given.

    Where all images lie in sub-folders, each sub-folder is a class, numbered in the order of their names. Unreadable images are
    reported with their path and left out. ValueError where there are none, where they are smaller than ``size``, or where more
    than 1 % are unreadable.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: holds no images; accepted are {', '.join(sorted(SUFFIXES))}")
    names = sorted({path.relative_to(folder).parts[0] for path in paths if len(path.relative_to(folder).parts) > 1})
    labelled = all(len(path.relative_to(folder).parts) > 1 for path in paths)
    first = next((image for path in paths[:100] if (image := _open(path)) is not None), None)
    if first is None:
        raise ValueError(f"{folder}: none of its first images can be read")
    size, mode = size or min(first.size), "L" if first.mode in ("1", "L") else "RGB"
    with ThreadPoolExecutor(cores()) as pool:
        work = pool.map(lambda path: _decode(path, size, mode), paths)
        decoded = list(tqdm(work, total=len(paths), desc=f"reading {folder.name}", unit="img", leave=False, disable=None))
    bad = [path for path, pixels in zip(paths, decoded, strict=True) if pixels is None]
    for path in bad[:20]:
        print(f"warning: {path} cannot be read and is left out", file=sys.stderr)
    if len(bad) > MOST_CORRUPT * len(paths):
        raise ValueError(f"{folder}: {len(bad)} of {len(paths)} images cannot be read, the first is {bad[0]}")
    kept = [(path, pixels) for path, pixels in zip(paths, decoded, strict=True) if pixels is not None]
    images = torch.from_numpy(np.stack([pixels for _, pixels in kept]))
    labels = torch.tensor([names.index(path.relative_to(folder).parts[0]) for path, _ in kept]) if labelled else None
    return images, labels


def _open(path: Path) -> Image.Image | None:
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return None
    return image


def _decode(path: Path, size: int, mode: str) -> np.ndarray | None:
    """uint8 [C, size, size], None where the file is no image. ValueError for an image smaller than ``size``."""
    image = _open(path)
    if image is None:
        return None
    if min(image.size) < size:
        raise ValueError(f"{path}: {image.width}x{image.height} is smaller than the {size}x{size} asked for")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert(mode).crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(square)
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1).copy()


def read_torchvision(name: str, root: str, download: bool) -> tuple[Tensor, Tensor]:
    """The training images of MNIST, FashionMNIST or CIFAR10 under ``root``; the network is used only with ``download``."""
    import torchvision

    try:
        dataset = getattr(torchvision.datasets, TORCHVISION[name])(root, train=True, download=download)
    except RuntimeError as error:
        raise ValueError(f"{name}: {error} (write {name}:{root},download to fetch it)") from None
    images = torch.as_tensor(np.asarray(dataset.data))
    nchw = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return nchw.contiguous(), torch.as_tensor(dataset.targets).long()
