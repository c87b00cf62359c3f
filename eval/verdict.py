"""Compare the rows of a sweep: ratio, Pareto front, equivalent evaluations, break-even, drift, and the verdict in words."""

from __future__ import annotations

import math
from statistics import median

from torch import Tensor

from eval.columns import plural
from eval.metrics import T_975, paired_difference
from eval.series import series

STEADY = 2.0  # a break-even is given where the ends of its interval are within this factor


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
    front = pareto(at_its_scale(row, teachers), "nfe")
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

    The reference of a row is the `reference_row` of its guidance scale, or of all rows where the teacher was not measured at that scale.
    Adds ``ratio`` (FID over the FID of the reference), ``diversity`` (`eval.variety.spread` over that of the reference) and ``drift``,
    for students also ``equivalent_nfe``, the `against_free` difference and the `break_even`.
    """
    teachers, out = _of("teacher", rows), []
    for row in rows:
        baseline = reference_row(at_its_scale(row, rows)) or reference_row(rows)
        if "error" not in row:
            new: dict = {}
            if baseline is not None:
                new["ratio"] = row["fid"] / baseline["fid"]
                if row.get("spread") and baseline.get("spread"):
                    new["diversity"] = row["spread"] / baseline["spread"]
                if row is not baseline:
                    new["drift"] = drift(kept[row["name"]], kept[baseline["name"]])
            if row["role"] == "student" and teachers:
                new["equivalent_nfe"] = equivalent_nfe(row, teachers)
                new |= against_free(row, teachers)
                new |= break_even(row | new, teachers)
            row = row | new
        out.append(row)
    return out


def against_free(row: dict, teachers: list[dict]) -> dict:
    """Return the FID of a student minus that of the best training-free sampler with at most as many evaluations, paired.

    ``paired_difference``, its 95 % interval ``paired_interval``, and the name ``paired_with`` of that sampler's row; {} without one.
    """
    if (rival := best_rival(row, teachers)) is None:
        return {}
    difference, error = paired_difference(row, rival)
    ends = [difference - T_975 * error, difference + T_975 * error]
    return {"paired_difference": difference, "paired_interval": ends, "paired_with": rival["name"]}


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


def break_even(row: dict, teachers: list[dict]) -> dict:
    """Return ``break_even_images`` and its interval: training seconds over the seconds that the student saves per image.

    The seconds saved are those of ``equivalent_nfe`` calls of the teacher less those of the student, within each round of timing. The
    value is taken at their median over the rounds, the interval at their extremes. Both are None where a round saves nothing, where the
    ends differ by more than the factor `STEADY`, and where something is unknown. A student that was timed with other teachers than these
    keeps what it has.
    """
    nothing = {"break_even_images": None, "break_even_interval": None}
    if not row.get("training_seconds") or row["equivalent_nfe"] is None or "timing" not in row:
        return nothing
    beside = [teacher for teacher in teachers if teacher.get("timing") == row["timing"]]
    if not beside:
        return {key: row.get(key) for key in nothing}
    saved = []
    for turn, seconds in enumerate(row["seconds_rounds"]):
        per_call = median(teacher["seconds_rounds"][turn] / teacher["nfe"] for teacher in beside)
        saved.append(row["equivalent_nfe"] * per_call - seconds)
    if min(saved) <= 0 or max(saved) > STEADY * min(saved):
        return nothing
    low, value, high = (row["training_seconds"] / s for s in (max(saved), median(saved), min(saved)))
    return {"break_even_images": value, "break_even_interval": [low, high]}


def _wins(rows: list[dict]) -> list[dict]:
    """Return the rows of students that are better than every training-free sampler with at most as many evaluations."""
    teachers = _of("teacher", rows)
    return [row for row in _of("student", rows) if (rival := best_rival(row, teachers)) and _is_better(row, rival)]


def headline(rows: list[dict]) -> str:
    """Return what the best student has with the fewest evaluations at which it wins, and what the teacher has; empty without a win."""
    if not (wins := _wins(rows)):
        return ""
    best = _best_at(min(row["nfe"] for row in wins), wins)
    rival = best_rival(best, _of("teacher", rows))
    assert rival is not None
    who = f" ({_who(best)})" if _several(rows) else ""
    count = plural(round(best["nfe"]), "network evaluation")
    return f"{count}: FID {best['fid']:.3g}{who} instead of {rival['fid']:.3g} ({rival['sampler']})."


def _several(rows: list[dict]) -> bool:
    return len({series(row) for row in _of("student", rows)}) > 1


def _who(row: dict) -> str:
    return series(row).removeprefix("student ")


def verdict(rows: list[dict]) -> str:
    """Return in words up to how many network evaluations the best student is better, and what the teacher needs to match it.

    It opens with the `headline` where that is about fewer evaluations. Where several students win at the largest number, the one with the
    lowest FID is named; so are other students that are better at fewer.
    """
    students, teachers = _of("student", rows), _of("teacher", rows)
    if not students or not teachers:
        return f"There is nothing to compare: this report has no {'teacher' if students else 'student'}."
    if not (wins := _wins(rows)):
        return "No student is better than the teacher's best training-free sampler at equally many network evaluations."
    last = _best_at(max(row["nfe"] for row in wins), wins)
    nearest = best_rival(last, teachers)
    assert nearest is not None
    difference, error = paired_difference(last, nearest)
    nfe = equivalent_nfe(last, teachers)
    equal = "No sampler of the teacher in this report reaches this FID."
    if nfe is not None:
        equal = f"The teacher's samplers need about {nfe:.1f} evaluations to reach this FID."
    first = f"{headline(rows)} " if any(row["nfe"] < last["nfe"] for row in wins) else ""
    who = f" {_who(last)}" if _several(rows) else ""
    there = {series(row) for row in students if row["nfe"] == last["nfe"]}
    among = f", the lowest of {len(there)} students" if len(there) > 1 else ""
    return (
        f"{first}Use the student{who} up to {plural(round(last['nfe']), 'network evaluation')}. There its FID is {last['fid']:.3f}{among}; "
        f"the teacher's best training-free sampler ({nearest['sampler']}) has {nearest['fid']:.3f}. The difference is {-difference:.3f} ± "
        f"{T_975 * error:.3f} (95 % interval). {equal}{_earned(last)}{_others(last, wins)}"
        f"{_beyond(last, students, teachers)}"
    )


def _best_at(nfe: float, rows: list[dict]) -> dict:
    """Return the row of the lowest FID with this number of network evaluations."""
    return min((row for row in rows if row["nfe"] == nfe), key=lambda row: row["fid"])


def _earned(row: dict) -> str:
    """Return the sentence about the break-even, or nothing where it is unknown or its interval too wide."""
    if row.get("break_even_images") is None:
        return ""
    low, high = map(_round, row["break_even_interval"])
    value = _round(row["break_even_images"])
    return f" The training time is regained after about {value} images ({low} to {high} over the rounds of timing)."


def _others(last: dict, wins: list[dict]) -> str:
    """Return a sentence about the other students that are the best at fewer evaluations."""
    best = [_best_at(nfe, wins) for nfe in sorted({row["nfe"] for row in wins}) if nfe < last["nfe"]]
    found = [f"{series(row)} at {row['nfe']:g} ({row['fid']:.3f})" for row in best if series(row) != series(last)]
    return f" At fewer evaluations other students have a lower FID: {', '.join(found)}." if found else ""


def _beyond(last: dict, students: list[dict], teachers: list[dict]) -> str:
    """Return a sentence about students of more evaluations: where a training-free sampler is better, and where neither is."""
    worse, level = list[str](), list[str]()
    for nfe in sorted({row["nfe"] for row in students if row["nfe"] > last["nfe"]}):
        best = _best_at(nfe, students)
        rival = best_rival(best, teachers)
        assert rival is not None
        (worse if _is_better(rival, best) else level).append(f"{nfe:g}")
    said = f" At {_listed(level)} evaluations the difference is within its interval." if level else ""
    return said + (f" At {_listed(worse)} evaluations a training-free sampler is better." if worse else "")


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _round(value: float) -> str:
    """Return a number to two significant digits, with thousands separated."""
    digits = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return f"{round(value / digits) * digits:,}"


def best_rival(row: dict, teachers: list[dict]) -> dict | None:
    """Return the teacher's best row with no more network evaluations, `at_its_scale`."""
    return min((t for t in at_its_scale(row, teachers) if t["nfe"] <= row["nfe"]), key=lambda t: t["fid"], default=None)


def at_its_scale(row: dict, rows: list[dict]) -> list[dict]:
    """Return the rows at the guidance scale of ``row``, or all of them where none was measured at that scale."""
    return [other for other in rows if other.get("guidance") == row.get("guidance")] or rows


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
    if len(sessions := {row.get("timing") for row in good(rows)}) > 1:
        out.append(f"The times were taken in {len(sessions)} sweeps that did not alternate: compare times within one run only.")
    for row in rows:
        if "error" in row:
            out.append(row["error"])
        elif row.get("saturated_pixels", 0) > 0.05:
            out.append(
                f"{row['saturated_pixels']:.0%} of the values of {row['name']!r} are outside [-1.1, 1.1] before clamping."
            )
    return out
