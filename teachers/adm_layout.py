"""The structure of an ADM UNet (Dhariwal & Nichol 2105.05233), read from the names and shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from torch import Tensor

UNETS = "accepted is the state dict of guided-diffusion's UNetModel, with resampling by convolutions or residual blocks"


@dataclass(frozen=True)
class Layout:
    """Hold the structure of a UNet.

    Input blocks: the first convolution, then ``layers`` residual blocks per resolution, with a downsampling block between two
    resolutions. Output blocks: ``layers`` + 1 per resolution, the lowest first; the last of a resolution ends with the upsampling.
    """

    layers: int
    channels: tuple[int, ...]  # per resolution, the full one first
    attends: tuple[bool, ...]  # per resolution: whether it has attention
    resampling: str  # "resnet" or "conv"

    @property
    def widths(self) -> list[int]:
        """The channel counts of all attention layers."""
        return sorted({c for c, attended in zip(self.channels, self.attends) if attended} | {self.channels[-1]})


def read_layout(tensors: dict[str, Tensor]) -> Layout:
    """Return the structure of a state dict. Raises ValueError if it is not that of a UNet that is supported."""
    layers, levels = _counts(tensors)
    channels, attends = [], []
    for level in range(levels):
        blocks = list(blocks_of(layers, levels, level))
        having = [block for block in blocks if f"{block}.1.qkv.weight" in tensors]
        if having and len(having) < len(blocks):
            lacking = [block for block in blocks if block not in having]
            raise ValueError(
                f"attention in {listed(having)} but not in {listed(lacking)}; accepted is all or none per resolution"
            )
        channels.append(len(need(tensors, f"{blocks[0]}.0.out_layers.3.weight")))
        attends.append(bool(having))
    resampling = "conv" if f"input_blocks.{layers + 1}.0.op.weight" in tensors else "resnet"
    return Layout(layers, tuple(channels), tuple(attends), resampling)


def _counts(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Return the residual blocks per resolution, and the resolutions."""
    counts = []
    for part in ("input_blocks", "output_blocks"):
        present = {name.split(".")[1] for name in tensors if name.startswith(part + ".")}
        if empty := [f"{part}.{i}" for i in range(len(present) or 1) if str(i) not in present]:
            raise ValueError(f"no tensors of {listed(empty)}; {UNETS}")
        counts.append(len(present))
    inputs, outputs = counts
    places = product(range(outputs), (1, 2), ("conv", "in_layers.0"))
    ends = (i for i, j, kind in places if f"output_blocks.{i}.{j}.{kind}.weight" in tensors)
    layers = next(ends, outputs - 1)  # the first upsampling is in the last block of the lowest resolution
    if not layers or outputs % (layers + 1) or inputs != outputs:
        raise ValueError(
            f"{inputs} input and {outputs} output blocks, the first upsampling in output_blocks.{layers}; accepted are equal "
            "numbers of both, and at each resolution"
        )
    return layers, outputs // (layers + 1)


def blocks_of(layers: int, levels: int, level: int) -> dict[str, str]:
    """Return the blocks of a resolution: their name -> ours, with {} for the kind of module."""
    first, back, up = 1 + level * (layers + 1), (levels - 1 - level) * (layers + 1), levels - 1 - level
    blocks = {f"input_blocks.{first + j}": f"down_blocks.{level}.{{}}.{j}" for j in range(layers)}
    return blocks | {f"output_blocks.{back + j}": f"up_blocks.{up}.{{}}.{j}" for j in range(layers + 1)}


def need(tensors: dict[str, Tensor], name: str, dims: int = 4) -> Tensor:
    """Return a tensor. Raises ValueError if it is missing or does not have ``dims`` dimensions."""
    if name not in tensors or tensors[name].ndim != dims:
        raise ValueError(f"lacks {name} with {dims} dimensions; {UNETS}")
    return tensors[name]


def listed(names: list[str]) -> str:
    """Return the first three names as text."""
    return ", ".join(names[:3]) + (" ..." if names[3:] else "")
