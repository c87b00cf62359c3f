"""A model to give away: self-describing safetensors, diffusers pipelines of stock classes proven to give the same pixels, a card.

    python recipes/export.py --model runs/progressive-digits/stages/4 --output-dir exports/digits-4
    python recipes/export.py --model runs/progressive-digits --variants fp16 --onnx --torch-export --push-to-hub me/digits-1

Everything is made and compared in a folder aside, which gets its name at the end.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import teachers
from distill.checkpoint import write_text
from eval.generate import generate, start, to_uint8
from eval.sheet import contact_sheet
from recipes.common import fail, flag, one_line_errors, parse
from teachers import Teacher, export, portable
from teachers.card import card, measured

PRESETS: dict[str, dict] = {"default": {}, "smoke": {}}  # nothing here takes long


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default or smoke, which is the same here", choices=PRESETS)
    model: str = flag("digits", "what is exported: " + teachers.ACCEPTED.replace("%", "%%"))
    output_dir: str = flag("runs/export", "a new directory")
    variants: tuple[str, ...] = flag(
        (), "also weights in half precision, as variants of each pipeline", choices=export.VARIANTS
    )
    torch_export: bool = flag(False, "also the one step of a student as a torch.export program, one-step.pt2")
    onnx: bool = flag(False, "also the one step of a student as ONNX, one-step.onnx, compared in onnxruntime")
    license: str = flag("other", "the licence named in the model card, as the hub spells it")
    push_to_hub: str | None = flag(None, "owner/name of a model repository that everything is uploaded to")
    private: bool = flag(False, "a new repository on the hub is private")


def picture(model: Teacher, path: Path) -> str | None:
    """Fifty samples of the fewest steps, where they are pictures."""
    if len(model.image_shape) != 3 or model.image_shape[0] not in (1, 3):
        return None
    steps = min(model.sampler.get("steps", [64]))
    begin = start(range(50), model.shape, model.classes, 0)
    if model.classes is not None:
        begin.labels = torch.arange(50) % model.classes
    name = model.sampler.get("name", "ddim")
    x0 = generate(model.denoiser, name, model.times(steps), begin, model.condition, torch.device("cpu"))
    contact_sheet(to_uint8(model.decode(x0)), path, 10)
    return path.name


def push(folder: Path, repository: str, private: bool) -> str:
    """The address of what was uploaded. ValueError in one line where the hub cannot be reached or refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=str(folder), repo_id=repository, commit_message="Upload a fewstep export"))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"--push-to-hub {repository}: {line}; the export stays in {folder}") from None


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        folder = Path(config.output_dir)
        if folder.exists():
            fail(f"{folder} exists: name another --output-dir")
        model = teachers.load(config.model)
        export.check_exportable(model)
        if config.torch_export or config.onnx:
            portable.check_portable(model, config.onnx)
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            make(config, model, aside)
            aside.chmod(0o755)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        print(f"export: {folder}")
        if config.push_to_hub:
            print(f"hub: {push(folder, config.push_to_hub, config.private)}")


def make(config: Config, model: Teacher, folder: Path) -> None:
    delivered = export.deliver(model, folder)
    kept = model
    if model.codec is not None:  # the autoencoder is given away with it
        source = model.codec.source | {"folder": f"./{next(iter(delivered))}"}
        kept = replace(model, codec=replace(model.codec, source=source))
    teachers.save(folder / "student.safetensors", kept)
    for name, worst in delivered.items():
        print(f"{name}: same pixels through diffusers alone (largest difference {worst:.1g})")
        for variant in config.variants:
            print(f"{name}, {variant}: largest difference {export.add_variant(model, folder / name, variant):.1g}")
    if config.torch_export:
        print(f"one-step.pt2: largest difference {portable.torch_export(model, folder / 'one-step.pt2'):.1g}")
    if config.onnx:
        print(f"one-step.onnx: largest difference {portable.onnx(model, folder / 'one-step.onnx'):.1g}")
    shown = picture(model, folder / "samples.png")
    labels = None if model.classes is None else [i % model.classes for i in range(4)]
    call = export.form_of(model).call(model, labels, 4)
    text = card(model, list(delivered), call, measured(config.model, model.fingerprint), config.license, shown)
    write_text(folder / "README.md", text)


if __name__ == "__main__":
    main()
