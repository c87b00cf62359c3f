"""Gather the features of one cell: all of them for every metric, or only their moments for FID."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from eval.gathering import gather_rows
from eval.metrics import Features, Moments, Reference, measure, measure_moments
from eval.variety import spread

INCOMPLETE = "an index is missing or occurs twice"
More = Callable[
    [Tensor, Tensor | None], dict
]  # features [N, D] and labels [N] in the order of the index -> further numbers of a row


class Collector(Protocol):
    """Take the features of each chunk of this process with `add`. `numbers` returns the metrics on the main process, else {}.

    Every process must call `numbers`. ``wanted``: the class of each label, -1 for none,
    among ``classes``.
    """

    def add(self, index: Tensor, labels: Tensor | None, features: Features) -> None: ...

    def numbers(self, accelerator: Accelerator, images: int, wanted: Sequence[int], classes: int) -> dict: ...


class AllFeatures:
    """Keep every feature, for FID, KID, IS, precision and recall. The numbers do not depend on the number of processes."""

    def __init__(self, reference: Reference, more: More | None = None) -> None:
        self.reference, self.more = reference, more
        self.parts: list[tuple[Tensor, Tensor | None, Features]] = []

    def add(self, index: Tensor, labels: Tensor | None, features: Features) -> None:
        self.parts.append((index, labels, features))

    def numbers(self, accelerator: Accelerator, images: int, wanted: Sequence[int], classes: int) -> dict:
        def gathered(pick: Callable) -> Tensor | None:
            rows = [pick(part) for part in self.parts]
            return gather_rows([part for part in rows if part is not None])

        index, labels = gathered(lambda part: part[0]), gathered(lambda part: part[1])
        fid, logits = gathered(lambda part: part[2].fid), gathered(lambda part: part[2].logits)
        if not accelerator.is_main_process:
            return {}
        assert index is not None and fid is not None
        order = index.argsort()
        assert torch.equal(index[order], torch.arange(images)), INCOMPLETE
        labels, logits = (None if rows is None else rows[order] for rows in (labels, logits))
        features = Features(fid[order], logits)
        numbers = measure(features, self.reference) | {"spread": spread(features.fid, labels)}
        numbers |= {} if self.more is None else self.more(features.fid, labels)
        return numbers | _class_counts(features.logits, labels, wanted, classes)


class MomentsOnly:
    """Keep float64 moments of 20 groups, for FID and its interval. Memory does not grow with the number of images."""

    def __init__(self, reference: Reference, more: More | None = None) -> None:
        self.reference = reference
        self.moments: Moments | None = None

    def add(self, index: Tensor, labels: Tensor | None, features: Features) -> None:
        new = Moments.of(features.fid, self.reference, index)
        if self.moments is None:
            self.moments = new
        else:
            self.moments += new

    def numbers(self, accelerator: Accelerator, images: int, wanted: Sequence[int], classes: int) -> dict:
        own = self.moments or Moments.of(torch.zeros(0, self.reference.dimension), self.reference)
        flat = [torch.from_numpy(part).to(accelerator.device, torch.float64) for part in own.sums]
        moments = Moments(*(accelerator.reduce(part).cpu().numpy() for part in flat))
        assert moments.n.sum() == images, INCOMPLETE
        return measure_moments(moments, self.reference) if accelerator.is_main_process else {}


COLLECTORS: dict[str, Callable[[Reference, More | None], Collector]] = {"all": AllFeatures, "fid": MomentsOnly}


def _class_counts(logits: Tensor | None, labels: Tensor | None, wanted: Sequence[int], classes: int) -> dict:
    """Return the requested and the recognised images of each class, over images of known classes, if the extractor has these classes."""
    if labels is None or logits is None or logits.shape[1] != classes:
        return {"agreement": None}
    requested = torch.tensor(wanted)[labels.cpu()]
    requested, seen = requested[requested >= 0], logits.argmax(1).cpu()[requested >= 0]
    if not len(requested):
        return {"agreement": None}
    counts = [torch.bincount(some, minlength=logits.shape[1]).tolist() for some in (requested, seen)]
    return {"agreement": (seen == requested).float().mean().item(), "labels_asked": counts[0], "labels_seen": counts[1]}
