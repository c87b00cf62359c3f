"""Train a feature extractor: a classifier of grey images. Its hidden layer holds the features of their FID.

    python recipes/classifier.py --output-dir runs/classifier                       the embedded one of 8x8 digits (20 s on two cores)
    python recipes/classifier.py --data images.npz --output-dir runs/features       that of a set of one's own

Prints the accuracy on a held-out fifth of the images. Then trains on all images, standardises the hidden layer over the data and
writes the weights. The file describes itself, and --features of every recipe accepts it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from recipes.common.accepted import LEARNING_RATE, SEED, THREADS, Checked
from recipes.common.cli import fail, flag, flags_first, machine_flag, model_flag, one_line_errors, parse, training_flag
from recipes.common.flags import TOPICS
from recipes.common.real_images import FASHION

PRESETS: dict[str, dict] = {
    "default": {},
    "smoke": {"epochs": 2},
    "fashion": FASHION | {"epochs": 8, "output_dir": "runs/fashion/features"},
}
BLOCK = 4096  # images evaluated at a time


@dataclass(frozen=True)
class Config(Checked):
    preset: str = flag("default", "smoke is a trial run of a few seconds; fashion: docs/real-images.md", choices=PRESETS)
    data: str = model_flag("digits", "grey images with labels (accepted: --help data)")
    output_dir: str = machine_flag(
        "runs/classifier",
        "directory of features.safetensors, or digits.safetensors; an existing file is not overwritten",
        path="folder",
    )
    epochs: int = training_flag(60, "passes over the data", at_least=1, at_most=10_000)
    batch_size: int = training_flag(64, "images per step", at_least=1, at_most=256)
    lr: float = training_flag(2e-3, "highest learning rate of the one-cycle schedule", **LEARNING_RATE)
    seed: int = machine_flag(0, "seed of all random numbers", **SEED)
    threads: int = machine_flag(0, "CPU threads; 0 takes those of torch", short=False, **THREADS)

    TOPICS: ClassVar = {"data": TOPICS["data"]}


flags_first(__name__, Config, __doc__, PRESETS)

import torch
from torch import Tensor, nn

from distill import files
from eval.classifier import Classifier
from eval.features import fingerprint
from eval.progress import progress
from recipes.data import sets
from recipes.data.sets import Data


def fit(images: Tensor, labels: Tensor, classes: int, config: Config) -> Classifier:
    """Train by cross-entropy with smoothed labels. Images get noise, and in a third of the batches a shift by up to one pixel."""
    torch.manual_seed(config.seed)
    model = Classifier((images.shape[2], images.shape[3]), classes).train()
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
def evaluated(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden layer [N, 64] and the most likely class [N] of each image."""
    hidden = torch.cat([model.hidden(part) for part in images.split(BLOCK)])
    return hidden, model.head(hidden).argmax(1)


def checked(data: Data, batch_size: int) -> tuple[Tensor, Tensor, int]:
    """Return images, labels and number of classes. Raises ValueError unless all images are there, grey, labelled and enough."""
    images = data.require_pixels()
    if data.stream is not None or images.shape[1] != 1:
        what = "is a stream" if data.stream is not None else f"has images of {images.shape[1]} channels"
        raise ValueError(f"{data.name} {what}; accepted are whole sets of grey images, and colour ones with the option ,grey")
    if data.labels is None or data.classes is None:
        raise ValueError(f"{data.name} has no labels; accepted are sets with labels, which a classifier learns")
    if len(images) * 4 // 5 < batch_size:
        raise ValueError(
            f"{data.name} has {len(images)} images, and a fifth is held out: accepted are --batch-size {batch_size} in the rest"
        )
    return images, data.labels, data.classes


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        output = Path(config.output_dir) / f"{'digits' if config.data == 'digits' else 'features'}.safetensors"
        if output.exists():
            fail(f"{output} exists: name another --output-dir")
        data = sets.load(config.data)
        images, labels, classes = checked(data, config.batch_size)
        Classifier((images.shape[2], images.shape[3]), classes)  # raises where it cannot be made
        torch.set_num_threads(config.threads or torch.get_num_threads())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    held_out, rest = order[: len(images) // 5], order[len(images) // 5 :]
    trained = fit(images[rest], labels[rest], classes, config)
    score = (evaluated(trained, images[held_out])[1] == labels[held_out]).float().mean().item()
    print(f"accuracy on {len(held_out)} held-out images: {score:.4f}")
    model = fit(images, labels, classes, config)
    hidden, _ = evaluated(model, images)
    model.mean.copy_(hidden.mean(0))
    model.std.copy_(hidden.std(0))
    settings = {k: v for k, v in asdict(config).items() if k not in ("output_dir", "preset", "threads")}
    record: dict = {"command": "python recipes/classifier.py", "config": settings, "held_out_accuracy": score}
    record |= {"of": data.name, "images_sha256": fingerprint(images), "size": list(images.shape[2:]), "classes": classes}
    files.save(output, model.state_dict(), {"classifier": record})
    print(f"wrote {output}: --features {output}" if config.data != "digits" else f"wrote {output}")


if __name__ == "__main__":
    main()
