"""The model card of an export: what the student is, what it was made from, what it reaches and how it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from teachers.load import Teacher

USE = """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}")
images = pipeline({call}, num_inference_steps={steps}).images
```
"""


def measured(spec: str, fingerprint: str) -> list[dict]:
    """The rows about this very model in the report of the run that it lies in; none where there is no report."""
    path = Path(spec)
    for folder in (path, *path.parents):
        try:
            rows = json.loads((folder / "report.json").read_text())["rows"]
        except (OSError, json.JSONDecodeError, KeyError):
            continue
        return [row for row in rows if row.get("model_sha256") == fingerprint and "fid" in row]
    return []


def card(
    model: Teacher, pipelines: list[str], call: dict[str, Any], rows: list[dict], licence: str, picture: str | None
) -> str:
    """README.md, with the front matter that the hub reads. ``call``: what the pipelines are called with."""
    record, sampler = model.record, model.sampler
    tags = ["diffusion", "distillation", "few-step", *([record["method"]] if "method" in record else [])]
    facts = {
        "method": record.get("method"),
        "teacher": record.get("of"),
        "data": record.get("data"),
        "prediction": model.parametric.prediction,
        "schedule": type(model.parametric.schedule).__name__,
        "boundary": record.get("boundary"),
        "sampler": sampler.get("name", "ddim"),
        "steps": ", ".join(map(str, sampler.get("steps", []))) or "any",
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
        out += ["", "FID as the report beside this model's run has it; it compares within one protocol only.", ""]
    steps, how = min(sampler.get("steps", [64])), ", ".join(f"{name}={value!r}" for name, value in call.items())
    out += [USE.format(folder=name, call=how, steps=_steps(name, steps)) for name in pipelines]
    out += [
        "`student.safetensors` is the same model with its whole recipe inside, for fewstep's `--teacher` and `--model`.",
        "",
    ]
    out += [f"Licence: {licence}.", ""]
    return "\n".join(out)


def _steps(pipeline: str, otherwise: int) -> int:
    """The step count of a pipeline whose times are baked in stands in its name."""
    last = pipeline.rpartition("-")[2]
    return int(last) if last.isdigit() else otherwise
