"""Read diffusers pipelines, from disk or from the hub, and their components. No code of a pipeline's own is run."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # components that are never loaded


def fetch(where: str, download: bool = True) -> Path:
    """Return the folder of a pipeline, downloaded from the hub if there is no folder ``where``.

    ``download``: False accepts only what an earlier download left on this machine.

    Raises ValueError if the hub does not have it or cannot be reached.
    """
    if Path(where).is_dir():
        return Path(where)
    from diffusers import DiffusionPipeline

    try:
        options = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": not download}
        return Path(DiffusionPipeline.download(where, **options))
    except Exception as error:  # the hub client raises many types; all mean that the model cannot be loaded
        reason = type(error).__name__
        found = "cannot be fetched from the hub" if download else f"was not downloaded yet, which `hf download {where}` does"
        raise ValueError(f"{where!r} is no folder here and {found} ({reason}): check spelling and network") from None


def read_json(path: Path, problem: str) -> dict:
    """Return the content of a JSON file. Raises ValueError with the text ``problem`` if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        raise ValueError(f"{path}: {problem}") from None


def component(folder: Path, part: str, name: str, what: str) -> Any:
    """Load a component of a pipeline by the name of its diffusers class.

    Raises ValueError, beginning with ``what``, if its files are missing or do not fit the class.
    """
    import diffusers

    cls = getattr(diffusers, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(f"{what}: {part} is of class {name}, which is no network of diffusers")
    if not (folder / part / "config.json").is_file():
        raise ValueError(f"{what}: the pipeline lacks {part}/config.json")
    try:
        return cls.from_pretrained(folder / part, use_safetensors=True, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{what}: the pipeline lacks the safetensors weights of {part} ({first_line(error)})") from None
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{what}: the weights of {part} do not fit a {name} ({first_line(error)})") from None


def assemble(cls: Any, folder: Path, parts: dict[str, Any]) -> Any:
    """Load the pipeline in ``folder`` as class ``cls``, with ``parts`` in place of its own components and without `UNUSED`."""
    absent = {name: None for name in UNUSED if name in inspect.signature(cls.__init__).parameters}
    options = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    return cls.from_pretrained(folder, **parts, **absent, **options)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
