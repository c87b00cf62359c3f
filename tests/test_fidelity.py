"""What eval/fidelity.py relies on in torch-fidelity, on features with known results."""

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import refuses
from torch.utils.data import Dataset

from eval import digits, fidelity
from eval.features import Extractor
from teachers.digits import digits as digit_images


def test_frechet_is_zero_on_itself_and_closed_form_between_axis_aligned_gaussians():
    mean = np.array([1.0, 2.0]), np.array([0.0, 2.5])
    variance = np.diag([4.0, 1.0]), np.diag([1.0, 9.0])
    one, two = ({"mu": m, "sigma": v} for m, v in zip(mean, variance))
    assert fidelity.frechet(one, one) == pytest.approx(0, abs=1e-12)
    expected = 1.25 + (2 - 1) ** 2 + (1 - 3) ** 2  # |mean difference|^2 + sum (std difference)^2
    assert fidelity.frechet(one, two) == pytest.approx(expected)


def test_statistics_are_mean_and_unbiased_covariance():
    features = torch.randn(50, 3)
    out = fidelity.statistics(features)
    assert np.allclose(out["mu"], features.mean(0)) and np.allclose(out["sigma"], torch.cov(features.T))


def test_precision_is_of_the_generated_and_recall_of_the_real():
    real = torch.randn(500, 2)
    narrow = 0.05 * torch.randn(500, 2)  # within the real images, but without most of them
    precision, recall = fidelity.precision_recall(narrow, real)
    assert precision > 0.95 and recall < 0.1


def test_kid_is_the_unbiased_polynomial_mmd():
    x, y = torch.randn(40, 4).double(), torch.randn(40, 4).double() + 0.5
    k = lambda a, b: (a @ b.T / 4 + 1) ** 3  # noqa: E731
    within = sum((k(z, z).sum() - k(z, z).diagonal().sum()) / (40 * 39) for z in (x, y))
    mean, _ = fidelity.kid(x, y)
    assert mean == pytest.approx(float(within - 2 * k(x, y).mean()), rel=1e-9)


def test_inception_score_of_certain_and_of_indifferent_classes():
    certain = 100 * torch.eye(10).repeat(100, 1)  # ten splits of 100 images each, with not quite equal classes
    assert fidelity.inception_score(certain) == pytest.approx(10, rel=0.06)
    assert fidelity.inception_score(torch.zeros(1000, 10)) == pytest.approx(1)


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i].expand(3, -1, -1)


@pytest.mark.slow
def test_the_registered_extractor_gives_calculate_metrics_our_numbers():
    images, _ = digit_images()
    one, two = images[:1100], images[700:]
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(one), input2=Images(two), cuda=False, feature_extractor="digits", fid=True, kid=True, isc=True, prc=True,
        kid_subset_size=1000, verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip
    extractor = Extractor.create("digits")
    a, b = (torch.cat([extractor(part).fid for part in z.split(64)]) for z in (one, two))
    logits = torch.cat([extractor(part).logits for part in one.split(64)])
    assert fidelity.frechet(fidelity.statistics(a), fidelity.statistics(b)) == theirs["frechet_inception_distance"]
    assert fidelity.kid(a, b)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-7)  # of float32 sums
    assert fidelity.inception_score(logits) == theirs["inception_score_mean"]


def test_the_embedded_classifier_recognises_its_digits_and_its_features_are_standardised():
    images, labels = digit_images()
    features, logits = digits.load()(images)
    assert (logits.argmax(1) == labels).float().mean() > 0.99
    assert features.mean(0).abs().max() < 1e-4 and (features.std(0) - 1).abs().max() < 1e-4


class Own(torch.nn.Module):
    """Mean and standard deviation of each colour: features without logits."""

    def forward(self, images):
        x = images.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], 1)


class Wrong(torch.nn.Module):
    def forward(self, images):
        return images.float()


def test_an_extractor_of_ones_own_comes_by_import_path_and_as_torchscript(tmp_path):
    images = digit_images()[0][:20]
    by_path = Extractor.create("test_fidelity:Own")
    expected = Own()(images.expand(-1, 3, -1, -1))
    assert torch.equal(by_path(images).fid, expected) and by_path(images).logits is None and not by_path.registered
    torch.jit.script(Own()).save(str(tmp_path / "own.pt"))
    assert torch.allclose(Extractor.create(str(tmp_path / "own.pt"))(images).fid, expected)


def test_an_extractor_with_an_output_of_another_shape_is_refused():
    message, wrong = "gave [(20, 3, 8, 8)] for 20 images: accepted are clip:FOLDER", Extractor.create("test_fidelity:Wrong")
    refuses(message, wrong, digit_images()[0][:20])


@pytest.mark.parametrize(
    "name, weights, message",
    [
        ("incption", None, "unknown features 'incption': accepted are ... inception-v3-compat ... digits"),
        ("nowhere:Own", None, "No module named 'nowhere'"),
        ("other.pth.pt", None, "not a TorchScript file"),
        ("inception-v3-compat", "nowhere.pth", "no such file"),
        ("inception-v3-compat", "module.pth", "would run code from it, which is refused"),
        ("inception-v3-compat", "other.pth", "these are not the weights of 'inception-v3-compat'"),
    ],
)
def test_unknown_extractors_and_unfit_weights_are_refused(tmp_path, monkeypatch, name, weights, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Own()}, "module.pth")
    for path in ("other.pth", "other.pth.pt"):
        torch.save({"w": torch.zeros(2)}, path)
    refuses(message, Extractor.create, name, weights)


def test_without_a_network_the_message_names_the_flag(monkeypatch):
    from urllib.error import URLError

    import torch_fidelity.feature_extractor_inceptionv3 as inception

    def offline(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(inception, "load_state_dict_from_url", offline)
    message = "no download (Name or service not known): give a file with --features-weights"
    refuses(message, Extractor.create, "inception-v3-compat")


def test_an_extractor_that_would_fetch_and_run_code_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    refuses("would fetch their code from github", Extractor.create, "dinov2-vit-s-14")
