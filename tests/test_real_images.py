"""Sets of real images: idx files, and the pixels of a whole set made grey, padded and averaged."""

import gzip
import struct

import numpy as np
import pytest
import torch
from conftest import refuses
from PIL import Image

from recipes.data import sets
from recipes.data.pixels import boxed, grey, padded

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
LABELS = np.arange(7, dtype=np.uint8) % 3


def idx(array):
    """An array of bytes as an idx file."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder, images=IMAGES, labels=LABELS, packed=True):
    folder.mkdir(parents=True)
    for stem, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        path = folder / (stem + ".gz" * packed)
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inside", ["", "FashionMNIST/raw"])
def test_idx_files_are_read_without_torchvision_plain_or_packed_and_where_torchvision_puts_them(
    tmp_path, monkeypatch, packed, inside
):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    write(tmp_path / "set" / inside, packed=packed)
    found = sets.load(f"fashionmnist:{tmp_path / 'set'}")
    assert found.images.dtype == torch.uint8 and found.classes == 3
    assert np.array_equal(found.images[:, 0].numpy(), IMAGES) and found.labels.tolist() == LABELS.tolist()


def test_idx_files_are_those_that_torchvision_reads(tmp_path):
    from torchvision.datasets.mnist import read_image_file, read_label_file

    folder = write(tmp_path / "set", packed=False)
    found = sets.load(f"mnist:{folder}")
    assert torch.equal(found.images[:, 0], read_image_file(str(folder / "train-images-idx3-ubyte")))
    assert torch.equal(found.labels, read_label_file(str(folder / "train-labels-idx1-ubyte")))


IMAGE_FILE = idx(IMAGES)
DAMAGED = {
    "half of it": (IMAGE_FILE[:4000], "says (7, 28, 28), which is 5,488 bytes, and holds more, fewer or too many"),
    "more than it says": (IMAGE_FILE + b"x", "says (7, 28, 28), which is 5,488 bytes, and holds more, fewer or too many"),
    "a huge claim": (struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 2), "and holds more, fewer or too many"),
    "integers": (struct.pack(">HBB3I", 0, 12, 3, 7, 28, 28) + b"0" * 21952, "not an idx file"),
    "labels": (idx(np.zeros(100, np.uint8)), "not an idx file; accepted is an idx file of unsigned bytes in 3 dimensions"),
    "a few bytes": (IMAGE_FILE[:9], "not an idx file"),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_is_not_a_whole_idx_file_is_refused(tmp_path, name, packed):
    content, message = DAMAGED[name]
    path = write(tmp_path / "set", packed=packed) / ("train-images-idx3-ubyte" + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert len(refuses(message, sets.load, f"mnist:{tmp_path / 'set'}")) < 250 + len(str(tmp_path))


def test_a_torn_packed_file_and_sets_of_unequal_length_are_refused(tmp_path):
    path = write(tmp_path / "torn") / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:500])
    refuses("accepted is an idx file", sets.load, f"mnist:{tmp_path / 'torn'}")
    path.write_bytes(IMAGE_FILE)
    refuses("Not a gzipped file", sets.load, f"mnist:{tmp_path / 'torn'}")
    write(tmp_path / "few", labels=LABELS[:4])
    refuses("7 images and 4 labels; accepted are as many", sets.load, f"mnist:{tmp_path / 'few'}")
    refuses(",download fetches it", sets.load, f"fashionmnist:{tmp_path}")


def test_grey_is_pillows_and_one_channel_stays():
    colour = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    found = grey(torch.from_numpy(colour).permute(0, 3, 1, 2))
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour])
    assert found.dtype == torch.uint8 and np.array_equal(found[:, 0].numpy(), expected)
    assert torch.equal(grey(found), found)
    refuses("grey: the images have 4 channels; accepted are 1 and 3", grey, torch.zeros(2, 4, 8, 8, dtype=torch.uint8))


def test_box_is_the_mean_of_blocks_as_in_pillow_and_pad_is_as_black_all_around():
    whole = torch.from_numpy(IMAGES)[:, None]
    wide = padded(whole, 32)
    assert torch.equal(wide, torch.nn.functional.pad(whole, (2, 2, 2, 2)))
    half = boxed(wide, 2)
    expected = np.stack([np.asarray(Image.fromarray(image[0].numpy()).reduce(2)) for image in wide])
    assert half.shape == (7, 1, 16, 16) and half.dtype == torch.uint8 and np.array_equal(half[:, 0].numpy(), expected)
    odd = padded(whole[:, :, :5, :8], 8)
    assert odd[:, :, 1:6].equal(whole[:, :, :5, :8]) and not odd[:, :, [0, 6, 7]].any()


def test_a_spec_pads_before_it_averages_names_the_size_and_keeps_labels(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.repeat(IMAGES[..., None], 3, 3), labels=LABELS.astype(int))
    found = sets.load(f"{tmp_path}/set.npz,box=2,grey,pad=32")
    assert found.name == "set 16x16 grey" and found.labels.tolist() == LABELS.tolist()
    assert torch.equal(found.images, boxed(padded(torch.from_numpy(IMAGES)[:, None], 32), 2))
    assert sets.load(f"{tmp_path}/set.npz,flip").name == "set" and sets.load("digits,box=2").shape == (1, 4, 4)


@pytest.mark.parametrize(
    "options, message",
    {
        "box=3": "box=3: the images are 8x8; accepted are divisors of both sides",
        "pad=7": "pad=7: the images are 8x8; accepted are at least 8",
        "box=0": "option box is '0'; accepted are whole numbers from 1 to 64",
        "grey=1": "option grey has the value '1'; accepted is grey alone",
    }.items(),
)
def test_options_that_do_not_fit_the_images_are_refused(options, message):
    refuses(message, sets.load, f"digits,{options}")


def test_options_that_need_the_whole_set_are_refused_for_streams_and_for_several_sizes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    refuses("grey needs the whole set in memory", sets.load, f"{tmp_path},stream=4,grey")
    refuses("pad changes its images", sets.several_sizes, f"{tmp_path},pad=16", ((8, 8),))
    assert sets.load(f"{tmp_path},grey,pad=16").shape == (1, 16, 16)
