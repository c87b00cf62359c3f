"""Images of several sizes: which sizes a model accepts, the index of a folder of latents for each, and a model at one of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distill import files
from recipes.common.shards import Shapes
from recipes.data.buckets import Buckets
from recipes.data.latent_shards import BUCKETS
from recipes.data.sets import Data
from teachers import Teacher
from teachers.networks.conditional import check_sides


def check_sizes(model: Teacher, sizes: tuple[tuple[int, int], ...]) -> None:
    """Raise ValueError for sizes in pixels that autoencoder or network cannot have."""
    if len(model.shape) != 3:
        raise ValueError(f"--sizes: the latents have the shape {model.shape}; accepted are models of latents [C, H, W]")
    for height, width in sizes:
        try:
            check_sides(model.network, height, width, model.image_shape[1] // model.shape[1])
        except ValueError as error:
            raise ValueError(f"--sizes {height}x{width}: {error}") from None


def write_indices(folder: Path, index: dict, shapes: Shapes, sizes: tuple[tuple[int, int], ...]) -> int:
    """Write index.json of the latents or, with ``sizes``, of each size and of all. Return the number of latents."""
    groups: dict[str, Shapes] = {"": shapes} if not sizes else {f"{h}x{w}": {} for h, w in sizes}
    for place, shape in sorted(shapes.items()) if sizes else ():
        name, _, file = place.partition("/")
        groups[name][file] = shape
    counts = {}
    for name, some in groups.items():
        if not some:
            print(f"no image is nearest to {name}, which is left out")
            continue
        held = {file: shape[0] for file, shape in sorted(some.items())}
        counts[name] = sum(held.values())
        own = {"count": counts[name], "shape": next(iter(some.values()))[1:], "shards": held}
        files.write_json(folder / name / "index.json", index | own)
    if sizes:
        files.write_json(folder / "index.json", {"format": BUCKETS, "model": index["model"], "buckets": counts})
        print("; ".join(f"{name}: {count:,} images" for name, count in counts.items()))
    return sum(counts.values())


def fits(teacher: Teacher, data: Data) -> bool:
    """Return whether the samples have the teacher's shape or, in a set of several shapes, its channels.

    Raises ValueError for one of several shapes that its network does not take.
    """
    if not isinstance(data.images, Buckets):
        return teacher.shape == data.shape
    for shape in data.images.shapes:
        if len(shape) != 3 or shape[:1] != teacher.shape[:1]:
            return False
        try:
            check_sides(teacher.network, *shape[1:])
        except ValueError as error:
            raise ValueError(f"{data.name} holds latents of shape {shape}: {error}") from None
    return True


def at_size(teacher: Teacher, data: Data) -> Teacher:
    """Return the model with conditions for the size of the images of data of one shape."""
    size = None if teacher.embeddings is None else data.pixels(data.shape)
    return (
        teacher if size is None or teacher.embeddings is None else replace(teacher, embeddings=teacher.embeddings.sized(*size))
    )


def shapes_text(data: Data) -> str:
    """Return the shape of the samples, or how many there are of each, for people."""
    if not isinstance(data.images, Buckets):
        return "x".join(map(str, data.shape))
    return ", ".join(f"{'x'.join(map(str, part.shape[1:]))} ({len(part):,})" for part in data.images.parts)
