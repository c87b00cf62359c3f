"""Features of 8x8 digits from a small classifier, which replaces Inception for the embedded teacher.

"penultimate" is the last hidden layer. It has mean 0 and standard deviation 1 over the real images, so that every unit has the
same weight in a Frechet distance. "logits" are the scores of the ten classes. ``recipes/classifier.py`` trains it.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn, ones, zeros
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from distill import files

WEIGHTS = Path(__file__).parent / "digits.safetensors"


class DigitsClassifier(nn.Module):
    """Evaluate uint8 images [B, C, 8, 8] -> (penultimate [B, 64], logits [B, 10]). Digits are grey: channels are averaged."""

    mean: Tensor
    std: Tensor

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(64 * 16, 64),
        )  # fmt: skip
        self.head = nn.Sequential(nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 10))
        self.register_buffer("mean", zeros(64))
        self.register_buffer("std", ones(64))

    def hidden(self, images: Tensor) -> Tensor:
        return self.body(images.float().mean(1, keepdim=True) / 127.5 - 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(images)
        return (hidden - self.mean) / self.std, self.head(hidden)


def load(path: Path | str = WEIGHTS) -> DigitsClassifier:
    """Load the classifier, frozen and in evaluation mode. Raises ValueError for a file of other weights."""
    model = DigitsClassifier()
    tensors, _ = files.load(path)
    files.load_weights(model, tensors, str(path))
    return model.eval().requires_grad_(False)


class FeatureExtractorDigits(FeatureExtractorBase):
    """Wrap the classifier in torch-fidelity's interface, where it is registered as "digits"."""

    def __init__(self, name: str, features_list: list[str], **kwargs):
        super().__init__(name, features_list)
        self.model = load(kwargs.get("feature_extractor_weights_path") or WEIGHTS)

    @staticmethod
    def get_provided_features_list():
        return ("penultimate", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "penultimate"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = dict(zip(self.get_provided_features_list(), self.model(images), strict=True))
        return tuple(features[name] for name in self.features_list)
