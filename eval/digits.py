"""Features of 8x8 digits from the embedded `eval.classifier.Classifier`, which replaces Inception for the embedded teacher.

"penultimate" are its features, "logits" the scores of the ten classes. ``recipes/classifier.py`` trains it.
"""

from __future__ import annotations

from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from eval.classifier import DIGITS, load


class FeatureExtractorDigits(FeatureExtractorBase):
    """Wrap the classifier in torch-fidelity's interface, where it is registered as "digits"."""

    def __init__(self, name: str, features_list: list[str], **kwargs):
        super().__init__(name, features_list)
        self.model = load(kwargs.get("feature_extractor_weights_path") or DIGITS)

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
