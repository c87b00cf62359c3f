"""Check a row of a report: write the cell's images as PNG files and measure them with torch-fidelity's own command."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from eval import fidelity
from eval.features import Extractor
from eval.generate import chunks, images
from eval.image_grid import write_folder
from eval.metrics import PAIRED
from eval.progress import progress
from eval.sweep import Cell, Protocol

ROUNDING = {
    "kid": 100
}  # torch-fidelity adds a million float32 kernels, ours are in float64 (`eval.kid`): so much more may differ
CHECKED = ("fid", "kid", "isc", "precision", "recall")


def verify(
    cell: Cell, row: dict, protocol: Protocol, real: Tensor, extractor: Extractor, weights: str | None, device: torch.device
) -> tuple[float, dict[str, float]]:
    """Return the largest relative difference of a row from `torch_fidelity.calculate_metrics`, and the metrics of the latter.

    ``real``: the images of the reference, uint8 [N, C, H, W]. Only the last digits differ, because batches are cut differently.
    """
    indices = progress(chunks(protocol.images, protocol.chunk), desc=f"verifying {cell.name}", leave=False)
    with tempfile.TemporaryDirectory() as folder:
        generated, reference = Path(folder, "generated"), Path(folder, "real")
        for batch in images(cell.model, cell.sampling, cell.steps, indices, protocol.seed, device, denoiser=cell.denoiser):
            first = int(batch.index[0])
            write_folder(batch.pixels.cpu()[: protocol.images - first], generated, first)
        write_folder(real, reference)
        theirs = fidelity.calculate(generated, reference, extractor.name, weights, protocol.chunk, device.type == "cuda")
    checked = CHECKED if len(real) <= PAIRED else CHECKED[:3]  # precision and recall are then taken over fewer images
    ours = {name: row[name] for name in checked if row.get(name) is not None and name in theirs}
    worst = max(abs(theirs[name] - v) / max(abs(v), 1e-3) / ROUNDING.get(name, 1) for name, v in ours.items())
    return worst, {name: theirs[name] for name in ours}
