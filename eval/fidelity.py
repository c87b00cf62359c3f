"""The one place where torch-fidelity's functions are imported: metrics of feature tensors, extractors by name.

Several are semi-private there; tests/test_fidelity.py holds the contract this file relies on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from eval.digits import FeatureExtractorDigits

METRICS = ("fid", "kid", "isc", "prc")

if "digits" not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor("digits", FeatureExtractorDigits)


def extractor_names() -> tuple[str, ...]:
    return tuple(FEATURE_EXTRACTORS_REGISTRY)


def layers(name: str) -> dict[str, str]:
    """The layer of an extractor that each metric takes by default: {"fid": ..., "kid": ..., "isc": ..., "prc": ...}."""
    cls = FEATURE_EXTRACTORS_REGISTRY[name]
    return {metric: cls.get_default_feature_layer_for_metric(metric) for metric in METRICS}


def create(name: str, weights: str | None):
    """The extractor as torch-fidelity itself would create it, on the CPU."""
    wanted = sorted(set(layers(name).values()))
    return create_feature_extractor(name, wanted, cuda=False, verbose=False, feature_extractor_weights_path=weights)


def statistics(features: Tensor) -> dict[str, np.ndarray]:
    """{"mu", "sigma"} of float32 features [N, D]."""
    return fid_features_to_statistics(features)


def frechet(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
    return fid_statistics_to_metric(one, two, False)[KEY_METRIC_FID]


def kid(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Mean and spread over 100 subsets of at most 1000 images."""
    size = min(1000, len(generated), len(real))
    out = kid_features_to_metric(generated, real, kid_subset_size=size, verbose=False)
    return out[KEY_METRIC_KID_MEAN], out[KEY_METRIC_KID_STD]


def inception_score(logits: Tensor) -> float:
    return isc_features_to_metric(logits)[KEY_METRIC_ISC_MEAN]


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    out = prc_features_to_metric(generated, real, save_cpu_ram=True, verbose=False)  # never N x N distances at once
    return out[KEY_METRIC_PRECISION], out[KEY_METRIC_RECALL]


@contextmanager
def float32_exactly() -> Iterator[None]:
    """Autocast and TF32 off: features are float32 arithmetic on every device."""
    was = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = was
