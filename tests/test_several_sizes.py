"""Images of several sizes: each is encoded in the size of the nearest aspect ratio, and every training step has one of them."""

import filecmp
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import here, refuses
from PIL import Image
from pipelines import dit, pixart, xl
from test_ahead import some
from test_data import pack
from test_device import pretended, waits

import teachers
from distill.denoiser import Guided
from distill.regression import Regression
from distill.resume import Resumable
from distill.rng import Rng
from distill.target import Mix
from distill.train import BatchSplit, Optimization, train
from eval import reference
from eval.features import Extractor
from eval.metrics import Reference
from eval.reference import Identity
from recipes import consistency, latents, teacher
from recipes.common import shards
from recipes.common.building import estimated_bias
from recipes.common.checks import check_match, conditioned, probed
from recipes.common.training import try_method
from recipes.data import batches, sets
from recipes.data.ahead import ahead
from recipes.data.buckets import Buckets
from recipes.data.image_file import ImageFormat
from teachers.conditions import of_size
from teachers.encoder import Encoder
from teachers.networks.records.flux import positions

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SIZES = {"16x16": (16, 16), "12x20": (12, 20), "20x12": (20, 12), "8x40": (8, 40)}  # height, width
COUNT = 24
SHORT = (
    "--method cd --preset smoke --training-images 32 --batch-size 8 --steps 1 --images 40 --chunk 64 --sweep-steps 1 --force"
)


def image(i):
    """A random image; no two have the same sides, and none is nearest to 8x40."""
    draw = np.random.default_rng(i)
    return draw.integers(0, 256, (*draw.integers(20, 45, 2), 3), dtype=np.uint8)


def nearest(i):
    height, width = image(i).shape[:2]
    return min(SIZES, key=lambda name: abs(math.log((SIZES[name][0] * width) / (SIZES[name][1] * height))))


def cut(i):
    """An image as Pillow alone cuts and resizes it to its size, [H, W, 3]."""
    height, width = SIZES[nearest(i)]
    whole = Image.fromarray(image(i))
    scale = min(whole.width / width, whole.height / height)
    across, down = round(width * scale), round(height * scale)
    left, top = (whole.width - across) // 2, (whole.height - down) // 2
    return np.asarray(whole.crop((left, top, left + across, top + down)).resize((width, height), Image.Resampling.LANCZOS))


def png(i, folder):
    Image.fromarray(image(i)).save(folder / "one.png")
    return (folder / "one.png").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny SDXL, 24 captioned images of as many sizes, and their latents in float32."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    xl(folder / "words").save_pretrained(folder / "xl")
    texts = {f"{i:02d}.txt": f"image {i}".encode() for i in range(COUNT)}
    pack(folder / "set.tar", dict(sorted(({f"{i:02d}.png": png(i, folder) for i in range(COUNT)} | texts).items())))
    encode(folder, folder / "encoded")
    return folder


def encode(folder, out, more="--shard-images 100"):
    sizes = ("--dtype float32 --sizes", *SIZES)
    here(latents.main, "--model", folder / "xl", "--data", f"wds:{folder / 'set.tar'}", *sizes, more, "--output-dir", out)


def pair(folder, model="xl", data="encoded"):
    """A teacher with the conditions of the data, and the data."""
    model, found = conditioned(teachers.load(f"{folder / model}"), sets.load(str(folder / data)))
    return model, check_match(model, found, training=True)


def drawn(data, model, step=0, n=1, split=None):
    made = data.batches(split or BatchSplit(6), 0, "p", CPU, model.condition, model.null)
    return list(islice(made(step), n))


# -- the latents -------------------------------------------------------------------------------------------------------------------
def test_every_image_is_once_in_the_folder_of_the_nearest_aspect_ratio_and_empty_folders_are_left_out(made, tmp_path, capsys):
    encode(made, tmp_path / "again")
    assert "no image is nearest to 8x40, which is left out" in capsys.readouterr().out
    folders = sorted(path.name for path in (made / "encoded").iterdir() if path.is_dir())
    found = {name: sets.load(str(made / "encoded" / name)).captions for name in folders}
    expected = {name: [f"image {i}" for i in range(COUNT) if nearest(i) == name] for name in SIZES}
    assert found == {name: captions for name, captions in expected.items() if captions} and len(found) == 3
    index = json.loads((made / "encoded" / "index.json").read_text())
    assert index["buckets"] == {name: len(captions) for name, captions in found.items()}


@pytest.mark.parametrize("name", ["16x16", "12x20"])
def test_a_folder_of_one_size_is_that_of_the_same_images_cut_before_and_a_pipeline_of_this_size(made, tmp_path, name):
    mine = [i for i in range(COUNT) if nearest(i) == name]
    np.savez(tmp_path / "cut.npz", images=np.stack([cut(i) for i in mine]), captions=[f"image {i}" for i in mine])
    model = f"{made / 'xl'},size={name}"
    here(latents.main, "--dtype float32 --model", model, "--data", tmp_path / "cut.npz", "--output-dir", tmp_path / "plain")
    (one, plain), (two, part) = pair(tmp_path, model, "plain"), pair(made, model, f"encoded/{name}")
    assert torch.equal(plain.images, part.images) and plain.captions == part.captions
    for (x0, cond), (y0, other) in zip(drawn(plain, one, n=3), drawn(part, two, n=3), strict=True):
        assert torch.equal(x0, y0) and torch.equal(cond["time_ids"], other["time_ids"])
        assert torch.allclose(cond["text"], other["text"], atol=1e-5)
    assert torch.equal(one.embeddings.null["time_ids"], two.embeddings.null["time_ids"])


def test_of_equal_aspect_ratios_an_image_gets_the_largest_that_it_covers():
    form = ImageFormat(0, "RGB", ((16, 16), (32, 32), (64, 64), (20, 40)))
    for sides, expected in (((40, 41), (32, 32)), ((70, 64), (64, 64)), ((9, 9), (16, 16)), ((100, 190), (20, 40))):
        assert form.size_for(*sides) == expected


def tensors(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def same_files(one, two):
    names = sorted(tensors(one))
    return names == sorted(tensors(two)) and filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


def test_each_process_encodes_its_own_shards_and_together_they_are_those_of_one(made):
    config = latents.Config(
        model=str(made / "xl"), data=f"wds:{made / 'set.tar'}", sizes=tuple(SIZES), shard_images=5, dtype="float32"
    )
    model, data = latents.load_pair(config)

    def encoded(world, rank):
        state = SimpleNamespace(num_processes=world, process_index=rank, device=CPU)
        return {name: (parts, about) for name, parts, about in latents.encoded(model, data, config, state)}

    whole, first, second = encoded(1, 0), encoded(2, 0), encoded(2, 1)
    assert not first.keys() & second.keys() and whole.keys() == first.keys() | second.keys() and len(second) > 2
    for name, (parts, about) in (first | second).items():
        assert torch.equal(parts["latents"], whole[name][0]["latents"]) and about == whole[name][1]


def test_an_encoding_that_was_killed_continues_to_the_same_bytes_and_keeps_its_shards(made, tmp_path, monkeypatch):
    more, save, seen = "--shard-images 7", shards.files.save, []
    encode(made, tmp_path / "one", more)

    def dies(path, *rest):
        seen.append(path.name)
        if len(seen) == 6:
            raise KeyboardInterrupt
        save(path, *rest)

    monkeypatch.setattr(shards.files, "save", dies)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        encode(made, tmp_path / "two", more)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".two.unfinished").rglob("latents-*")}
    monkeypatch.setattr(shards.files, "save", save)
    encode(made, tmp_path / "two", more)
    assert same_files(tmp_path / "one", tmp_path / "two") and len(kept) == 5
    names = {tmp_path / "two" / path.relative_to(tmp_path / ".two.unfinished"): at for path, at in kept.items()}
    assert all(path.stat().st_mtime_ns == at for path, at in names.items())


# -- batches -----------------------------------------------------------------------------------------------------------------------
def test_a_step_draws_a_shape_by_its_number_of_images():
    sizes, steps = (100, 37, 263), 4000
    some = Buckets([torch.zeros(n, 1, 1 + n, 1) for n in sizes])
    count = Counter(some.draw(3, "phase", step) for step in range(steps))
    expected = [steps * n / sum(sizes) for n in sizes]
    assert sum((count[i] - e) ** 2 / e for i, e in enumerate(expected)) < 13.8  # 2 degrees of freedom, p = 0.001
    assert [some.draw(3, "phase", s) for s in range(30)] != [some.draw(4, "phase", s) for s in range(30)]


def test_all_processes_and_microbatches_of_a_step_have_the_rows_of_one_batch_of_one_shape(made):
    model, data = pair(made)
    whole = drawn(data, model, 0, 12, BatchSplit(12))
    assert len({x0.shape for x0, _ in whole}) == 3
    ranks = [drawn(data, model, 0, 24, BatchSplit(12, 2, rank, microbatch=3)) for rank in range(2)]
    for step, (x0, cond) in enumerate(whole):
        parts = [ranks[rank][2 * step + turn] for turn in range(2) for rank in range(2)]
        assert torch.equal(x0, torch.cat([part for part, _ in parts]))
        for name, rows in cond.items():
            assert torch.equal(rows, torch.cat([part[name] for _, part in parts])), name


def test_batches_from_any_step_are_those_of_the_whole_run(made):
    model, data = pair(made)
    whole = drawn(data, model, 0, 9)
    for step in range(9):
        ((x0, cond),) = drawn(data, model, step)
        assert torch.equal(x0, whole[step][0]) and all(torch.equal(cond[k], v) for k, v in whole[step][1].items())


def test_a_step_has_the_loss_of_the_same_step_on_the_folder_of_its_shape(made):
    model, data = pair(made)
    seen = {}
    for step, (x0, cond) in enumerate(drawn(data, model, 0, 8)):
        name = "x".join(str(2 * side) for side in x0.shape[2:])
        if name in seen:
            continue
        own, part = seen[name] = pair(made, f"xl,size={name}", f"encoded/{name}")
        ((y0, other),) = drawn(part, own, step)
        method, of_own = (Regression(Mix(some.guided(3.0))) for some in (model, own))
        one, two = (
            f(some.denoiser, x, rng=Rng.seeded(step, CPU, 6), progress=0.0, **c)
            for f, some, x, c in ((method, model, x0, cond), (of_own, own, y0, other))
        )
        assert torch.equal(x0, y0) and torch.equal(one, two) and one.shape == (6,)
    assert seen.keys() == {"16x16", "12x20", "20x12"}


def test_both_halves_of_guidance_have_the_time_ids_of_the_size(made):
    model, data = pair(made)
    of_each = {x0.shape: (x0, cond) for x0, cond in drawn(data, model, 0, 8)}
    assert len(of_each) == 3
    for x0, cond in of_each.values():
        height, width = (2 * side for side in x0.shape[2:])
        ids = torch.tensor([height, width, 0, 0, height, width]).float()
        assert torch.equal(cond["time_ids"], ids.expand(6, 6))
        null = {k: row[1] for k, row in Encoder(str(made / "xl"), side=x0.shape[2:])(["a"]).items()}
        assert torch.equal(null["time_ids"], ids[None])
        t = torch.tensor(0.5)
        expected = Guided(model.denoiser, null, 4.0)(x0, t, **cond)
        assert torch.allclose(model.guided(4.0)(x0, t, **cond), expected, atol=1e-5)


def test_pixart_is_conditioned_on_the_size_that_its_pipeline_has(tmp_path):
    import diffusers

    pipeline = pixart(tmp_path, diffusers.PixArtAlphaPipeline, use_additional_conditions=True, attention_head_dim=12)
    pipeline.save_pretrained(tmp_path / "p")
    model = teachers.load(str(tmp_path / "p"))
    table = Encoder.of(replace(model, shape=(4, 6, 10))).table(["a"])
    sized = Encoder.of(model).table(["a"]).sized(12, 20)
    for name, rows in table(torch.arange(2)).items():
        assert torch.equal(sized(torch.arange(2))[name], rows)
    assert torch.equal(sized.null["resolution"], of_size(12, 20)["resolution"])


def test_flux_has_the_positions_of_its_pipeline_at_any_shape():
    from diffusers import FluxPipeline

    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 5, CPU, torch.float32)
    assert torch.equal(positions(3, 5, expected), expected.view(15, 3))


def test_a_training_on_several_shapes_that_stopped_continues_to_the_same_weights(made, tmp_path):
    model, data = pair(made)
    made_by, budget = data.batches(BatchSplit(6), 0, "p", CPU, model.condition), Optimization(36, 6)

    def weights(folder, *stops):
        for stop in (*stops, None):
            states = train(
                Regression(Mix(model.guided(3.0))), model.student(), made_by, Accelerator(cpu=True), budget, seed=0, phase="p",
                resumable=Resumable(folder), save_every_images=6,
            )  # fmt: skip
            for state in islice(states, stop):
                net = state.student.net
        return list(net.parameters())

    one, two = weights(tmp_path / "one"), weights(tmp_path / "two", 3, 2)
    assert all(map(torch.equal, one, two)) and not torch.equal(one[0], next(model.parametric.net.parameters()))


def several(folder=None):
    parts = Buckets([torch.randn(9, 4, 3, 3).half(), torch.randn(20, 4, 2, 6).half(), torch.randn(6, 4, 5, 4).half()])
    return sets.Data("several", parts, torch.arange(35) % 3, latents={"factor": 8})


@pytest.mark.parametrize("part", [0.0, 1.0], ids=["sent", "resident"])
def test_batches_of_several_shapes_on_a_gpu_are_those_on_the_cpu_and_nothing_waits_for_them(monkeypatch, part):
    monkeypatch.setattr(batches, "RESIDENT", part)
    data = several()
    expected = some(data, CPU, 3, 24)
    assert len({x0.shape for x0, _ in expected}) == 3
    with pretended() as gpu:
        made = data.batches(BatchSplit(8, microbatch=4), 0, "p", CUDA, lambda labels: {"labels": labels}, 3, 0.3)(3)
        found = [next(made)]
        gpu.reset()
        found += islice(made, 23)
        assert not waits(gpu) and not gpu.pageable
        for (x0, cond), (theirs, others) in zip(found, expected, strict=True):
            assert torch.equal(x0.cpu(), theirs) and torch.equal(cond["labels"].cpu(), others["labels"])
        made.close()


def test_batches_ahead_keep_their_shapes_and_values():
    shapes = [(2, 1, 3), (2, 4, 2), (2, 2, 2), (2, 4, 2), (2, 1, 1)] * 4
    made = ahead(((torch.full(shape, i), None) for i, shape in enumerate(shapes)), room=8)
    held = list(made)
    assert [tuple(images.shape) for images, _ in held] == shapes
    assert [images.unique().tolist() for images, _ in held] == [[i] for i in range(20)]


# -- what needs one shape ----------------------------------------------------------------------------------------------------------
def test_probe_bias_and_trial_use_one_shape_and_what_cannot_is_refused_in_one_line(made):
    model, data = pair(made)
    shapes = {len(part): shape for part, shape in zip(data.images.parts, data.images.shapes, strict=True)}
    one, largest = data.of_one_shape(model.shape), data.of_one_shape()
    assert one.shape == (4, 8, 8) == largest.shape and shapes[len(one.images)] == (4, 8, 8)
    assert one.captions == sets.load(str(made / "encoded" / "16x16")).captions
    assert data.of_one_shape((4, 6, 10)).shape == (4, 6, 10) and one.of_one_shape((4, 6, 10)) is one
    seen = []
    watched = replace(model, denoiser=Watched(model.denoiser, seen))
    probed(watched, data, 0, levels=2, samples=4)
    estimated_bias(watched, data, 8, 0, CPU).errors(model.denoiser.schedule, torch.tensor([0.0]), torch.Generator())
    assert {shape[1:] for shape in seen} == {(4, 8, 8)}
    try_method(Regression(Mix(model.denoiser)), model, data)
    for call in (lambda: data.shape, lambda: data.x0(slice(4)), lambda: data.x0(torch.arange(3))):
        refuses("samples of shapes 4x8x8, 4x6x10, 4x10x6: accepted here is one, such as a sub-folder", call)


class Watched:
    """A denoiser that keeps the shapes that it is called on."""

    def __init__(self, inner, seen):
        self.inner, self.seen, self.schedule = inner, seen, inner.schedule

    def __call__(self, x_t, t, **cond):
        self.seen.append(tuple(x_t.shape))
        return self.inner(x_t, t, **cond)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_wrong_sizes_and_data_end_in_one_line_with_nothing_written(made, tmp_path, refused):
    dit(tmp_path).save_pretrained(tmp_path / "dit")
    images, out, known = f"wds:{made / 'set.tar'}", tmp_path / "out", tmp_path / "known.safetensors"
    store_reference(known)
    for model, data, sizes, message in (
        ("xl", images, "16x16 13x20", "--sizes 13x20: accepted are heights and widths that are multiples of 2, up to"),
        ("xl", images, "16", "--sizes 16: accepted are HEIGHTxWIDTH in pixels, such as 64x64 48x80 80x48"),
        ("xl", images, "64x64", "is smaller than 64x64; accepted are larger images, or a smaller one in --sizes"),
        ("xl", "digits", "16x16", "--sizes with --data digits: its images have one size; accepted are FOLDER, hf and wds"),
        ("xl", f"{made},size=16", "16x16", "its size=... is another size; accepted are FOLDER, hf and wds without size=..."),
        (tmp_path / "dit", images, "16x16 12x20", "a DiTTransformer2DModel has one size; accepted are"),
    ):
        assert message in refused(
            latents.main, "--model", made / model, "--data", data, "--sizes", sizes, "--output-dir", out / "l"
        )
    for recipe, flags in ((teacher, ""), (consistency, "--method ict --from-scratch --reference")):
        more = [known] if flags else []
        line = refused(recipe.main, "--data", made / "encoded", flags, *more, "--output-dir", out / "r")
        assert "accepted here is one, such as a sub-folder of the latents" in line
    assert not list(out.rglob("*"))


def test_parts_that_do_not_agree_are_refused(made, tmp_path):
    shutil.copytree(made / "encoded", tmp_path / "l")
    path = tmp_path / "l" / "12x20" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scale": 2.0}))
    refuses("12x20 has scale 2.0, 16x16", sets.load, str(tmp_path / "l"))
    (tmp_path / "l" / "index.json").write_text('{"format": "fewstep-latent-buckets/1"}')
    refuses("index.json: an entry 'buckets' is missing", sets.load, str(tmp_path / "l"))


@pytest.mark.slow
def test_the_plan_of_a_run_names_the_number_of_images_of_each_shape(made, tmp_path, capsys):
    known = tmp_path / "known.safetensors"
    store_reference(known)
    arguments = ("--teacher", made / "xl", "--data", made / "encoded", "--reference", known, "--features test_latent_runs:Pool")
    with pytest.raises(SystemExit) as stop:
        here(consistency.main, SHORT, *arguments, "--guidance 3 --dry-run --output-dir", tmp_path / "run")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "24 images of 4x8x8 (" in out and "time and memory are those of the largest" in out


def store_reference(path):
    extractor = Extractor.create("test_latent_runs:Pool")
    identity = Identity(extractor.name, extractor.fingerprint, "random", 64, "0", "none")
    reference.save(path, Reference(torch.rand(64, 12)), identity)
