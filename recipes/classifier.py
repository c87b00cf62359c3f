"""Trains the embedded feature extractor, a classifier of 8x8 digits whose hidden layer is what FID on digits is taken on.

    python recipes/classifier.py --output-dir runs/classifier              (20 s on two cores)

Prints the accuracy on a fifth of the images held out, then trains on all of them, standardises the hidden layer over
the data and writes the weights with this command in them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import trange

from distill import checkpoint
from eval.digits import DigitsClassifier
from recipes.common import fail, flag, one_line_errors, parse
from teachers.digits import digits

PRESETS: dict[str, dict] = {"default": {}, "smoke": {"epochs": 2}}


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default, or smoke (a few seconds, weights of no worth)", choices=PRESETS)
    output_dir: str = flag("runs/classifier", "where digits.safetensors goes; an existing file is not overwritten")
    epochs: int = flag(60, "passes over the data")
    batch_size: int = flag(64, "images a step")
    lr: float = flag(2e-3, "highest learning rate of the one-cycle schedule")
    seed: int = flag(0, "seed of everything")


def fit(images: Tensor, labels: Tensor, config: Config) -> DigitsClassifier:
    """Cross-entropy with smoothed labels, AdamW, on images with noise and, in a third of the batches, moved by up to a pixel."""
    torch.manual_seed(config.seed)
    model = DigitsClassifier().train()
    steps = config.epochs * len(images) // config.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, steps)
    for step in trange(steps, desc="classifier", unit="step", disable=None):
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
    return (model(images)[1].argmax(1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        output = Path(config.output_dir) / "digits.safetensors"
        if output.exists():
            fail(f"{output} exists: name another --output-dir, or move it away")
        images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    held_out, rest = order[: len(images) // 5], order[len(images) // 5 :]
    score = accuracy(fit(images[rest], labels[rest], config), images[held_out], labels[held_out])
    print(f"accuracy on {len(held_out)} images held out: {score:.4f}")
    model = fit(images, labels, config)
    with torch.no_grad():
        hidden = model.hidden(images)
    model.mean.copy_(hidden.mean(0))
    model.std.copy_(hidden.std(0))
    settings = {k: v for k, v in asdict(config).items() if k not in ("output_dir", "preset")}
    record = {"command": "python recipes/classifier.py", "config": settings, "held_out_accuracy": score}
    checkpoint.save(output, model.state_dict(), {"classifier": record})
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
