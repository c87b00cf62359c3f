"""Models from diffusers pipelines, a folder or a hub id. Only stock classes and safetensors are accepted; no foreign code is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from distill.denoiser import Denoiser
from teachers import diffusers_scheduler, prompts
from teachers.codec import Codec
from teachers.hub import UNUSED, check_adapters, check_numbers, component, fetch, left_out, read_json, variant_of
from teachers.networks import adapters, conditional, unet
from teachers.teacher import Teacher, frozen

LABELLED = ("UNet2DModel", "DiTTransformer2DModel")  # conditioned on labels or nothing
TEXTUAL = tuple(name for name in conditional.NETWORKS if name not in LABELLED)  # conditioned on text
CODECS = ("AutoencoderKL", "VQModel")
STOCK_SCHEDULERS = ("deprecated", "stochastic_karras_ve")  # modules of diffusers with a scheduler of their own


def load(spec: str, download: bool = True) -> Teacher:
    """Load ``PIPELINE``, or ``PIPELINE,prompts=FILE`` for a text-to-image pipeline; each line of the file is a class.

    ``,variant=NAME`` chooses among several weights, such as fp16. ``download``: False accepts only what is on this machine.

    Raises ValueError for a pipeline with missing, foreign or unsupported components.
    """
    where, file, variant = _split(spec)
    folder = fetch(where, variant, download)
    check_adapters(folder, where)
    index = read_json(folder / "model_index.json", "no diffusers pipeline")
    name = str(index.get("_class_name"))
    lines = _read_prompts(where, name, file)
    _check_parts(where, folder, index)
    part = "unet" if "unet" in index else "transformer"
    if part not in index or "scheduler" not in index:
        raise ValueError(f"{where}: holds a {name}; {_accepted()}")
    config = read_json(folder / "scheduler" / "scheduler_config.json", "the pipeline lacks its scheduler")
    check_numbers(config, f"{where}: scheduler_config.json")
    convention = diffusers_scheduler.read(config, where)
    found = variant_of(folder / part, variant, where)
    if variant not in (None, found):
        raise ValueError(
            f"{where}: {part} has no weights of variant {variant!r}; accepted without variant= is {found or 'plain'}"
        )
    variant = found
    net = _network(folder, part, index[part][1], where, TEXTUAL if lines else LABELLED, variant)
    inner, network, classes, null = _wrapped(net)
    outer, network = adapters.wrap(inner, network, convention.adapter)
    denoiser = Denoiser(frozen(outer), convention.schedule, convention.prediction, convention.time, convention.sigma_data)
    codec, embeddings = _codec(where, folder, index, variant), None
    _check_channels(where, net, codec)
    record = {"source": where, **convention.record}
    if lines:
        embeddings = prompts.embed(name, folder, {part: net, "vae": codec and codec.vae}, lines, variant)
        classes = null = len(lines)
        record["prompts"] = lines
    if name == "StableDiffusion3Pipeline" and (without := [part for part in left_out(folder) if part not in UNUSED]):
        record["without"] = without
    return Teacher(denoiser, conditional.size_of(net), network, classes, null, convention.sampling, record, codec, embeddings)


def _split(spec: str) -> tuple[str, str | None, str | None]:
    """Return the pipeline, the file of prompts and the variant of a spec. Raises ValueError for any other option."""
    if Path(spec).is_dir():
        return spec, None, None
    where, *options = spec.split(",")
    fields = dict(option.partition("=")[::2] for option in options)
    if wrong := [f"{key}={value}" for key, value in fields.items() if key not in ("prompts", "variant") or not value]:
        raise ValueError(
            f"{spec!r}: unknown option {wrong[0]!r}; accepted is prompts=FILE, a text file with one prompt per line, and "
            "variant=NAME of the weights, such as fp16"
        )
    return where, fields.get("prompts"), fields.get("variant")


def _accepted() -> str:
    return f"accepted are pipelines of {', '.join(LABELLED)} and {', '.join(prompts.ENCODERS)}"


def _read_prompts(where: str, name: str, path: str | None) -> list[str]:
    if name not in prompts.ENCODERS:
        if path is not None:
            raise ValueError(f"{where}: a {name} takes no prompts; {', '.join(prompts.ENCODERS)} do")
        return []
    if path is None:
        raise ValueError(f"{where}: a {name} needs prompts: give {where},prompts=FILE, a text file with one prompt per line")
    return prompts.read_prompts(path)


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


def _network(folder: Path, part: str, name: str, what: str, accepted: tuple[str, ...], variant: str | None) -> Any:
    """Load the network. Older DiT and PixArt folders have Transformer2DModel, for which diffusers makes the right class."""
    net: Any = component(folder, part, name, what, variant) if name in (*accepted, "Transformer2DModel") else None
    found = name if net is None else type(net).__name__
    if found not in accepted:
        raise ValueError(f"{what}: holds a {part} of class {found}; {_accepted()}")
    if net.config.get("time_cond_proj_dim") is not None:
        raise ValueError(f"{what}: networks conditioned on the guidance scale (time_cond_proj_dim) are not accepted")
    return net


def _wrapped(net: Any) -> tuple[nn.Module, dict, int | None, int | None]:
    """Return the network as a module of this project, its description, its classes and its null label."""
    if type(net).__name__ == "UNet2DModel":
        return unet.UNet(net), unet.describe(net), net.config["num_class_embeds"], None
    return conditional.NETWORKS[type(net).__name__](net), conditional.describe(net), *conditional.classes_of(net)


def _check_channels(where: str, net: Any, codec: Codec | None) -> None:
    """Raise ValueError for a network that takes more than a noisy sample, such as one for inpainting or upscaling."""
    takes, returns = net.config["in_channels"], net.config["out_channels"] or net.config["in_channels"]
    holds = takes if codec is None else codec.network.config["latent_channels"]
    if takes != holds or returns not in (takes, 2 * takes):
        latents = "" if codec is None else f", its latents have {holds}"
        raise ValueError(
            f"{where}: the network takes {takes} channels and returns {returns}{latents}; accepted are as many channels in as a sample "
            "has, and as many or twice as many out: no inpainting, no upscaling"
        )


def _codec(where: str, folder: Path, index: dict, variant: str | None) -> Codec | None:
    part = next((p for p in ("vae", "vqvae") if p in index), None)
    if part is None:
        return None
    library, name = index[part]
    if library != "diffusers" or name not in CODECS:
        raise ValueError(f"{where}: holds an autoencoder of class {name}; accepted are {', '.join(CODECS)}")
    vae = component(folder, part, name, where, variant)
    if vae.config.get("latents_mean") is not None:
        raise ValueError(f"{where}: an autoencoder with a mean and deviation per channel (latents_mean) is not supported")
    source = {"folder": str(Path(where).resolve()) if Path(where).is_dir() else where, "part": part, "class": name}
    source |= {} if variant is None else {"variant": variant}
    return Codec(frozen(vae), vae.config["scaling_factor"], vae.config.get("shift_factor") or 0.0, source)
