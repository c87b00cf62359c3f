"""A shard of latents that grows while its images are decoded, so that few of them are in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.images import from_uint8
from recipes.common.shards import stored
from teachers.codec import Codec


@dataclass
class Growing:
    """Hold a shard while its images arrive: the latents so far, and the images that wait for a whole batch.

    The batches are those of all images of the shard in order, so that latents do not depend on how the images arrive.
    """

    codec: Codec
    name: str  # of the data
    dtype: torch.dtype
    batch: int
    device: torch.device
    latents: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    captions: list[str] | None = None
    waiting: Tensor | None = None

    def add(self, images: Tensor, labels: Tensor | None, captions: list[str] | None) -> None:
        """Add images [n, C, H, W], with their labels [n] and captions [n] where the data have them."""
        self.labels += [] if labels is None else [labels]
        self.captions = captions if self.captions is None else self.captions + (captions or [])
        images = images if self.waiting is None else torch.cat([self.waiting, images])
        ready = len(images) - len(images) % self.batch
        self._encode(images[:ready])
        self.waiting = images[ready:].clone()  # not a view, which would keep all

    def _encode(self, images: Tensor) -> None:
        for part in images.split(self.batch) if len(images) else ():
            z = self.codec.encode(from_uint8(part, self.device))
            self.latents.append(stored(z, self.dtype, f"latents of {self.name}"))

    def whole(self) -> tuple[dict[str, Tensor], dict]:
        """Return the tensors and the description of the shard. Raises ValueError if a latent overflows the number format."""
        assert self.waiting is not None
        self._encode(self.waiting)
        labels = {"labels": torch.cat(self.labels)} if self.labels else {}
        return {"latents": torch.cat(self.latents)} | labels, {"captions": self.captions}
