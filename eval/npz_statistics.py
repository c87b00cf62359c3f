"""The .npz statistics of EDM, guided-diffusion and clean-fid: mean "mu" [D] and covariance "sigma" [D, D] of real features.

Such files come from anywhere. What a member declares is checked before memory is taken for it, and nothing is unpickled.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

ACCEPTED = "mu [D] in float32 or float64 and sigma [D, D] in float64"
LARGEST = 16_384  # features; their covariance takes 2 GB
ROUNDING = 1e-6  # of sigma's largest value or trace: what rounding may cost in symmetry or in negative eigenvalues


def read(path: Path) -> dict[str, np.ndarray]:
    """Return {"mu": [D], "sigma": [D, D]}.

    Raises ValueError, in one line, for what is no whole .npz file of two arrays of these shapes and types, and for values that are
    not finite, or not a covariance: sigma has to be symmetric without negative eigenvalues, up to rounding.
    """
    if not path.is_file():  # a pipe would wait for a writer
        raise ValueError(f"{path}: there is no such file; accepted is an .npz with {ACCEPTED}")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_declared(archive)
            found = {name: _member(archive, name) for name in ("mu", "sigma")}
    except Exception as error:  # a damaged archive raises errors of zipfile, zlib, struct, tokenize, ast and numpy
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"{path}: {reason}; accepted is an .npz with {ACCEPTED}") from None
    _check_values(path, **found)
    return found


def _check_declared(archive: zipfile.ZipFile) -> None:
    """Raise ValueError where types, shapes and sizes that the members declare do not fit."""
    shapes, types = {}, {}
    for name in ("mu", "sigma"):
        if f"{name}.npy" not in archive.namelist():
            raise ValueError(f"{name} is not a file in the archive")
        with archive.open(f"{name}.npy") as file:
            version = npy.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"{name} has version {version} of the .npy format, which such an array never needs")
            header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shapes[name], _, types[name] = header(file)
    if types["mu"] not in (np.float32, np.float64) or types["sigma"] != np.float64:
        raise ValueError(f"mu is {types['mu']} and sigma {types['sigma']}")
    if len(shapes["mu"]) != 1 or shapes["sigma"] != 2 * shapes["mu"] or not 0 < shapes["mu"][0] <= LARGEST:
        raise ValueError(f"mu has shape {shapes['mu']} and sigma {shapes['sigma']}; D is at most {LARGEST:,}"[:160])


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        array = npy.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError(f"{name} is longer than its shape {array.shape} says")
    return array


def _check_values(path: Path, mu: np.ndarray, sigma: np.ndarray) -> None:
    for name, array in (("mu", mu), ("sigma", sigma)):
        if bad := int((~np.isfinite(array)).sum()):
            raise ValueError(f"{path}: {bad:,} values of {name} are not finite")
    if (lack := np.abs(sigma - sigma.T).max()) > ROUNDING * np.abs(sigma).max():
        raise ValueError(f"{path}: sigma is not symmetric (by {lack:.3g}): a covariance is accepted")
    try:
        np.linalg.cholesky(sigma + ROUNDING * np.trace(sigma) * np.eye(len(sigma)))
    except np.linalg.LinAlgError:
        raise ValueError(f"{path}: sigma has negative eigenvalues, or is 0: a covariance is accepted") from None
