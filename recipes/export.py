"""A model as self-describing safetensors and as a diffusers pipeline of stock classes, proven to give the same pixels.

python recipes/export.py --model runs/progressive-digits/stages/4 --output-dir exports/digits-4
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import teachers
from recipes.common import fail, flag, one_line_errors, parse
from teachers import export

PRESETS: dict[str, dict] = {"default": {}, "smoke": {}}  # nothing here takes long


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default or smoke, which is the same here", choices=PRESETS)
    model: str = flag("digits", "what is exported: " + teachers.ACCEPTED)
    output_dir: str = flag("runs/export", "a new directory")


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        folder = Path(config.output_dir)
        if folder.exists():
            fail(f"{folder} exists: name another --output-dir")
        model = teachers.load(config.model)
        export.check_exportable(model)
    teachers.save(folder / "student.safetensors", model)
    for name, worst in export.deliver(model, folder).items():
        print(f"{folder / name}: same pixels through diffusers alone (largest difference {worst:.1g})")


if __name__ == "__main__":
    main()
