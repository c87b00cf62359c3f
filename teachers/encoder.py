"""Encode prompts with the text encoders of a text-to-image pipeline, which are loaded when they are needed and freed again."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from teachers.conditions import Conditions
from teachers.hollow import network, text_encoder
from teachers.hub import WEIGHTS, assemble, fetch, first_line, left_out, quiet, read_json, stock, variant_of
from teachers.networks.records import ENCODERS, Encoded

if TYPE_CHECKING:
    from teachers.teacher import Teacher

BATCH = 16  # prompts per call of the text encoders
EXAMPLES = ("a cat", "two dogs on a boat", "a red house", "mountains")  # prompts of exports, for models without any


@dataclass(frozen=True)
class Encoder:
    """Encode prompts as a text-to-image pipeline does, with its own text encoders, which are loaded when they are first used.

    ``where``: the pipeline, a folder or a hub id. ``variant``: of its weights. ``side``: height and width of the network's samples, where
    they are not those of its configuration: some networks are conditioned on the size of their images. ``device``, ``dtype``: where the
    encoders run, and in which precision. The pipeline's network and autoencoder are not loaded. Nothing is downloaded. On the meta device
    the encoders have no weights, rows have shapes alone and are 0, and the sha256 is "".
    """

    where: str
    variant: str | None = None
    side: tuple[int, ...] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, model: Teacher, **how: Any) -> Encoder:
        """Return the encoder of the pipeline that a text-to-image model comes from; a student's file names it by its autoencoder.

        Raises ValueError for any other model.
        """
        if model.embeddings is None or model.codec is None or "folder" not in model.codec.source:
            raise ValueError(f"the model takes {model.conditions}: accepted are text-to-image models of a diffusers pipeline")
        return cls(model.codec.source["folder"], model.codec.source.get("variant"), model.shape[1:], **how)

    @cached_property
    def folder(self) -> Path:
        """The folder of the pipeline."""
        return fetch(self.where, self.variant, download=False, weights=not self.hollow)

    @property
    def hollow(self) -> bool:
        """Whether the encoders have no weights."""
        return self.device.type == "meta"

    @cached_property
    def index(self) -> dict:
        """The content of its model_index.json. Raises ValueError for a pipeline without text encoders that are supported."""
        index = read_json(self.folder / "model_index.json", "no diffusers pipeline")
        if index.get("_class_name") not in ENCODERS:
            raise ValueError(f"{self.where}: a {index.get('_class_name')} takes no prompts; {', '.join(ENCODERS)} do")
        return index

    @cached_property
    def sha256(self) -> str:
        """The sha256 of text encoders and tokenizers: names and bytes of the weights, and the tokenizers' files.

        Neither versions of the libraries nor the layout of the files change it. It takes about a second for each gigabyte.
        """
        if self.hollow:
            return ""
        digest = hashlib.sha256()
        for part in sorted(self._parts("transformers")):
            digest.update(part.encode())
            weights = self._weights(part)
            for name, place in sorted((name, path) for path in weights for name in _tensors(path)):
                with safe_open(place, framework="pt") as file:
                    value = file.get_tensor(name)
                digest.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            for path in sorted((self.folder / part).glob("*")) if not weights else ():
                if path.suffix in (".json", ".txt", ".model"):
                    digest.update(path.name.encode() + _stable(path))
        return digest.hexdigest()

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline with its encoders; network and autoencoder have no weights. Raises ValueError if an encoder is missing."""
        try:
            from transformers import PreTrainedModel
        except ImportError:
            raise ValueError(f"{self.where}: text pipelines need the package transformers: pip install transformers") from None
        cls = stock(self.index["_class_name"])
        with silent():
            try:
                parts = {part: network(self.folder / part, name) for part, name in self._parts("diffusers").items()}
                net: Any = parts.get("unet", parts.get("transformer"))
                if self.side is not None and "sample_size" in net.config:
                    net.register_to_config(sample_size=[*self.side])
                if self.hollow:
                    parts |= self._without_weights()
                pipeline = assemble(cls, self.folder, parts, self.variant)
            except Exception as error:  # the libraries raise many types; all mean that an encoder cannot be loaded
                raise ValueError(f"{self.where}: a text encoder or tokenizer cannot be read ({first_line(error)})") from None
        for part in pipeline.components.values():
            if isinstance(part, PreTrainedModel):
                torch.nn.Module.to(part, None if self.hollow else self.device, self.dtype).eval()
        return pipeline

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Encoded:
        """Return {condition: (rows [P, ...], row of the empty prompt [1, ...])} on the CPU."""
        pipeline = self.pipeline
        with silent():  # of prompts that are cut, see `too_long`
            found = ENCODERS[self.index["_class_name"]](pipeline, prompts)
        return {name: (rows.cpu(), null[:1].cpu()) for name, (rows, null) in found.items()}

    def table(self, prompts: list[str]) -> Conditions:
        """Return the conditions of some prompts, in memory."""
        parts = [self(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        rows = {name: torch.cat([*(part[name][0] for part in parts), parts[0][name][1]]) for name in parts[0]}
        return Conditions.of(rows, prompts, self.sha256)

    def too_long(self, prompts: Iterable[str]) -> int:
        """Return how many prompts no tokenizer takes whole. Their ends have no effect."""
        parameters = inspect.signature(self.pipeline.encode_prompt).parameters
        longest = parameters["max_sequence_length"].default if "max_sequence_length" in parameters else None
        found: list[tuple[Any, int]] = []
        for name, part in self.pipeline.components.items():
            if name.startswith("tokenizer") and part is not None:
                t5 = longest is not None and not type(part).__name__.startswith("CLIP")
                found.append((part, min(part.model_max_length, longest) if t5 else part.model_max_length))
        with silent():
            return sum(all(len(part(text, verbose=False).input_ids) > most for part, most in found) for text in prompts)

    def warn_of_long(self, prompts: list[str]) -> None:
        """Say how many prompts no tokenizer takes whole, once for all launched processes."""
        if os.environ.get("RANK", "0") == "0" and (cut := self.too_long(prompts)):
            tqdm.write(
                f"warning: {cut:,} of {len(prompts):,} prompts are longer than the tokenizer takes; their ends have no effect"
            )

    def close(self) -> None:
        """Free the encoders' memory. They are loaded again if they are used again."""
        vars(self).pop("pipeline", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _parts(self, library: str) -> dict[str, str]:
        """Return the components of a library other than scheduler and unused ones, {part: class}."""
        stated = {k: v for k, v in self.index.items() if isinstance(v, list) and k not in (*left_out(self.folder), "scheduler")}
        return {part: name for part, (home, name) in stated.items() if home == library}

    def _without_weights(self) -> dict[str, Any]:
        """Return the text encoders from their configurations alone."""
        import transformers

        classes = {part: getattr(transformers, name) for part, name in self._parts("transformers").items()}
        models = {part: cls for part, cls in classes.items() if issubclass(cls, transformers.PreTrainedModel)}
        return {part: text_encoder(self.folder / part, cls) for part, cls in models.items()}

    def _weights(self, part: str) -> list[Path]:
        """Return the files of a component's weights, of the variant that is loaded."""
        variant = variant_of(self.folder / part, self.variant, self.where)
        matches = [(path, WEIGHTS.fullmatch(path.name)) for path in (self.folder / part).glob("*.safetensors")]
        return [path for path, match in matches if match and (match[1] or match[2]) == variant]


def with_prompts(model: Teacher, prompts: list[str]) -> Teacher:
    """Return a text-to-image model whose labels are the numbers of ``prompts``, encoded by its own pipeline.

    Raises ValueError for a model that takes no text, and for a pipeline that is gone.
    """
    encoder = Encoder.of(model)
    encoder.warn_of_long(prompts)
    return model.with_conditions(encoder.table(prompts))


@dataclass(frozen=True)
class Online:
    """Encode the prompts of each batch when they are needed. The encoders stay in memory."""

    encoder: Encoder
    prompts: list[str]

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        rows, place = index.unique(return_inverse=True)
        texts = [self.prompts[i] for i in rows.tolist() if i < len(self.prompts)]
        found = self.encoder(texts or [""])
        return {name: torch.cat([some[: len(texts)], null])[place] for name, (some, null) in found.items()}


def online(encoder: Encoder, prompts: list[str]) -> Conditions:
    """Return conditions of prompts that are encoded in each batch."""
    null = {name: row for name, (_, row) in encoder([""]).items()}
    return Conditions(null, len(prompts), Online(encoder, prompts), prompts, encoder.sha256)


def with_examples(model: Teacher) -> Teacher:
    """Return a text-to-image model with a few prompts: the first ones of its table, else `EXAMPLES`. Others are returned unchanged.

    They are encoded anew: rows of a table may be in half precision. Raises ValueError for a pipeline that is gone.
    """
    if model.embeddings is None:
        return model
    return model.with_conditions(Encoder.of(model).table(list(model.embeddings.prompts[:4]) or list(EXAMPLES)))


@contextmanager
def silent() -> Iterator[None]:
    """Silence the logs of diffusers and transformers, and their progress bars for good."""
    from diffusers.utils import logging
    from transformers.utils import logging as more

    before = more.get_verbosity()
    more.set_verbosity(more.CRITICAL)
    logging.disable_progress_bar()
    more.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        more.set_verbosity(before)


def _tensors(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _stable(path: Path) -> bytes:
    """Return the content of a tokenizer's file without what the libraries' versions change."""
    if path.name != "tokenizer_config.json":
        return path.read_bytes()
    found = read_json(path, "the tokenizer's configuration")
    return json.dumps(found.get("model_max_length")).encode()
