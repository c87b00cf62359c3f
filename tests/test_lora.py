"""A student that is a LoRA adapter: its base is the teacher itself, and only the adapter is trained, averaged, saved and read."""

import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from accelerate import Accelerator
from conftest import refuses, words
from pipelines import FAMILIES, PROMPTS

import fewstep as fs
import teachers
from distill import files
from distill.consistency import Consistency, Neighbours, truncated_snr
from distill.resume import Resumable
from distill.sampling import Sampling
from distill.schedule import Cosine
from distill.second import SecondTrainer
from distill.speed import compiled
from distill.target import Mix
from distill.train import BatchSplit, Optimization, train
from recipes import consistency, progressive
from recipes.common.building import method_of
from recipes.data import sets
from teachers.custom import wrap
from teachers.lora import merged, rounded, with_adapter
from teachers.networks.lora import PROJECTIONS, is_adapter, targets_of

TARGETS = ("conv1", "conv2", "to_q", "to_v")
X, T, LABELS = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor(0.6), torch.arange(4)


def changed(model, size=0.05):
    """The model with an adapter that is not 0 any more."""
    net, rng = copy.deepcopy(model.denoiser.net), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in net.adapter():
            weight.add_(size * torch.randn(weight.shape, generator=rng))
    return replace(model, denoiser=replace(model.denoiser, net=net))


def x0(model):
    with torch.no_grad():
        return model.denoiser(X, T, **model.condition(LABELS))


def pointers(net):
    return {weight.data_ptr() for weight in net.parameters()}


def trained(model, path, steps=None, images=96, seed=0):
    """The states of a training with an average, which the method uses, and with checkpoints."""
    accelerator, data = Accelerator(cpu=True), sets.load("digits")
    method = Consistency(Mix(model.denoiser), Neighbours(lambda _: 4, grid="uniform"), truncated_snr, averaged=True)
    batches = data.batches(
        BatchSplit(32, accelerator.num_processes, accelerator.process_index), seed, "p", accelerator.device, model.condition
    )
    how = Optimization(images, 32, ema_halflife_images=64)
    states = train(
        method,
        model.student(),
        batches,
        accelerator,
        how,
        seed=seed,
        phase="p",
        resumable=Resumable(path),
        save_every_images=32,
    )
    return list(islice(states, steps))


def test_a_new_adapter_changes_no_bit_and_needs_no_second_base(teacher):
    model = with_adapter(teacher, "digits", 4, TARGETS)
    student = model.student()
    assert torch.equal(x0(model), x0(teacher))
    assert all(weight.requires_grad == is_adapter(name) for name, weight in student.net.named_parameters())
    assert pointers(teacher.denoiser.net) < pointers(student.net)
    assert pointers(copy.deepcopy(student.net)) & pointers(student.net) == pointers(teacher.denoiser.net)


def test_the_teacher_keeps_every_bit_while_a_student_on_it_is_trained(teacher, tmp_path):
    before, weights = x0(teacher), files.weights_sha256(teacher.denoiser.net.state_dict())
    model = with_adapter(teacher, "digits", 4, TARGETS)
    state = trained(model, tmp_path)[-1]
    assert torch.equal(x0(teacher), before) and files.weights_sha256(teacher.denoiser.net.state_dict()) == weights
    one, two = (x0(replace(model, denoiser=denoiser)) for denoiser in (state.student, state.ema))
    assert (one - before).abs().max() > 1e-3 and (two - one).abs().max() > 1e-4


def test_gradient_optimizer_average_and_checkpoint_are_those_of_the_adapter_alone(teacher, tmp_path):
    model = with_adapter(teacher, "digits", 4, TARGETS)
    state = trained(model, tmp_path, steps=2)[-1]
    assert all(weight.requires_grad == is_adapter(name) for name, weight in state.student.net.named_parameters())
    base = pointers(teacher.denoiser.net)
    assert pointers(state.ema.net) & pointers(state.student.net) == base
    tensors, _ = files.load(next(tmp_path.glob("resume-*")))
    names = [name for name in tensors if name.startswith(("net.", "ema.", "optimizer."))]
    assert len(names) == (1 + 1 + 3) * len(list(state.student.net.adapter())) and all(map(is_adapter, names))


def test_a_killed_training_of_an_adapter_continues_to_the_same_bits(teacher, tmp_path):
    model = with_adapter(teacher, "digits", 4, TARGETS, seed=2)
    whole = trained(model, tmp_path / "whole")[-1]
    trained(model, tmp_path / "cut", steps=2)
    again = trained(model, tmp_path / "cut")
    assert again[0].step == 2
    for kind in ("student", "ema"):
        one, two = (getattr(state, kind).net.state_dict() for state in (whole, again[-1]))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_file_holds_the_adapter_and_finds_its_base(teacher, tmp_path):
    model = changed(with_adapter(teacher, "digits", 4, TARGETS))
    teachers.save(tmp_path / "student.safetensors", model)
    again = teachers.load(str(tmp_path))
    assert torch.equal(x0(again), x0(model)) and again.fingerprint == model.fingerprint != teacher.fingerprint
    tensors, description = files.load(tmp_path / "student.safetensors")
    assert all(map(is_adapter, tensors)) and description["network"]["config"]["source"] == {"spec": "digits"}


def test_a_base_that_is_gone_or_changed_is_refused_in_one_line(teacher, tmp_path):
    base = tmp_path / "base.safetensors"
    teachers.save(base, teacher)
    teachers.save(tmp_path / "student.safetensors", with_adapter(teachers.load(str(base)), str(base), 4, TARGETS))
    teachers.load(str(tmp_path))
    other = copy.deepcopy(teacher)
    other.denoiser.net.unet.conv_in.bias.data += 1
    teachers.save(base, other)
    refuses("base.safetensors: its weights are not those that this LoRA adapter was trained on", teachers.load, str(tmp_path))
    teachers.save(base, with_adapter(teacher, str(base), 4, TARGETS))  # a file that names itself as its base
    refuses("is a model without one", teachers.load, str(base))
    base.unlink()
    refuses("base.safetensors: there is no such file", teachers.load, str(tmp_path))


def test_merged_weights_give_the_same_model_and_leave_base_and_adapter_alone(teacher):
    before, model = x0(teacher), changed(with_adapter(teacher, "digits", 4, TARGETS))
    with_it, plain = x0(model), merged(model)
    assert (with_it - before).abs().max() > 0.01 and (x0(plain) - with_it).abs().max() < 1e-5
    assert (
        plain.network == teacher.network and plain.denoiser.net.state_dict().keys() == teacher.denoiser.net.state_dict().keys()
    )
    assert torch.equal(x0(teacher), before) and torch.equal(x0(model), with_it) and merged(teacher) is teacher


def test_a_rounded_base_is_bfloat16_for_teacher_and_student_and_its_adapter_float32(tmp_path):
    plain = teachers.load("digits")
    exact = changed(with_adapter(teachers.load("digits"), "digits", 4, TARGETS))
    model = changed(with_adapter(rounded(plain), "digits", 4, TARGETS))
    kinds = {(is_adapter(name), weight.dtype) for name, weight in model.denoiser.net.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert 0 < (x0(model) - x0(exact)).abs().max() < 0.05
    teachers.save(tmp_path / "student.safetensors", model)
    again = teachers.load(str(tmp_path))
    assert torch.equal(x0(again), x0(model))
    weights = merged(again).denoiser.net.state_dict()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    untouched = [name for name in weights if not any(f".{target}." in name for target in TARGETS)]
    own = teachers.load("digits").denoiser.net.state_dict()
    assert untouched and all(torch.equal(weights[name], own[name].bfloat16().float()) for name in untouched)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_networks_takes_an_adapter_and_its_file_needs_no_prompts(family, tmp_path):
    made = FAMILIES[family](tmp_path / "parts")
    made.save_pretrained(tmp_path / "origin")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    spec = str(tmp_path / "origin")
    spec += f",prompts={tmp_path / 'prompts.txt'}" if hasattr(made, "encode_prompt") else ""
    teacher = teachers.load(spec)
    model = changed(with_adapter(teacher, spec, 2), 0.2)
    names = {name.split(".lora_A")[0] for name, _ in model.denoiser.net.named_parameters() if ".lora_A." in name}
    inside = model.denoiser.net.net
    assert names == {f"net.{name}" for name, module in inside.named_modules() if hasattr(module, "lora_A")}
    plain = [(n, m) for n, m in teacher.denoiser.net.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(names) == sum(getattr(module, "groups", 1) == 1 for _, module in plain)  # all but depthwise convolutions
    attention = targets_of(teacher.denoiser.net, ["attention"])
    assert attention and set(attention) < set(PROJECTIONS)
    teachers.save(tmp_path / "student.safetensors", replace(model, sampling=Sampling(steps=(1,))))
    (tmp_path / "prompts.txt").unlink()
    again, x = teachers.load(str(tmp_path / "student.safetensors")), torch.randn(2, *model.shape)
    if teacher.embeddings is not None:
        again = again.with_conditions(teacher.embeddings)
    one, two, zero = (m.denoiser(x, T, **m.condition(torch.tensor([0, 1]))) for m in (model, again, teacher))
    assert torch.equal(one, two) and (one - zero).abs().max() > 1e-4


def test_what_does_not_fit_an_adapter_ends_in_one_line_and_writes_nothing(teacher, refused, tmp_path, monkeypatch):
    teachers.save(tmp_path / "rank4.safetensors", with_adapter(teacher, "digits", 4, TARGETS))
    lora = "--preset smoke --lora-rank 4"
    there = "there are conv, conv1, conv2, conv_in, conv_out, conv_shortcut, linear_1, linear_2, time_emb_proj, to_k, to_out.0, to_q"
    for recipe, flags, message in (
        (progressive, f"{lora} --lora-targets to_q attn", f"--lora-targets attn: no layer has this name; {there}"),
        (progressive, f"{lora} --teacher oracle:digits", "an oracle has no network"),
        (progressive, "--lora-targets to_q", "--lora-targets needs an adapter: accepted with --lora-rank alone"),
        (consistency, "--base-precision bf16", "--base-precision bf16 needs an adapter"),
        (consistency, f"{lora} --student new", "without --student"),
        (consistency, f"{lora} --method ict --from-scratch", "accepted are methods with a teacher"),
        (consistency, f"{lora} --method meanflow", "without new layers (slow time, two times, heads, --guidance-range)"),
        (
            progressive,
            f"--lora-rank 8 --teacher {tmp_path / 'rank4.safetensors'}",
            "the teacher has an adapter of rank 4 on conv1",
        ),
        (progressive, "--lora-rank -1", "--lora-rank"),
    ):
        assert message in refused(recipe.main, *words(flags), "--output-dir", tmp_path / "none")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "--lora-rank with FSDP2" in refused(progressive.main, *words(lora), "--output-dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_missing_peft_is_named_in_one_line(teacher, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuses("LoRA needs the package peft: pip install 'fewstep[lora]'", with_adapter, teacher, "digits", 4)


def test_a_network_without_attention_says_which_layers_it_has():
    net = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2), "blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})
    refuses(
        "--lora-targets attention: no layer has this name; there are blocks.0, first, or all", targets_of, net, ["attention"]
    )
    assert targets_of(net, None) == targets_of(net, ["all"]) == ("blocks.0", "first")


def test_the_second_network_of_a_method_is_an_adapter_on_the_same_base(teacher, tmp_path):
    model = with_adapter(teacher, "digits", 4, TARGETS)
    flags = consistency.Config(method="dmd", output_dir=str(tmp_path))
    method = method_of(flags, teacher, model, sets.load("digits"), 0)
    trainer = SecondTrainer(method, Accelerator(cpu=True))
    assert pointers(trainer.module) & pointers(model.denoiser.net) == pointers(teacher.denoiser.net)
    assert trainer.module.state_dict().keys() == model.denoiser.net.state_dict().keys()
    assert all(weight.requires_grad == is_adapter(name) for name, weight in trainer.module.named_parameters())
    plain = method_of(flags, teacher, teacher, sets.load("digits"), 0).second.begin.net
    assert plain is teacher.denoiser.net


def test_a_compiled_network_with_an_adapter_gives_the_same_x0(teacher):
    model = changed(with_adapter(teacher, "digits", 4, TARGETS))
    before = x0(model)
    with compiled(model.denoiser, backend="eager"):
        assert torch.allclose(x0(model), before, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 0}, {"rank": 10**9}, {"rank": "4"}, {"rank": None}, {"targets": "conv1"}, {"targets": [3]}, {"targets": ["nothing"]},
        {"targets": []}, {"source": {}}, {"source": "digits"}, {"source": {"spec": 3}}, {"source": {"spec": "oracle:digits"}},
        {"source": {"folder": "/"}}, {"source": {"spec": "os.path:join,schedule=cosine,prediction=eps,shape=2"}}, {"sha256": 0},
        {"network": {"family": "given", "config": {"class": "x"}}, "source": {"spec": "nothing"}},
    ],
)  # fmt: skip
def test_a_file_whose_adapter_is_described_wrongly_is_refused_in_one_line(changes, teacher, tmp_path):
    path = tmp_path / "student.safetensors"
    teachers.save(path, with_adapter(teacher, "digits", 4, TARGETS))
    tensors, description = files.load(path)
    description["network"]["config"] |= changes
    files.save(path, tensors, {key: value for key, value in description.items() if key != "format"})
    refuses("", teachers.load, str(path))


def test_an_adapter_of_a_teacher_without_a_file_is_loaded_onto_its_network(teacher, tmp_path):
    """Made from Python: the base is given as net."""
    path = tmp_path / "student.safetensors"
    for net, model in ((teacher.denoiser.net, teacher), (Mine(), None)):
        model = model or wrap(net, schedule=Cosine(), prediction="v", shape=(1, 8, 8), classes=10)
        student = changed(with_adapter(model, "python-0", 2, ["conv1"] if net is teacher.denoiser.net else ["layer"]))
        teachers.save(path, student)
        assert torch.equal(x0(fs.load(path, net=net).inner), x0(student))
        refuses("", fs.load, path)
    refuses("its weights are not those that this LoRA adapter was trained on", fs.load, path, net=Mine())


class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x, t, labels):
        return self.layer(x.flatten(1)).view_as(x)
