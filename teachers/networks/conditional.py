"""diffusers' networks other than UNet2DModel, as modules called as (x [B, C, H, W], t [B], **cond) -> [B, C, H, W].

The second half of twice as many output channels is a learned variance; it is dropped.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from teachers.networks.adapters import Adapter


class TextUNet(Adapter):
    """Call a UNet2DConditionModel with ``text`` [B, L, D], and for SDXL with ``pooled`` [B, E] and ``time_ids`` [B, 6]."""

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None
    ) -> Tensor:
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        return self.net(x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0][:, : x.shape[1]]


class DiT(Adapter):
    """Call a DiTTransformer2DModel with ``labels`` [B]. Its label dropout is off: data or guidance provide the null label."""

    def __init__(self, net: nn.Module):
        super().__init__(net)
        for module in net.modules():
            if hasattr(module, "token_drop"):
                module.dropout_prob = 0.0  # type: ignore[assignment]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.net(x, timestep=t, class_labels=labels, return_dict=False)[0][:, : x.shape[1]]


class PixArt(Adapter):
    """Call a PixArtTransformer2DModel with ``text`` [B, L, D] and its ``mask`` [B, L].

    A network conditioned on the size of its images also takes their ``resolution`` [B, 2] in pixels and their ``aspect_ratio`` [B, 1].
    Older files lack these; the resolution is then 8 times that of the latents.
    """

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        mask: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        if self.net.use_additional_conditions and resolution is None:
            height, width = x.shape[2:]
            resolution = x.new_tensor([8 * height, 8 * width]).expand(len(x), 2)
            aspect_ratio = x.new_tensor([height / width]).expand(len(x), 1)
        added = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        output = self.net(
            x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask, added_cond_kwargs=added, return_dict=False
        )[0]
        return output[:, : x.shape[1]]


class SD3(Adapter):
    """Call an SD3Transformer2DModel with ``text`` [B, L, D] and ``pooled`` [B, E]."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        cond = {"encoder_hidden_states": text, "pooled_projections": pooled}
        return self.net(hidden_states=x, timestep=t, return_dict=False, **cond)[0]


NETWORKS: dict[str, type[nn.Module]] = {
    "UNet2DConditionModel": TextUNet,
    "DiTTransformer2DModel": DiT,
    "PixArtTransformer2DModel": PixArt,
    "SD3Transformer2DModel": SD3,
}


def describe(net: Any) -> dict:
    """Return the description of a network of a class in `NETWORKS`, as JSON data."""
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    return {"family": "stock", "config": {"class": type(net).__name__, **config}}


def build(config: dict) -> nn.Module:
    """Build a network from its description's "config". Raises ValueError for a class not in `NETWORKS`."""
    import diffusers

    options = dict(config)
    name = options.pop("class")
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: accepted are {', '.join(NETWORKS)}")
    return NETWORKS[name](getattr(diffusers, name).from_config(options))


def classes_of(net: Any) -> tuple[int | None, int | None]:
    """Return (classes, null label) of a DiT, where the null label is None without an embedding for it; (None, None) otherwise."""
    if type(net).__name__ != "DiTTransformer2DModel":
        return None, None
    classes = net.config["num_embeds_ada_norm"]
    rows = [len(m.embedding_table.weight) for m in net.modules() if hasattr(m, "embedding_table")]
    return classes, classes if rows and min(rows) > classes else None


def size_of(net: Any) -> tuple[int, ...]:
    """Return the shape [C, H, W] of one sample. Raises ValueError if the configuration has no sample_size."""
    size = net.config["sample_size"]
    if size is None:
        raise ValueError("the network's config.json has no sample_size")
    return (net.config["in_channels"], *((size, size) if isinstance(size, int) else size))
