"""Compare the rows of a sweep: ratio, Pareto front, equivalent evaluations, break-even, drift, and the verdict in words."""

from __future__ import annotations

import math

from torch import Tensor

from eval.columns import plural
from eval.metrics import T_975, paired_difference


def good(rows: list[dict]) -> list[dict]:
    """Return the rows of cells that were measured without error."""
    return [row for row in rows if "error" not in row]


def _of(role: str, rows: list[dict]) -> list[dict]:
    return [row for row in good(rows) if row["role"] == role]


def reference_row(rows: list[dict]) -> dict | None:
    """Return the row of the teacher at its largest number of DDIM steps, or None if there is none."""
    ddim = [row for row in _of("teacher", rows) if row["sampler"] == "ddim"]
    return max(ddim, key=lambda row: row["steps"], default=None)


def pareto(rows: list[dict], x: str) -> list[dict]:
    """Return the rows that no other row beats in both cost ``x`` and FID, cheapest first."""
    best, front = float("inf"), []
    for row in sorted(good(rows), key=lambda row: (row[x], row["fid"])):
        if row["fid"] < best:
            best = row["fid"]
            front.append(row)
    return front


def equivalent_nfe(row: dict, teachers: list[dict]) -> float | None:
    """Return the network evaluations with which the teacher's best samplers reach the FID of ``row``.

    The value is interpolated on the log-log line through their Pareto front. It is None if none of them reaches the FID, and
    the cost of the cheapest one if that one has a lower FID already.
    """
    front = pareto(teachers, "nfe")
    for i, rival in enumerate(front):
        if rival["fid"] <= row["fid"]:
            if i == 0:
                return rival["nfe"]
            before = front[i - 1]
            part = math.log(before["fid"] / row["fid"]) / math.log(before["fid"] / rival["fid"])
            return before["nfe"] * (rival["nfe"] / before["nfe"]) ** part
    return None


def with_comparisons(rows: list[dict], kept: dict[str, Tensor]) -> list[dict]:
    """Return the rows with their comparison to the teacher. ``kept``: name -> first images of the cell, uint8 [n, C, H, W].

    Adds ``ratio`` (FID over the FID of `reference_row`) and ``drift``, for students also ``equivalent_nfe`` and
    ``break_even_images`` (training time over the time saved per image).
    """
    baseline, teachers = reference_row(rows), _of("teacher", rows)
    out = []
    for row in rows:
        if "error" not in row:
            new: dict = {}
            if baseline is not None:
                new["ratio"] = row["fid"] / baseline["fid"]
                if row is not baseline:
                    new["drift"] = drift(kept[row["name"]], kept[baseline["name"]])
            if row["role"] == "student" and teachers:
                new["equivalent_nfe"] = equivalent_nfe(row, teachers)
                new["break_even_images"] = _break_even(row | new, teachers)
            row = row | new
        out.append(row)
    return out


def drift(images: Tensor, reference: Tensor) -> float | None:
    """Return the RMS distance to the reference's images of the same indices, over that among its images of different indices.

    0: the student has the teacher's map from noise to images. 1: only the distribution is shared. None: not comparable.
    """
    n = min(len(images), len(reference))
    if n < 2 or images.shape[1:] != reference.shape[1:]:
        return None
    one, two = images[:n].float(), reference[:n].float()
    apart = (two - two.roll(1, 0)).square().mean().sqrt()
    return ((one - two).square().mean().sqrt() / apart).item() if apart > 0 else None


def _break_even(row: dict, teachers: list[dict]) -> float | None:
    """Return training seconds over seconds saved per image, or None if nothing is saved or one of them is unknown."""
    if row["equivalent_nfe"] is None or not row.get("training_seconds"):
        return None
    per_call = sorted(t["seconds_per_image"] / t["nfe"] for t in teachers)[len(teachers) // 2]
    saved = row["equivalent_nfe"] * per_call - row["seconds_per_image"]
    return row["training_seconds"] / saved if saved > 0 else None


def verdict(rows: list[dict]) -> str:
    """Return in words up to how many network evaluations the student is better, and what the teacher needs to match it."""
    students, teachers = sorted(_of("student", rows), key=lambda row: row["nfe"]), _of("teacher", rows)
    if not students or not teachers:
        return "There is nothing to compare: this report has no student or no teacher."
    wins = [(row, rival) for row in students if (rival := _best_rival(row, teachers)) and _is_better(row, rival)]
    if not wins:
        return "No student is better than the teacher's best training-free sampler at equally many network evaluations."
    last, nearest = wins[-1]
    difference, error = paired_difference(last, nearest)
    nfe, even = equivalent_nfe(last, teachers), last.get("break_even_images")
    equal = "No sampler of the teacher in this report reaches this FID."
    if nfe is not None:
        equal = f"The teacher's samplers need about {nfe:.1f} evaluations to reach this FID."
    earned = "" if even is None else f" The training time is regained after {_round(even)} images."
    return (
        f"Use the student up to {plural(round(last['nfe']), 'network evaluation')}. There its FID is {last['fid']:.3f}; the teacher's "
        f"best training-free sampler ({nearest['sampler']}) has {nearest['fid']:.3f}. The difference is {-difference:.3f} ± "
        f"{T_975 * error:.3f} (95 % interval). {equal}{earned}"
    )


def _round(value: float) -> str:
    """Return a number to two significant digits, with thousands separated."""
    digits = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return f"{round(value / digits) * digits:,}"


def _best_rival(row: dict, teachers: list[dict]) -> dict | None:
    """Return the teacher's best row with no more network evaluations."""
    return min((t for t in teachers if t["nfe"] <= row["nfe"]), key=lambda t: t["fid"], default=None)


def _is_better(row: dict, rival: dict) -> bool:
    """Return whether the FID is lower by more than the 95 % interval of the difference."""
    difference, error = paired_difference(row, rival)
    return difference < -T_975 * error


def warnings(rows: list[dict], protocol: dict, dimension: int) -> list[str]:
    """Return what a reader must know before using the numbers. ``dimension``: number of features."""
    out = []
    n, m = protocol["images"], protocol["reference_images"]
    if n <= dimension:
        out.append(f"{n:,} images do not determine the covariance of {dimension:,} features: FID is far too high.")
    if n < 2048:
        out.append(f"FID of {n:,} images is noisy and biased upwards: compare it only within this report.")
    if 0 < m <= dimension:
        out.append(f"The reference of {m:,} images does not determine the covariance of {dimension:,} features.")
    for row in rows:
        if "error" in row:
            out.append(row["error"])
        elif row.get("saturated_pixels", 0) > 0.05:
            out.append(
                f"{row['saturated_pixels']:.0%} of the values of {row['name']!r} are outside [-1.1, 1.1] before clamping."
            )
    return out
