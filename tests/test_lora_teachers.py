"""A user's own LoRA in a teacher, and folders whose weights are pickles."""

import sys

import diffusers
import pytest
import torch
from conftest import refuses
from flow_pipelines import sana
from pipelines import PROMPTS, dit, sd
from safetensors.torch import load_file, save_file

import teachers

peft = pytest.importorskip("peft")
MADE = {"sd": (sd, "unet", ["to_q", "to_v"]), "sana": (sana, "transformer", ["to_q", "proj_out"])}


def lora(pipeline, part, targets, folder):
    """Write a LoRA of random weights, as a training script of diffusers does."""
    net = getattr(pipeline, part)
    net.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.normal_()
    type(pipeline).save_lora_weights(folder, **{f"{part}_lora_layers": peft.get_peft_model_state_dict(net)})
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(params=MADE)
def made(request, tmp_path):
    """A pipeline with its LoRA, the folder of the base, and the LoRA's file."""
    make, part, targets = MADE[request.param]
    pipeline = make(tmp_path / "parts")
    pipeline.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return pipeline, part, f"{tmp_path / 'base'},prompts={tmp_path / 'prompts.txt'}", lora(pipeline, part, targets, tmp_path)


def test_a_teacher_with_a_lora_has_the_outputs_of_its_base_with_the_adapter(made):
    pipeline, part, spec, file = made
    teacher, base = teachers.load(f"{spec},lora={file}"), teachers.load(spec)
    x, t, cond = torch.randn(2, *teacher.shape), torch.full((2,), 400.0), teacher.condition(torch.tensor([0, 1]))
    theirs = type(teacher.denoiser.net)(getattr(pipeline, part).eval())
    with torch.no_grad():
        expected, found, before = theirs(x, t, **cond), teacher.denoiser.net(x, t, **cond), base.denoiser.net(x, t, **cond)
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(before, expected, atol=0.01)
    assert teacher.denoiser.net.state_dict().keys() == base.denoiser.net.state_dict().keys()
    assert teacher.record["lora"] == str(file) and teacher.fingerprint != base.fingerprint
    assert torch.equal(teachers.load(f"{spec},lora={file.parent}").denoiser.net(x, t, **cond), found)


def test_a_lora_that_does_not_fit_is_refused_in_one_line(made, tmp_path, monkeypatch):
    _, part, spec, file = made
    tensors = load_file(file)
    save_file({key.replace(part, "text_encoder"): value for key, value in tensors.items()}, tmp_path / "text.safetensors")
    save_file({key: value[..., :1].contiguous() for key, value in tensors.items()}, tmp_path / "narrow.safetensors")
    save_file({key.replace("blocks", "bricks"): value for key, value in tensors.items()}, tmp_path / "other.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "none.safetensors")
    for name, message in (
        (
            "text",
            "of its weights are of text encoders, which are not changed here; accepted are weights with the adapter fused",
        ),
        ("narrow", "size mismatch"),
        ("other", "lora="),
        ("none", "lora="),
        ("missing", "there is no such file; accepted is a LoRA as .safetensors"),
    ):
        line = refuses(message, teachers.load, f"{spec},lora={tmp_path / name}.safetensors")
        assert len(line.replace(str(tmp_path), "")) < 300, line
    monkeypatch.setitem(sys.modules, "peft", None)
    refuses("a LoRA needs the package peft: pip install peft", teachers.load, f"{spec},lora={file}")


def test_a_pipeline_without_loras_refuses_one(tmp_path):
    dit(tmp_path).save_pretrained(tmp_path / "base")
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    refuses(
        "diffusers loads no LoRA into a DiTPipeline", teachers.load, f"{tmp_path / 'base'},lora={tmp_path / 'x.safetensors'}"
    )


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_as_pickles_alone_are_refused_with_the_line_that_converts_them(tmp_path, monkeypatch, part):
    sd(tmp_path / "words").save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    weights = next((tmp_path / "base" / part).glob("*.safetensors"))
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(weights), weights.parent / name)
    spec = f"{tmp_path / 'base'},prompts={tmp_path / 'prompts.txt'}"
    expected = teachers.load(spec).fingerprint  # the safetensors beside it are read
    weights.unlink()
    line = refuses(f"{part} has weights as .bin alone, which are not read; convert them: python -c ", teachers.load, spec)
    monkeypatch.chdir(tmp_path)
    exec(line.partition('python -c "')[2].rpartition('"')[0], {})  # what the user is asked to run
    assert teachers.load(spec.replace("base", "base-safe", 1)).fingerprint == expected
    assert diffusers.DiffusionPipeline.from_pretrained(tmp_path / "base-safe", use_safetensors=True)
