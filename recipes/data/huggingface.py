"""Read image sets through the package ``datasets``, from the Hugging Face hub or from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.decode import Record, Source
from teachers.hub import reached

LABELS, CAPTIONS = ("label", "labels", "fine_label"), ("caption", "text", "prompt")  # default columns, the first found is used


def hub_source(name: str, options: dict[str, str], streaming: bool) -> Source:
    """Return a set of the hub, or of the folder ``name``, as a source.

    ``options``: split, config, image, label, caption and classes. Raises ValueError if the package, the set or a column is missing.
    """
    split = options.get("split", "train")
    found = _open(name, options.get("config"), split, streaming)
    if found.features is None:
        found = found._resolve_features()  # some streams show their features only by the first examples
    features = found.features or {}
    image, label, caption = _columns(name, options, {column: type(feature).__name__ for column, feature in features.items()})
    found = _encoded(found, image)
    count = len(found) if hasattr(found, "__len__") else None
    classes = int(options["classes"]) if "classes" in options else getattr(features.get(label or ""), "num_classes", None)

    def record(i: int, row: dict[str, Any]) -> Record:
        where = f"hf:{name} {split} {i}"
        number, text = row.get(label or ""), row.get(caption or "")
        if label is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise ValueError(f"{where}: {label} is {number!r}; accepted as label=... is a column of class numbers")
        if caption is not None and not isinstance(text, str):
            raise ValueError(f"{where}: {caption} is {type(text).__name__}; accepted as caption=... is a column of text")
        content = row[image] or {}
        return Record(where, content.get("bytes") or Path(content.get("path") or ""), number, text)

    def records(seed: int | None, rank: int, world: int) -> Iterator[Record]:
        from datasets.distributed import split_dataset_by_node

        if count is not None:
            order = range(count) if seed is None else np.random.default_rng(seed).permutation(count).tolist()
            yield from (record(i, found[i]) for i in order[rank::world])
        else:
            stream = found if seed is None else found.shuffle(seed=seed, buffer_size=1)  # shuffles the shards only
            mine = split_dataset_by_node(stream, rank=rank, world_size=world)
            yield from (record(i, row) for i, row in enumerate(mine))

    return Source(Path(name).name, records, count, classes)


def _columns(name: str, options: dict[str, str], kinds: dict[str, str]) -> tuple[str, str | None, str | None]:
    """Return the columns of images, labels and captions. ``kinds``: {column: class name of its feature}."""
    image = options.get("image") or next((column for column, kind in kinds.items() if kind == "Image"), "image")
    label = options.get("label") or next((column for column in LABELS if column in kinds), None)
    caption = options.get("caption") or next((column for column in CAPTIONS if kinds.get(column) == "Value"), None)
    for option, column in (("image", image), ("label", label), ("caption", caption)):
        if column is not None and column not in kinds:
            raise ValueError(f"hf:{name}: no column {column!r}; accepted as {option}=... are {', '.join(kinds)}")
    if kinds[image] != "Image":
        raise ValueError(
            f"hf:{name}: column {image!r} holds {kinds[image]}, not images; accepted as image=... are {', '.join(kinds)}"
        )
    return image, label, caption


def _open(name: str, config: str | None, split: str, streaming: bool) -> Any:
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError:
        raise ValueError(f"hf:{name} needs the package datasets: pip install -e '.[hf]'") from None
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
            return found[split] if isinstance(found, dict) else found
        if not Path(name).exists() and not reached(name, "dataset"):
            datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = (
                True  # what is in the cache is read, and nothing tried again
            )
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # the package raises many kinds; all mean that the set cannot be loaded
        line = " ".join(str(error).split())[:200]
        raise ValueError(
            f"hf:{name}, split={split}: {type(error).__name__}: {line}; is the spelling right, and is there a network?"
        ) from None


def _encoded(found: Any, image: str) -> Any:
    """Return the set with undecoded images, so that skipped images cost nothing."""
    import datasets

    return found.cast_column(image, datasets.Image(decode=False))
