"""Folders of images as people have them: grey and colour mixed, transparent, with classes named by numbers."""

import io

import numpy as np
import pytest
from PIL import Image

from recipes.data import decode, sets
from recipes.data.folders import in_order


def folder(path, **images):
    """Write images of 8x8 by their names."""
    path.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(path / f"{name}.png")
    return str(path)


def flat(mode, colour):
    return Image.new(mode, (8, 8), colour)


def test_a_set_with_a_colour_image_is_a_colour_set_whatever_its_first_image_is(tmp_path):
    found = sets.load(folder(tmp_path, a=flat("L", 9), b=flat("1", 1), c=flat("RGB", (1, 2, 3)), d=flat("LA", (5, 255))))
    assert found.images[:, :, 0, 0].tolist() == [[9] * 3, [255] * 3, [1, 2, 3], [5] * 3]


def test_a_colour_image_behind_all_that_decide_the_format_is_refused_and_not_made_grey(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "PEEKED", 1)
    where = folder(tmp_path, **{f"{i:02}": flat("L", i) for i in range(40)}, zz=flat("RGB", (1, 2, 3)))
    with pytest.raises(ValueError, match=r"zz\.png: a colour image in a set whose first images are grey"):
        sets.load(where)


def test_the_images_that_decide_the_format_are_also_drawn_at_random(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "PEEKED", 20)
    where = folder(tmp_path, **{f"{i:02}": flat("L" if i < 30 else "RGB", 0) for i in range(60)})
    assert sets.load(where).shape == (3, 8, 8)


@pytest.mark.parametrize("grey", [False, True])
def test_transparent_images_are_put_on_white_and_a_warning_says_so(tmp_path, capsys, grey):
    mode, half = ("LA", (100, 51)) if grey else ("RGBA", (100, 0, 200, 51))
    opaque, nothing = (*half[:-1], 255), (*half[:-1], 0)
    found = sets.load(folder(tmp_path / "set", a=flat(mode, half), b=flat(mode, opaque), c=flat(mode, nothing)))
    white = [round(255 + (value - 255) * 51 / 255) for value in half[:-1]]
    assert found.images[:, :, 0, 0].tolist() == [white, list(half[:-1]), [255] * len(white)]
    assert "transparent images are put on white" in capsys.readouterr().err
    palette = flat("P", 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert sets.load(folder(tmp_path / "palette", a=palette)).images.unique().tolist() == [255]
    capsys.readouterr()
    sets.load(folder(tmp_path / "plain", a=flat("RGB", 0)))
    assert not capsys.readouterr().err


def test_class_folders_named_by_numbers_are_in_the_order_of_the_numbers_and_the_log_says_which_is_which(tmp_path, capsys):
    for number in range(11):
        folder(tmp_path / str(number), a=flat("L", number))
    found = sets.load(str(tmp_path))
    assert found.labels.tolist() == found.images[:, 0, 0, 0].tolist() and found.classes == 11
    assert "0 = 0, 1 = 1, 2 = 2, 3 = 3" in capsys.readouterr().out
    assert in_order({"10", "2", "cat"}) == ["10", "2", "cat"] and in_order({"10", "02", "2"}) == ["02", "2", "10"]


def test_an_image_of_more_pixels_than_any_photograph_is_unreadable_before_it_is_decoded(monkeypatch):
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    form = decode.ImageFormat(8, "RGB")
    with decode.workers(0) as pool:
        assert decode.decode(pool, [decode.Record("bomb", file.getvalue())], form) == [None]


def test_a_set_that_does_not_fit_in_memory_is_refused_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.machine.memory", lambda: 8 * 8 * 2 * 10)
    where = folder(tmp_path, **{f"{i}": Image.fromarray(np.zeros((8, 8), np.uint8)) for i in range(12)})
    with pytest.raises(ValueError, match=r"GB of images that fit in memory; accepted are a smaller size=\.\.\. and stream="):
        sets.load(where)
    assert len(sets.load(f"{where},size=4").images) == 12
