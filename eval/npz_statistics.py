"""The .npz statistics of EDM, guided-diffusion and clean-fid: mean "mu" [D] and covariance "sigma" [D, D] of real features.

Such files come from anywhere. What a member declares is checked before memory is taken for it, and nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill import npz

ACCEPTED = "mu [D] in float32 or float64 and sigma [D, D] in float64"
LARGEST = 16_384  # features; their covariance takes 2 GB
ROUNDING = 1e-6  # of sigma's largest value or trace: what rounding may cost in symmetry or in negative eigenvalues


def read(path: Path) -> dict[str, np.ndarray]:
    """Return {"mu": [D], "sigma": [D, D]}.

    Raises ValueError, in one line, for what is no whole .npz file of two arrays of these shapes and types, and for values that are
    not finite, or not a covariance: sigma has to be symmetric without negative eigenvalues, up to rounding.
    """
    found = npz.read(path, ("mu", "sigma"), f".npz with {ACCEPTED}", mapped=False)
    if missing := {"mu", "sigma"} - found.keys():
        raise ValueError(f"{path}: {min(missing)} is not a file in the archive; accepted is an .npz with {ACCEPTED}")
    mu, sigma = found["mu"], found["sigma"]
    if mu.dtype not in (np.float32, np.float64) or sigma.dtype != np.float64:
        raise ValueError(f"{path}: mu is {mu.dtype} and sigma {sigma.dtype}; accepted is an .npz with {ACCEPTED}")
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not 0 < len(mu) <= LARGEST:
        shapes = f"mu has shape {mu.shape} and sigma {sigma.shape}; D is at most {LARGEST:,}"[:160]
        raise ValueError(f"{path}: {shapes}; accepted is an .npz with {ACCEPTED}")
    _check_values(path, **found)
    return found


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
