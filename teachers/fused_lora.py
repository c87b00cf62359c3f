"""A user's own LoRA, added to the weights of a pipeline's network by diffusers and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill import reading
from teachers.hub import FUSE, assemble, quiet, stock

DEFAULT = "pytorch_lora_weights.safetensors"  # in a folder


def fuse(path: str, net: Any, name: str, folder: Path, index: dict, part: str) -> None:
    """Add a LoRA, a .safetensors of any format that diffusers reads, to the weights of ``net``, in place.

    ``name``: the class of the pipeline in ``folder``. ``index``: its components. ``part``: the one that ``net`` is.

    Raises ValueError without peft, and for a file that is no LoRA of this network alone.
    """
    cls, file = stock(name), Path(path) / DEFAULT if Path(path).is_dir() else Path(path)
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(f"lora={path}: there is no such file; accepted is a LoRA as .safetensors, or a folder with {DEFAULT}")
    reading.regular(file)
    if not hasattr(cls, "load_lora_weights"):
        raise ValueError(f"lora={path}: diffusers loads no LoRA into a {name}")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError(f"lora={path}: a LoRA needs the package peft: pip install peft") from None
    others = {key: None for key, value in index.items() if isinstance(value, list) and key not in ("scheduler", part)}
    where = {"pretrained_model_name_or_path_or_dict": str(file.parent), "weight_name": file.name, "local_files_only": True}
    try:
        with quiet():
            state = cls.lora_state_dict(**where, use_safetensors=True)
            names = [key for key in (state[0] if isinstance(state, tuple) else state) if "lora" in key]
            if text := sum(key.startswith("text_encoder") for key in names):
                raise ValueError(f"{text} of its weights are of text encoders, which are not changed here; {FUSE}")
            pipeline = assemble(cls, folder, {**others, part: net})
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True, use_safetensors=True)
            fitting = sum(".lora_" in key for key, _ in net.named_parameters())
            if not names or fitting != len(names):
                raise ValueError(
                    f"{fitting} of its {len(names)} weights fit the {type(net).__name__}; accepted is a LoRA made for it"
                )
            pipeline.fuse_lora(components=[part])
            pipeline.unload_lora_weights()
    except Exception as error:  # diffusers raises many types; all mean that the file does not fit
        raise ValueError(f"lora={path}: {' '.join(str(error).split()):.200}") from None
