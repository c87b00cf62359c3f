import struct

import numpy as np
import pytest
import torch
from PIL import Image

from distill.train import Shares
from recipes import data


def write(folder, n, size=(12, 10), mode="RGB"):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(n):
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")


def test_sub_folders_are_classes_and_images_are_centre_cropped_squares(tmp_path):
    for name, n in (("cat", 3), ("ant", 2)):
        write(tmp_path / "set" / name, n)
    found = data.load(str(tmp_path / "set"))
    assert found.images.shape == (5, 3, 10, 10) and found.images.dtype == torch.uint8
    assert found.labels.tolist() == [0, 0, 1, 1, 1] and found.classes == 2
    pixels = np.asarray(Image.open(tmp_path / "set" / "cat" / "0.png"))
    assert (found.images[2].permute(1, 2, 0).numpy() == pixels[:, 1:11]).all()


def test_a_flat_folder_has_no_labels_grey_stays_grey_and_a_size_resizes(tmp_path):
    write(tmp_path / "grey", 4, mode="L")
    assert data.load(str(tmp_path / "grey")).images.shape == (4, 1, 10, 10) and data.load(str(tmp_path / "grey")).labels is None
    small = data.load(f"{tmp_path / 'grey'},size=5")
    assert small.images.shape == (4, 1, 5, 5)
    with pytest.raises(ValueError, match="12x10 is smaller than the 16x16 asked for"):
        data.load(f"{tmp_path / 'grey'},size=16")


def test_a_corrupt_image_is_reported_and_left_out_and_many_are_fatal(tmp_path, capsys):
    write(tmp_path / "set", 150)
    (tmp_path / "set" / "007.png").write_bytes(b"no image")
    assert len(data.load(str(tmp_path / "set")).images) == 150
    assert "007.png cannot be read and is left out" in capsys.readouterr().err
    for i in range(3):
        (tmp_path / "set" / f"bad{i}.png").write_bytes((tmp_path / "set" / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"4 of 154 images cannot be read, the first is .*007\.png"):
        data.load(str(tmp_path / "set"))


def test_a_folder_without_images_and_unknown_specs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        data.load(str(tmp_path))
    for spec in ("nowhere", "cifar10", f"mnist:{tmp_path},downlod", f"{tmp_path},side=3"):
        with pytest.raises(ValueError, match="accepted are 'digits'"):
            data.load(spec)


def test_torchvisions_sets_are_read_from_their_root_and_not_fetched_unasked(tmp_path):
    with pytest.raises(ValueError, match=f"write mnist:{tmp_path},download to fetch it"):
        data.load(f"mnist:{tmp_path}")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 6), ("t10k", 2)):
        pixels = np.arange(n * 784, dtype=np.uint8).reshape(n, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, n, 28, 28) + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, n) + bytes(range(n)))
    found = data.load(f"mnist:{tmp_path}")
    assert found.images.shape == (6, 1, 28, 28) and found.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.images[1, 0, 0, 0] == 784 % 256


def test_every_process_draws_its_own_rows_of_one_batch():
    found = data.load("digits")
    whole = next(iter(found.batches(Shares(12), 0, "p", torch.device("cpu"))(5)))[0]
    parts = [next(iter(found.batches(Shares(12, 3, rank), 0, "p", torch.device("cpu"))(5)))[0] for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
