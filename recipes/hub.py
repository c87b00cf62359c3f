"""hf: image sets of the ``datasets`` package, from its hub or from a folder that `save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recipes.decode import Record, Source

LABELS, CAPTIONS = ("label", "labels", "fine_label"), ("caption", "text", "prompt")  # looked for where no column is named


def hub_source(name: str, options: dict[str, str], streaming: bool) -> Source:
    """``options``: split, config, image, label, caption and classes. ValueError where the package, the set or a column is missing."""
    split = options.get("split", "train")
    found = _open(name, options.get("config"), split, streaming)
    if found.features is None:
        found = found._resolve_features()  # a stream may say what it holds by its first examples only
    features = found.features or {}
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    image = options.get("image") or next((column for column, kind in kinds.items() if kind == "Image"), "image")
    label = options.get("label") or next((column for column in LABELS if column in kinds), None)
    caption = options.get("caption") or next((column for column in CAPTIONS if kinds.get(column) == "Value"), None)
    for option, column in (("image", image), ("label", label), ("caption", caption)):
        if column is not None and column not in kinds:
            raise ValueError(f"hf:{name}: no column {column!r}: {option}=... accepts {', '.join(kinds)}")
    if kinds[image] != "Image":
        raise ValueError(
            f"hf:{name}: column {image!r} holds {kinds[image]}, no images: image=... accepts one of {', '.join(kinds)}"
        )
    found = _encoded(found, image)
    count = len(found) if hasattr(found, "__len__") else None
    classes = int(options["classes"]) if "classes" in options else getattr(features.get(label or ""), "num_classes", None)

    def record(i: int, row: dict[str, Any]) -> Record:
        where = f"hf:{name} {split} {i}"
        number, text = row.get(label or ""), row.get(caption or "")
        if label is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise ValueError(f"{where}: {label} is {number!r}, label=... accepts a column of class numbers")
        if caption is not None and not isinstance(text, str):
            raise ValueError(f"{where}: {caption} is {type(text).__name__}, caption=... accepts a column of text")
        content = row[image] or {}
        return Record(where, content.get("bytes") or Path(content.get("path") or ""), number, text)

    def records(seed: int | None, rank: int, world: int) -> Iterator[Record]:
        from datasets.distributed import split_dataset_by_node

        if count is not None:
            order = range(count) if seed is None else np.random.default_rng(seed).permutation(count).tolist()
            yield from (record(i, found[i]) for i in order[rank::world])
        else:
            stream = found if seed is None else found.shuffle(seed=seed, buffer_size=1)  # the order of its shards
            mine = split_dataset_by_node(stream, rank=rank, world_size=world)
            yield from (record(i, row) for i, row in enumerate(mine))

    return Source(Path(name).name, records, count, classes)


def _open(name: str, config: str | None, split: str, streaming: bool) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"hf:{name} needs the package datasets: pip install 'fewstep[hf]'") from None
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
            return found[split] if isinstance(found, dict) else found
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # the package raises many kinds; all mean that the set cannot be had
        line = " ".join(str(error).split())[:200]
        raise ValueError(
            f"hf:{name}, split={split}: {type(error).__name__}: {line}; is it spelt right, is there a network?"
        ) from None


def _encoded(found: Any, image: str) -> Any:
    """Images as the bytes they were stored in, so that what is passed over is not decoded."""
    import datasets

    return found.cast_column(image, datasets.Image(decode=False))
