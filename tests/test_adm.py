"""guided-diffusion's files against a small network of the same names, written from the paper (2105.05233, section 3)."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import refuses
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, silu

import teachers
from distill.sampling import Sampling
from teachers.export import deliver

GROUPS = 8


class Residual(nn.Module):
    """``film``: h = norm(h) (1 + scale) + shift, else the embedding is added. ``resample``: 2, 1/2 or 1, before the convolution."""

    def __init__(self, before, after, hidden, film, resample=1):
        super().__init__()
        self.film, self.resample = film, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(hidden, (1 + film) * after))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, after), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(after, after, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def sampled(self, x):
        if self.resample == 1:
            return x
        return interpolate(x, scale_factor=2) if self.resample == 2 else avg_pool2d(x, 2)

    def forward(self, x, emb):
        h = self.in_layers[2](self.sampled(silu(self.in_layers[0](x))))
        embedded = self.emb_layers(emb)[:, :, None, None]
        if self.film:
            scale, shift = embedded.chunk(2, 1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + embedded)
        return self.skip_connection(self.sampled(x)) + self.out_layers[3](silu(h))


class Attention(nn.Module):
    def __init__(self, channels, heads, order):
        super().__init__()
        self.heads, self.order = heads, order
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, emb):
        flat = x.flatten(2)
        rows, channels, out = self.qkv(self.norm(flat)), flat.shape[1], []
        width = channels // self.heads
        for head in range(self.heads):
            if self.order == "legacy":
                q, k, v = (rows[:, (3 * head + i) * width :][:, :width] for i in range(3))
            else:
                q, k, v = (rows[:, i * channels + head * width :][:, :width] for i in range(3))
            scores = q.transpose(1, 2) @ k / math.sqrt(width)  # [B, to, from]
            out.append(v @ scores.softmax(-1).transpose(1, 2))
        return (flat + self.proj_out(torch.cat(out, 1))).view_as(x)


class Resampling(nn.Module):
    """A convolution with stride 2, called ``op``, or one after doubling the sides, called ``conv``."""

    def __init__(self, name, channels):
        super().__init__()
        self.up = name == "conv"
        self.add_module(name, nn.Conv2d(channels, channels, 3, stride=1 if self.up else 2, padding=1))

    def forward(self, x, emb):
        return self.conv(interpolate(x, scale_factor=2)) if self.up else self.op(x)


class First(nn.Conv2d):
    def forward(self, x, emb):
        return super().forward(x)


class ADM(nn.Module):
    """(x [B, 3, H, W], index [B], labels [B] or None) -> [B, 3 or 6, H, W]."""

    def __init__(self, base=16, multipliers=(1, 2), layers=1, attends=(1,), resnet=True, film=True, heads=2, width=None,
                 order="legacy", classes=None, variance=False):  # fmt: skip
        super().__init__()
        self.base, hidden = base, 4 * base
        self.time_embed = nn.Sequential(nn.Linear(base, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        if classes:
            self.label_emb = nn.Embedding(classes, hidden)

        def block(before, after, level):
            made = [Residual(before, after, hidden, film)]
            return made + ([attention(after)] if level in attends else [])

        def attention(channels):
            return Attention(channels, channels // width if width else heads, order)

        channels, last = [base * m for m in multipliers], len(multipliers) - 1
        now, kept = channels[0], [channels[0]]
        inputs = [[First(3, now, 3, padding=1)]]
        for level, c in enumerate(channels):
            for _ in range(layers):
                inputs.append(block(now, c, level))
                now = c
                kept.append(c)
            if level < last:
                inputs.append([Residual(c, c, hidden, film, 0.5) if resnet else Resampling("op", c)])
                kept.append(c)
        middle = [Residual(now, now, hidden, film), attention(now), Residual(now, now, hidden, film)]
        outputs = []
        for level, c in reversed(list(enumerate(channels))):
            for j in range(layers + 1):
                outputs.append(block(now + kept.pop(), c, level))
                now = c
                if level and j == layers:
                    outputs[-1].append(Residual(c, c, hidden, film, 2) if resnet else Resampling("conv", c))
        self.input_blocks, self.output_blocks = (nn.ModuleList(map(nn.ModuleList, blocks)) for blocks in (inputs, outputs))
        self.middle_block = nn.ModuleList(middle)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, now), nn.SiLU(), nn.Conv2d(now, 6 if variance else 3, 3, padding=1))
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=(1.5 if "qkv" in name else 1) / math.sqrt(p[0].numel()))
            else:
                nn.init.normal_(p, mean=float(name.endswith("weight")), std=0.3)  # gains of norms, and biases

    def forward(self, x, index, labels=None):
        half = self.base // 2
        angles = index[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1).to(x))
        if labels is not None:
            emb = emb + self.label_emb(labels)
        kept = []
        for block in self.input_blocks:
            x = through(block, x, emb)
            kept.append(x)
        x = through(self.middle_block, x, emb)
        for block in self.output_blocks:
            x = through(block, torch.cat([x, kept.pop()], 1), emb)
        return self.out(x)


def through(block, x, emb):
    for module in block:
        x = module(x, emb)
    return x


def written(path, net, prefix=""):
    save_file({prefix + name: value for name, value in net.state_dict().items()}, path)
    return f"guided:{path},size=8,groups={GROUPS}"


@pytest.fixture
def adm():
    return ADM(order="new", classes=5, variance=True).eval()


ADMS = {
    "as published at 64x64": (
        {"order": "new", "width": 16, "classes": 5, "variance": True}, "head_channels=16,attention=new,schedule=cosine"
    ),
    "as published at 256x256": (
        {"multipliers": (1, 1, 2), "layers": 2, "attends": (1, 2), "width": 8, "classes": 5, "variance": True}, "head_channels=8"
    ),
    "heads in the legacy order": ({}, "heads=2"),
    "convolutions": ({"resnet": False, "film": False}, "heads=2,schedule=linear,attention=legacy"),
    "attention above the middle": (
        {"resnet": False, "attends": (0, 1), "multipliers": (1, 1, 3), "heads": 1, "classes": 2}, "heads=1"
    ),
    "added embedding": ({"film": False, "order": "new", "variance": True}, "heads=2,attention=new"),
    "attention in the middle alone": ({"attends": (), "layers": 3}, "heads=2"),
    "one resolution": ({"multipliers": (1,), "attends": (0,), "layers": 2, "width": 8, "classes": 3}, "head_channels=8"),
}  # fmt: skip


def alphas_cumprod(schedule):
    if schedule == "linear":
        return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    bar = torch.cos((torch.linspace(0, 1, 1001, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2) ** 2
    return (bar[1:] / bar[:-1]).clamp(min=0.001).cumprod(0)


@pytest.mark.parametrize("options, spec", ADMS.values(), ids=ADMS)
@torch.no_grad()
def test_a_file_of_guided_diffusion_gives_the_eps_of_its_network(tmp_path, options, spec):
    net = ADM(**options).eval()
    teacher = teachers.load(written(tmp_path / "adm.safetensors", net) + "," + spec)
    assert teacher.shape == (3, 8, 8) and teacher.classes == options.get("classes") and teacher.null is None
    x, index = torch.randn(4, 3, 8, 8), torch.tensor([0.0, 17.0, 300.0, 500.0])
    labels = torch.arange(4) % options["classes"] if "classes" in options else None
    eps = net(x, index, labels)[:, :3]
    bar = alphas_cumprod("cosine" if "cosine" in spec else "linear")[index.long()].float()[:, None, None, None]
    got = teacher.denoiser(x, (index.double() + 1) / 1000, **teacher.condition(labels))
    assert torch.allclose(got, (x - (1 - bar).sqrt() * eps) / bar.sqrt(), rtol=1e-4, atol=1e-4)
    exact, ours = net.double()(x.double(), index, labels)[:, :3], teacher.parametric.net.double()(x.double(), index, labels)
    assert torch.allclose(ours, exact, rtol=0, atol=1e-9) and exact.std() > 0.3


@torch.no_grad()
def test_a_loaded_network_survives_our_own_file(tmp_path, adm):
    teacher = teachers.load(written(tmp_path / "adm.safetensors", adm) + ",heads=2,attention=new,null=4")
    teachers.save(tmp_path / "ours.safetensors", teacher)
    again = teachers.load(str(tmp_path / "ours.safetensors"))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8])
    for label in (1, teacher.null):
        here, there = (m.denoiser(x, t, labels=torch.tensor([label, 3])) for m in (teacher, again))
        assert torch.equal(here, there)
    assert again.fingerprint == teacher.fingerprint and again.classes == 4 and again.null == 4
    assert again.parametric.net.unet.config["out_channels"] == 3  # without the variance


@pytest.mark.parametrize("prefix", ["module.", "model.", "ema.module."])
def test_a_prefix_that_all_names_share_is_removed(tmp_path, adm, prefix):
    plain, prefixed = (teachers.load(written(tmp_path / "adm.safetensors", adm, p) + ",heads=2") for p in ("", prefix))
    assert plain.fingerprint == prefixed.fingerprint  # of weights and description


def test_weights_in_half_precision_are_converted_to_float32(tmp_path, adm):
    net = teachers.load(written(tmp_path / "adm.safetensors", adm.half()) + ",heads=2").parametric.net
    assert {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_student_of_it_is_exported_in_stock_classes(tmp_path, adm):
    teacher = teachers.load(written(tmp_path / "adm.safetensors", adm) + ",heads=2,attention=new")
    student = replace(teacher, sampling=Sampling("ddim", steps=(1, 2)))
    assert deliver.export_pipelines(student, tmp_path)["pipeline"] < 1e-4


def refused(spec, *parts):
    refuses(" ... ".join(parts), teachers.load, spec)


def test_options_that_do_not_fit_are_refused_in_one_line(tmp_path, adm):
    file = written(tmp_path / "adm.safetensors", adm)
    accepted = "head_channels=WIDTH or heads=COUNT"
    refused(file, "size, and either head_channels or heads, are required", accepted)
    refused(file + ",heads=2,head_channels=16", "either head_channels or heads", accepted)
    refused(f"guided:{tmp_path / 'adm.safetensors'},heads=2,groups=8", "size, and either", "size=SIDE")
    wrong = ",heads=2,schedule=quadratic,attention=old,layers=2,null=-1,heads=two"
    refused(file + wrong, "schedule=quadratic", "layers=2", accepted)
    refused(file + ",heads=0", "unknown heads=0", accepted)
    refused(file.replace("size=8", "size=9") + ",heads=2", "adm.safetensors: size=9 cannot be halved")
    refused(file.replace("groups=8", "groups=32") + ",heads=2", "adm.safetensors: 32 groups do not divide 16, 32 channels")
    refused(file + ",heads=64", "heads=64 does not fit attention over 32 channels")
    refused(file + ",heads=3", "heads=3 does not fit attention over 32 channels")
    refused(file + ",head_channels=24", "head_channels=24 does not fit attention over 32 channels")
    refused(file + ",heads=2,null=3", "null=3: this network has labels 0 to 4")


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path, adm):
    path, rest, weights = tmp_path / "adm.safetensors", f",size=8,groups={GROUPS},heads=2", adm.state_dict()

    def changed(*without, **given):
        kept = {k: v for k, v in weights.items() if not k.startswith(without)} if without else dict(weights)
        save_file(kept | {k.replace("__", "."): v for k, v in given.items()}, path)
        return f"guided:{path}{rest}"

    torch.save(adm, tmp_path / "adm.pt")
    refused(f"guided:{tmp_path / 'adm.pt'}{rest}", "adm.pt: loading this file would run code from it")
    refused(changed("input_blocks.1.0.out_layers.0"), "adm.safetensors: 2 weights missing: input_blocks.1.0.out_layers.0.bias")
    refused(changed("time_embed.0", "out.2"), "lacks out.2.weight with 4 dimensions; accepted is the state dict")
    refused(changed("output_blocks"), "no tensors of output_blocks.0", "accepted is the state dict")
    refused(changed("input_blocks.2"), "no tensors of input_blocks.2", "resampling by convolutions or residual blocks")
    refused(changed("input_blocks.3.1"), "attention in output_blocks.0, output_blocks.1 but not in input_blocks.3")
    refused(changed(out__4__weight=torch.ones(3)), "adm.safetensors: 1 weights left over: out.4.weight")
    refused(changed(optimizer__step=torch.ones(3)), "left over: optimizer.step")
    refused(changed("out.2.weight", out__2__weight=torch.ones(5, 16, 3, 3)), "3 channels in and 5 out")
    refused(changed("label_emb", label_emb__weight=torch.ones(5, 7)), "1 weights of another shape: unet.class_embedding.weight")
    refused(changed("time_embed.0.weight", time_embed__0__weight=torch.ones(64, 32)), "32 model channels, 16 at full")
    refused(written(path, ADM(base=8, attends=(0, 1))) + ",heads=2", "heads=2 does not fit attention over 8, 16 channels")
    save_file({"module." + k: v for k, v in weights.items()} | {"epoch": torch.ones(1)}, path)
    refused(f"guided:{path}{rest}", "no tensors of input_blocks.0")
    save_file({"weight": torch.ones(1)}, path)
    refused(f"guided:{path}{rest}", "accepted")
