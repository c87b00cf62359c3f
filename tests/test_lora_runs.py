"""Adapters in processes, recipes and stock pipelines."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import here, rows, words
from pipelines import FAMILIES, PROMPTS
from processes import together
from test_latent_runs import OURS, SHORT, importable, made, measured, text_model  # noqa: F401 (fixtures)
from test_lora import TARGETS, changed, trained

import teachers
from distill import device, files
from distill.progressive import Progressive
from distill.rng import Rng
from distill.sampling import Sampling
from recipes import consistency, evaluate, export, progressive
from recipes.common.flags import LoraFlags
from recipes.common.lora import with_lora
from teachers import passport
from teachers.codec import Codec
from teachers.export import deliver
from teachers.export.lora import export_lora
from teachers.lora import merged, rounded, with_adapter

pytestmark = pytest.mark.slow


def compare_gradients():
    """In each of two processes: the gradient of half of the batch, averaged by DDP, and that of the whole batch."""
    torch.set_num_threads(1)
    accelerator, teacher = Accelerator(cpu=True), teachers.load("digits")
    alone = changed(with_adapter(teacher, "digits", 4, TARGETS)).student()
    shared = replace(alone, net=accelerator.prepare(copy.deepcopy(alone.net)))
    assert type(shared.net).__name__ == "DistributedDataParallel"
    x0, labels = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 10
    method, rank = Progressive(teacher.denoiser, torch.linspace(1, 0, 5).double()), accelerator.process_index
    for student, part in ((alone, slice(None)), (shared, slice(8 * rank, 8 * rank + 8))):
        rng = Rng(torch.Generator().manual_seed(7), 16, None if student is alone else part)
        accelerator.backward(method(student, x0[part], rng=rng, progress=0.5, labels=labels[part]).mean())
    module = accelerator.unwrap_model(shared.net)
    pairs = [(one.grad, two.grad) for one, two in zip(alone.net.parameters(), module.parameters(), strict=True)]
    assert sum(one is not None for one, _ in pairs) == len(list(module.adapter()))
    assert all((one is None) == (two is None) for one, two in pairs)
    for one, two in pairs:
        assert one is None or (one - two).abs().max() < 1e-5 * max(1, one.abs().max())
    print("agrees")
    accelerator.end_training()


def test_two_processes_give_an_adapter_the_gradient_of_one(tmp_path):
    codes, out = together(2, compare_gradients, log=tmp_path / "log")
    assert codes == {0} and out.count("agrees") == 2, out


def train_adapter(folder):
    torch.set_num_threads(1)
    model = with_adapter(teachers.load("digits"), "digits", 4, TARGETS)
    state = trained(model, folder / "checkpoints")[-1]
    accelerator = Accelerator(cpu=True)
    if accelerator.is_main_process:
        files.save(folder / "ema.safetensors", state.ema.net.state_dict(), {})
    accelerator.wait_for_everyone()
    accelerator.end_training()


def test_two_processes_train_the_adapter_that_one_trains(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    train_adapter(tmp_path / "one")
    codes, out = together(2, train_adapter, tmp_path / "two", log=tmp_path / "log")
    assert codes == {0}, out
    one, two = (files.load(tmp_path / name / "ema.safetensors")[0] for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


LORA = ("Stable Diffusion", "SDXL", "SD3")  # whose pipelines load adapters


def student(tmp_path, family, halved=False, targets=None):
    """A student of two steps that is an adapter of a tiny pipeline, from its own file."""
    pipeline = FAMILIES[family](tmp_path / "parts")
    pipeline.save_pretrained(tmp_path / "origin")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    spec = str(tmp_path / "origin") + (f",prompts={tmp_path / 'prompts.txt'}" if hasattr(pipeline, "encode_prompt") else "")
    teacher = teachers.load(spec)
    sampler = "consistency:0.5" if family == "Stable Diffusion" else "ddim"
    model = changed(with_adapter(rounded(teacher) if halved else teacher, spec, 2, targets), 0.3)
    teachers.save(tmp_path / "s.safetensors", replace(model, sampling=Sampling.parse(sampler, steps=(1, 2))))
    return teachers.load(str(tmp_path / "s.safetensors") + spec.removeprefix(str(tmp_path / "origin"))), teachers.load(spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_and_where_there_are_any_adapter_files_give_the_pixels_of_our_sampler(family, tmp_path, request):
    if family != "Stable Diffusion":  # which runs in a process with diffusers alone
        request.getfixturevalue("stock_here")
    model, teacher = student(tmp_path, family, halved=family == "SDXL")
    labels = None if model.classes is None else [0, 1]
    own, before = (deliver.own_pixels(m, 1, labels, [0, 1]) for m in (model, replace(teacher, sampling=model.sampling)))
    assert (own - before).abs().max() > 5e-3  # far above the tolerance
    worst = deliver.export_pipelines(model, tmp_path / "out")
    assert max(worst.values()) < 1e-4
    if family not in LORA:
        with pytest.raises(ValueError, match="has no load_lora_weights: the exported pipeline holds the merged weights"):
            export_lora(model, tmp_path / "out")
        assert not (tmp_path / "out" / "lora").exists()
        return
    assert export_lora(model, tmp_path / "out") < 1e-4
    assert (tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "out" / "lora" / "scheduler" / "scheduler_config.json").is_file()
    stated = passport.read(tmp_path / "out" / "lora" / passport.NAME)
    assert stated.steps == (1, 2) and passport.recognises(stated, model) == "the same images"


@pytest.mark.parametrize("family", ["Stable Diffusion", "SD3"])
def test_an_adapter_of_all_layers_is_exported_from_wide_networks_too(family, tmp_path, stock_here, monkeypatch):
    monkeypatch.setattr(device, "WIDE", 4)  # from which on convolutions are stored channels last
    model, _ = student(tmp_path, family, targets=("all",))
    adapter = list(model.to(torch.device("cpu")).denoiser.net.adapter())
    assert {weight.ndim for weight in adapter} == {2, 4} and (family == "SD3" or not all(w.is_contiguous() for w in adapter))
    assert export_lora(model, tmp_path / "out") < 1e-4


def test_a_wrong_adapter_file_is_found_and_removed(tmp_path, stock_here, monkeypatch):
    model, _ = student(tmp_path, "Stable Diffusion")
    from teachers.export import lora

    right = lora.stock_names
    monkeypatch.setattr(lora, "stock_names", lambda net: {name: 2 * value for name, value in right(net).items()})
    with pytest.raises(RuntimeError, match="differs from our sampler"):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out" / "lora").exists()
    assert export_lora(merged(model), tmp_path / "out") is None


def test_a_ladder_of_adapters_is_trained_measured_loaded_and_exported(tmp_path, capsys, stock_here):
    run = tmp_path / "run"
    flags = words(
        "--preset smoke --images-per-stage 256 --images 64 --start-steps 4 --sweep-steps 1 --lora-rank 4 --lora-targets"
    )
    here(progressive.main, *flags, *TARGETS, "--output-dir", run)
    out = capsys.readouterr().out
    assert "M trained" in out and "pipeline/ gives the same pixels" in out and "no LoRA file: a pixel-space pipeline" in out
    first, last = (teachers.load(str(run / "stages" / n)) for n in "21")
    assert not any(torch.equal(one, two) for one, two in zip(first.denoiser.net.adapter(), last.denoiser.net.adapter()))
    there = {row["name"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    student = next(row for name, row in there.items() if "student@1" in name)
    assert student["model_sha256"] == last.fingerprint
    here(evaluate.main, "--images 64 --chunk 256 --steps 1 --samplers ddim --output-dir", tmp_path / "again", "--model", run)
    (again,) = (row for row in rows(tmp_path / "again").values() if row["model_sha256"] == last.fingerprint)
    assert again["fid"] == pytest.approx(student["fid"], rel=1e-3)
    export.main(words("--model", run, "--output-dir", tmp_path / "out"))
    plain = teachers.load(str(tmp_path / "out"))
    assert plain.network["family"] == "unet2d"
    x, t, cond = torch.randn(2, 1, 8, 8), torch.tensor(0.9), {"labels": torch.arange(2)}
    assert torch.allclose(plain.denoiser(x, t, **cond), last.denoiser(x, t, **cond), atol=1e-5)


def test_an_adapter_on_a_rounded_base_is_trained_and_is_a_teacher_of_adapters_and_of_whole_networks(tmp_path, stock_here):
    common = words("--preset smoke --images-per-stage 128 --images 64 --start-steps 2 --sweep-steps 1 --output-dir", tmp_path)
    here(progressive.main, *common, "--lora-rank 4 --base-precision bf16 --lora-targets", *TARGETS)
    rank4 = teachers.load(str(tmp_path))
    assert {weight.dtype for weight in rank4.denoiser.net.parameters()} == {torch.bfloat16, torch.float32}
    _, again = with_lora(LoraFlags(lora_rank=4), rank4, rank4, str(tmp_path), 0)
    _, plain = with_lora(LoraFlags(), rank4, rank4, str(tmp_path), 0)
    assert again is rank4 and plain.network["family"] == "unet2d"
    assert {weight.dtype for weight in plain.student().net.parameters()} == {torch.float32}
    assert all(weight.requires_grad for weight in plain.student().net.parameters())


def test_a_text_teacher_gets_an_adapter_with_all_that_saves_memory(made, tmp_path, capsys, stock_here, monkeypatch):  # noqa: F811
    teacher = ("--teacher", text_model(made), "--data", made / "captioned")
    lora = "--lora-rank 2 --base-precision bf16 --checkpoint-activations --microbatch 16 --decode sliced"
    flags = (SHORT, OURS, measured(made), lora, "--method dmd --steps 1 --output-dir", tmp_path / "run")
    moves: list = []
    monkeypatch.setattr(Codec, "to", lambda self, device: moves.append(device.type))
    here(consistency.main, *teacher, *flags)
    assert moves and set(moves) == {"cpu"}  # the autoencoder leaves the device before each stage
    out = capsys.readouterr().out
    assert "pipeline/ gives the same pixels" in out and "lora/ gives the same pixels in the teacher's own pipeline" in out
    model = teachers.load(str(tmp_path / "run"))
    assert max(weight.abs().max() for name, weight in model.denoiser.net.named_parameters() if "lora_B" in name) > 0
