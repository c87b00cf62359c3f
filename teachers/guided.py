"""The UNet of guided-diffusion (ADM, Dhariwal & Nichol 2021): its tensors under other names are those of a stock UNet2DModel.

``guided:FILE,size=64,head_channels=64`` with perhaps ``schedule=linear|cosine``, ``attention=legacy|new``, ``groups=32`` and
``null=K``. Names and shapes of the tensors say all else; they do not say these, and a wrong one gives a wrong network. Those of a
published model are in its MODEL_FLAGS: size is --image_size; head_channels is --num_head_channels, or heads is --num_heads; schedule
is --noise_schedule, of 1000 steps; attention=new is --use_new_attention_order True. ``null``: the label for "none", which is the last
of the table of labels, of a network trained to have one.

A learned variance, in the second half of the output channels, is dropped: a stock scheduler takes only the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from torch import Tensor

from distill.checkpoint import load_weights
from distill.denoiser import Denoiser
from teachers import unet
from teachers.load import Teacher, frozen
from teachers.module import state_dict, unwrapped
from teachers.scheduler import table_of

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # theirs -> diffusers'
CHOICES = {"schedule": tuple(SCHEDULES), "attention": ("legacy", "new")}  # the first where none is named
NUMBERS = ("size", "head_channels", "heads", "groups", "null")
ACCEPTED = (
    "guided:FILE, a state dict as .safetensors or as a .pt of tensors alone, with size=SIDE, head_channels=WIDTH or heads=COUNT, "
    "and perhaps part=NAME, schedule=linear|cosine, attention=legacy|new, groups=32, null=LABEL"
)
UNETS = "accepted is the state dict of a UNetModel of guided-diffusion that resamples by convolutions or residual blocks"
OUTER = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
}  # fmt: skip


def load(spec: str) -> Teacher:
    """A teacher of the eps that the network predicts. ValueError in one line for options or a file that do not fit."""
    path, words, numbers = _options(spec)
    tensors = {name: value.float() for name, value in unwrapped(state_dict(path, words.pop("part", None))).items()}
    try:
        layout = _layout(tensors)
        config = _config(tensors, layout, numbers)
        weights = _renamed(tensors, _names(tensors, layout), config, words["attention"])
        classes, null = _labels(config["num_class_embeds"], numbers.get("null"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    net = unet.build(config)
    load_weights(net, weights, path)
    denoiser = Denoiser(frozen(net), table_of({"beta_schedule": SCHEDULES[words["schedule"]]}), "eps", "index")
    shape = (config["in_channels"], numbers["size"], numbers["size"])
    return Teacher(denoiser, shape, unet.network(net.unet), classes, null, record={"source": spec})


def _options(spec: str) -> tuple[str, dict[str, str], dict[str, int]]:
    """The file, the choices and the numbers that a spec names."""
    path, *pairs = spec.removeprefix("guided:").split(",")
    fields = {key: values[0] for key, values in CHOICES.items()} | {"groups": "32"}
    fields |= dict(pair.partition("=")[::2] for pair in pairs)
    words = {k: v for k, v in fields.items() if v in CHOICES.get(k, ()) or k == "part"}
    numbers = {k: int(v) for k, v in fields.items() if k in NUMBERS and v.isdecimal() and (int(v) or k == "null")}
    if wrong := [f"{k}={v}" for k, v in fields.items() if k not in words and k not in numbers]:
        raise ValueError(f"{spec!r}: unknown {', '.join(wrong)}; accepted are {ACCEPTED}")
    if "size" not in numbers or ("heads" in numbers) == ("head_channels" in numbers):
        raise ValueError(
            f"{spec!r}: the side of an image and either the width or the count of attention heads must be named, since the "
            f"weights do not tell them; accepted are {ACCEPTED}"
        )
    return path, words, numbers


@dataclass(frozen=True)
class Layout:
    """What stands where. Input blocks: the first convolution, then ``layers`` residual blocks a resolution and a downsampling between
    two. Output blocks: ``layers`` + 1 a resolution, from the lowest on, of which the last ends with the upsampling."""

    layers: int
    channels: tuple[int, ...]  # of each resolution, from the full one on
    attends: tuple[bool, ...]
    resampling: str  # "resnet" or "conv"

    @property
    def widths(self) -> list[int]:
        """The channels over which there is attention."""
        return sorted({c for c, attended in zip(self.channels, self.attends) if attended} | {self.channels[-1]})


def _layout(tensors: dict[str, Tensor]) -> Layout:
    layers, levels = _counts(tensors)
    channels, attends = [], []
    for level in range(levels):
        blocks = list(_blocks(layers, levels, level))
        having = [block for block in blocks if f"{block}.1.qkv.weight" in tensors]
        if having and len(having) < len(blocks):
            without = [block for block in blocks if block not in having]
            raise ValueError(
                f"attention in {_some(having)} but not in {_some(without)}, at one resolution; in all or none is accepted"
            )
        channels.append(len(_need(tensors, f"{blocks[0]}.0.out_layers.3.weight")))
        attends.append(bool(having))
    resampling = "conv" if f"input_blocks.{layers + 1}.0.op.weight" in tensors else "resnet"
    return Layout(layers, tuple(channels), tuple(attends), resampling)


def _counts(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Residual blocks a resolution, and resolutions."""
    counts = []
    for part in ("input_blocks", "output_blocks"):
        there = {name.split(".")[1] for name in tensors if name.startswith(part + ".")}
        if empty := [f"{part}.{i}" for i in range(len(there) or 1) if str(i) not in there]:
            raise ValueError(f"no tensors of {_some(empty)}; {UNETS}")
        counts.append(len(there))
    inputs, outputs = counts
    places = product(range(outputs), (1, 2), ("conv", "in_layers.0"))
    ends = (i for i, j, kind in places if f"output_blocks.{i}.{j}.{kind}.weight" in tensors)
    layers = next(ends, outputs - 1)  # the last block of the lowest resolution is the first one with an upsampling
    if not layers or outputs % (layers + 1) or inputs != outputs:
        raise ValueError(
            f"{inputs} input and {outputs} output blocks, the first upsampling in output_blocks.{layers}; accepted are as many of "
            "both, and as many at each resolution"
        )
    return layers, outputs // (layers + 1)


def _blocks(layers: int, levels: int, level: int) -> dict[str, str]:
    """The blocks of a resolution -> ours, with a place for the kind of module in them."""
    first, back, up = 1 + level * (layers + 1), (levels - 1 - level) * (layers + 1), levels - 1 - level
    blocks = {f"input_blocks.{first + j}": f"down_blocks.{level}.{{}}.{j}" for j in range(layers)}
    return blocks | {f"output_blocks.{back + j}": f"up_blocks.{up}.{{}}.{j}" for j in range(layers + 1)}


def _names(tensors: dict[str, Tensor], layout: Layout) -> dict[str, str]:
    """Module of theirs -> of ours, where the q, k and v of an attention are three under the name of the whole."""
    layers, levels = layout.layers, len(layout.channels)
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    attentions, names = {"middle_block.1": "mid_block.attentions.0"}, dict(OUTER)
    for level, attended in enumerate(layout.attends):
        blocks = _blocks(layers, levels, level)
        resnets |= {f"{theirs}.0": ours.format("resnets") for theirs, ours in blocks.items()}
        attentions |= {f"{theirs}.1": ours.format("attentions") for theirs, ours in blocks.items() if attended}
        down = f"input_blocks.{(level + 1) * (layers + 1)}.0", f"down_blocks.{level}.downsamplers.0"
        back = levels - level
        up = f"output_blocks.{back * (layers + 1) - 1}.{1 + attended}", f"up_blocks.{back - 1}.upsamplers.0"
        for (theirs, ours), part, there in ((down, "op", level < levels - 1), (up, "conv", level > 0)):
            if there and layout.resampling == "resnet":
                resnets[theirs] = ours
            elif there:
                names[f"{theirs}.{part}"] = f"{ours}.conv"
    for theirs, ours in resnets.items():
        names |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in RESIDUAL.items()}
        after, before = _need(tensors, f"{theirs}.in_layers.2.weight").shape[:2]
        names |= {f"{theirs}.skip_connection": f"{ours}.conv_shortcut"} if after != before else {}
    for theirs, ours in attentions.items():
        names |= {f"{theirs}.norm": f"{ours}.group_norm", f"{theirs}.qkv": ours, f"{theirs}.proj_out": f"{ours}.to_out.0"}
    return names | ({"label_emb": "class_embedding"} if "label_emb.weight" in tensors else {})


def _config(tensors: dict[str, Tensor], layout: Layout, numbers: dict[str, int]) -> dict:
    """The configuration of the UNet2DModel. ValueError for what none can be."""
    channels, size, groups = layout.channels, numbers["size"], numbers["groups"]
    image, given = _need(tensors, "input_blocks.0.0.weight").shape[1], len(_need(tensors, "out.2.weight"))
    hidden, model = _need(tensors, "time_embed.0.weight", 2).shape
    if given not in (image, 2 * image) or image == given == 6:  # an upsampler has the small image beside the noisy one
        raise ValueError(f"{image} channels in and {given} out: as many or twice as many are accepted, and no upsampler")
    if model != channels[0]:
        raise ValueError(f"{model} model channels, {channels[0]} at full resolution: accepted is a first multiplier of 1")
    if any(c % groups for c in channels):
        raise ValueError(f"{groups} groups do not divide {', '.join(map(str, channels))} channels: groups=N names others")
    if size % 2 ** (len(channels) - 1):
        raise ValueError(f"size={size} cannot be halved {len(channels) - 1} times, as this network does")
    down = "ResnetDownsampleBlock2D" if layout.resampling == "resnet" else "DownBlock2D"
    types = ["AttnDownBlock2D" if attended else down for attended in layout.attends]
    told = len(_need(tensors, "input_blocks.1.0.emb_layers.1.weight", 2))
    return {
        "sample_size": size,
        "in_channels": image,
        "out_channels": image,
        "time_embedding_dim": hidden,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": types,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(types)],
        "block_out_channels": list(channels),
        "layers_per_block": layout.layers,
        "downsample_type": layout.resampling,
        "upsample_type": layout.resampling,
        "attention_head_dim": _head_width(layout.widths, numbers),
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "resnet_time_scale_shift": "scale_shift" if told == 2 * channels[0] else "default",
        "num_class_embeds": len(_need(tensors, "label_emb.weight", 2)) if "label_emb.weight" in tensors else None,
    }


def _head_width(widths: list[int], numbers: dict[str, int]) -> int | None:
    """Channels of one head, None for one head of any width: a UNet2DModel has no other count of heads of several widths."""
    if numbers.get("heads") == 1:
        return None
    key = "heads" if "heads" in numbers else "head_channels"
    if any(c % numbers[key] for c in widths) or (key == "heads" and len(widths) > 1):
        raise ValueError(
            f"{key}={numbers[key]} does not fit attention over {', '.join(map(str, widths))} channels; accepted are heads of one "
            "width everywhere that divides the channels (head_channels=WIDTH), or one head (heads=1)"
        )
    return numbers[key] if key == "head_channels" else widths[0] // numbers[key]


def _labels(rows: int | None, null: int | None) -> tuple[int | None, int | None]:
    """Classes and the label for none."""
    if null is None:
        return rows, None
    if rows is None or null != rows - 1:
        held = "no labels" if rows is None else f"labels 0 to {rows - 1}"
        raise ValueError(f"null={null}: this network has {held}; the last one is accepted, as the label for none")
    return null, null


def _renamed(tensors: dict[str, Tensor], names: dict[str, str], config: dict, order: str) -> dict[str, Tensor]:
    """The tensors as `teachers.unet.UNet` names them; what is left over keeps its name. ValueError for what is missing."""
    expected = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")} - {"label_emb.bias"}
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"{len(missing)} weights missing: {_some(missing)}")
    out = {}
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        ours = f"unet.{names.get(module)}"
        if module not in names:
            out[name] = value
        elif module.endswith(".qkv"):
            parts = _split(value, config["attention_head_dim"] or len(value) // 3, order)
            out |= {f"{ours}.to_{part}.{kind}": rows for part, rows in zip("qkv", parts, strict=True)}
        elif module.endswith(".proj_out") and value.ndim > 1:
            out[f"{ours}.{kind}"] = value.flatten(1)
        else:
            out[f"{ours}.{kind}"] = value[: config["out_channels"]] if module == "out.2" else value
    return out


def _split(value: Tensor, width: int, order: str) -> tuple[Tensor, ...]:
    """q, k and v, each [C, C] or [C] with its heads one after the other, from rows [heads, 3, width] ("legacy") or [3, C] ("new")."""
    if len(value) % (3 * width):
        raise ValueError(f"{len(value)} rows of q, k and v are not those of heads of {width} channels")
    rows = value.flatten(1) if value.ndim > 1 else value
    return rows.chunk(3) if order == "new" else rows.unflatten(0, (-1, 3, width)).transpose(0, 1).flatten(1, 2).unbind()


def _need(tensors: dict[str, Tensor], name: str, dims: int = 4) -> Tensor:
    if name not in tensors or tensors[name].ndim != dims:
        raise ValueError(f"lacks {name} of {dims} dimensions; {UNETS}")
    return tensors[name]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if names[3:] else "")
