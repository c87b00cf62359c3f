"""--data: images as uint8 [N, C, H, W] with labels, and the batches every recipe trains on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.rng import Rng, seed_of
from distill.train import Batches, Shares
from recipes import folders

ACCEPTED = (
    "'digits', an .npz file with images uint8 [N, H, W, C] and, where there are any, labels [N], a folder of images "
    "(sub-folders are classes; FOLDER,size=32 resizes), mnist:ROOT, fashionmnist:ROOT or cifar10:ROOT (ROOT,download fetches them)"
)


@dataclass(frozen=True)
class Data:
    name: str
    images: Tensor
    labels: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    @property
    def classes(self) -> int | None:
        return None if self.labels is None else int(self.labels.max()) + 1

    def batches(
        self,
        shares: Shares,
        seed: int,
        phase: str,
        device: torch.device,
        conditional: bool = True,
        null: int | None = None,
        null_probability: float = 0.0,
    ) -> Batches:
        """Microbatches (x0 in [-1, 1], {"labels"}) from any step on, drawn with replacement as a function of (seed, phase, step).

        Labels are replaced by ``null`` with ``null_probability``, the dropout that classifier-free guidance needs.
        """

        def stream(step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
            generator = torch.Generator()
            while True:
                for turn in range(shares.accumulate):
                    rng = Rng(generator.manual_seed(seed_of(seed, phase, step, "data")), shares.batch_size, shares.rows(turn))
                    index = rng.integers(len(self.images))
                    x0 = self.images[index].to(device).float() / 127.5 - 1
                    cond = {}
                    if conditional and self.labels is not None:
                        labels = self.labels[index]
                        if null is not None and null_probability:
                            labels = torch.where(rng.uniform() < null_probability, null, labels)
                        cond = {"labels": labels.to(device)}
                    yield x0, cond
                step += 1

        return stream


def load(spec: str) -> Data:
    """The data set a spec names. ValueError in one line that says what is accepted."""
    if spec == "digits":
        from teachers.digits import digits

        return Data("digits", *digits())
    name, _, rest = spec.partition(":")
    if name in folders.TORCHVISION:
        root, _, option = rest.partition(",")
        if not root or option not in ("", "download"):
            raise ValueError(f"data {spec!r}: accepted are {ACCEPTED}")
        return Data(name, *folders.read_torchvision(name, root, option == "download"))
    where, _, option = spec.partition(",")
    path, size = Path(where), option.removeprefix("size=")
    if path.is_dir() and (not option or size.isdigit()):
        return Data(path.name, *folders.read_folder(path, int(size) if size else None))
    if path.suffix != ".npz" or not path.is_file() or option:
        raise ValueError(f"unknown data {spec!r}: accepted are {ACCEPTED}")
    return Data(path.stem, *_read_npz(path))


def _read_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["images"]
            labels = file["labels"] if "labels" in file.files else None
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}; accepted are {ACCEPTED}") from None
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"{path}: images are {images.dtype} {images.shape}; accepted are {ACCEPTED}")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: {len(images)} images but labels of shape {labels.shape}")
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return nchw, None if labels is None else torch.from_numpy(labels).long()
