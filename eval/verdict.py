"""What the rows of a sweep say together: ratios, the front, equivalent evaluations, break-even, drift, and the verdict."""

from __future__ import annotations

import math

from torch import Tensor

from eval.metrics import T_975, paired_difference


def good(rows: list[dict]) -> list[dict]:
    """The rows of cells that could be measured."""
    return [row for row in rows if "error" not in row]


def reference_row(rows: list[dict]) -> dict | None:
    """The teacher at its most DDIM steps, against which students are compared; None where it was not measured."""
    ddim = [row for row in good(rows) if row["role"] == "teacher" and row["sampler"] == "ddim"]
    return max(ddim, key=lambda row: row["steps"], default=None)


def pareto(rows: list[dict], x: str) -> list[dict]:
    """The rows that no other row beats in both cost ``x`` and FID, cheapest first."""
    best, front = float("inf"), []
    for row in sorted(good(rows), key=lambda row: (row[x], row["fid"])):
        if row["fid"] < best:
            best = row["fid"]
            front.append(row)
    return front


def equivalent_nfe(row: dict, teachers: list[dict]) -> float | None:
    """Network evaluations at which the teacher's best samplers reach a student's FID, on the log-log line through their front.

    None where none of them does; their cheapest cell where that one is better already.
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
    """The rows with what they are beside the teacher. ``kept``: the first images of each cell by name, uint8 [n, C, H, W].

    ratio: FID over the teacher's at its most DDIM steps. drift: see `drift`. equivalent_nfe: see there, students only.
    break_even_images: images after which the seconds spent on training a student are earned back against those evaluations.
    """
    baseline = reference_row(rows)
    teachers = [row for row in good(rows) if row["role"] == "teacher"]
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
    """Root mean square pixel difference from the reference's images of the same indices, over that between its own images of
    different ones: 0 where a student copies the teacher's map, 1 where it shares no more than its distribution."""
    n = min(len(images), len(reference))
    if n < 2 or images.shape[1:] != reference.shape[1:]:
        return None
    one, two = images[:n].float(), reference[:n].float()
    apart = (two - two.roll(1, 0)).square().mean().sqrt()
    return ((one - two).square().mean().sqrt() / apart).item() if apart > 0 else None


def _break_even(row: dict, teachers: list[dict]) -> float | None:
    """Training seconds over seconds saved an image; None where nothing is saved or either is unknown."""
    if row["equivalent_nfe"] is None or not row.get("training_seconds"):
        return None
    per_call = sorted(t["seconds_per_image"] / t["nfe"] for t in teachers)[len(teachers) // 2]
    saved = row["equivalent_nfe"] * per_call - row["seconds_per_image"]
    return row["training_seconds"] / saved if saved > 0 else None


def verdict(rows: list[dict]) -> str:
    """One sentence: up to how many NFE the student is the better choice, and what the teacher needs to match it."""
    students = sorted((row for row in good(rows) if row["role"] == "student"), key=lambda row: row["nfe"])
    teachers = [row for row in good(rows) if row["role"] == "teacher"]
    if not students or not teachers:
        return "There is nothing to compare: the sweep holds no student or no teacher."
    wins = [(row, rival) for row in students if (rival := _best_rival(row, teachers)) and _is_better(row, rival)]
    if not wins:
        return "No student beats the teacher's best training-free sampler at the same number of network evaluations."
    last, nearest = wins[-1]
    difference, error = paired_difference(last, nearest)
    nfe = equivalent_nfe(last, teachers)
    equal = "no sampler in this sweep reaches it" if nfe is None else f"they need about {nfe:.1f} to reach it"
    even = last.get("break_even_images")
    earned = "" if even is None else f" Its training is earned back after {_round(even)} images."
    return (
        f"Up to {last['nfe']:.0f} network evaluations use the student: at {last['nfe']:.0f} its FID of {last['fid']:.3f} is below "
        f"the {nearest['fid']:.3f} of the best training-free sampler ({nearest['sampler']}) "
        f"by {-difference:.3f} +- {T_975 * error:.3f}, and {equal}.{earned}"
    )


def _round(value: float) -> str:
    """Two significant digits, with thousands apart."""
    digits = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return f"{round(value / digits) * digits:,}"


def _best_rival(row: dict, teachers: list[dict]) -> dict | None:
    """The teacher's best sampler that costs no more network evaluations."""
    return min((t for t in teachers if t["nfe"] <= row["nfe"]), key=lambda t: t["fid"], default=None)


def _is_better(row: dict, rival: dict) -> bool:
    """By more than the 95 % interval of the difference."""
    difference, error = paired_difference(row, rival)
    return difference < -T_975 * error


def warnings(rows: list[dict], protocol: dict, dimension: int) -> list[str]:
    """What a reader must know before trusting the numbers."""
    out = []
    n, m = protocol["images"], protocol["reference_images"]
    if n <= dimension:
        out.append(f"{n:,} images do not determine the covariance of {dimension:,} features: FID is far too high")
    if n < 2048:
        out.append(f"FID at {n:,} images is biased upwards and noisy; compare it only within this report")
    if 0 < m <= dimension:
        out.append(f"the reference of {m:,} images does not determine the covariance of {dimension:,} features")
    for row in rows:
        if "error" in row:
            out.append(row["error"])
        elif row.get("saturated_pixels", 0) > 0.05:
            out.append(f"{row['saturated_pixels']:.0%} of the values of {row['name']!r} are more than 0.1 outside [-1, 1]")
    return out
