"""Feature extraction by the bare extractor, the FID at 2,048 features, and both beside torch-fidelity and torchmetrics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.networks import Network
from benchmarks.turns import Clock, Figure, Ratio, Row, in_turn, seconds_of
from eval import fidelity
from eval.features import Extractor
from eval.metrics import Moments, Reference, fid_of, fid_with_interval
from eval.reference import extract

CHUNK = 256
FEATURES, IMAGES = 2_048, 5_000  # of the FID arithmetic: Inception's dimension, and fewer images than are usual


def rows(
    title: str, network: Network, turns: int, clock: Clock, device: torch.device, dimension: int = FEATURES
) -> Iterator[Row]:
    yield extraction(title, network, turns, clock, device)
    yield from arithmetic(clock, dimension)
    yield from peers(turns, clock, device)


def extraction(title: str, network: Network, turns: int, clock: Clock, device: torch.device) -> Ratio:
    """Return the seconds of the sweep's extraction by those of the bare extractor on the same batches."""
    extractor, accelerator = Extractor.create("digits").to(device), Accelerator(cpu=device.type == "cpu")
    images = torch.randint(0, 256, (16 * CHUNK, *network.model.image_shape), dtype=torch.uint8)

    def bare() -> None:
        with torch.inference_mode():
            for part in images.split(CHUNK):
                extractor.module(part.to(device).expand(-1, 3, -1, -1))

    return in_turn(f"{title} extraction", lambda: extract(images, extractor, CHUNK, accelerator), bare, turns, clock, 1.03)


def arithmetic(clock: Clock, dimension: int) -> Iterator[Figure]:
    """Yield the seconds on one core of an FID with its interval, from features to numbers, and its difference from torch-fidelity."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1, dimension + 1) ** -0.5  # a spectrum that falls, as that of Inception's features does
    real, made = (scales * torch.randn(IMAGES, dimension, generator=generator) for _ in range(2))
    threads = torch.get_num_threads()
    found: dict[str, float] = {}
    torch.set_num_threads(1)
    with threadpool_limits(1):
        reference = Reference(real)
        seconds = seconds_of(lambda: found.update(ours=fid_of(Moments.of(made, reference), reference)["fid"]), clock)
        theirs = (fidelity.statistics(made), fidelity.statistics(real))
        alone = seconds_of(lambda: found.update(theirs=fidelity.frechet(*theirs)), clock)
    torch.set_num_threads(threads)
    what = f"FID with interval at {dimension:,} features"
    yield Figure(what, seconds, "s on one core", "<= 20 at 2,048 features")
    yield Figure(f"torch-fidelity's FID alone at {dimension:,} features", alone, "s on one core")
    yield Figure(f"{what}, difference from torch-fidelity", abs(found["ours"] / found["theirs"] - 1), "of it", "<= 1e-6")


class Images(Dataset):
    """Hold uint8 images [N, 3, H, W], as torch-fidelity accepts them."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def peers(turns: int, clock: Clock, device: torch.device, images: int = 4_096) -> Iterator[Row]:
    """Yield extraction and FID with interval by extraction and FID of the peers, on the features of the digits."""
    generator = torch.Generator().manual_seed(0)
    real, made = (torch.randint(0, high, (images, 3, 8, 8), dtype=torch.uint8, generator=generator) for high in (256, 200))
    extractor, accelerator = Extractor.create("digits").to(device), Accelerator(cpu=device.type == "cpu")

    def ours() -> float:
        return fid_with_interval(
            extract(made, extractor, CHUNK, accelerator), Reference(extract(real, extractor, CHUNK, accelerator))
        )["fid"]

    def torch_fidelity() -> float:
        from torch_fidelity import calculate_metrics

        found = calculate_metrics(
            input1=Images(made), input2=Images(real), fid=True, feature_extractor="digits", batch_size=CHUNK, cache=False,
            cuda=device.type == "cuda", verbose=False,
        )  # fmt: skip
        return found["frechet_inception_distance"]

    def torchmetrics() -> float:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=FidFeatures(extractor), normalize=False).to(device)
        for images, are_real in ((real, True), (made, False)):
            for part in images.split(CHUNK):
                metric.update(part.to(device), real=are_real)
        return float(metric.compute())

    for peer in (torch_fidelity, torchmetrics):
        name = f"extraction and FID by {peer.__name__.replace('_', '-')}"
        try:
            theirs = peer()
        except ImportError:
            yield Figure(name, None, "not installed")
            continue
        yield in_turn(name, ours, peer, turns, clock, 1.0, abs(ours() / theirs - 1))


class FidFeatures(torch.nn.Module):
    """Return the features of FID alone, as torchmetrics wants them."""

    def __init__(self, extractor: Extractor):
        super().__init__()
        self.module, self.num_features = extractor.module, 64

    def forward(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.module(images)[0]
