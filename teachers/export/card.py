"""The model card of an export: what the model is, what it was made from, what it reaches and how to run it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from teachers.teacher import Teacher

USE = """```python
{load}
images = pipeline({call}, num_inference_steps={steps}).images
```
"""
FROM_FOLDER = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}"{without})"""
FROM_HUB = """from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

pipeline = DiffusionPipeline.from_pretrained(snapshot_download("{repository}") + "/{folder}"{without})"""


def measured(spec: str, fingerprint: str, sampler: str) -> list[dict]:
    """Return the rows about this model with this sampler from the report.json of its run, the nearest one above ``spec``.

    With one step all samplers of a student are one. Returns [] without a report.
    """
    path = Path(spec)
    for folder in (path, *path.parents):
        try:
            rows = json.loads((folder / "report.json").read_text())["rows"]
        except (OSError, json.JSONDecodeError, KeyError):
            continue
        mine = [row for row in rows if row.get("model_sha256") == fingerprint and "fid" in row]
        return [row for row in mine if row.get("role") == "teacher" or row["steps"] == 1 or row["sampler"] == sampler]
    return []


def card(
    model: Teacher,
    pipelines: list[str],
    call: dict[str, Any],
    rows: list[dict],
    licence: str,
    picture: str | None,
    repository: str | None = None,
    without: Iterable[str] = (),
) -> str:
    """Return the text of README.md, with the front matter that the hub reads.

    ``pipelines``: folder names. ``call``: arguments of the pipelines. ``rows``: from `measured`. ``picture``: a file of samples.
    ``repository``: where the hub will have the export; None for an export that is loaded from its folder.
    ``without``: components that the pipelines lack.
    """
    record, sampling = model.record, model.sampling
    tags = ["diffusion", "distillation", "few-step", *([record["method"]] if "method" in record else [])]
    facts = {
        "method": record.get("method"),
        "teacher": record.get("of"),
        "data": record.get("data"),
        "prediction": model.parametric.prediction,
        "schedule": type(model.parametric.schedule).__name__,
        "boundary": record.get("boundary"),
        "sampler": sampling.label,
        "guidance scales": model.guidance and f"{model.guidance}, pipelines of pixels at {model.guidance.scale:g}",
        "steps": ", ".join(map(str, sampling.steps)) or "any",
        "sample shape": "x".join(map(str, model.shape)),
        "classes": model.classes,
        "sha256": model.fingerprint,
    }
    out = ["---", f"license: {licence}", "library_name: diffusers", "tags:", *(f"- {tag}" for tag in tags), "---", ""]
    out += [f"# A {record.get('method', 'diffusion')} model of {record.get('data', 'unknown data')}", ""]
    if record.get("of"):
        out += [f"Distilled from `{record['of']}` with fewstep.", ""]
    if picture:
        out += [f"![samples]({picture})", ""]
    out += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items() if value is not None), ""]
    if rows:
        out += ["| steps | sampler | FID | 95 % interval | images |", "|---|---|---|---|---|"]
        for row in rows:
            low, high = row["fid_interval"]
            out.append(f"| {row['steps']} | {row['sampler']} | {row['fid']:.4g} | {low:.4g} - {high:.4g} | {row['images']:,} |")
        out += ["", "FID from the report of this model's run. Compare it only with FID of the same protocol.", ""]
    steps, how = min(sampling.steps, default=64), ", ".join(f"{name}={value!r}" for name, value in call.items())
    load, lacks = FROM_FOLDER if repository is None else FROM_HUB, "".join(f", {name}=None" for name in without)
    for name in pipelines:
        out += [
            USE.format(load=load.format(folder=name, repository=repository, without=lacks), call=how, steps=_steps(name, steps))
        ]
    out += ["`student.safetensors` is the same model with its recipe, for `--teacher` and `--model` of fewstep.", ""]
    out += [f"Licence: {licence}.", ""]
    return "\n".join(out)


def _steps(pipeline: str, otherwise: int) -> int:
    """Return the step count at the end of a pipeline's name, else ``otherwise``."""
    last = pipeline.rpartition("-")[2]
    return int(last) if last.isdigit() else otherwise
