"""Batches that are prepared ahead, or indexed on the GPU, are those of the CPU, and their thread ends with them."""

import os
import threading
import time
from dataclasses import replace
from itertools import count, islice

import numpy as np
import pytest
import torch
from test_device import pretended, waits

from distill.train import BatchSplit
from recipes.data import batches, sets
from recipes.data.ahead import THREAD, ahead

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def running():
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not running()


def numbers(seen=None, last=None):
    """The batches 0, 1, 2, ..., each noted in ``seen`` when it is made; KeyError after ``last``."""
    for i in count():
        if seen is not None:
            seen.append(i)
        yield torch.full((2, 1, 1, 1), i), torch.tensor([i, -i])
        if i == last:
            raise KeyError("no more")


def test_the_order_is_kept_and_no_more_than_the_depth_is_prepared():
    seen = []
    stream = ahead(numbers(seen), depth=3)
    for i, (images, labels) in enumerate(islice(stream, 20)):
        assert images.unique().tolist() == [i] and labels.tolist() == [i, -i]
        time.sleep(0.005)
        assert len(seen) <= i + 1 + 3
    assert len(seen) > 20  # some were ahead
    stream.close()


def test_a_batch_keeps_its_values_while_later_ones_are_prepared():
    stream = ahead(numbers(), depth=2)
    held = list(islice(stream, 12))
    assert [int(images[0]) for images, _ in held] == list(range(12))
    stream.close()


def test_an_exception_of_the_thread_is_raised_after_the_batches_before_it():
    stream = ahead(numbers(last=4))
    assert [int(images[0]) for images, _ in islice(stream, 5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="no more"):
        next(stream)
    assert list(ahead(iter([]))) == [] and len(list(ahead(x for x in islice(numbers(), 4)))) == 4


@pytest.mark.parametrize("end", ["closed", "dropped", "interrupted"])
def test_the_thread_ends_with_its_iterator(end):
    finished = threading.Event()

    def source():
        try:
            yield from numbers()
        finally:
            finished.set()

    stream = ahead(source())
    next(stream)
    assert len(running()) == 1
    if end == "closed":
        stream.close()
    elif end == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt)
    else:
        del stream
    assert finished.is_set() and not running()


def test_a_forked_process_is_refused_and_ends():
    stream = ahead(numbers())
    next(stream)
    child = os.fork()
    if child == 0:
        try:
            next(stream)
        except RuntimeError as error:
            os._exit(7 if "forked process" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] >> 8 == 7
    assert int(next(stream)[0][0]) == 1  # the parent goes on
    stream.close()


# -- the sets of --data ------------------------------------------------------------------------------------------------------------
def colour(n=40):
    return np.random.default_rng(0).integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)


def memory(folder):
    return sets.Data.of(torch.from_numpy(colour()).permute(0, 3, 1, 2).contiguous(), torch.arange(40) % 3)


def mapped(folder):
    np.savez(folder / "set.npz", images=colour(), labels=np.arange(40) % 3)
    return sets.load(str(folder / "set.npz"))


def unlabelled(folder):
    return replace(memory(folder), labels=None)


def latents(folder):
    return sets.Data("latents", torch.randn(40, 4, 3, 3).half(), torch.arange(40) % 3, latents={})


def stream(folder):
    from PIL import Image

    for i, image in enumerate(colour()):
        (folder / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / str(i % 3) / f"{i:02d}.png")
    return sets.load(f"{folder},stream=8")


def some(data, device, step, n=5):
    made = data.batches(BatchSplit(8, microbatch=4), 0, "p", device, lambda labels: {"labels": labels}, 3, 0.3)(step)
    return list(islice(made, n))


@pytest.mark.parametrize("part", [0.0, 1.0], ids=["sent", "resident"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", [memory, mapped, unlabelled, latents, stream])
def test_batches_on_a_gpu_have_the_bits_of_those_on_the_cpu_and_nothing_waits_for_them(tmp_path, monkeypatch, kind, flip, part):
    monkeypatch.setattr(batches, "RESIDENT", part)
    data = replace(kind(tmp_path), flip=flip and kind is not latents)
    expected = some(data, CPU, 3)
    with pretended() as gpu:
        made = data.batches(BatchSplit(8, microbatch=4), 0, "p", CUDA, lambda labels: {"labels": labels}, 3, 0.3)(3)
        found = [next(made)]
        assert len(running()) == (part == 0 or kind is stream)
        gpu.reset()
        found += islice(made, 4)
        assert not waits(gpu) and not gpu.pageable
        for (x0, cond), (theirs, others) in zip(found, expected, strict=True):
            assert x0.is_cuda and x0.dtype == torch.float32 and torch.equal(x0.cpu(), theirs)
            if kind is not unlabelled:
                assert cond["labels"].is_cuda and torch.equal(cond["labels"].cpu(), others["labels"])
        made.close()


def test_a_training_on_the_cpu_has_no_thread(tmp_path):
    made = memory(tmp_path).batches(BatchSplit(8), 0, "p", CPU, lambda labels: {})(0)
    next(made)
    assert not running()


@pytest.mark.parametrize("kind", [memory, mapped])
def test_mirrored_images_are_those_of_the_set_mirrored(tmp_path, kind):
    data = replace(kind(tmp_path), labels=torch.arange(40), flip=True)
    seen = set()
    for x0, cond in some(data, CPU, 0, 20):
        for image, label in zip(x0, cond["labels"].tolist(), strict=True):
            if label != 3:  # the null label
                own = data.x0(slice(label, label + 1))[0]
                seen.add(torch.equal(image, own.flip(-1)))
                assert torch.equal(image, own) or torch.equal(image, own.flip(-1))
    assert seen == {True, False}
