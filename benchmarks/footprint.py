"""Print the tables of docs/memory.md: python -m benchmarks.footprint

Networks of text-to-image models are built on the meta device, from the configurations of their model cards, and called once with one image
of their own size. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distill.speed import checkpoint_activations
from recipes.common.cost import A100, CARDS, FULL, HALF, Cost, calls_of_a_step, cost, largest_batch
from recipes.common.footprint import saved_bytes
from teachers.networks.lora import Adapted, targets_of

RANK = 16
TEACHER_CALLS = 2  # two steps of a teacher without a second call for guidance
IMAGES = 100_000
Empty = Callable[..., Tensor]


@dataclass(frozen=True)
class Network:
    """Name a network of diffusers, its options where they are not the defaults, and its call with one image, made of empty tensors."""

    name: str
    kind: str
    options: dict[str, Any]
    call: Callable[[Any, Empty], Any]
    pixels: int
    source: str

    def build(self) -> nn.Module:
        """Return the network in bfloat16 on the meta device."""
        import diffusers

        with torch.device("meta"):
            return getattr(diffusers, self.kind)(**self.options).to(torch.bfloat16).requires_grad_(False)


def _unet(net: Any, e: Empty, side: int, width: int, **added: Tensor) -> Tensor:
    return net(e(1, 4, side, side), e(1), encoder_hidden_states=e(1, 77, width), added_cond_kwargs=added or None).sample


def _xl(net: Any, e: Empty) -> Tensor:
    return _unet(net, e, 128, 2048, text_embeds=e(1, 1280), time_ids=e(1, 6))


def _sd3(net: Any, e: Empty) -> Tensor:
    cond = {"encoder_hidden_states": e(1, 154, 4096), "pooled_projections": e(1, 2048)}
    return net(hidden_states=e(1, 16, 128, 128), timestep=e(1), **cond).sample


def _sana(net: Any, e: Empty) -> Tensor:
    return net(e(1, 32, 32, 32), encoder_hidden_states=e(1, 300, 2304), timestep=e(1), encoder_attention_mask=e(1, 300)).sample


def _flux(net: Any, e: Empty) -> Tensor:
    cond = {"encoder_hidden_states": e(1, 512, 4096), "pooled_projections": e(1, 768), "guidance": e(1)}
    return net(hidden_states=e(1, 4096, 64), timestep=e(1), img_ids=e(4096, 3), txt_ids=e(512, 3), **cond).sample


def _z(net: Any, e: Empty) -> Tensor:
    return net([e(16, 1, 128, 128)], e(1), [e(128, 2560)], return_dict=False)[0][0]


SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
}  # fmt: skip
SD3_MEDIUM = {
    "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24, "num_attention_heads": 24,
    "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}  # fmt: skip
UNET, FLUX = "UNet2DConditionModel", "FluxTransformer2DModel"
NETWORKS = (
    Network("Stable Diffusion 1.5", UNET, {"cross_attention_dim": 768}, partial(_unet, side=64, width=768), 512, "2112.10752"),
    Network("Stable Diffusion XL", UNET, SDXL, _xl, 1024, "2307.01952"),
    Network("SD3-medium", "SD3Transformer2DModel", SD3_MEDIUM, _sd3, 1024, "2403.03206"),
    Network("Sana 1.6B", "SanaTransformer2DModel", {}, _sana, 1024, "2410.10629"),
    Network("Flux-dev", FLUX, {"guidance_embeds": True}, _flux, 1024, "model card"),
    Network("Z-Image", "ZImageTransformer2DModel", {}, _z, 1024, "2511.22699"),
)


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def count(weights: Any) -> int:
    return sum(weight.numel() for weight in weights)


def activations(network: Network, net: nn.Module, recomputed: bool) -> int:
    """Return the activations of one image in bytes. ``recomputed``: with --checkpoint-activations."""
    net.train()
    if recomputed:
        checkpoint_activations(net)
    return saved_bytes(lambda: network.call(getattr(net, "net", net), empty).sum(), net.parameters(), net)


def full(network: Network) -> Cost:
    """Return what training all weights takes for one image: weights and teacher in float32, autocast to bf16, checkpoints.

    Autocast keeps a copy of the weights in bf16 for the backward pass, which is counted with the teacher.
    """
    net = network.build().requires_grad_(True)
    weights = count(net.parameters())
    needed = activations(network, net, recomputed=True)
    return cost(weights, 1, teacher=weights, teacher_bytes=FULL + HALF, activations=needed, averaged=False)


def adapter(network: Network, recomputed: bool = True) -> Cost:
    """Return what training an adapter on a bf16 base takes for one image."""
    base = network.build()
    net = Adapted(base, RANK, targets_of(base, None)).requires_grad_(True)
    needed, trained, whole = activations(network, net, recomputed), count(net.adapter()), count(base.parameters())
    return cost(trained, 1, teacher=whole, teacher_bytes=HALF, activations=needed, averaged=False)


def tera(network: Network) -> float:
    """Return the TFLOP of one call, a multiplication and an addition as two. Kernels of attention are counted like matrices."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.call(network.build(), empty)
    return counter.get_total_flops() / 1e12


def row(network: Network, needed: Cost, calls: int, flop: float) -> str:
    """Return the row of a network: trained weights, memory without and with the activations of an image, what fits, and hours."""
    fits = [str(largest_batch(needed, 1, size) or "no") for size in CARDS]
    hours = IMAGES * calls * flop * 1e12 / A100 / 3600
    trained = needed.gradients / FULL / 1e6
    fixed, image = needed.memory - needed.activations, needed.activations
    cells = [network.name, f"{trained:,.1f}", f"{fixed / 1e9:.1f}", f"{image / 1e9:.2f}", *fits, f"{hours:.1f}"]
    return "| " + " | ".join(cells) + " |"


def head(*names: str) -> str:
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def tables(networks: tuple[Network, ...] = NETWORKS) -> list[str]:
    """Return the lines of three tables: the networks, an adapter, and all weights."""
    flops = {network.name: tera(network) for network in networks}
    lines = [head("network", "weights", "TFLOP per call", "image", "source")]
    for n in networks:
        side, weights = f"{n.pixels}x{n.pixels}", count(n.build().parameters()) / 1e6
        lines.append(f"| {n.name} | {weights:,.0f} M | {flops[n.name]:.2f} | {side} | {n.source} |")
    names = ("trained (M)", "fixed (GB)", "per image (GB)", *(f"{size} GB" for size in CARDS), "hours")
    lines += ["", head(f"LoRA rank {RANK}", *names)]
    lines += [row(n, adapter(n), calls_of_a_step(TEACHER_CALLS, True, True), flops[n.name]) for n in networks]
    lines += ["", head("all weights", *names)]
    lines += [row(n, full(n), calls_of_a_step(TEACHER_CALLS, False, True), flops[n.name]) for n in networks]
    return lines


if __name__ == "__main__":
    print("\n".join(tables()))
