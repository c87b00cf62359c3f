"""Conditions are data: encoded once into shards by one command, bound to a model without prompts, and the same as its pipeline's."""

import filecmp
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import here, refuses, words
from pipelines import FAMILIES, PROMPTS, sd, xl
from processes import together

import teachers
from distill import files
from distill.train import BatchSplit
from eval import reference
from eval.features import Extractor
from eval.metrics import Reference
from eval.reference import Identity
from recipes import consistency, latents
from recipes.common import encoding
from recipes.common.checks import check_match, conditioned
from recipes.common.encoding import Encoding
from recipes.data import latent_shards, sets
from recipes.data.condition_shards import distinct, read_conditions
from teachers.conditions import Rows
from teachers.encoder import Encoder, online
from teachers.networks.records import ENCODERS

CAPTIONS = [f"{a} {b}" for a in ("red", "a small", "the") for b in ("cat", "boat")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Stable Diffusion pipeline, one of another text encoder, 40 captioned images, and their latents and conditions in float32."""
    folder = tmp_path_factory.mktemp("made")
    sd(folder / "words").save_pretrained(folder / "sd")
    sd(folder / "words").save_pretrained(folder / "other")
    shutil.rmtree(folder / "other" / "vae")
    shutil.copytree(folder / "sd" / "vae", folder / "other" / "vae")
    images = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "set.npz", images=images, captions=[CAPTIONS[i % 6] for i in range(40)])
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
    encode(folder, folder / "encoded", "--dtype float32")
    return folder


def encode(folder, out, *more):
    settings = "--shard-images 16 --shard-captions 4 --model"
    here(latents.main, settings, folder / "sd", "--data", folder / "set.npz", *more, "--output-dir", out)


@torch.no_grad()
def stock(folder, prompts):
    """The conditions of the stock pipeline of a folder."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    return ENCODERS[type(pipeline).__name__](pipeline, prompts)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in ("Stable Diffusion", "SDXL", "SD3", "PixArt Sigma")])
def test_a_table_has_the_conditions_of_the_pipelines_own_encode_prompt(tmp_path, family):
    FAMILIES[family](tmp_path / "parts").save_pretrained(tmp_path / "p")
    model = teachers.load(str(tmp_path / "p"))
    assert model.classes == 0 and not model.embeddings.null
    expected = stock(tmp_path / "p", PROMPTS)
    table = Encoder.of(model).table(PROMPTS)
    cond = model.with_conditions(table).condition(torch.tensor([2, 0, 3]))
    assert cond.keys() == expected.keys()
    for name, (rows, null) in expected.items():
        assert torch.allclose(cond[name].float(), torch.stack([rows[2], rows[0], null[0]]).float(), atol=1e-6), name


def test_latents_of_captions_hold_a_row_for_each_different_caption(made):
    data = sets.load(str(made / "encoded"))
    index = json.loads((made / "encoded" / "index.json").read_text())
    assert data.table.prompts == CAPTIONS and index["encoder_sha256"] == data.table.encoder == Encoder(str(made / "sd")).sha256
    teacher, found = conditioned(teachers.load(str(made / "sd")), data)
    assert found.labels.tolist() == [i % 6 for i in range(40)] and (teacher.classes, teacher.null) == (6, 6)
    rows, null = stock(made / "sd", CAPTIONS)["text"]
    assert torch.allclose(teacher.condition(torch.arange(6))["text"], rows, atol=1e-6)
    assert torch.equal(teacher.condition(torch.tensor([6]))["text"], null[:1])
    assert isinstance(data.table.lookup.rows["text"], Rows) and len(data.table.lookup.rows["text"].parts) == 3


def test_half_precision_rounds_the_large_rows_and_keeps_the_sizes_in_pixels(tmp_path):
    xl(tmp_path / "words").save_pretrained(tmp_path / "xl")
    how = Encoding(Encoder(str(tmp_path / "xl")))
    how.write(tmp_path, CAPTIONS, PartialState())
    rows = read_conditions(tmp_path).lookup.rows
    assert rows["text"].dtype == torch.float16 and rows["time_ids"].dtype == torch.float32
    exact = how.encoder.table(CAPTIONS)
    found = read_conditions(tmp_path)(torch.arange(7))
    for name, expected in exact(torch.arange(7)).items():
        assert found[name].dtype == torch.float32 and torch.allclose(found[name], expected, rtol=1e-3, atol=1e-3), name
    assert torch.equal(found["time_ids"], exact(torch.arange(7))["time_ids"])


def test_an_encoding_that_was_killed_continues_to_the_same_bytes(made, tmp_path, monkeypatch):
    calls, whole = [], Encoder.__call__

    def dies(self, prompts):
        calls.append(prompts)
        if len(calls) > 3:  # twice of the empty prompt, and of the first shard
            raise KeyboardInterrupt
        return whole(self, prompts)

    monkeypatch.setattr(Encoder, "__call__", dies)
    how = Encoding(Encoder(str(made / "sd")), block=4)
    with pytest.raises(KeyboardInterrupt):
        encoding.cached(tmp_path, CAPTIONS, how, PartialState())
    (aside,) = tmp_path.glob(".conditions-*.unfinished")
    assert [p.name for p in aside.glob("conditions-*")] == ["conditions-00000.safetensors"]
    again = []
    monkeypatch.setattr(Encoder, "__call__", lambda self, prompts: again.append(prompts) or whole(self, prompts))
    encoding.cached(tmp_path, CAPTIONS, how, PartialState())
    assert again == [[""], [""], CAPTIONS[4:]]  # of the first shard, nothing
    encoding.cached(tmp_path / "again", CAPTIONS, how, PartialState())
    (one,), (two,) = tmp_path.glob("conditions-*"), (tmp_path / "again").glob("conditions-*")
    names = sorted(p.name for p in one.iterdir())
    assert len(names) == 3 and filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


def test_a_cache_is_found_again_without_a_text_encoder(made, tmp_path, monkeypatch):
    how = Encoding(Encoder(str(made / "sd")))
    first = encoding.cached(tmp_path, CAPTIONS, how, PartialState())
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("encoded again"))
    again = encoding.cached(tmp_path, CAPTIONS, Encoding(Encoder(str(made / "sd"))), PartialState())
    labels = torch.tensor([5, 6])
    assert torch.equal(first(labels)["text"], again(labels)["text"])
    assert "pipeline" not in vars(how.encoder)  # the encoders are freed


def test_a_shard_that_does_not_agree_with_the_index_is_refused(made, tmp_path):
    shutil.copytree(made / "encoded", tmp_path / "e")
    shard = tmp_path / "e" / "conditions-00000.safetensors"
    files.save(shard, {"text": torch.zeros(3, 77, 8)}, {})
    refuses(
        "conditions.safetensors: conditions-00000.safetensors: text is torch.float32 (3, 77, 8)", sets.load, str(tmp_path / "e")
    )
    shard.unlink()
    refuses("conditions-00000.safetensors: there is no such file", sets.load, str(tmp_path / "e"))


@pytest.mark.slow
def test_two_processes_encode_what_one_does(made, tmp_path):
    arguments = words(
        "--shard-images 16 --shard-captions 4 --dtype float32 --threads 1 --model", made / "sd", "--data", made / "set.npz"
    )
    codes, out = together(2, latents.main, [*arguments, "--output-dir", str(tmp_path / "two")], log=tmp_path / "log")
    names = sorted(p.name for p in (made / "encoded").iterdir())
    assert codes == {0} and len(names) == 7, out
    assert filecmp.cmpfiles(made / "encoded", tmp_path / "two", names, shallow=False) == (names, [], [])


def test_the_conditions_of_another_text_encoder_are_refused(made):
    data = sets.load(str(made / "encoded"))
    message = "made by another text encoder or tokenizer ... encode them with the model, by recipes/latents.py"
    refuses(message, conditioned, teachers.load(str(made / "other")), data)
    message = "the teacher is conditioned on text, and plain has no captions: accepted are sets with captions"
    refuses(message, conditioned, teachers.load(str(made / "sd")), replace(data, captions=None, name="plain"))


def test_the_encoders_sha256_is_that_of_weights_and_tokenizer_alone(made, tmp_path):
    shutil.copytree(made / "sd", tmp_path / "copy")
    before, config = Encoder(str(made / "sd")).sha256, tmp_path / "copy" / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "x", "transformers_version": "0"}))
    assert Encoder(str(tmp_path / "copy")).sha256 == before != Encoder(str(made / "other")).sha256
    tokens = next(p for p in (tmp_path / "copy" / "tokenizer").iterdir() if p.name in ("vocab.json", "tokenizer.json"))
    tokens.write_text(tokens.read_text() + " ")
    assert Encoder(str(tmp_path / "copy")).sha256 != before


def test_online_conditions_are_those_of_the_cache(made):
    encoder = Encoder(str(made / "sd"))
    table, live = encoder.table(CAPTIONS), online(encoder, CAPTIONS)
    for labels in ([3, 3, 0, 6], [6, 6], [1]):
        one, other = table(torch.tensor(labels))["text"], live(torch.tensor(labels))["text"]
        assert torch.allclose(one, other, atol=1e-6)
    assert live.count == 6 and live.sha256 == table.sha256


def test_online_conditions_of_the_null_label_are_the_pipelines_negative_ones(monkeypatch):
    """SDXL has zeros there, and not what its encoders make of an empty prompt."""
    monkeypatch.setattr(Encoder, "sha256", "e")
    monkeypatch.setattr(
        Encoder,
        "__call__",
        lambda _, texts: {"text": (torch.tensor([[float(len(t))] for t in texts]), torch.full((1, 1), -1.0))},
    )
    live = online(Encoder("nowhere"), ["a", "bb"])
    for labels, expected in (([2, 1, 0, 1], [-1, 2, 1, 2]), ([2, 2], [-1, -1]), ([1, 1], [2, 2])):
        assert live(torch.tensor(labels))["text"][:, 0].tolist() == expected


def test_batches_of_mapped_latents_and_conditions_are_those_in_memory(made, monkeypatch):
    def some(data):
        teacher, data = conditioned(teachers.load(str(made / "sd")), data)
        data = check_match(teacher, data, training=True)
        stream = data.batches(BatchSplit(12), 0, "p", CPU, teacher.condition, teacher.null, 0.3)(0)
        return [next(stream) for _ in range(3)]

    memory = some(sets.load(str(made / "encoded")))
    monkeypatch.setattr(latent_shards, "IN_MEMORY", 0)
    mapped = sets.load(str(made / "encoded"))
    assert isinstance(mapped.images, Rows)
    for (x0, cond), (y0, other) in zip(memory, some(mapped), strict=True):
        assert torch.equal(x0, y0) and torch.equal(cond["text"], other["text"]) and x0.dtype == torch.float32


TRAIN = (
    "--method cd --preset smoke --training-images 32 --batch-size 16 --steps 1 --images 40 --chunk 64 --sweep-steps 1 --force"
)


@pytest.mark.slow
def test_a_training_from_a_cache_is_the_training_with_a_list_of_prompts_and_its_file_holds_no_prompts(
    made, tmp_path, monkeypatch, stock_here
):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    weights, ours, known = {}, "--features test_latent_runs:Pool", tmp_path / "known.safetensors"
    extractor = Extractor.create("test_latent_runs:Pool")
    reference.save(
        known, Reference(torch.rand(64, 12)), Identity(extractor.name, extractor.fingerprint, "random", 64, "0", "none")
    )
    for name, spec in (("cache", made / "sd"), ("list", f"{made / 'sd'},prompts={made / 'prompts.txt'}")):
        arguments = ("--teacher", spec, "--data", made / "encoded", "--reference", known, "--output-dir", tmp_path / name)
        here(consistency.main, TRAIN, ours, *arguments)
        weights[name], description = files.load(tmp_path / name / "student.safetensors")
        assert weights[name]["table.text"].shape[0] == 1 and description["classes"] == 0
        assert not any(caption in json.dumps(description) for caption in CAPTIONS)
    assert weights["cache"].keys() == weights["list"].keys()
    worst = max(float((a - weights["list"][k]).abs().max()) for k, a in weights["cache"].items())
    assert worst < 1e-6


def test_captions_are_made_distinct_in_the_order_in_which_they_occur():
    assert distinct(["b", " a", "b ", "c", "a"]) == ["b", "a", "c"]
