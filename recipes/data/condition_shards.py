"""Read the conditions that recipes/latents.py and recipes/common/encoding.py write: memory-mapped shards with one row for each prompt.

conditions.safetensors holds the prompts as JSON text, the row of the empty prompt, and the sizes of the shards. Equal prompts share a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from distill import files
from distill.reading import malformed
from teachers.conditions import Conditions, Rows

CONDITIONS, INDEX, PATTERN = "fewstep-conditions/1", "conditions.safetensors", "conditions-*.safetensors"
NULL = "null."  # prefix of the empty prompt's conditions


def distinct(captions: Iterable[str]) -> list[str]:
    """Return captions without their surrounding blanks, each once, in the order in which they first occur."""
    return list(dict.fromkeys(caption.strip() for caption in captions))


def write_index(folder: Path, prompts: list[str], null: dict[str, Tensor], encoder: str, sizes: dict[str, int]) -> None:
    """Write the index of conditions. ``sizes``: {name of a shard: rows}, in order."""
    text = torch.frombuffer(bytearray(json.dumps(prompts).encode()), dtype=torch.uint8)
    tensors = {"prompts": text} | {NULL + name: row for name, row in null.items()}
    about = {"format": CONDITIONS, "count": len(prompts), "encoder_sha256": encoder, "shards": sizes}
    files.save(folder / INDEX, tensors, {"conditions": about})


def read_conditions(folder: Path) -> Conditions | None:
    """Return the conditions of a folder, mapped into memory; None if it has none.

    Raises ValueError for an incomplete index, and for a shard that does not agree with it.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    tensors, description = files.load(path)
    with malformed(path):
        about = description["conditions"]
        if about["format"] != CONDITIONS:
            raise ValueError(f"format {about['format']!r}, this version reads {CONDITIONS!r}")
        prompts = json.loads(tensors.pop("prompts").numpy().tobytes())
        null = {name.removeprefix(NULL): row for name, row in tensors.items()}
        parts: dict[str, list[Tensor]] = {name: [] for name in null}
        for name, rows in about["shards"].items():
            shard, _ = files.load(folder / Path(name).name, check=False)
            for condition, row in null.items():
                part = shard[condition]
                if part.shape != (rows, *row.shape[1:]) or part.dtype != row.dtype:
                    raise ValueError(f"{name}: {condition} is {part.dtype} {tuple(part.shape)}")
                parts[condition].append(part)
        whole = {name: Rows([*some, null[name]]) for name, some in parts.items()}
        if not null or any(len(rows) != len(prompts) + 1 for rows in whole.values()) or len(prompts) != about["count"]:
            raise ValueError(f"the shards do not hold the rows of {len(prompts):,} prompts")
    return Conditions.of(whole, prompts, about["encoder_sha256"])
