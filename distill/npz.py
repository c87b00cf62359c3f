"""Read .npz files without trust: no pickles, and no array that is larger than its file can hold."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from distill.reading import first_line, regular

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
LARGE, RATIO = 2**28, 100  # bytes of an array; an array above it that is compressed further than 1 : 100 is refused


def read(path: Path, names: Iterable[str], kind: str = ".npz file", mapped: bool = True) -> dict[str, np.ndarray]:
    """Return those of the arrays ``names`` that a file holds.

    ``mapped``: map uncompressed arrays into memory; writes do not reach the file. Otherwise all are read and their checksums verified.

    Raises ValueError, in one line, for another file, for objects, and for an array that is not as large as its header says.
    """
    regular(path, kind)
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            members = {info.filename: info for info in archive.infolist()}
            return {
                name: _array(archive, members[f"{name}.npy"], file if mapped else None)
                for name in names
                if f"{name}.npy" in members
            }
    except Exception as error:  # zipfile and numpy raise many types for damaged and hostile files
        raise ValueError(f"{path}: not a whole {kind} ({first_line(error)})") from None


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: IO[bytes] | None) -> np.ndarray:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in HEADERS:  # the third only allows for names that are not ASCII
            raise ValueError(f"{info.filename} has version {version} of the format; accepted are (1, 0) and (2, 0)")
        shape, fortran, dtype = HEADERS[version](member)
        begin, size = member.tell(), math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError(f"{info.filename} holds Python objects, which are not unpickled (allow_pickle=False)")
        if begin + size != info.file_size:
            raise ValueError(f"{info.filename} says {dtype} {shape} and has {info.file_size - begin:,} bytes")
        if size > LARGE and size > RATIO * info.compress_size:
            raise ValueError(f"{info.filename} would grow from {info.compress_size:,} to {size:,} bytes")
        stored = info.compress_type == zipfile.ZIP_STORED
        if file is None or not stored or fortran or 0 in shape:
            return _unpacked(member, size).view(dtype).reshape(shape, order="F" if fortran else "C")
    # a local header has 30 bytes; the last four are the lengths of the name and of an extra field, which follow it
    file.seek(info.header_offset + 26)
    lengths = file.read(4)
    extra = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return np.memmap(file.name, dtype, "c", info.header_offset + 30 + extra + begin, shape)


def _unpacked(member: IO[bytes], size: int) -> np.ndarray:
    flat, at = np.empty(size, np.uint8), 0
    while at < size:
        part = member.read(2**20)
        if not part:
            raise ValueError(f"ends after {at:,} of {size:,} bytes")
        flat[at : at + len(part)] = np.frombuffer(part, np.uint8)
        at += len(part)
    return flat
