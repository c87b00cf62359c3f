"""The texts of a report: column heads, their explanations, number formats, and the names of the protocol's entries."""

from __future__ import annotations

COLUMNS = {
    "model": "model",
    "sampler": "sampler",
    "grid": "time grid",
    "steps": "steps",
    "nfe": "NFE",
    "fid": "FID",
    "fid_interval": "95 % interval",
    "fid_infinity": "FID at infinite n",
    "paired_difference": "FID − best free sampler's",
    "paired_with": "best free sampler",
    "ratio": "FID / teacher's FID",
    "equivalent_nfe": "teacher's NFE for this FID",
    "break_even_images": "break-even images",
    "drift": "drift",
    "kid": "KID × 1000",
    "cmmd": "CMMD",
    "clip_score": "CLIP score",
    "isc": "IS",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "diversity": "diversity",
    "agreement": "class agreement",
    "nearest_real": "nearest real",
    "copies": "copies",
    "seconds_per_image": "ms per image",
    "seconds_interval": "ms per image, range",
    "decode_seconds_per_image": "decoding, ms per image",
    "peak_memory_gb": "peak memory, GB",
    "same_as": "measured as",
}
SHOWN = (
    "nfe",
    "fid",
    "fid_interval",
    "paired_difference",
    "ratio",
    "equivalent_nfe",
    "seconds_per_image",
)  # and the row's name
NOTES = {
    "nfe": "network evaluations per image; guidance doubles them",
    "fid_interval": "of the FID, from a jackknife over 20 groups of the generated images; in simulations it covered 92 to 95 % of the time, "
    "and 86 % with heavy-tailed features",
    "fid_infinity": "FID extrapolated to infinitely many generated images; it has the width of the FID's interval, so that a small one may "
    "be below 0",
    "paired_difference": "FID of a student minus that of the teacher's best training-free sampler with at most as many evaluations, with "
    "the 95 % interval of the paired difference, in which the shared noise cancels; below 0 the student is better",
    "ratio": "FID divided by the FID of the teacher at its largest number of DDIM steps",
    "equivalent_nfe": "network evaluations with which the teacher's best samplers reach this FID; a student that needs as many itself is "
    "of no use",
    "break_even_images": "number of images at which the time saved in sampling equals the training time; empty where the rounds of timing "
    "disagree by more than a factor of 2 on the time saved",
    "seconds_per_image": "median over six rounds, each of which times a batch of every cell in turn",
    "seconds_interval": "fastest and slowest of these rounds, a 97 % interval of the median",
    "same_as": "this sampler makes the same arithmetic at this step count as the named cell, and shares its measurement",
    "drift": "distance to the teacher's images from the same noise, divided by the distance between the teacher's images from "
    "different noise; 0 means equal images, 1 means unrelated images",
    "precision": "fraction of generated images near real ones (1904.06991); it and recall take at most 10,000 evenly spaced real images",
    "coverage": "fraction of real images with a generated image nearer than their 5th nearest real one",
    "cmmd": "1000 times the squared kernel distance of the CLIP features of generated and real images (2401.09603)",
    "clip_score": "100 times the cosine of the CLIP features of an image and its prompt, at least 0, averaged (2104.08718)",
    "diversity": "mean distance of two images of one class or prompt in feature space, divided by that of the teacher at its largest "
    "number of DDIM steps",
    "agreement": "fraction of images that the feature extractor assigns to the requested class, or to the class of their caption",
    "nearest_real": "median distance to the nearest real image, divided by this median among real images; values well below 1 "
    "indicate memorisation",
    "copies": "fraction of images closer to a real image than the closest 1 % of real images are to each other; about 0.01 means "
    "no copies",
}
FACTS = {  # entries of the protocol and of a run
    "images": "generated images per cell",
    "chunk": "images per batch",
    "features": "feature extractor",
    "distance": "name of the Fréchet distance",
    "features_sha256": "sha256 of the extractor's weights",
    "reference": "reference (real images)",
    "reference_images": "images in the reference (0: unknown)",
    "reference_sha256": "sha256 of the reference",
    "rounding": "rounding to uint8",
    "resize": "resizing",
    "labels": "class labels",
    "generation": "arithmetic of generation",
    "training": "training time",
    "versions": "software versions",
    "runs": "compared runs",
    "commit": "commit of fewstep",
}
_FORMATS: dict[str, tuple[float, str]] = {  # factor and format of a column's numbers
    **dict.fromkeys(("fid", "fid_interval", "fid_infinity", "ratio", "drift", "isc", "cmmd"), (1, ".3f")),
    **dict.fromkeys(("precision", "recall", "coverage", "diversity", "agreement", "nearest_real", "copies"), (1, ".3f")),
    **dict.fromkeys(("kid", "seconds_per_image", "seconds_interval", "decode_seconds_per_image"), (1000, ".2f")),
    "nfe": (1, "g"),
    "clip_score": (1, ".2f"),
    "equivalent_nfe": (1, ".1f"),
    "break_even_images": (1, ",.0f"),
    "peak_memory_gb": (1, ".1f"),
}  # fmt: skip


def plural(number: float, noun: str) -> str:
    """Return a number with its noun in the right form: "1 step", "2 steps", "10,000 processes"."""
    counted = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{counted} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def text(row: dict, column: str) -> str:
    """Return one cell of the table as text."""
    value = row.get(column)
    if "error" in row and column == "fid":
        return row["error"]
    if value is None:
        return ""
    if column == "paired_difference":
        return f"{value:+.3f} ± {(row['paired_interval'][1] - row['paired_interval'][0]) / 2:.3f}".replace("-", "−")
    factor, form = _FORMATS.get(column, (1, None))
    if isinstance(value, list):
        return " – ".join(f"{factor * end:{form}}" for end in value)
    return str(value) if form is None else f"{factor * value:{form}}"


def facts(report: dict) -> list[tuple[str, str]]:
    """Return name and value of everything that the numbers depend on."""
    floor = "" if report["floor"] is None else f"{report['floor']:.4f}"
    known = [("floor: FID of as many fresh real images", floor), ("row that FIDs are divided by", report["baseline"] or "")]
    return known + [(FACTS.get(k, k), str(v)) for k, v in {**report["protocol"], **report["run"]}.items()]


def used_columns(report: dict) -> list[str]:
    """Return the columns that have a value in at least one row."""
    return [c for c in COLUMNS if any(row.get(c) is not None for row in report["rows"])]


def floor_note(report: dict) -> str:
    """Return what the floor of a report is, what it consists of, and why rows lie below it; empty without a floor.

    The floor is c (1/n + 1/m) for n generated and m reference images (`eval.metrics.Reference.floor`).
    """
    floor, n, m = report["floor"], report["protocol"]["images"], report["protocol"]["reference_images"]
    if floor is None or not m:
        return ""
    measured = [row for row in report["rows"] if "error" not in row]
    below = sum(row["fid"] < floor for row in measured)
    own = floor * m / (n + m)
    return (
        f"The floor (dashed line) is the FID of {n:,} fresh real images: {floor:.3f}. Of it, {own:.3f} come from these {n:,} images, and "
        f"{floor - own:.3f} from the {m:,} images of the reference, which are a sample too. {below} of {plural(len(measured), 'row')} "
        f"{'lies' if below == 1 else 'lie'} below the floor. By default the reference is the training set itself. A model that has learned "
        f"this set shares its sampling error, fresh real images do not: {n:,} images drawn again from the reference have an FID of about "
        f"{own:.3f}. Most FIDs of a good model therefore lie below the floor. This does not mean that its images are better than real ones."
    )
