"""Folders of generated images as two public benchmarks of text-to-image models read them, so that their own scripts run.

GenEval (2310.11513): 00000/metadata.jsonl, the line of its prompt file, and 00000/samples/*.png. DPG-Bench (2403.05135): one NAME.png
per prompt file NAME.txt, which holds four images, two by two.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distill.reading import read_text
from eval.image_grid import write_folder

DPG_IMAGES = 4  # of a prompt


@dataclass(frozen=True)
class Task:
    """Hold one prompt of a benchmark: its number, the name of its file or the line of the prompt file, and the text."""

    number: int
    name: str
    prompt: str


def geneval_tasks(file: Path) -> list[Task]:
    """Read GenEval's evaluation_metadata.jsonl: one JSON object with "prompt" per line. Raises ValueError for any other line."""
    tasks = []
    for number, line in enumerate(line for line in read_text(str(file)).splitlines() if line.strip()):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}: line {number + 1} is no JSON object with a prompt: {line:.80}") from None
        tasks.append(Task(number, line, str(prompt)))
    return tasks


def dpg_tasks(folder: Path) -> list[Task]:
    """Read DPG-Bench's prompts, one text file each. Raises ValueError for a folder without any."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ValueError(f"{folder}: accepted is a folder with one .txt file per prompt")
    return [Task(number, file.stem, read_text(str(file)).strip()) for number, file in enumerate(files)]


def write_geneval(folder: Path, task: Task, images: Tensor) -> None:
    """Write the images [n, C, H, W], uint8, of a task of GenEval."""
    own = folder / f"{task.number:05d}"
    write_folder(images, own / "samples")
    (own / "metadata.jsonl").write_text(task.name.strip() + "\n", encoding="utf-8")


def write_dpg(folder: Path, task: Task, images: Tensor) -> None:
    """Write the four images [4, C, H, W], uint8, of a task of DPG-Bench. Raises ValueError for another number."""
    if len(images) != DPG_IMAGES:
        raise ValueError(f"DPG-Bench reads {DPG_IMAGES} images per prompt, these are {len(images)}")
    rows = torch.cat([torch.cat(list(pair), dim=2) for pair in images.split(2)], dim=1)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rows.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()).save(folder / f"{task.name}.png")


LAYOUTS: dict[str, tuple[Callable[[Path], list[Task]], Callable[[Path, Task, Tensor], None]]] = {
    "geneval": (geneval_tasks, write_geneval),
    "dpg": (dpg_tasks, write_dpg),
}
