"""Features of grey images from a small classifier of theirs, where Inception's are of no use. ``recipes/classifier.py`` trains it.

The features are the last hidden layer. It has mean 0 and standard deviation 1 over the real images, so that every unit has the
same weight in a Frechet distance. The logits are the scores of the classes. A file of such a classifier describes its shape.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn, ones, zeros

from distill import files

DIGITS = Path(__file__).parent / "digits.safetensors"  # the embedded one
FEATURES, SMALLEST = 64, 4  # units of the hidden layer; convolutions halve the sides until none is longer than this
SIDES, CLASSES = range(8, 257), range(2, 10_001)  # accepted heights and widths, and numbers of classes


class Classifier(nn.Module):
    """Evaluate uint8 images [B, C, H, W] -> (features [B, 64], logits [B, classes]). The mean of the channels is taken.

    ``size``: (H, W). Raises ValueError for sides or numbers of classes that are not accepted.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: tuple[int, int] = (8, 8), classes: int = 10):
        super().__init__()
        if any(side not in SIDES for side in size):
            raise ValueError(f"a classifier of {size[0]}x{size[1]} images: accepted are sides from {SIDES[0]} to {SIDES[-1]}")
        if classes not in CLASSES:
            raise ValueError(f"a classifier of {classes} classes: accepted are {CLASSES[0]} to {CLASSES[-1]:,}")
        height, width = (-(-side // 2) for side in size)
        layers = [
            nn.Conv2d(1, 32, 3, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.GELU(),
        ]  # fmt: skip
        while max(height, width) > SMALLEST:
            layers += [nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.GELU()]
            height, width = -(-height // 2), -(-width // 2)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * height * width, FEATURES))
        self.head = nn.Sequential(nn.GELU(), nn.Dropout(0.3), nn.Linear(FEATURES, classes))
        self.register_buffer("mean", zeros(FEATURES))
        self.register_buffer("std", ones(FEATURES))

    def hidden(self, images: Tensor) -> Tensor:
        return self.body(images.float().mean(1, keepdim=True) / 127.5 - 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(images)
        return (hidden - self.mean) / self.std, self.head(hidden)


def load(path: Path | str = DIGITS) -> Classifier:
    """Load a classifier, frozen and in evaluation mode. Raises ValueError for any other file.

    A file that names neither size nor classes is of 8x8 digits.
    """
    tensors, description = files.load(path)
    record = description.get("classifier")
    size, classes = (record.get("size", [8, 8]), record.get("classes", 10)) if isinstance(record, dict) else ([], 0)
    if not (isinstance(size, list) and len(size) == 2 and all(type(number) is int for number in (*size, classes))):
        raise ValueError(f"{path}: holds no classifier; accepted is a file that recipes/classifier.py wrote")
    try:
        model = Classifier((size[0], size[1]), classes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    files.load_weights(model, tensors, str(path))
    return model.eval().requires_grad_(False)
