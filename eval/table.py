"""The table of a report: its columns, what they mean, and how their values are shown."""

from __future__ import annotations

COLUMNS = {
    "model": "model",
    "sampler": "sampler",
    "grid": "grid",
    "steps": "steps",
    "nfe": "NFE",
    "fid": "FID",
    "fid_interval": "95 % interval",
    "fid_infinity": "FID at infinite n",
    "ratio": "FID / teacher",
    "equivalent_nfe": "teacher's NFE for this FID",
    "break_even_images": "break-even images",
    "drift": "drift",
    "kid": "KID x1000",
    "isc": "IS",
    "precision": "precision",
    "recall": "recall",
    "agreement": "class agreement",
    "nearest_real": "nearest real",
    "copies": "copies",
    "seconds_per_image": "ms/image",
    "decode_seconds_per_image": "decoding ms/image",
    "peak_memory_gb": "peak GB",
}
NOTES = {
    "ratio": "FID over that of the teacher at its most DDIM steps",
    "drift": "distance to the teacher's images of the same noise, over that between its images of different noise",
    "nearest_real": "median distance to the nearest real image, over the same among real images; well below 1 is memorisation",
    "copies": "part of images nearer to a real one than the nearest 1 % of real images are to each other; 0.01 is none",
    "equivalent_nfe": "network evaluations at which the teacher's best samplers reach this FID",
    "break_even_images": "images after which the training time is earned back against those evaluations",
}
FORMS: dict[str, tuple[float, str]] = {  # factor and format of a column's numbers
    **dict.fromkeys(("fid", "fid_infinity", "ratio", "drift", "isc"), (1, ".3f")),
    **dict.fromkeys(("precision", "recall", "agreement", "nearest_real", "copies"), (1, ".3f")),
    **dict.fromkeys(("kid", "seconds_per_image", "decode_seconds_per_image"), (1000, ".2f")),
    "nfe": (1, "g"),
    "equivalent_nfe": (1, ".1f"),
    "break_even_images": (1, ",.0f"),
    "peak_memory_gb": (1, ".1f"),
}  # fmt: skip


def text(row: dict, column: str) -> str:
    """One cell of the table as it is shown."""
    value = row.get(column)
    if "error" in row and column == "fid":
        return row["error"]
    if value is None:
        return ""
    if column == "fid_interval":
        return f"{value[0]:.3f} - {value[1]:.3f}"
    factor, form = FORMS.get(column, (1, None))
    return str(value) if form is None else f"{factor * value:{form}}"


def facts(report: dict) -> list[tuple[str, str]]:
    """The protocol block: everything the numbers depend on."""
    floor = "" if report["floor"] is None else f"{report['floor']:.4f}"
    known = [("FID of fresh real images at this n (floor)", floor), ("ratios are against", report["baseline"] or "")]
    return known + [(k, str(v)) for k, v in {**report["protocol"], **report["run"]}.items()]


def used_columns(report: dict) -> list[str]:
    """The columns that say something in this report."""
    return [c for c in COLUMNS if any(row.get(c) is not None for row in report["rows"])]
