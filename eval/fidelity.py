"""torch-fidelity's metrics of feature tensors and its extractors. No other file imports torch-fidelity's functions.

Some of these functions are not public there. tests/test_fidelity.py tests what this file relies on.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from eval.digits import FeatureExtractorDigits
from eval.kid import MOST, kid_of_subsets
from teachers.weights import state_dict

METRICS = ("fid", "kid", "isc", "prc")
_TENSORS_ALONE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # read by torch.load at every call

if "digits" not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor("digits", FeatureExtractorDigits)


def extractor_names() -> tuple[str, ...]:
    """Return the names of all registered extractors."""
    return tuple(FEATURE_EXTRACTORS_REGISTRY)


def layers(name: str) -> dict[str, str]:
    """Return the extractor's default layer for each metric: {"fid": ..., "kid": ..., "isc": ..., "prc": ...}."""
    cls = FEATURE_EXTRACTORS_REGISTRY[name]
    return {metric: cls.get_default_feature_layer_for_metric(metric) for metric in METRICS}


@contextmanager
def tensors_alone(name: str, weights: str | None) -> Iterator[str | None]:
    """Yield a file of the extractor's weights that torch-fidelity may unpickle, because it was written here from tensors alone.

    Meanwhile torch refuses every pickle that holds more than tensors, downloads included. CLIP's download is TorchScript, whose
    hash torch-fidelity checks. Raises ValueError for a file ``weights`` that is missing or holds more than tensors.
    """
    was = os.environ.get(_TENSORS_ALONE)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit, which torch-fidelity uses for CLIP
        path = weights
        if weights is not None and name != "digits":  # the loader of "digits" reads tensors alone
            path = str(Path(folder) / "weights.pt")
            tensors = state_dict(weights)
            if name.startswith("clip"):
                torch.jit.script(_tree(tensors)).save(path)
            else:
                torch.save(tensors, path)
        if not name.startswith("clip"):
            os.environ[_TENSORS_ALONE] = "1"
        try:
            yield path
        finally:
            os.environ.pop(_TENSORS_ALONE, None)
            if was is not None:
                os.environ[_TENSORS_ALONE] = was


def _tree(tensors: dict[str, Tensor]) -> nn.Module:
    """Return a module whose state dict is ``tensors``."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, tensor)
    return root


class Registered(nn.Module):
    """Evaluate an extractor that torch-fidelity creates, on the CPU: uint8 [B, 3, H, W] -> (FID features, logits or None)."""

    def __init__(self, name: str, weights: str | None):
        super().__init__()
        self.layers = layers(name)
        wanted = sorted(set(self.layers.values()))
        with tensors_alone(name, weights) as path:
            self.module = create_feature_extractor(name, wanted, cuda=False, verbose=False, feature_extractor_weights_path=path)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        out = self.module.convert_features_tuple_to_dict(self.module(images))
        logits = self.layers["isc"]
        return out[self.layers["fid"]], out.get(logits) if logits != self.layers["fid"] else None


def statistics(features: Tensor) -> dict[str, np.ndarray]:
    """Return mean "mu" [D] and covariance "sigma" [D, D] of float32 features [N, D]."""
    return fid_features_to_statistics(features)


def frechet(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
    """Return the Frechet distance of two `statistics`: the FID (1706.08500)."""
    return fid_statistics_to_metric(one, two, False)[KEY_METRIC_FID]


def kid(generated: Tensor, real: Tensor, subsets: int = 100) -> tuple[float, float]:
    """Return mean and standard deviation of the KID (1801.01401) over ``subsets`` random subsets of at most 1000 images."""
    size = min(1000, len(generated), len(real))
    if max(len(generated), len(real)) <= MOST:
        each = kid_of_subsets(generated, real, subsets, size)
        return float(each.mean()), float(each.std())
    out = kid_features_to_metric(generated, real, kid_subset_size=size, kid_subsets=subsets, verbose=False)
    return out[KEY_METRIC_KID_MEAN], out[KEY_METRIC_KID_STD]


def inception_score(logits: Tensor) -> float:
    """Return the inception score (1606.03498) of logits [N, C]."""
    return isc_features_to_metric(logits)[KEY_METRIC_ISC_MEAN]


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Return precision and recall (1904.06991)."""
    out = prc_features_to_metric(generated, real, save_cpu_ram=True, verbose=False)  # in blocks of the N x N distances
    return out[KEY_METRIC_PRECISION], out[KEY_METRIC_RECALL]


def calculate(generated: Path, real: Path, name: str, weights: str | None, batch_size: int, cuda: bool) -> dict[str, float]:
    """Return the metrics of `torch_fidelity.calculate_metrics` for two folders of PNG files, all with one extractor."""
    layer = layers(name)
    scored = layer["isc"] != layer["fid"]
    with tensors_alone(name, weights) as path:
        out = calculate_metrics(
            input1=str(generated), input2=str(real), cuda=cuda, batch_size=batch_size, feature_extractor=name,
            feature_extractor_weights_path=path, fid=True, kid=True, isc=scored, prc=True,
            feature_layer_prc=layer["fid"], feature_layer_kid=layer["fid"], verbose=False, cache=False,
            kid_subset_size=min(1000, *(len(list(folder.iterdir())) for folder in (generated, real))),
        )  # fmt: skip
    keys = {"fid": KEY_METRIC_FID, "kid": KEY_METRIC_KID_MEAN, "isc": KEY_METRIC_ISC_MEAN}
    keys |= {"precision": KEY_METRIC_PRECISION, "recall": KEY_METRIC_RECALL}
    return {metric: float(out[key]) for metric, key in keys.items() if key in out}


@contextmanager
def float32_exactly() -> Iterator[None]:
    """Turn autocast and TF32 off, so that features use float32 arithmetic on every device."""
    was = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = was
