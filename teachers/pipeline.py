"""Teachers from diffusers pipelines, a folder or a hub id: stock classes and safetensors alone, and no code of the pipeline's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from distill.denoiser import Denoiser
from teachers import adapter, scheduler, stock, text, unet
from teachers.codec import Codec
from teachers.load import Teacher, frozen

NETWORKS = ("UNet2DModel", "DiTTransformer2DModel")  # told labels or nothing; the others of teachers.stock take text
CODECS = ("AutoencoderKL", "VQModel")


def load(spec: str) -> Teacher:
    """``PATH``, or ``PATH,prompts=FILE`` of a text-to-image pipeline: a class for each line of the file."""
    where, prompts = split(spec)
    folder = fetch(where)
    index = read_json(folder / "model_index.json", "no diffusers pipeline")
    name = index.get("_class_name")
    lines = _prompts(where, str(name), prompts)
    _check_parts(where, folder, index)
    part = "unet" if "unet" in index else "transformer"
    if part not in index or "scheduler" not in index:
        raise ValueError(f"{where}: holds a {name}; {_accepted()}")
    config = read_json(folder / "scheduler" / "scheduler_config.json", "the pipeline lacks its scheduler")
    convention = scheduler.read(config, where)
    net = _network(folder, part, index[part][1], where, bool(lines))
    inner, network, classes, null = _wrapped(net)
    outer, network = adapter.wrap(inner, network, convention.adapter)
    denoiser = Denoiser(frozen(outer), convention.schedule, convention.prediction, convention.time, convention.sigma_data)
    codec, table = _codec(where, folder, index), None
    if lines:
        table = text.table_of(str(name), folder, {part: net, "vae": codec and codec.vae}, lines)
        classes = null = len(lines)
    record = {"source": where, **convention.record, **({"prompts": lines} if lines else {})}
    return Teacher(denoiser, stock.size_of(net), network, classes, null, convention.sampler, record, codec, table)


def split(spec: str) -> tuple[str, str | None]:
    """The pipeline and the file of prompts that a spec names. ValueError for any other option."""
    if Path(spec).is_dir():
        return spec, None
    where, _, option = spec.partition(",")
    key, _, value = option.partition("=")
    if option and (key != "prompts" or not value):
        raise ValueError(f"{spec!r}: unknown option {option!r}; accepted is prompts=FILE, a text file of one prompt a line")
    return where, value or None


def fetch(where: str) -> Path:
    """The pipeline's folder, from the hub where there is none of that name."""
    if Path(where).is_dir():
        return Path(where)
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(where, trust_remote_code=False, use_safetensors=True))
    except Exception as error:  # the hub client raises many kinds; all mean that the model cannot be had
        raise ValueError(
            f"cannot fetch {where!r} from the hub ({type(error).__name__}): is it spelt right, is there a network?"
        ) from None


def read_json(path: Path, otherwise: str) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        raise ValueError(f"{path}: {otherwise}") from None


def part_of(folder: Path, part: str, name: str, what: str) -> Any:
    """A component of the pipeline, by the name of its diffusers class. ValueError where its files are missing or do not fit."""
    import diffusers

    if not (folder / part / "config.json").is_file():
        raise ValueError(f"{what}: the pipeline lacks {part}/config.json")
    try:
        return getattr(diffusers, name).from_pretrained(folder / part, use_safetensors=True, local_files_only=True)
    except OSError as error:
        line = text.first_line(error)
        raise ValueError(f"{what}: the pipeline lacks its weights as safetensors, of {part} ({line})") from None
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{what}: the weights of {part} do not make a {name} ({text.first_line(error)})") from None


def _accepted() -> str:
    return f"accepted are pipelines of {', '.join(NETWORKS)} and {', '.join(text.ENCODERS)}"


def _prompts(where: str, name: str, path: str | None) -> list[str]:
    if name not in text.ENCODERS:
        if path is not None:
            raise ValueError(f"{where}: a {name} takes no prompts; {', '.join(text.ENCODERS)} do")
        return []
    if path is None:
        raise ValueError(
            f"{where}: a {name} needs prompts: name them as {where},prompts=FILE, a text file of one prompt a line"
        )
    return text.read_prompts(path)


def _check_parts(where: str, folder: Path, index: dict) -> None:
    """ValueError for a component that is missing, or whose class is not one of diffusers' or transformers'."""
    for part, stated in index.items():
        if (
            part.startswith("_")
            or part in (*text.UNUSED, "scheduler")
            or not isinstance(stated, list)
            or len(stated) != 2
            or stated[0] is None
        ):
            continue
        if stated[0] not in ("diffusers", "transformers"):
            raise ValueError(
                f"{where}: {part} is code of the pipeline's own ({'.'.join(stated)}), which is not run; {_accepted()}"
            )
        if not (folder / part).is_dir():
            raise ValueError(f"{where}: the pipeline lacks {part}/")


def _network(folder: Path, part: str, name: str, what: str, textual: bool) -> Any:
    """The pipeline's network. Older DiT and PixArt folders name a Transformer2DModel, of which diffusers makes the right class."""
    accepted = set(stock.NETWORKS) - set(NETWORKS) if textual else set(NETWORKS)
    if name not in {*accepted, "Transformer2DModel"}:
        raise ValueError(f"{what}: holds a {part} of class {name}; {_accepted()}")
    net = part_of(folder, part, name, what)
    if type(net).__name__ not in accepted:
        raise ValueError(f"{what}: holds a {part} of class {type(net).__name__}; {_accepted()}")
    if net.config.get("time_cond_proj_dim") is not None:
        raise ValueError(f"{what}: the network is told its guidance scale (time_cond_proj_dim), which no teacher here is")
    return net


def _wrapped(net: Any) -> tuple[nn.Module, dict, int | None, int | None]:
    """The network as ours, what rebuilds it, its classes and its null class."""
    if type(net).__name__ == "UNet2DModel":
        return unet.UNet(net), unet.network(net), net.config["num_class_embeds"], None
    return stock.NETWORKS[type(net).__name__](net), stock.network(net), *stock.null_of(net)


def _codec(where: str, folder: Path, index: dict) -> Codec | None:
    part = next((p for p in ("vae", "vqvae") if p in index), None)
    if part is None:
        return None
    library, name = index[part]
    if library != "diffusers" or name not in CODECS:
        raise ValueError(f"{where}: holds an autoencoder of class {name}; accepted are {', '.join(CODECS)}")
    vae = part_of(folder, part, name, where)
    if vae.config.get("latents_mean") is not None:
        raise ValueError(f"{where}: latents of a mean and deviation for each channel (latents_mean) are not read so far")
    source = str(Path(where).resolve()) if Path(where).is_dir() else where
    shift = vae.config.get("shift_factor") or 0.0
    return Codec(
        vae.eval().requires_grad_(False), vae.config["scaling_factor"], shift, {"folder": source, "part": part, "class": name}
    )
