"""The proof that a row is what torch-fidelity says: the cell's images as PNG files, and its own command on the two folders."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from eval import fidelity
from eval.features import Extractor
from eval.generate import chunks, generate, start, to_uint8
from eval.sheet import write_folder
from eval.sweep import Cell, Protocol

CHECKED = ("fid", "kid", "isc", "precision", "recall")


def verify(
    cell: Cell, row: dict, protocol: Protocol, real: Tensor, extractor: Extractor, weights: str | None, device: torch.device
) -> tuple[float, dict[str, float]]:
    """The largest relative difference between a row and `torch_fidelity.calculate_metrics`, and what that says.

    ``real``: the reference's images uint8 [N, C, H, W]. Differences are of the last digits only, from ragged last batches.
    """
    with tempfile.TemporaryDirectory() as folder:
        generated, reference = Path(folder, "generated"), Path(folder, "real")
        count = 0
        for indices in tqdm(chunks(protocol.images, protocol.chunk), desc=f"verifying {cell.name}", leave=False, disable=None):
            begin = start(indices, cell.model.shape, cell.model.classes, protocol.seed)
            x0 = generate(cell.denoiser, cell.sampler, cell.grid_times, begin, cell.model.condition, device)
            pixels = to_uint8(cell.model.decode(x0)).cpu()[: protocol.images - count]
            write_folder(pixels, generated, first=count)
            count += len(pixels)
        write_folder(real, reference)
        theirs = fidelity.calculate(generated, reference, extractor.name, weights, protocol.chunk, device.type == "cuda")
    ours = {name: row[name] for name in CHECKED if row.get(name) is not None and name in theirs}
    worst = max(abs(theirs[name] - value) / max(abs(value), 1e-3) for name, value in ours.items())
    return worst, {name: theirs[name] for name in ours}
