"""Files and folders that no recipe accepts, by what is wrong with them."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from distill import files

DEEP = "[" * 10_000 + "]" * 10_000
DIGITS = Path(files.__file__).parents[1] / "teachers" / "digits" / "teacher.safetensors"


NAMES = {
    "absent",
    "folder",
    "empty",
    "pipe",
    "text",
    "zeros",
    "sparse",
    "loop",
    "pickle",
    "device",
    "null device",
    "below",
    "long",
}


def plain(folder: Path, suffix: str) -> dict[str, Path]:
    """What can stand in for any file: nothing, a folder, pipes, devices, text and damage; the keys are `NAMES`."""
    made = {
        name: folder / f"{name}{suffix}"
        for name in ("absent", "folder", "empty", "pipe", "text", "zeros", "sparse", "loop", "pickle")
    }
    made["folder"].mkdir()
    made["empty"].touch()
    os.mkfifo(made["pipe"])
    made["text"].write_text("no such thing\n" * 100)
    made["zeros"].write_bytes(bytes(10_000))
    with open(made["sparse"], "wb") as file:
        file.truncate(10**12)
    made["loop"].symlink_to(made["loop"])
    made["pickle"].write_bytes(pickle.dumps({"a": [1]}))
    link = made["device"] = folder / f"device{suffix}"
    link.symlink_to("/dev/zero")
    return made | {
        "null device": Path("/dev/null"),
        "below": made["text"] / f"below{suffix}",
        "long": folder / ("x" * 300 + suffix),
    }


def models(folder: Path) -> dict[str, Path]:
    """Files and folders that are no models."""
    tensors, described = files.load(DIGITS)
    made = plain(folder, ".safetensors")

    def written(name: str, text: str) -> None:
        made[name] = folder / f"{name.replace(' ', '-')}.safetensors"
        save_file(tensors, made[name], metadata={"fewstep": text})

    def changed(name: str, **entries: object) -> None:
        written(name, json.dumps(described | entries))

    for text in ("", "{", "[1]", "null", "3", DEEP, json.dumps({"format": "fewstep/2"}), json.dumps({"format": []})):
        written(f"description {text[:20] or 'empty'}".replace("/", ""), text)
    for key in described.keys() - {"format"}:
        written(f"without {key}", json.dumps({k: v for k, v in described.items() if k != key}))
        changed(f"{key} is a text", **{key: "text"})
        changed(f"{key} is a list", **{key: [[]]})
    config = described["network"]["config"]
    for key, value in (
        ("block_out_channels", [32, 10**9]), ("layers_per_block", 10**9), ("num_class_embeds", 10**12), ("sample_size", 10**9),
        ("norm_num_groups", 0), ("down_block_types", ["DownBlock2D", "X"]), ("act_fn", None), ("in_channels", "1"), ("reach", "far"),
    ):  # fmt: skip
        changed(f"network with {key} {value}", network={"family": "unet2d", "config": config | {key: value}})
    for family in ("zzz", [], "given", "adapter", "stock"):
        changed(f"family {family}", network={"family": family, "config": {}})
    for kind in ({}, {"kind": "table", "alphas_cumprod": "abc"}, {"kind": []}, {"kind": "edm", "t_min": "x"}):
        changed(f"schedule {kind}"[:40], schedule=kind)
    for n, sampler in enumerate((
        {"name": 3, "grid": "uniform", "steps": [1]}, {"name": "ddim", "grid": [], "steps": [1]}, {"name": "ddim", "steps": [1]},
        {"name": "ddim", "grid": "uniform", "steps": [0]}, {"name": "ddim", "grid": "searched", "steps": [2], "times": {"2": [1.0]}},
    )):  # fmt: skip
        changed(f"sampler {n}", sampler=sampler)
    changed("a million classes and more", classes=10**12)
    changed("a shape of 10^12", shape=[1, 10**6, 10**6])
    changed("codec without parts", codec={"scale": 1.0})
    whole = DIGITS.read_bytes()
    for name, content in {
        "truncated": whole[:5000], "half": whole[: len(whole) // 2], "long header": struct.pack("<Q", 2**62) + b"{}",
        "torch": b"PK\x03\x04" + bytes(100),
    }.items():  # fmt: skip
        (made.setdefault(name, folder / f"{name}.safetensors")).write_bytes(content)
    save_file(tensors, folder / "bare.safetensors")
    torch.save(tensors, folder / "tensors.pt")
    made |= {"without description": folder / "bare.safetensors", "state dict": folder / "tensors.pt"}
    for name, text in {
        "null": "null",
        "list": "[]",
        "deep": DEEP,
        "unknown": '{"_class_name": "X"}',
        "lists": '{"unet": [[], 3]}',
    }.items():
        made[f"pipeline {name}"] = folder / f"pipeline-{name}"
        made[f"pipeline {name}"].mkdir()
        (made[f"pipeline {name}"] / "model_index.json").write_text(text)
    made["pipeline pipe"] = folder / "pipeline-pipe"
    made["pipeline pipe"].mkdir()
    os.mkfifo(made["pipeline pipe"] / "model_index.json")
    return made


def npy(shape: str, dtype: str = "|u1", content: bytes = b"") -> bytes:
    """An .npy file whose header says so."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def archive(path: Path, compressed: bool = False, **arrays: bytes) -> Path:
    """An .npz file of given bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        for name, content in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(content)
    return path


def npz(folder: Path) -> dict[str, Path]:
    """Files that are no sets of images."""
    made = plain(folder, ".npz")
    images = np.zeros((4, 8, 8, 1), np.uint8)
    for name, arrays in {
        "floats": {"images": images / 1.0}, "flat": {"images": images[..., 0]}, "none": {"images": images[:0]}, "other": {"x": images},
        "labels of another length": {"images": images, "labels": np.arange(3)},
        "labels of 2^64": {"images": images, "labels": np.full(4, 2**64 - 1, np.uint64)},
        "labels of 10^12": {"images": images, "labels": np.full(4, 10**12)}, "labels below 0": {"images": images, "labels": -np.arange(4)},
        "labels of floats": {"images": images, "labels": np.zeros(4)}, "labels of objects": {"images": images, "labels": np.array([{}] * 4)},
        "captions of numbers": {"images": images, "captions": np.arange(4)}, "objects": {"images": np.array([None], object)},
    }.items():  # fmt: skip
        made[name] = folder / f"{name}.npz"
        np.savez(made[name], **arrays)
    whole = (folder / "labels of another length.npz").read_bytes()
    made["truncated"] = folder / "truncated.npz"
    made["truncated"].write_bytes(whole[:300])
    np.save(folder / "array.npy", images)
    (folder / "array.npy").rename(folder / "array.npz")
    made["array"] = folder / "array.npz"
    for name, content in {
        "a header that lies": npy("(1000000000000, 8, 8, 1)", content=bytes(256)),
        "a negative shape": npy("(-4, 8, 8, -1)", content=bytes(256)),
        "a header of nothing": b"\x93NUMPY\x01\x00\xff\xff", "no header": b"abc", "version 2": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{",
        "brackets": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000, "no size": npy("(1000000000000,)", "<U0"),
    }.items():  # fmt: skip
        made[name] = archive(folder / f"{name}.npz", images=content)
        made[f"{name}, compressed"] = archive(folder / f"{name}, compressed.npz", True, images=content)
    return made


def bombs(folder: Path) -> dict[str, str]:
    """Specs of data of some kilobytes to megabytes that would fill the memory."""
    made = {"npz": str(folder / "bomb.npz"), "npz labels": str(folder / "labels.npz")}
    for path, first, name in ((made["npz"], (), "images"), (made["npz labels"], ("images",), "labels")):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for other in first:
                file.writestr(f"{other}.npy", npy("(4, 8, 8, 1)", content=bytes(256)))
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(npy("(300000, 32, 32, 1)"))
                for _ in range(300):
                    member.write(bytes(1_024_000))
    with gzip.open(folder / "bomb.tar.gz", "wb", 1) as packed:
        member = tarfile.TarInfo("0.png")
        member.type, member.size = tarfile.XHDTYPE, 300 * 10**6  # a header, which is read whole
        packed.write(member.tobuf())
        for _ in range(30):
            packed.write(bytes(10**7))
    with tarfile.open(folder / "large.tar", "w") as file:
        member = tarfile.TarInfo("0.png")
        member.size = 10**12
        file.addfile(member)
    header = bytearray(tarfile.TarInfo("0.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"  # a sparse file of 8 GB without content
    header[483:495] = b"77777777777\0"
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
    (folder / "sparse.tar").write_bytes(bytes(header) + bytes(1024))
    made |= {name: f"wds:{folder / name}" for name in ("bomb.tar.gz", "large.tar", "sparse.tar")}
    made["names"] = "wds:a-{0..99999999999}.tar"
    made["names of braces"] = "wds:" + "{0..9}" * 11 + ".tar"
    made["sides"] = str(folder / "sides")
    (folder / "sides").mkdir()
    for i, side in enumerate((20_000, 60_000)):
        rows = zlib.compress(bytes(1000), 9)
        chunks = ((b"IHDR", struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
        png = b"".join(struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
        (folder / "sides" / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    made["large images"] = str(folder / "large")
    (folder / "large").mkdir()
    Image.new("L", (4000, 4000)).save(folder / "large" / "0.png")
    return made


def shard(path: Path, **contents: bytes) -> str:
    """A shard of one sample."""
    with tarfile.open(path, "w") as file:
        for extension, content in contents.items():
            member = tarfile.TarInfo(f"0.{extension}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return f"wds:{path}"


def data(folder: Path) -> dict[str, str]:
    """Specs of data that are none, but for those of `npz` and `bombs`."""
    image = io.BytesIO()
    Image.new("L", (8, 8)).save(image, "png")
    png = image.getvalue()
    made = {f"tar {name}": f"wds:{path}" for name, path in plain(folder, ".tar").items()}
    for name, contents in {
        "label of text": {"cls": b"two"}, "label of 10^12": {"cls": b"1" + b"0" * 12}, "label of 5000 digits": {"cls": b"9" * 5000},
        "label below 0": {"cls": b"-1"}, "json list": {"json": b"[]"}, "json null": {"json": b"null"}, "json deep": {"json": DEEP.encode()},
        "json label": {"json": b'{"label": [1]}'}, "json caption": {"json": b'{"caption": 3}'}, "json bytes": {"json": b"\xff\xfe"},
        "caption of bytes": {"txt": b"\xff\xfe\xff"}, "json true": {"json": b'{"label": true}'},
    }.items():  # fmt: skip
        made[name] = shard(folder / f"{name}.tar".replace(" ", "-"), png=png, **contents)
    made["no images"] = shard(folder / "texts.tar", txt=b"a")
    made["torn image"] = shard(folder / "torn.tar", png=png[:40])
    (folder / "short.tar").write_bytes((folder / "json-list.tar").read_bytes()[:700])
    made["short tar"] = f"wds:{folder / 'short.tar'}"
    for name, content in {"torn": png[:40], "text": b"a", "nothing": b""}.items():
        made[f"images of {name}"] = str(folder / f"images-{name}")
        (folder / f"images-{name}").mkdir()
        (folder / f"images-{name}" / "0.png").write_bytes(content)
    for name in ("images of pipes", "images of devices", "images of folders", "images of loops"):
        made[name] = str(folder / name)
        (folder / name).mkdir()
    os.mkfifo(folder / "images of pipes" / "0.png")
    (folder / "images of devices" / "0.png").symlink_to("/dev/zero")
    (folder / "images of folders" / "0.png").mkdir()
    (folder / "images of loops" / "0.png").symlink_to("0.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "images of loops" / "1.png")
    entry = {"format": "fewstep-latents/1", "model": "m", "codec_sha256": "x", "scale": 1.0, "shift": 0.0, "classes": None}
    for name, index in {
        "list": ["fewstep-latents/1"], "missing": entry,
        "huge": entry | {"count": 10**12, "shape": [4, 64, 64], "dtype": "float16", "shards": {}},
        "types": entry | {"count": "x", "shape": 3, "dtype": "float16", "shards": {}},
        "gone": entry | {"count": 1, "shape": [4, 8, 8], "dtype": "float16", "shards": {"l-0.safetensors": 1}},
        "dtype": entry | {"count": 0, "shape": [4], "dtype": ["x"], "shards": {}},
        "shards": entry | {"count": 1, "shape": [4], "shards": [1]},
    }.items():  # fmt: skip
        made[f"latents {name}"] = str(folder / f"latents-{name}")
        (folder / f"latents-{name}").mkdir()
        (folder / f"latents-{name}" / "index.json").write_text(json.dumps(index))
    made["latents deep"] = str(folder / "latents-deep")
    (folder / "latents-deep").mkdir()
    (folder / "latents-deep" / "index.json").write_text(f'{{"format": "fewstep-latents/1", "a": {DEEP}}}')
    for option in (
        "classes=1000000000000",
        "classes=0",
        "classes=-1",
        "classes=x",
        "stream=1000000000000",
        "classes=" + "9" * 5000,
    ):
        made[f"option {option[:30]}"] = f"{made['json list']},{option}"
    for option in ("size=0", "size=1000000000", "size=nan", "size=²", "stream=0", "stream"):
        made[f"option {option}"] = f"{folder / 'images-torn'},{option}"
    for spec in (
        "",
        "nowhere",
        "nowhere.npz",
        "digits,size=3",
        "mnist:nowhere",
        "hf:nobody/nothing",
        "hf:",
        "wds:",
        "x" * 5000,
        "digits,flip=1",
    ):
        made[f"spec {spec[:20]}"] = spec
    return made


def runs(folder: Path) -> dict[str, Path]:
    """Folders that hold no finished run."""
    schema = {"schema": "fewstep-report/2"}
    made = {"absent": folder / "absent"}
    for name, text in {
        "null": "null", "list": "[]", "deep": DEEP, "torn": '{"schema": ', "other": '{"schema": 3}',
        "bare": json.dumps(schema), "bytes": "\x00",
        "types": json.dumps(schema | {"rows": 3, "protocol": [], "run": None, "floor": "x", "feature_dimension": {}}),
        "rows": json.dumps(schema | {"rows": [{}], "protocol": {}, "run": {}, "floor": 0, "feature_dimension": 1}),
    }.items():  # fmt: skip
        made[name] = folder / name
        made[name].mkdir()
        (made[name] / "report.json").write_text(text)
    made["pipe"] = folder / "pipe"
    made["pipe"].mkdir()
    os.mkfifo(made["pipe"] / "report.json")
    return made


def configurations(folder: Path) -> dict[str, Path]:
    """Folders whose config.json is no configuration."""
    made = {}
    for name, text in {"null": "null", "list": "[]", "deep": DEEP, "torn": "{", "empty": "", "bytes": "\x00"}.items():
        made[name] = folder / name
        made[name].mkdir()
        (made[name] / "config.json").write_text(text)
    for name in ("pipe", "folder"):
        made[name] = folder / name
        made[name].mkdir()
    os.mkfifo(made["pipe"] / "config.json")
    (made["folder"] / "config.json").mkdir()
    return made
