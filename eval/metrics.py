"""Metrics of generated features against a reference, with intervals.

The metrics are torch-fidelity's own functions, on float32 features in the order of their indices. The interval of FID is a
delete-a-group jackknife over 20 groups. Each group is a sum of float64 moments, so that leaving one out is a subtraction. A
bootstrap would be wrong: its duplicates add to the bias of FID. The sums alone suffice for FID, and their size does not grow
with the number of images. Features are multiplied by the root of the reference's covariance before they are summed. Leaving a group
out then costs eigenvalues alone. At 2,048 features the sums take 671 MB. 10,000 images cost 19 to 20 seconds of one core: 4 for the
sums, 9 for the jackknife, 1.6 for the root of the reference, and 4 for torch-fidelity's own FID.

The intervals are fid +- t error, with Student's t of 19 degrees of freedom. In simulations of 500 images with 8 features
(tests/test_fid_interval.py) the interval of FID covered its mean in 0.95 of the runs for Gaussian features, 0.93 for Student's t with 5
degrees of freedom, and 0.92 for log-normal ones; that of FID at infinite n covered the true distance in 0.95, 0.98 and 0.98. With more
features and heavy tails the first can be too narrow: it covered 0.86 for Student's t, 2,000 images and 32 features. A few extreme images
then decide the FID, and a sample without them cannot show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from eval import fidelity
from eval.machine import cores
from eval.memorisation import memorisation
from eval.variety import coverage

GROUPS = 20
PAIRED = 10_000  # real images that precision and recall are taken over
T_975 = 2.093  # Student's t, 19 degrees of freedom


@dataclass(frozen=True)
class Features:
    """Hold features of images in order: ``fid`` [N, D] for FID, KID, precision and recall, and ``logits`` [N, C] or None."""

    fid: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class Reference:
    """Hold the features [N, D] of the real images, or only their mean and covariance in ``given``."""

    features: Tensor | None
    given: dict[str, np.ndarray] | None = None

    @cached_property
    def statistics(self) -> dict[str, np.ndarray]:
        """Mean "mu" [D] and covariance "sigma" [D, D]."""
        if self.features is None:
            assert self.given is not None
            return self.given
        return fidelity.statistics(self.features)

    @property
    def dimension(self) -> int:
        return len(self.statistics["mu"])

    @cached_property
    def root(self) -> Tensor:
        """The symmetric root R^(1/2) of the covariance, float64 [D, D]."""
        values, vectors = torch.linalg.eigh(torch.from_numpy(self.statistics["sigma"]).double())
        return (vectors * values.clip(0).sqrt()) @ vectors.T

    def frechet(self, mean: np.ndarray, trace: float, cross: np.ndarray) -> float:
        """Return torch-fidelity's FID of ``mean`` [D] and a covariance S, given by its ``trace`` and cross = R^(1/2) S R^(1/2).

            |mean - mu|^2 + tr S + tr R - 2 tr cross^(1/2)

        torch's symmetric eigenvalues take an eighth of the time of torch-fidelity's: 0.4 s of one core at 2,048 features.
        """
        values = torch.linalg.eigvalsh(torch.from_numpy(cross)).clip(0)
        shift = mean - self.statistics["mu"]
        return float(shift @ shift + trace + np.trace(self.statistics["sigma"]) - 2 * values.sqrt().sum())

    def floor(self, images: int, repeats: int = 10) -> float | None:
        """Return the FID that ``images`` fresh real images would have, or None if only statistics are known.

        Two sets of n and m real images have FID c (1/n + 1/m) to first order. c is measured on random halves of the
        reference. The result is for n = ``images`` and m = all images of the reference.
        """
        if self.features is None:
            return None
        n = len(self.features)
        rng = np.random.default_rng(0)
        values = []
        for _ in range(repeats):
            order = torch.from_numpy(rng.permutation(n))
            one, two = self.features[order[: n // 2]], self.features[order[n // 2 :]]
            values.append(fidelity.frechet(fidelity.statistics(one), fidelity.statistics(two)))
        return float(np.mean(values)) / (1 / (n // 2) + 1 / (n - n // 2)) * (1 / images + 1 / n)


@dataclass(frozen=True)
class Moments:
    """Hold float64 sums per group of samples x, for their Frechet distance to a reference of covariance R.

    Count [G], sum of x [G, D], sum of |x|^2 [G], and sum of the outer products of R^(1/2) x [G, D, D]. These give R^(1/2) S R^(1/2)
    for the covariance S of any groups without a product of matrices.
    """

    n: np.ndarray
    total: np.ndarray
    square: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, features: Tensor, reference: Reference, index: Tensor | None = None, groups: int = GROUPS) -> Moments:
        """Sum features [N, D]. Sample i belongs to group i mod ``groups``, or index[i] mod ``groups`` if ``index`` [N] is given."""
        group = (torch.arange(len(features)) if index is None else index) % groups
        parts = [features[group == g].double() for g in range(groups)]
        rooted = [x @ reference.root for x in parts]
        return cls(
            np.array([len(x) for x in parts]),
            torch.stack([x.sum(0) for x in parts]).numpy(),
            torch.stack([x.square().sum() for x in parts]).numpy(),
            torch.stack([y.T @ y for y in rooted]).numpy(),
        )

    @property
    def sums(self) -> tuple[np.ndarray, ...]:
        return self.n, self.total, self.square, self.outer

    def __iadd__(self, other: Moments) -> Moments:
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            mine += theirs
        return self

    def distance(self, reference: Reference) -> float:
        """Return the Frechet distance of all samples. ``reference`` is that of `of`."""
        return _distance(reference, *(part.sum(0) for part in self.sums))

    def left_out(self, reference: Reference) -> list[float]:
        """Return the Frechet distances without each group in turn."""
        whole: list = [part.sum(0) for part in self.sums]
        return [
            _distance(reference, *(every - part[group] for every, part in zip(whole, self.sums, strict=True)))
            for group in range(len(self.n))
        ]


def _distance(reference: Reference, n: int, total: np.ndarray, square: float, outer: np.ndarray) -> float:
    """Return the Frechet distance of n samples with these sums. Takes ``outer`` for the intermediate result."""
    mean = total / n
    along = reference.root.numpy() @ mean
    outer -= n * np.outer(along, along)
    outer /= n - 1
    return reference.frechet(mean, (square - n * float(mean @ mean)) / (n - 1), outer)


def jackknife(value: float, left_out: list[float]) -> tuple[float, float]:
    """Return standard error and bias-corrected value, from the values v_g with each of G groups left out.

        error^2 = (G - 1)/G sum (v_g - mean v)^2,        corrected = G value - (G - 1) mean v

    The correction removes a bias in 1/n. For FID it gives FID-infinity (1911.07023).
    """
    groups = len(left_out)
    mean = sum(left_out) / groups
    error = math.sqrt((groups - 1) / groups * sum((v - mean) ** 2 for v in left_out))
    return error, groups * value - (groups - 1) * mean


def paired_difference(one: dict, two: dict) -> tuple[float, float]:
    """Return the FID of row one minus that of row two, and its standard error. Shared noise cancels."""
    differences = [a - b for a, b in zip(one["fid_left_out"], two["fid_left_out"], strict=True)]
    value = one["fid"] - two["fid"]
    return value, jackknife(value, differences)[0]


@contextmanager
def _all_cores() -> Iterator[None]:
    """Give torch and numpy's BLAS all cores, however many processes there are: the last digits depend on the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        with threadpool_limits(cores()):
            yield
    finally:
        torch.set_num_threads(threads)


def fid_with_interval(features: Tensor, reference: Reference) -> dict:
    """Return `fid_of` for features [N, D], with the FID itself from torch-fidelity."""
    fid = fidelity.frechet(fidelity.statistics(features), reference.statistics)
    return fid_of(Moments.of(features, reference), reference, fid)


def fid_of(moments: Moments, reference: Reference, fid: float | None = None) -> dict:
    """Return fid and fid_infinity with their 95 % intervals, and the FIDs with each group left out."""
    fid = moments.distance(reference) if fid is None else fid
    left_out = moments.left_out(reference)
    error, infinity = jackknife(fid, left_out)
    return {
        "fid": fid,
        "fid_interval": [fid - T_975 * error, fid + T_975 * error],
        "fid_infinity": infinity,
        "fid_infinity_interval": [infinity - T_975 * error, infinity + T_975 * error],
        "fid_left_out": left_out,
    }


@_all_cores()
def measure_moments(moments: Moments, reference: Reference) -> dict:
    """Return FID and its interval from moments alone."""
    return fid_of(moments, reference)


def spaced(real: Tensor) -> Tensor:
    """Return the features [N, D] of evenly spaced real images, at most `PAIRED`; all where there are no more.

    Precision and recall need the distances of all pairs of real images: minutes per cell for 60,000.
    """
    return real[:: -(-len(real) // PAIRED)]


@_all_cores()
def measure(features: Features, reference: Reference) -> dict:
    """Return all metrics of generated features. Those that need the real features are None without them."""
    row = fid_with_interval(features.fid, reference)
    row["isc"] = None if features.logits is None else fidelity.inception_score(features.logits)
    if reference.features is None:
        return row | dict.fromkeys(("kid", "kid_spread", "precision", "recall", "coverage", "nearest_real", "copies"))
    kid, kid_spread = fidelity.kid(features.fid, reference.features)
    precision, recall = fidelity.precision_recall(features.fid, spaced(reference.features))
    row |= {"kid": kid, "kid_spread": kid_spread, "precision": precision, "recall": recall}
    row["coverage"] = coverage(features.fid, reference.features)
    return row | memorisation(features.fid, reference.features)
