"""Checkpoints of OpenAI's guided-diffusion: the ADM UNet (Dhariwal & Nichol 2105.05233) with its tensors renamed to a UNet2DModel's.

``guided:FILE,size=64,head_channels=64``, and perhaps ``schedule=linear|cosine``, ``attention=legacy|new``, ``groups=32``, ``null=K``
and ``part=NAME``. The tensors determine everything else; a wrong option gives a wrong network. In a published model's MODEL_FLAGS:

    size                     --image_size
    head_channels, heads     --num_head_channels, or --num_heads
    schedule                 --noise_schedule, of 1000 steps
    attention=new            --use_new_attention_order True

``null`` is the last label, if it was trained as the unconditional case. A learned variance, the second half of the output
channels, is dropped, because stock schedulers take the first half only.
"""

from __future__ import annotations

from torch import Tensor

from distill.denoiser import Denoiser
from distill.files import load_weights
from teachers.adm_layout import Layout, blocks_of, listed, need, read_layout
from teachers.diffusers_scheduler import table_of
from teachers.networks import unet
from teachers.teacher import Teacher, frozen
from teachers.weights import state_dict, unwrapped

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # theirs -> diffusers'
CHOICES = {"schedule": tuple(SCHEDULES), "attention": ("legacy", "new")}  # the first is the default
NUMBERS = ("size", "head_channels", "heads", "groups", "null")
ACCEPTED = (
    "guided:FILE (.safetensors, or .pt of tensors alone) with size=SIDE, head_channels=WIDTH or heads=COUNT, and perhaps "
    "part=NAME, schedule=linear|cosine, attention=legacy|new, groups=32, null=LABEL"
)
OUTER = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
}  # fmt: skip


def load(spec: str) -> Teacher:
    """Load a network that predicts eps. Raises ValueError for options or a file that do not fit."""
    path, words, numbers = _options(spec)
    tensors = {name: value.float() for name, value in unwrapped(state_dict(path, words.pop("part", None))).items()}
    try:
        layout = read_layout(tensors)
        config = _config(tensors, layout, numbers)
        weights = _renamed(tensors, _names(tensors, layout), config, words["attention"])
        classes, null = _labels(config["num_class_embeds"], numbers.get("null"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    net = unet.build(config)
    load_weights(net, weights, path)
    denoiser = Denoiser(frozen(net), table_of({"beta_schedule": SCHEDULES[words["schedule"]]}), "eps", "index")
    shape = (config["in_channels"], numbers["size"], numbers["size"])
    return Teacher(denoiser, shape, unet.describe(net.unet), classes, null, record={"source": spec})


def _options(spec: str) -> tuple[str, dict[str, str], dict[str, int]]:
    """Return the file, the choices and the numbers of a spec."""
    path, *pairs = spec.removeprefix("guided:").split(",")
    fields = {key: values[0] for key, values in CHOICES.items()} | {"groups": "32"}
    fields |= dict(pair.partition("=")[::2] for pair in pairs)
    words = {k: v for k, v in fields.items() if v in CHOICES.get(k, ()) or k == "part"}
    numbers = {k: int(v) for k, v in fields.items() if k in NUMBERS and v.isdecimal() and (int(v) or k == "null")}
    if wrong := [f"{k}={v}" for k, v in fields.items() if k not in words | numbers]:
        raise ValueError(f"{spec!r}: unknown {', '.join(wrong)}; accepted are {ACCEPTED}")
    if "size" not in numbers or ("heads" in numbers) == ("head_channels" in numbers):
        raise ValueError(f"{spec!r}: size, and either head_channels or heads, are required; accepted are {ACCEPTED}")
    return path, words, numbers


def _names(tensors: dict[str, Tensor], layout: Layout) -> dict[str, str]:
    """Return module names, theirs -> ours. Their joint q, k, v layer maps to the name of our attention, which has three."""
    layers, levels = layout.layers, len(layout.channels)
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    attentions, names = {"middle_block.1": "mid_block.attentions.0"}, dict(OUTER)
    for level, attended in enumerate(layout.attends):
        blocks = blocks_of(layers, levels, level)
        resnets |= {f"{theirs}.0": ours.format("resnets") for theirs, ours in blocks.items()}
        attentions |= {f"{theirs}.1": ours.format("attentions") for theirs, ours in blocks.items() if attended}
        down = f"input_blocks.{(level + 1) * (layers + 1)}.0", f"down_blocks.{level}.downsamplers.0"
        back = levels - level
        up = f"output_blocks.{back * (layers + 1) - 1}.{1 + attended}", f"up_blocks.{back - 1}.upsamplers.0"
        for (theirs, ours), part, present in ((down, "op", level < levels - 1), (up, "conv", level > 0)):
            if present and layout.resampling == "resnet":
                resnets[theirs] = ours
            elif present:
                names[f"{theirs}.{part}"] = f"{ours}.conv"
    for theirs, ours in resnets.items():
        names |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in RESIDUAL.items()}
        after, before = need(tensors, f"{theirs}.in_layers.2.weight").shape[:2]
        names |= {f"{theirs}.skip_connection": f"{ours}.conv_shortcut"} if after != before else {}
    for theirs, ours in attentions.items():
        names |= {f"{theirs}.norm": f"{ours}.group_norm", f"{theirs}.qkv": ours, f"{theirs}.proj_out": f"{ours}.to_out.0"}
    return names | ({"label_emb": "class_embedding"} if "label_emb.weight" in tensors else {})


def _config(tensors: dict[str, Tensor], layout: Layout, numbers: dict[str, int]) -> dict:
    """Return the configuration of the UNet2DModel. Raises ValueError for a network that is not one."""
    channels, size, groups = layout.channels, numbers["size"], numbers["groups"]
    image, outputs = need(tensors, "input_blocks.0.0.weight").shape[1], len(need(tensors, "out.2.weight"))
    hidden, model = need(tensors, "time_embed.0.weight", 2).shape
    if outputs not in (image, 2 * image) or image == outputs == 6:  # an upsampler takes the small image beside the noisy one
        raise ValueError(f"{image} channels in and {outputs} out; accepted are as many or twice as many out, and no upsampler")
    if model != channels[0]:
        raise ValueError(f"{model} model channels, {channels[0]} at full resolution; accepted is a first multiplier of 1")
    if any(c % groups for c in channels):
        raise ValueError(f"{groups} groups do not divide {', '.join(map(str, channels))} channels; give others with groups=N")
    if size % 2 ** (len(channels) - 1):
        raise ValueError(f"size={size} cannot be halved {len(channels) - 1} times, which this network does")
    down = "ResnetDownsampleBlock2D" if layout.resampling == "resnet" else "DownBlock2D"
    types = ["AttnDownBlock2D" if attended else down for attended in layout.attends]
    embedded = len(need(tensors, "input_blocks.1.0.emb_layers.1.weight", 2))
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
        "resnet_time_scale_shift": "scale_shift" if embedded == 2 * channels[0] else "default",
        "num_class_embeds": len(need(tensors, "label_emb.weight", 2)) if "label_emb.weight" in tensors else None,
    }


def _head_width(widths: list[int], numbers: dict[str, int]) -> int | None:
    """Return the channels per head, or None for a single head. A UNet2DModel has one width of head everywhere, or one head."""
    if numbers.get("heads") == 1:
        return None
    key = "heads" if "heads" in numbers else "head_channels"
    if any(c % numbers[key] for c in widths) or (key == "heads" and len(widths) > 1):
        raise ValueError(
            f"{key}={numbers[key]} does not fit attention over {', '.join(map(str, widths))} channels; accepted are heads of "
            "equal width that divides the channels (head_channels=WIDTH), or one head (heads=1)"
        )
    return numbers[key] if key == "head_channels" else widths[0] // numbers[key]


def _labels(rows: int | None, null: int | None) -> tuple[int | None, int | None]:
    """Return the number of classes and the null label."""
    if null is not None and (rows is None or null != rows - 1):
        present = "no labels" if rows is None else f"labels 0 to {rows - 1}"
        raise ValueError(f"null={null}: this network has {present}; accepted is the last one")
    return (rows, None) if null is None else (null, null)


def _renamed(tensors: dict[str, Tensor], names: dict[str, str], config: dict, order: str) -> dict[str, Tensor]:
    """Return the tensors under the names of `teachers.networks.unet.UNet`; others keep their names. Raises ValueError if any is missing."""
    expected = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")} - {"label_emb.bias"}
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"{len(missing)} weights missing: {listed(missing)}")
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
    """Return q, k, v, [C, C] or [C] each with heads in order, from rows [heads, 3, width] ("legacy") or [3, C] ("new")."""
    if len(value) % (3 * width):
        raise ValueError(f"{len(value)} rows of q, k and v do not fit heads of {width} channels")
    rows = value.flatten(1) if value.ndim > 1 else value
    return rows.chunk(3) if order == "new" else rows.unflatten(0, (-1, 3, width)).transpose(0, 1).flatten(1, 2).unbind()
