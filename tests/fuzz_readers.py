"""Mutate files of this project, and see that every reader loads them or refuses them with ValueError or OSError.

    python tests/fuzz_readers.py --runs 20000

With the package atheris installed the choices are guided by coverage; otherwise they are random. A file that breaks a reader is kept.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import random
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
Pick = Callable[[int], int]  # n -> one of 0 .. n - 1

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 3, 2**31, 10**30, 0.5, float("nan"), float("inf"), "", "x", "digits", "cosine", "\0", "../x", "é" * 300,
    [], [1], [[]], {}, {"kind": "x"}, {"family": "adapter", "config": {}}, {"family": "unet2d", "config": {}},
)  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def mutated(document: Any, pick: Pick) -> Any:
    """Return a JSON document with one to three nodes replaced, removed, renamed or moved."""
    document = copy.deepcopy(document)
    for _ in range(1 + pick(3)):
        holder, key = _node(document, pick)
        if holder is None:
            return VALUES[pick(len(VALUES))]
        kind = pick(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[str(key) + "x"] = holder.pop(key)
        elif kind == 2:
            holder[key] = copy.deepcopy(document)
        elif kind == 3:
            holder[key] = nested(100)
        elif kind == 4 and isinstance(holder[key], (int, float)):
            holder[key] = (-holder[key], holder[key] * 1000, str(holder[key]), [holder[key]])[pick(4)]
        else:
            holder[key] = VALUES[pick(len(VALUES))]
    return document


def _node(document: Any, pick: Pick) -> tuple[Any, Any]:
    """Return a random place in a document, (dict or list, key); (None, None) for the document itself."""
    holder, key, value = None, None, document
    while isinstance(value, (dict, list)) and value and (holder is None or pick(4)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        holder, key = value, keys[pick(len(keys))]
        value = holder[key]
    return holder, key


def safetensors_file(tensors: dict, description: Any, pick: Pick) -> bytes:
    """Return a safetensors file with a mutated description, or with a mutated header, or with changed bytes."""
    from safetensors.torch import save

    description = {k: v for k, v in description.items() if k != "sha256"}
    kind = pick(6)
    text = json.dumps(mutated(description, pick) if kind else description)
    if kind == 1 and pick(4) == 0:
        text = "[" * 100_000
    whole = save(tensors, metadata={"fewstep": text})
    if kind == 0:
        return flipped(whole, pick)
    if kind == 2:
        size = struct.unpack("<Q", whole[:8])[0]
        header = json.dumps(mutated(json.loads(whole[8 : 8 + size]), pick)).encode()
        return struct.pack("<Q", len(header)) + header + whole[8 + size :]
    return whole


def flipped(whole: bytes, pick: Pick) -> bytes:
    """Return bytes cut, or with some changed, mostly near their ends."""
    data = bytearray(whole)
    if pick(4) == 0:
        return bytes(data[: pick(len(data))])
    for _ in range(1 + pick(4)):
        near = pick(min(len(data), 600))
        data[near if pick(2) else len(data) - 1 - near] = pick(256)
    return bytes(data)


def npz_file(arrays: dict[str, np.ndarray], pick: Pick) -> bytes:
    """Return an .npz file with arrays of other types, shapes or values, with members that are no arrays, or with changed bytes."""
    arrays = dict(arrays)
    name = sorted(arrays)[pick(len(arrays))]
    kind, array = pick(9), arrays[name]
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name] = array.astype((np.float16, np.uint64, np.int8, np.complex64, np.float32, object, "U8")[pick(7)])
    elif kind == 2:
        arrays[name] = array.reshape(-1) if pick(2) else array[None]
    elif kind == 3:
        arrays[name] = array[:0]
    elif kind == 4 and array.dtype.kind == "f":
        arrays[name] = np.full_like(array, (np.nan, np.inf, -1, 1e300)[pick(4)])
    elif kind == 5:
        arrays[name] = np.asfortranarray(array)
    out = io.BytesIO()
    np.savez(out, **arrays)
    if kind == 6:
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr(f"{name}.npy", (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{}", b"text")[pick(4)])
    if kind == 7:  # a header that claims far more than there is
        claims = {
            "descr": "<f8" if pick(2) else "|u1",
            "fortran_order": False,
            "shape": (10**6, 10**6) if pick(2) else (10**12,),
        }
        header = (str(claims) + " " * 20 + "\n").encode()
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for member in arrays:
                archive.writestr(f"{member}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    return flipped(out.getvalue(), pick) if kind == 8 else out.getvalue()


class Readers:
    """Readers with the files to mutate for each, in a temporary folder."""

    def __init__(self, folder: Path):
        import teachers
        from distill import files
        from eval import reference
        from eval.features import Extractor
        from recipes.data import sets

        self.folder, self.extractor = folder, Extractor.create("digits")
        self.model = files.load(ROOT / "teachers" / "digits" / "teacher.safetensors")
        self.model[1].pop("sha256", None)
        features = torch.randn(8, 64)
        identity = {
            "features": "digits",
            "features_sha256": self.extractor.fingerprint,
            "data": "d",
            "images": 8,
            "data_sha256": "0",
        }
        self.reference = {"features": features}, {"format": files.FORMAT, "reference": identity}
        images = np.zeros((4, 8, 8, 1), np.uint8)
        self.names: dict[str, Callable[[Pick], Any]] = {
            "model": lambda pick: teachers.load(self.write("m.safetensors", safetensors_file(*self.model, pick))),
            "reference": lambda pick: reference.load(
                Path(self.write("r.safetensors", safetensors_file(*self.reference, pick))), self.extractor
            ),
            "statistics": lambda pick: reference.load(
                Path(self.write("s.npz", npz_file({"mu": np.zeros(4, np.float32), "sigma": np.eye(4)}, pick))), self.extractor
            ),
            "images": lambda pick: sets.load(
                self.write("i.npz", npz_file({"images": images, "labels": np.arange(4), "captions": np.array(["a"] * 4)}, pick))
            ),
            "latents": lambda pick: self.latents(sets.load, files.save, pick),
        }

    def write(self, name: str, data: bytes) -> str:
        (self.folder / name).write_bytes(data)
        return str(self.folder / name)

    def latents(self, load: Callable, save: Callable, pick: Pick) -> Any:
        folder = self.folder / "latents"
        folder.mkdir(exist_ok=True)
        index = {
            "format": "fewstep-latents/1", "count": 4, "shape": [1, 8, 8], "dtype": "float16", "shards": {"0.safetensors": 4},
            "model": "digits", "scale": 1.0, "shift": 0.0, "codec_sha256": "0",
        }  # fmt: skip
        save(folder / "0.safetensors", {"latents": torch.zeros(4, 1, 8, 8, dtype=torch.float16), "labels": torch.arange(4)}, {})
        (folder / "index.json").write_text(json.dumps(mutated(index, pick)))
        return load(str(folder))

    def read(self, name: str, pick: Pick) -> bool:
        """Return whether a mutated file was loaded. ValueError and OSError refuse it; any other error goes on to the caller."""
        try:
            self.names[name](pick)
        except (ValueError, OSError) as error:
            lines = str(error).strip().splitlines()
            assert len(lines) == 1, f"{name}: not one line: {error}"
            return False
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    try:
        import atheris
    except ImportError:
        atheris = None
    guide = atheris.instrument_imports(include=["distill", "teachers", "eval", "recipes"]) if atheris else nullcontext()
    with guide:
        readers = Readers(Path(tempfile.mkdtemp(prefix="fuzz-")))
    names, counts = list(readers.names), {"loaded": 0, "refused": 0}

    def once(pick: Pick) -> None:
        name = names[pick(len(names))]
        try:
            counts["loaded" if readers.read(name, pick) else "refused"] += 1
        except Exception:
            print(f"{name}: the file that broke it is in {readers.folder}")
            raise

    if atheris is None:
        source = random.Random(options.seed)
        for _ in range(options.runs):
            once(source.randrange)
        print(f"{options.runs} files: {counts}")
        return

    def guided(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        once(lambda n: provider.ConsumeIntInRange(0, n - 1))
        if sum(counts.values()) == options.runs:
            print(f"{options.runs} files: {counts}", flush=True)

    atheris.Setup([sys.argv[0], f"-runs={options.runs}", f"-seed={options.seed + 1}", "-max_len=256"], guided)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
