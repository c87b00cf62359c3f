"""Models from diffusers pipelines, a folder or a hub id. Only stock classes and safetensors are accepted; no foreign code is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.denoiser import Denoiser
from distill.guidance import GuidanceRange
from teachers import diffusers_scheduler, fused_lora, hollow, passport
from teachers.codec import Codec, downsampling, latent_channels, statistics
from teachers.conditions import Conditions
from teachers.encoder import Encoder
from teachers.hub import UNUSED, check_adapters, check_numbers, check_pickles, component, fetch, left_out, read_json, variant_of
from teachers.networks import adapters, conditional, unet
from teachers.networks.records import ENCODERS, RECORDS
from teachers.prompts import read_prompts
from teachers.teacher import Teacher, frozen

TEXTUAL = tuple(name for name, record in RECORDS.items() if record.encoders)  # conditioned on text
LABELLED = ("UNet2DModel", *(name for name in RECORDS if name not in TEXTUAL))  # conditioned on labels or nothing
CODECS = ("AutoencoderKL", "VQModel", "AutoencoderDC", "AutoencoderKLQwenImage", "AutoencoderKLFlux2")
OPTIONS = {
    "prompts": "FILE with one prompt per line",
    "variant": "NAME of the weights, such as fp16",
    "size": "HEIGHTxWIDTH of the images",
    "guidance": "W, the scale for a network that embeds it",
    "lora": "FILE, a LoRA as .safetensors",
}
SCALES = "_guidance_range"  # in the configuration of an exported network that takes the guidance scale
ANY_SCALE = [0.0, 1000.0, 7.5]  # of one from elsewhere, which does not state its range; 7.5 is the default of its pipeline
STOCK_SCHEDULERS = ("deprecated", "stochastic_karras_ve")  # modules of diffusers with a scheduler of their own


def load(spec: str, download: bool = True, weights: bool = True) -> Teacher:
    """Load ``PIPELINE``. A text-to-image pipeline takes its conditions from the data, or from ``PIPELINE,prompts=FILE``.

    ``,variant=NAME`` chooses among several weights, such as fp16. ``,size=HEIGHTxWIDTH`` sets the pixels of the images, for a network
    that was trained on others than its configuration says. ``,guidance=W`` is the scale for a network that embeds it. ``,lora=FILE`` adds
    a LoRA to the weights of the network.
    ``download``: False accepts only what is on this machine. ``weights``: False reads configurations alone; the networks are hollow
    (`teachers.hollow`), and a LoRA is not added.

    Raises ValueError for a pipeline with missing, foreign or unsupported components.
    """
    where, options = _split(spec)
    file, variant = options.get("prompts"), options.get("variant")
    folder = fetch(where, variant, download, weights)
    if "lora" not in options:
        check_adapters(folder, where)
    index = read_json(folder / "model_index.json", "no diffusers pipeline")
    name = str(index.get("_class_name"))
    lines = _read_prompts(where, name, file)
    textual = name in ENCODERS
    _check_parts(where, folder, index)
    part = "unet" if "unet" in index else "transformer"
    if part not in index or "scheduler" not in index:
        raise ValueError(f"{where}: holds a {name}; {_accepted()}")
    config = read_json(folder / "scheduler" / "scheduler_config.json", "the pipeline lacks its scheduler")
    check_numbers(config, f"{where}: scheduler_config.json")
    convention = diffusers_scheduler.read(config, where)
    found = variant_of(folder / part, variant, where)
    if weights and variant not in (None, found):
        raise ValueError(
            f"{where}: {part} has no weights of variant {variant!r}; accepted without variant= is {found or 'plain'}"
        )
    variant = found
    net = _network(folder, part, index[part][1], where, TEXTUAL if textual else LABELLED, variant, weights)
    if "lora" in options and weights:
        fused_lora.fuse(options["lora"], net, name, folder, index, part)
    codec = _codec(where, folder, index, variant, weights)
    _check_channels(where, net, codec)
    shape = _shape(where, net, codec, options.get("size"))
    inner, network, classes, null = _wrapped(net, _number("guidance", options))
    outer, network = adapters.wrap(inner, network, convention.adapter)
    denoiser = Denoiser(frozen(outer), convention.schedule, convention.prediction, convention.time, convention.sigma_data)
    embeddings = None
    known = {key: value for key, value in config.items() if key != "trained_betas" and (key == "_class_name" or key[0] != "_")}
    record = {
        "source": where,
        "scheduler": known,
        **convention.record,
        **({"lora": options["lora"]} if "lora" in options else {}),
    }
    if textual:
        encoder = Encoder(where, variant, shape[1:], torch.device("cpu" if weights else "meta"))
        if lines:
            encoder.warn_of_long(lines)
        embeddings = encoder.table(lines) if lines else Conditions({})
        classes = null = embeddings.count
    if name == "StableDiffusion3Pipeline" and (without := [part for part in left_out(folder) if part not in UNUSED]):
        record["without"] = without
    guidance, sampling = _scales(folder / part, net), passport.obeyed(folder, denoiser, convention.sampling)
    return Teacher(denoiser, shape, network, classes, null, sampling, record, codec, embeddings, guidance)


def _split(spec: str) -> tuple[str, dict[str, str]]:
    """Return the pipeline and the options of a spec. Raises ValueError for an unknown option."""
    if Path(spec).is_dir():
        return spec, {}
    where, *options = spec.split(",")
    fields = dict(option.partition("=")[::2] for option in options)
    if wrong := [f"{key}={value}" for key, value in fields.items() if key not in OPTIONS or not value]:
        accepted = "; ".join(f"{key}={meaning}" for key, meaning in OPTIONS.items())
        raise ValueError(f"{spec!r}: unknown option {wrong[0]!r}; accepted are {accepted}")
    return where, fields


def _accepted() -> str:
    return f"accepted are {', '.join(dict.fromkeys(('UNet2D', *conditional.SHORT)))}; {conditional.OWN}"


def _number(name: str, options: dict[str, str]) -> float | None:
    try:
        return float(options[name]) if name in options else None
    except ValueError:
        raise ValueError(f"{name}={options[name]}: accepted is a number") from None


def _shape(where: str, net: Any, codec: Codec | None, size: str | None) -> tuple[int, ...]:
    """Return the shape of one sample. ``size``: HEIGHTxWIDTH of the images, or one number for both.

    Raises ValueError for a size that the network or the autoencoder cannot have.
    """
    if size is None:
        return conditional.size_of(net)
    step = 1 if codec is None else downsampling(codec.network)
    sides = [int(side) if side.isdecimal() else 0 for side in size.split("x")]
    height, width = sides * (3 - len(sides)) if len(sides) < 3 else (0, 0)
    even = step * conditional.multiple_of(type(net).__name__, net.config)
    if not (height and width) or height % even or width % even:
        raise ValueError(f"size={size}: accepted are HEIGHTxWIDTH in pixels, multiples of {even}")
    latents = height // step, width // step
    if "sample_size" in net.config and "UNet" not in type(net).__name__:
        raise ValueError(
            f"size={size}: {where} has a {type(net).__name__} for one size; accepted are UNets and classes without sample_size"
        )
    if "sample_size" in net.config:
        net.register_to_config(sample_size=[*latents])
    return conditional.channels_of(net), *latents


def _read_prompts(where: str, name: str, path: str | None) -> list[str]:
    if name not in ENCODERS:
        if path is not None:
            raise ValueError(f"{where}: a {name} takes no prompts; text-to-image pipelines with a record do; {conditional.OWN}")
        return []
    return [] if path is None else read_prompts(path)


def _check_parts(where: str, folder: Path, index: dict) -> None:
    """Raise ValueError for a component that is missing, or that is not of a class of diffusers or transformers."""
    for part, stated in index.items():
        if part in left_out(folder) or not isinstance(stated, list) or stated == [None, None]:
            continue
        nested = str(stated[-1]).endswith("Pipeline") or str(stated[-1]).startswith(("AutoPipeline", "AutoModel"))
        libraries = ("diffusers", "transformers", *(STOCK_SCHEDULERS if part == "scheduler" else ()))
        if part.startswith("_") or len(stated) != 2 or stated[0] not in libraries or nested:
            own = ".".join(map(str, stated))
            raise ValueError(f"{where}: {part} is code outside of diffusers ({own:.80}), which is not run; {_accepted()}")
        if part != "scheduler" and not (folder / part).is_dir():
            raise ValueError(f"{where}: the pipeline lacks {part}/")
        check_pickles(folder / part, where)


def _network(
    folder: Path, part: str, name: str, what: str, accepted: tuple[str, ...], variant: str | None, weights: bool
) -> Any:
    """Load the network. Older DiT and PixArt folders have Transformer2DModel, for which diffusers makes the right class."""
    net: Any = None
    if name in (*accepted, "Transformer2DModel"):
        net = component(folder, part, name, what, variant) if weights else hollow.component(folder, part, name, what)
    found = name if net is None else type(net).__name__
    if found not in accepted:
        known = found in RECORDS and RECORDS[found].encoders  # in a pipeline for something else, such as inpainting
        accepted_here = f"accepted are its pipelines {', '.join(known)}" if known else _accepted()
        raise ValueError(f"{what}: holds a {part} of class {found}; {accepted_here}")
    return net


def _scales(folder: Path, net: Any) -> GuidanceRange | None:
    """Return the guidance scales that a network takes; None for one that takes none."""
    if net.config.get("time_cond_proj_dim") is None:
        return None
    return GuidanceRange.of(read_json(folder / "config.json", "not readable").get(SCALES, ANY_SCALE))


def _wrapped(net: Any, guidance: float | None) -> tuple[nn.Module, dict, int | None, int | None]:
    """Return the network as a module of this project, its description, its classes and its null label."""
    if type(net).__name__ == "UNet2DModel":
        if guidance is not None:
            raise ValueError(f"guidance={guidance:g}: a UNet2DModel has no such input")
        return unet.UNet(net), unet.describe(net), net.config["num_class_embeds"], None
    return *conditional.wrap(net, guidance), *conditional.classes_of(net)


def _check_channels(where: str, net: Any, codec: Codec | None) -> None:
    """Raise ValueError for a network that takes more than a noisy sample, such as one for inpainting or upscaling."""
    takes, given = conditional.channels_of(net), net.config["in_channels"]
    returns = net.config.get("out_channels") or given  # of a network with packed latents, packed or not
    holds = takes if codec is None else latent_channels(codec.network)
    if takes != holds or returns not in (given, 2 * given, takes):
        latents = "" if codec is None else f", its latents have {holds}"
        raise ValueError(
            f"{where}: the network takes {takes} channels and returns {returns}{latents}; accepted are as many channels in as a sample "
            "has, and as many or twice as many out: no inpainting, no upscaling"
        )


def _codec(where: str, folder: Path, index: dict, variant: str | None, weights: bool) -> Codec | None:
    part = next((p for p in ("vae", "vqvae") if p in index), None)
    if part is None:
        return None
    library, name = index[part]
    if library != "diffusers" or name not in CODECS:
        raise ValueError(f"{where}: holds an autoencoder of class {name}; accepted are {', '.join(CODECS)}")
    vae = component(folder, part, name, where, variant) if weights else hollow.component(folder, part, name, where)
    source = {"folder": str(Path(where).resolve()) if Path(where).is_dir() else where, "part": part, "class": name}
    source |= {} if variant is None else {"variant": variant}
    return Codec(frozen(vae), *statistics(vae), source)
