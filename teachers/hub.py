"""Read diffusers pipelines, from disk or from the hub, and their components. No code of a pipeline's own is run."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distill import reading
from distill.reading import first_line as first_line

TIMEOUT = 5.0  # seconds that the hub has for its first answer
CONFIGS = ("*.json", "*.txt", "*.model")  # all of a pipeline but its weights
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # components that are never loaded
T5 = ("text_encoder_3", "tokenizer_3")  # of Stable Diffusion 3, whose pipeline takes embeddings of 0 without them
ADAPTERS = ("pytorch_lora_weights*", "adapter_config.json", "adapter_model.*")
FUSE = "accepted are weights with the adapter fused into them: fuse_lora, unload_lora_weights, save_pretrained of the pipeline"
WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.safetensors")


def fetch(where: str, variant: str | None = None, download: bool = True, weights: bool = True) -> Path:
    """Return the folder of a pipeline, downloaded from the hub if there is no folder ``where``.

    ``variant``: of the weights to download. ``download``: False accepts only what an earlier download left on this machine.
    ``weights``: False downloads the files of `CONFIGS` alone.

    Raises ValueError if the hub does not have it or cannot be reached.
    """
    if Path(where).is_dir():
        _check_files(Path(where))
        return Path(where)
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    here = not (download and reached(where, "model"))
    options = {"variant": variant, "trust_remote_code": False, "use_safetensors": True, "local_files_only": here}
    try:
        with quiet():
            if not weights:
                return Path(snapshot_download(where, allow_patterns=[*CONFIGS], local_files_only=here))
            return Path(DiffusionPipeline.download(where, **options))
    except Exception as error:  # the hub client raises many types; all mean that the model cannot be loaded
        reason = type(error).__name__
        found = "cannot be fetched from the hub" if download else f"was not downloaded yet, which `hf download {where}` does"
        raise ValueError(f"{where!r} is no folder here and {found} ({reason}): check spelling and network") from None


def reached(name: str, kind: str) -> bool:
    """Return whether the hub has a repository of ``kind`` "model" or "dataset". It is queried once, for `TIMEOUT` seconds.

    The hub's own client tries again for minutes where there is no network.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
    except Exception:  # the client raises many types; none of them leaves anything to download
        return False
    return True


def _check_files(folder: Path) -> None:
    """Raise ValueError if a file of a pipeline or of its components is no regular file."""
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.suffix in (".json", ".safetensors", ".txt", ".model") and not path.is_dir():
            reading.regular(path)


def read_json(path: Path, problem: str) -> dict:
    """Return the content of a file with a JSON object. Raises ValueError with the text ``problem`` if it cannot be read."""
    try:
        return reading.read_json(path)
    except (OSError, ValueError):
        raise ValueError(f"{path}: {problem}") from None


def left_out(folder: Path) -> tuple[str, ...]:
    """Return the components that a pipeline is loaded without."""
    return UNUSED if (folder / T5[0]).is_dir() else UNUSED + T5


def nulls(folder: Path) -> dict[str, None]:
    """Return what plain diffusers needs as further arguments to load a saved pipeline: None for each component of `T5` it lacks."""
    index = read_json(folder / "model_index.json", "no diffusers pipeline")
    return {name: None for name in T5 if index.get(name) == [None, None]}


def check_adapters(folder: Path, what: str) -> None:
    """Raise ValueError for the file of a LoRA or another adapter in a pipeline, which would be ignored."""
    found = [path for pattern in ADAPTERS for path in (*folder.glob(pattern), *folder.glob(f"*/{pattern}"))]
    if found:
        raise ValueError(
            f"{what}: {found[0].relative_to(folder)} is an adapter, which would be ignored; {FUSE}, or no such file"
        )


def check_pickles(folder: Path, what: str) -> None:
    """Raise ValueError if the folder of a component has its weights as .bin alone, which are pickles."""
    if [*folder.glob("*pytorch_model*.bin")] and not [*folder.glob("*.safetensors")]:
        raise ValueError(
            f'{what}: {folder.name} has weights as .bin alone, which are not read; convert them: python -c "from diffusers import '
            f"DiffusionPipeline as P; P.from_pretrained('{what}').save_pretrained('{Path(what).name}-safe')\""
        )


def variant_of(folder: Path, wanted: str | None, what: str) -> str | None:
    """Return the variant of the weights in the folder of a component: ``wanted`` if there is one, else None for plain weights.

    Without plain weights it is the only variant. Raises ValueError if there are several.
    """
    matches = [match for path in folder.glob("*.safetensors") if (match := WEIGHTS.fullmatch(path.name))]
    variants = {match[1] or match[2] for match in matches}
    if wanted in variants or None in variants or not variants:
        return wanted if wanted in variants else None
    if len(variants) > 1:
        raise ValueError(
            f"{what}: {folder.name} has no plain weights; accepted is variant={' or variant='.join(sorted(variants))}"
        )
    return variants.pop()


def stock(name: str) -> Any:
    """Return a class of diffusers by its name. Raises ValueError if the installed diffusers does not have it."""
    import diffusers

    if (cls := getattr(diffusers, name, None)) is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no {name}: pip install --upgrade diffusers")
    return cls


def component(folder: Path, part: str, name: str, what: str, variant: str | None = None) -> Any:
    """Load a component of a pipeline by the name of its diffusers class, in float32.

    ``variant``: as in `variant_of`. Raises ValueError, beginning with ``what``, if its files are missing or do not fit the class.
    """
    import diffusers

    cls = stock(name)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(f"{what}: {part} is of class {name}, which is no network of diffusers")
    if not (folder / part / "config.json").is_file():
        raise ValueError(f"{what}: the pipeline lacks {part}/config.json")
    check_numbers(reading.read_json(folder / part / "config.json"), f"{what}: {part}/config.json")
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    variant = variant_of(folder / part, variant, what)
    try:
        with quiet():
            net, info = cls.from_pretrained(folder / part, variant=variant, **options)
    except OSError as error:
        raise ValueError(f"{what}: the pipeline lacks the safetensors weights of {part} ({first_line(error)[:80]})") from None
    except Exception as error:  # diffusers raises many types; all mean that configuration and weights do not fit
        raise ValueError(f"{what}: the weights of {part} do not fit a {name} ({first_line(error)[:80]})") from None
    for problem, keys in (("left over", info["unexpected_keys"]), ("missing", info["missing_keys"])):
        if keys:
            adapter = f"; {FUSE}" if any("lora" in key for key in info["unexpected_keys"]) else ""
            raise ValueError(f"{what}: {len(keys)} weights of {part} are {problem}, such as {min(keys)}{adapter}")
    return net


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log of diffusers, whose lines stand beside the one line of an error."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_numbers(config: dict, where: str) -> None:
    """Raise ValueError, beginning with ``where``, for whole numbers that no network or scheduler has, before anything is made of them."""
    for name, value in config.items():
        most = 1000 if "layers" in name or "depth" in name else 10**5 if "timesteps" in name else 10**8
        if large := [number for number in reading.numbers(value) if isinstance(number, int) and abs(number) > most]:
            raise ValueError(f"{where}: {name} is {large[0]:g}; accepted are at most {most:,}")


def assemble(cls: Any, folder: Path, parts: dict[str, Any], variant: str | None = None) -> Any:
    """Load the pipeline in ``folder`` as class ``cls`` in float32, with ``parts`` in place of its own and without `left_out`."""
    absent = {name: None for name in left_out(folder) if name in inspect.signature(cls.__init__).parameters}
    options = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True, "variant": variant}
    with warnings.catch_warnings():  # its new name is dtype, which older versions do not take
        warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)
        return cls.from_pretrained(folder, **absent | parts, **options, torch_dtype=torch.float32)
