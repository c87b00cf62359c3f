"""Stored references that others made, or that a disk damaged: one line each, and no number from them."""

import io
import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from distill import files
from eval import npz_statistics, reference
from eval.features import Extractor

D = 4
COVARIANCE = np.diag([1.0, 2.0, 3.0, 4.0]) + 0.1


class Stub(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :D].float()


EXTRACTOR = Extractor("inception-v3-compat", Stub())


def npy(array) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asarray(array), allow_pickle=True)
    return out.getvalue()


def header(shape, descr="<f8", version=(1, 0)) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode() + b"\n"
    length = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + text


def archive(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, member in members.items():
            out.writestr(f"{name}.npy", member if isinstance(member, bytes) else npy(member))


def whole(path):
    archive(path, mu=np.zeros(D), sigma=COVARIANCE)
    return path.read_bytes()


def flipped(data):
    at = data.index(b"sigma.npy") + 50  # in its compressed values
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch ran",)


def changed(position, value, base=COVARIANCE):
    out = base.copy()
    out[position] = value
    return out


SKEWED, NEGATIVE = changed((0, 1), 0.5), np.diag([1.0, 1.0, 1.0, -0.5])
FILES = {  # name -> (how it is written, what the error names)
    "nan in mu": (lambda p: archive(p, mu=changed(1, np.nan, np.zeros(D)), sigma=COVARIANCE), "1 values of mu are not finite"),
    "inf in sigma": (lambda p: archive(p, mu=np.zeros(D), sigma=changed((2, 2), np.inf)), "1 values of sigma are not finite"),
    "not symmetric": (lambda p: archive(p, mu=np.zeros(D), sigma=SKEWED), "sigma is not symmetric (by 0.4)"),
    "one negative": (lambda p: archive(p, mu=np.zeros(D), sigma=NEGATIVE), "sigma has negative eigenvalues"),
    "all negative": (lambda p: archive(p, mu=np.zeros(D), sigma=-COVARIANCE), "sigma has negative eigenvalues"),
    "torn": (lambda p: p.write_bytes(whole(p)[:-60]), "not a zip file"),
    "flipped": (lambda p: p.write_bytes(flipped(whole(p))), "not a whole .npz with mu"),
    "other bytes": (lambda p: archive(p, mu=b"\x93NUMPY\x01\x00" + 20 * b"?", sigma=COVARIANCE), "not a whole .npz with mu"),
    "a short header": (lambda p: archive(p, mu=b"\x93NUMPY\x01\x00\xff\xff{", sigma=COVARIANCE), "not a whole .npz with mu"),
    "nested header": (lambda p: archive(p, mu=header("(" * 5000), sigma=COVARIANCE), "not a whole .npz with mu"),
    "later version": (lambda p: archive(p, mu=header((D,), version=(3, 0)), sigma=COVARIANCE), "version (3, 0)"),
    "empty file": (lambda p: p.write_bytes(b""), "it is empty"),
    "empty archive": (lambda p: archive(p), "mu is not a file in the archive"),
    "empty member": (lambda p: archive(p, mu=b"", sigma=COVARIANCE), "not a whole .npz with mu"),
    "an .npy": (lambda p: p.write_bytes(npy(COVARIANCE)), "not a zip file"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps(Bomb())), "not a zip file"),
    "objects": (lambda p: archive(p, mu=np.array([Bomb()] * D), sigma=COVARIANCE), "holds Python objects"),
    "a scalar": (lambda p: archive(p, mu=np.float64(0), sigma=COVARIANCE), "mu has shape ()"),
    "no features": (lambda p: archive(p, mu=np.zeros(0), sigma=np.zeros((0, 0))), "mu has shape (0,)"),
    "text": (lambda p: archive(p, mu=np.array(list("abcd")), sigma=COVARIANCE), "mu is <U1"),
    "complex": (lambda p: archive(p, mu=np.zeros(D), sigma=COVARIANCE.astype(complex)), "sigma complex128"),
    "short data": (lambda p: archive(p, mu=np.zeros(D), sigma=npy(COVARIANCE)[:-8]), "not a whole .npz with mu"),
    "long data": (lambda p: archive(p, mu=np.zeros(D), sigma=npy(COVARIANCE) + b"x"), "sigma.npy says float64 (4, 4)"),
    "a bomb": (lambda p: archive(p, mu=header((10**6,)), sigma=header((10**6, 10**6))), "and has 0 bytes"),
    "a bomb in 1-D": (lambda p: archive(p, mu=header((10**12,)), sigma=COVARIANCE), "and has 0 bytes"),
    "overflow": (lambda p: archive(p, mu=header((2**62,)), sigma=header((2**62, 2**62))), "and has 0 bytes"),
    "a folder": (lambda p: p.mkdir(), "it is a folder"),
    "a pipe": (lambda p: os.mkfifo(p), "it is a pipe"),
    "nothing": (lambda p: None, "there is no such file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_an_npz_that_is_no_covariance_is_refused_in_one_line_without_memory_or_code(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, message = FILES[kind]
    path = tmp_path / "given.npz"
    write(path)
    tracemalloc.start()
    with pytest.raises(ValueError) as raised:
        reference.load(path, EXTRACTOR)
    said, peak = str(raised.value), tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in said and said.startswith(str(path)) and "\n" not in said and len(said) - len(str(path)) < 250
    assert peak < 20e6 and not (tmp_path / "ran").exists()


def test_good_statistics_are_read_and_rounding_is_forgiven(tmp_path):
    few = np.random.default_rng(0).normal(size=(20, 64))  # fewer images than features: eigenvalues of 0, or a little less
    for sigma in (COVARIANCE, np.cov(few, rowvar=False), COVARIANCE + 1e-9 * np.triu(np.ones((D, D)))):
        archive(tmp_path / "good.npz", mu=np.zeros(len(sigma)), sigma=sigma)
        given, identity = reference.load(tmp_path / "good.npz", EXTRACTOR)
        assert np.array_equal(given.given["sigma"], sigma) and identity.images == 0
    second = tmp_path / "version2.npz"
    archive(second, mu=header((D,), version=(2, 0)) + np.zeros(D).tobytes(), sigma=COVARIANCE)
    assert np.array_equal(npz_statistics.read(second)["mu"], np.zeros(D))


def own(path, features=None, **identity):
    known = {"features": "inception-v3-compat", "features_sha256": "", "data": "d", "images": 6, "data_sha256": ""} | identity
    tensors = {"features": torch.randn(6, D) if features is None else features}
    files.save(path, tensors, {"reference": {k: v for k, v in known.items() if v is not None}})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"features": torch.full((6, D), torch.nan)}, "the features of 6 images are not finite"),
        ({"features": torch.eye(6)[:, :D] / 0}, "the features of 6 images are not finite"),
        ({"features": torch.zeros(6)}, "features have shape (6,), accepted is [N, D]"),
        ({"features": torch.zeros(1, D), "images": 1}, "features have shape (1, 4), accepted is [N, D]"),
        ({"images": 7}, "it holds the features of 6 images, its identity says 7"),
        ({"data_sha256": None}, "its identity does not have the entries features, features_sha256, data, images"),
        ({"surprise": 1}, "its identity does not have the entries features"),
        ({"features_sha256": 7}, "features_sha256 of its identity is a int"),
        ({"images": 6.0}, "images of its identity is a float"),
    ],
)
def test_a_reference_of_ours_with_unfit_features_or_identity_is_refused_in_one_line(changes, message, tmp_path):
    own(tmp_path / "own.safetensors", **changes)
    with pytest.raises(ValueError) as raised:
        reference.load(tmp_path / "own.safetensors", EXTRACTOR)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_reference_without_features_or_with_an_identity_of_another_type_is_refused_in_one_line(tmp_path):
    path = tmp_path / "own.safetensors"
    for tensors, identity, message in (
        ({"x": torch.zeros(2)}, {}, "have shape (0,)"),
        ({"features": torch.zeros(6, D)}, [1], "entries"),
    ):
        files.save(path, tensors, {"reference": identity})
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            reference.load(path, EXTRACTOR)


def test_a_torn_reference_of_a_run_is_named_and_computed_again_and_another_one_is_refused(tmp_path, capsys):
    images = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)
    path, extractor, accelerator = tmp_path / "reference.safetensors", Extractor("stub", Stub()), Accelerator(cpu=True)
    made, identity = reference.of_images(images, "d", extractor, 16, accelerator, path)
    good = path.read_bytes()
    for damaged in (good[:-9], b"", good[:4] + b"\xff" + good[5:]):
        path.write_bytes(damaged)
        again, same = reference.of_images(images, "d", extractor, 16, accelerator, path)
        said = capsys.readouterr().err.strip()
        assert torch.equal(again.features, made.features) and same == identity
        assert said.startswith(str(path)) and said.endswith("the reference is computed again") and "\n" not in said
        assert reference.load(path, extractor)[1] == identity
    with pytest.raises(ValueError, match="has images 30, here it is 29"):
        reference.of_images(images[:29], "d", extractor, 16, accelerator, path)
