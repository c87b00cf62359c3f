"""Export a model: safetensors with its description, diffusers pipelines of stock classes with the same pixels, and a model card.

    python recipes/export.py --model runs/progressive-digits/stages/4 --output-dir exports/digits-4
    python recipes/export.py --model runs/progressive-digits --variants fp16 --onnx --torch-export --push-to-hub me/digits-1

Everything is made and compared in a temporary folder, which is renamed at the end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from recipes.common import flags
from recipes.common.accepted import GUIDANCE, Checked
from recipes.common.cli import flag, flags_first, machine_flag, method_flag, model_flag, one_line_errors, parse

PRESETS: dict[str, dict] = {"default": {}, "smoke": {}}  # nothing here takes long


@dataclass(frozen=True)
class Config(Checked):
    preset: str = flag("default", "both are the same here", choices=PRESETS)
    model: str = model_flag("digits", "the model (accepted: --help teacher)")
    output_dir: str = machine_flag("runs/export", "a new directory", path="new")
    guidance: float | None = flag(
        None,
        "the scale of a student that takes it, in pipelines of pixels and one-step programs, which take none; others have it as an input",
        own=lambda v: "the student's own",
        **GUIDANCE,
    )
    sampler: str | None = method_flag(
        None,
        "another sampler of several steps for the export: ddim, consistency:GAMMA",
        own=lambda v: "the student's",
        short=False,
    )
    variants: tuple[str, ...] = flag(
        (), "also weights in half precision, as variants of each pipeline", choices=("fp16", "bf16")
    )
    torch_export: bool = flag(False, "also the one step of a student as a torch.export program, one-step.pt2")
    onnx: bool = flag(False, "also the one step of a student as ONNX, one-step.onnx, compared in onnxruntime")
    license: str = flag("other", "the licence in the model card, as the hub spells it")
    push_to_hub: str | None = flag(None, "upload everything to this model repository, owner/name")
    private: bool = flag(False, "make a new repository on the hub private", short=False)

    TOPICS: ClassVar = {"teacher": flags.TOPICS["teacher"]}


flags_first(__name__, Config, __doc__, PRESETS)

import torch

import teachers
from distill.files import replacing_folder, write_text
from eval.generate import images
from eval.image_grid import contact_sheet
from recipes.common.checks import with_sampler
from recipes.common.guidance import outside
from teachers import Teacher
from teachers.encoder import with_examples
from teachers.export import deliver, one_step
from teachers.export.card import card, measured
from teachers.export.lora import export_lora
from teachers.hub import first_line, nulls
from teachers.lora import merged


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        if config.push_to_hub and not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", config.push_to_hub):
            raise ValueError(f"--push-to-hub {config.push_to_hub}: accepted is owner/name")
        export(teachers.load(config.model), config)
        if config.push_to_hub:
            print(f"hub: {push(Path(config.output_dir), config.push_to_hub, config.private)}")


def export(model: Teacher, config: Config) -> None:
    """Write all files of an export into a new folder. Raises ValueError where the model cannot be exported so."""
    folder, model = Path(config.output_dir), with_examples(model)
    if config.sampler is not None:
        if not model.distilled:
            raise ValueError("--sampler: this model was not distilled; accepted is a student of several steps")
        model = with_sampler(model, config.sampler)
    if config.guidance is not None:
        model = at_scale(model, config.guidance)
    deliver.check_exportable(model)
    if config.torch_export or config.onnx:
        one_step.check_portable(model, config.onnx)
    with replacing_folder(folder) as aside:
        _write(config, model, aside)
    print(f"export: {folder}")


def at_scale(model: Teacher, scale: float) -> Teacher:
    """Return a student that takes the guidance scale, with another one for calls that name none. Raises ValueError outside of its range."""
    if model.guidance is None:
        raise ValueError(f"--guidance {scale:g}: this model takes no guidance scale; accepted is a student of --guidance-range")
    if warning := outside(model, scale):
        raise ValueError(f"--guidance: {warning}")
    return replace(model, guidance=replace(model.guidance, chosen=scale))


def _write(config: Config, model: Teacher, folder: Path) -> None:
    pipelines = deliver.export_pipelines(model, folder)
    write_lora(model, folder)
    fingerprint = model.fingerprint
    kept = model = merged(model)
    if model.codec is not None:  # the export has its own copy of the autoencoder
        source = model.codec.source | {"folder": f"./{next(iter(pipelines))}"}
        kept = replace(model, codec=replace(model.codec, source=source))
    teachers.save(folder / "student.safetensors", kept)
    for name, worst in pipelines.items():
        print(f"{name}: same pixels through diffusers alone (largest difference {worst:.1g})")
        for variant in config.variants:
            print(f"{name}, {variant}: largest difference {deliver.add_variant(model, folder / name, variant):.1g}")
    if config.torch_export:
        print(f"one-step.pt2: largest difference {one_step.torch_export(model, folder / 'one-step.pt2'):.1g}")
    if config.onnx:
        print(f"one-step.onnx: largest difference {one_step.onnx(model, folder / 'one-step.onnx'):.1g}")
    shown = draw_samples(model, folder / "samples.png")
    labels = None if model.classes is None else [i % model.classes for i in range(4)]
    call = deliver.form_of(model).call(model, labels, 4)
    rows = measured(config.model, fingerprint, model.sampling.label)
    without = nulls(folder / next(iter(pipelines)))
    text = card(model, list(pipelines), call, rows, config.license, shown, config.push_to_hub, without)
    write_text(folder / "README.md", text)


def write_lora(model: Teacher, folder: Path) -> None:
    """Write the adapter of a LoRA student, or say why no pipeline can load it."""
    try:
        worst = export_lora(model, folder)
    except ValueError as error:
        return print(f"no LoRA file: {error}")
    if worst is not None:
        print(f"lora: same pixels in the teacher's own pipeline (largest difference {worst:.1g})")


def draw_samples(model: Teacher, path: Path) -> str | None:
    """Write fifty samples of the fewest steps, where they are pictures. Return the file's name."""
    if len(model.image_shape) != 3 or model.image_shape[0] not in (1, 3):
        return None
    steps = min(model.sampling.steps, default=64)
    label_of = None if model.classes is None else lambda i: i % (model.classes or 1)
    (batch,) = images(model, model.sampling, steps, [range(50)], 0, torch.device("cpu"), label_of=label_of)
    contact_sheet(batch.pixels, path, 10)
    return path.name


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder and return its address. Raises ValueError in one line where the hub cannot be reached or refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=str(folder), repo_id=repository, commit_message="Upload a fewstep export"))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"--push-to-hub {repository}: {first_line(error)}; the export stays in {folder}") from None


if __name__ == "__main__":
    main()
