"""Models from diffusers pipelines, a folder or a hub id. Only stock classes and safetensors are accepted; no foreign code is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from distill.denoiser import Denoiser
from teachers import diffusers_scheduler, prompts
from teachers.codec import Codec
from teachers.hub import UNUSED, component, fetch, read_json
from teachers.networks import adapters, conditional, unet
from teachers.teacher import Teacher, frozen

LABELLED = ("UNet2DModel", "DiTTransformer2DModel")  # conditioned on labels or nothing
TEXTUAL = tuple(name for name in conditional.NETWORKS if name not in LABELLED)  # conditioned on text
CODECS = ("AutoencoderKL", "VQModel")


def load(spec: str) -> Teacher:
    """Load ``PIPELINE``, or ``PIPELINE,prompts=FILE`` for a text-to-image pipeline; each line of the file is a class.

    Raises ValueError for a pipeline with missing, foreign or unsupported components.
    """
    where, file = _split(spec)
    folder = fetch(where)
    index = read_json(folder / "model_index.json", "no diffusers pipeline")
    name = str(index.get("_class_name"))
    lines = _read_prompts(where, name, file)
    _check_parts(where, folder, index)
    part = "unet" if "unet" in index else "transformer"
    if part not in index or "scheduler" not in index:
        raise ValueError(f"{where}: holds a {name}; {_accepted()}")
    config = read_json(folder / "scheduler" / "scheduler_config.json", "the pipeline lacks its scheduler")
    convention = diffusers_scheduler.read(config, where)
    net = _network(folder, part, index[part][1], where, TEXTUAL if lines else LABELLED)
    inner, network, classes, null = _wrapped(net)
    outer, network = adapters.wrap(inner, network, convention.adapter)
    denoiser = Denoiser(frozen(outer), convention.schedule, convention.prediction, convention.time, convention.sigma_data)
    codec, embeddings = _codec(where, folder, index), None
    record = {"source": where, **convention.record}
    if lines:
        embeddings = prompts.embed(name, folder, {part: net, "vae": codec and codec.vae}, lines)
        classes = null = len(lines)
        record["prompts"] = lines
    return Teacher(denoiser, conditional.size_of(net), network, classes, null, convention.sampling, record, codec, embeddings)


def _split(spec: str) -> tuple[str, str | None]:
    """Return the pipeline and the file of prompts of a spec. Raises ValueError for any other option."""
    if Path(spec).is_dir():
        return spec, None
    where, _, option = spec.partition(",")
    key, _, value = option.partition("=")
    if option and (key != "prompts" or not value):
        raise ValueError(f"{spec!r}: unknown option {option!r}; accepted is prompts=FILE, a text file with one prompt per line")
    return where, value or None


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
        if part in UNUSED or not isinstance(stated, list) or stated == [None, None]:
            continue
        nested = str(stated[-1]).endswith("Pipeline") or str(stated[-1]).startswith(("AutoPipeline", "AutoModel"))
        if part.startswith("_") or len(stated) != 2 or stated[0] not in ("diffusers", "transformers") or nested:
            own = ".".join(map(str, stated))
            raise ValueError(f"{where}: {part} is code outside of diffusers ({own:.80}), which is not run; {_accepted()}")
        if not (folder / part).is_dir():
            raise ValueError(f"{where}: the pipeline lacks {part}/")


def _network(folder: Path, part: str, name: str, what: str, accepted: tuple[str, ...]) -> Any:
    """Load the network. Older DiT and PixArt folders have Transformer2DModel, for which diffusers makes the right class."""
    net: Any = component(folder, part, name, what) if name in (*accepted, "Transformer2DModel") else None
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


def _codec(where: str, folder: Path, index: dict) -> Codec | None:
    part = next((p for p in ("vae", "vqvae") if p in index), None)
    if part is None:
        return None
    library, name = index[part]
    if library != "diffusers" or name not in CODECS:
        raise ValueError(f"{where}: holds an autoencoder of class {name}; accepted are {', '.join(CODECS)}")
    vae = component(folder, part, name, where)
    if vae.config.get("latents_mean") is not None:
        raise ValueError(f"{where}: an autoencoder with a mean and deviation per channel (latents_mean) is not supported")
    source = {"folder": str(Path(where).resolve()) if Path(where).is_dir() else where, "part": part, "class": name}
    return Codec(frozen(vae), vae.config["scaling_factor"], vae.config.get("shift_factor") or 0.0, source)
