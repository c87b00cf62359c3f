"""Two measures of how varied generated images are, from their features."""

from __future__ import annotations

import torch
from torch import Tensor

from eval.memorisation import nearest

NEIGHBOURS = 5  # k of coverage
PER_CLASS = 200  # images of a class whose pairwise distances are taken
QUERIES = 2_000  # real images that coverage is counted over


def coverage(generated: Tensor, real: Tensor) -> float:
    """Return the fraction of real images with a generated one nearer than their 5th nearest real one (Naeem et al. 2002.09797).

    It is taken over the first `QUERIES` real features [N, D]. A few odd images do not raise it, as they raise recall.
    """
    some = real[:QUERIES]
    radius = torch.cat(
        [torch.cdist(part, real).kthvalue(NEIGHBOURS + 1, 1).values for part in some.split(256)]
    )  # itself is one
    to_generated, _ = nearest(some, generated)
    return (to_generated < radius).float().mean().item()


def spread(features: Tensor, labels: Tensor | None) -> float | None:
    """Return the mean distance of two images of one class, from features [N, D], averaged over the classes of ``labels`` [N].

    A prompt is a class. Of each class the first `PER_CLASS` images count; without labels all images are of one class. None where no
    two images share a class.
    """
    if labels is None:
        return torch.pdist(features[:PER_CLASS].float()).mean().item()
    classes, counts = labels.unique(return_counts=True)
    means = [torch.pdist(features[labels == label][:PER_CLASS].float()).mean() for label in classes[counts > 1]]
    return torch.stack(means).mean().item() if means else None
