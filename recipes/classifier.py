"""Train the embedded feature extractor: a classifier of 8x8 digits. Its hidden layer holds the features of FID on digits.

    python recipes/classifier.py --output-dir runs/classifier              (20 s on two cores)

Prints the accuracy on a held-out fifth of the images. Then trains on all images, standardises the hidden layer over the data and
writes the weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from recipes.common.accepted import LEARNING_RATE, SEED, Checked
from recipes.common.cli import fail, flag, flags_first, machine_flag, one_line_errors, parse, training_flag

PRESETS: dict[str, dict] = {"default": {}, "smoke": {"epochs": 2}}


@dataclass(frozen=True)
class Config(Checked):
    preset: str = flag("default", "smoke is a trial run of a few seconds", choices=PRESETS)
    output_dir: str = machine_flag(
        "runs/classifier", "directory of digits.safetensors; an existing file is not overwritten", path="folder"
    )
    epochs: int = training_flag(60, "passes over the data", at_least=1, at_most=10_000)
    batch_size: int = training_flag(64, "images per step", at_least=1, at_most=256)
    lr: float = training_flag(2e-3, "highest learning rate of the one-cycle schedule", **LEARNING_RATE)
    seed: int = machine_flag(0, "seed of all random numbers", **SEED)


flags_first(__name__, Config, __doc__, PRESETS)

import torch
from torch import Tensor, nn

from distill import files
from eval.digits import DigitsClassifier
from eval.progress import progress
from teachers.digits import digits


def fit(images: Tensor, labels: Tensor, config: Config) -> DigitsClassifier:
    """Train by cross-entropy with smoothed labels. Images get noise, and in a third of the batches a shift by up to one pixel."""
    torch.manual_seed(config.seed)
    model = DigitsClassifier().train()
    steps = config.epochs * len(images) // config.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, steps)
    for step in progress(range(steps), desc="classifier", unit="step"):
        index = torch.randint(len(images), (config.batch_size,))
        x = images[index].float()
        x = x + 20 * torch.rand(len(x), 1, 1, 1) * torch.randn(x.shape)
        if step % 3 == 0:
            x = torch.roll(x, tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
        loss = nn.functional.cross_entropy(model.head(model.hidden(x)), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: DigitsClassifier, images: Tensor, labels: Tensor) -> float:
    """Return the part of the images whose class is right."""
    return (model(images)[1].argmax(1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        output = Path(config.output_dir) / "digits.safetensors"
        if output.exists():
            fail(f"{output} exists: name another --output-dir")
        images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    held_out, rest = order[: len(images) // 5], order[len(images) // 5 :]
    score = accuracy(fit(images[rest], labels[rest], config), images[held_out], labels[held_out])
    print(f"accuracy on {len(held_out)} held-out images: {score:.4f}")
    model = fit(images, labels, config)
    with torch.no_grad():
        hidden = model.hidden(images)
    model.mean.copy_(hidden.mean(0))
    model.std.copy_(hidden.std(0))
    settings = {k: v for k, v in asdict(config).items() if k not in ("output_dir", "preset")}
    record = {"command": "python recipes/classifier.py", "config": settings, "held_out_accuracy": score}
    files.save(output, model.state_dict(), {"classifier": record})
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
