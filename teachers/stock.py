"""diffusers' networks other than UNet2DModel, as modules called as (x [B, C, H, W], t [B], **cond) -> [B, C, H, W].

A learned variance, in the second half of the output channels, is dropped.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class TextUNet(nn.Module):
    """UNet2DConditionModel: ``text`` [B, L, D]; with SDXL's ``pooled`` [B, E] and ``time_ids`` [B, 6]."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None
    ) -> Tensor:
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        return self.net(x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0][:, : x.shape[1]]


class DiT(nn.Module):
    """DiTTransformer2DModel: ``labels`` [B]. Its own label dropout is off: null labels come from the data or from guidance."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        for module in net.modules():
            if hasattr(module, "token_drop"):
                module.dropout_prob = 0.0  # type: ignore[assignment]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.net(x, timestep=t, class_labels=labels, return_dict=False)[0][:, : x.shape[1]]


class PixArt(nn.Module):
    """PixArtTransformer2DModel: ``text`` [B, L, D] and its ``mask`` [B, L]; the resolution, where it is told, is 8 times the
    latents'."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.net.use_additional_conditions:
            height, width = x.shape[2:]
            added["resolution"] = x.new_tensor([8 * height, 8 * width]).expand(len(x), 2)
            added["aspect_ratio"] = x.new_tensor([height / width]).expand(len(x), 1)
        output = self.net(
            x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask, added_cond_kwargs=added, return_dict=False
        )[0]
        return output[:, : x.shape[1]]


class SD3(nn.Module):
    """SD3Transformer2DModel: ``text`` [B, L, D] and ``pooled`` [B, E]."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        return self.net(hidden_states=x, timestep=t, encoder_hidden_states=text, pooled_projections=pooled, return_dict=False)[
            0
        ]


NETWORKS: dict[str, type[nn.Module]] = {
    "UNet2DConditionModel": TextUNet,
    "DiTTransformer2DModel": DiT,
    "PixArtTransformer2DModel": PixArt,
    "SD3Transformer2DModel": SD3,
}


def network(net: Any) -> dict:
    """What rebuilds a network of `NETWORKS`, as JSON."""
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    return {"family": "stock", "config": {"class": type(net).__name__, **config}}


def build(config: dict) -> nn.Module:
    import diffusers

    options = dict(config)
    name = options.pop("class")
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: accepted are {', '.join(NETWORKS)}")
    return NETWORKS[name](getattr(diffusers, name).from_config(options))


def null_of(net: Any) -> tuple[int | None, int | None]:
    """The classes of a DiT, and the label one past them where its table of embeddings has a row for none."""
    if type(net).__name__ != "DiTTransformer2DModel":
        return None, None
    classes = net.config["num_embeds_ada_norm"]
    rows = [len(m.embedding_table.weight) for m in net.modules() if hasattr(m, "embedding_table")]
    return classes, classes if rows and min(rows) > classes else None


def size_of(net: Any) -> tuple[int, ...]:
    """The shape of one sample. ValueError where the configuration names none."""
    size = net.config["sample_size"]
    if size is None:
        raise ValueError("the network's config.json names no sample_size")
    return (net.config["in_channels"], *((size, size) if isinstance(size, int) else size))
