"""The cost model of many processes, against the sizes of diffusers' networks and the bytes of real collective calls."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from collectives import counted
from conftest import ROOT, refuses
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from processes import together
from test_parallel import averaged, regression, shard, steps_of
from torch import nn

import teachers
from distill.denoiser import Denoiser
from distill.schedule import Flow
from recipes.common.cost import cost
from recipes.common.footprint import saved_bytes
from recipes.common.plan import sharding_of, training_memory


def celeba():
    """The network of google/ddpm-celebahq-256."""
    return UNet2DModel(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    )


def sd15():
    return UNet2DConditionModel(cross_attention_dim=768)


def sdxl():
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def weights(net):
    return sum(p.numel() for p in net.parameters())


def sizes(make):
    """The weights of a network that is built without memory: all, those of its largest block, and those outside of all blocks."""
    with torch.device("meta"):
        net = make()
    blocks = [weights(module) for module in net.modules() if isinstance(module, ResnetBlock2D | BasicTransformerBlock)]
    return weights(net), max(blocks), weights(net) - sum(blocks)


TABLE = {
    "DDPM CelebA-HQ, 256x256": (celeba, 113_673_219),
    "Stable Diffusion 1.5": (sd15, 859_520_964),
    "Stable Diffusion XL": (sdxl, 2_567_463_684),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_the_table_in_the_documentation_is_what_the_model_gives_for_diffusers_networks(name):
    make, published = TABLE[name]
    trained, block, root = sizes(make)
    assert trained == published
    text = (Path(ROOT) / "docs" / "many-gpus.md").read_text(encoding="utf-8")
    for sharding, label in (("none", "DDP"), ("gradients", "FSDP2, weights kept"), ("weights", "FSDP2")):
        c = cost(trained, 8, sharding, block=block, root=root, teacher=trained, target_calls=1)
        own = [c.weights, c.gradients, c.adam, c.average, c.teacher, c.memory, c.sent]
        row = f"| {name} | {label} | " + " | ".join(f"{x / 1e9:.1f}" for x in own) + " |"
        assert row in text, row


def test_one_process_sends_nothing_and_ddp_shards_nothing():
    alone = cost(1000, 1, "weights", block=100, root=10)
    assert alone.sent == 0 and alone.gathered == 0 and alone.weights == 4000 and alone.average == 4000
    ddp = cost(1000, 4, target_calls=3)
    assert (ddp.memory, ddp.gathered, ddp.reduced, ddp.sent) == (5 * 4000, 0, 4000, 6000)
    assert cost(1000, 4, averaged=False).memory == 4 * 4000
    refuses("sharding 'zero3': accepted are none, gradients, weights, zero2", cost, 1, 1, "zero3")


def test_zero_shards_all_but_weights_and_average_and_sends_as_much_as_ddp():
    zero, ddp = cost(1000, 4, "zero2", block=50, target_calls=3), cost(1000, 4, target_calls=3)
    assert (zero.weights, zero.gradients, zero.adam, zero.average) == (5000, 1000 + 200, 2000, 4000)
    assert (zero.gathered, zero.reduced) == (4000, 4000) and zero.sent == ddp.sent


def test_saved_bytes_are_those_of_the_tensors_that_a_backward_pass_needs():
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(16, 8)
    assert saved_bytes(lambda: (x @ weight).exp().sum(), [weight]) == 2 * 16 * 8 * 4  # x and the exponential


@pytest.mark.parametrize("reshard, sharding", [(True, "weights"), (False, "gradients")])
def test_the_plan_takes_blocks_and_root_from_the_wrapped_classes_and_counts_nested_blocks_once(reshard, sharding):
    class Block(nn.Module):
        def __init__(self, *inner):
            super().__init__()
            self.own, self.inner = nn.Linear(4, 4, bias=False), nn.ModuleList(inner)

    net = nn.Sequential(nn.Linear(3, 3, bias=False), Block(Block()), Block())
    net[2].own = nn.Linear(10, 10, bias=False)
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=["Block"], reshard_after_forward=reshard)
    under = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    assert sharding_of(under, net) == {"sharding": sharding, "block": 100, "root": 9}
    assert sharding_of(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU), net) == {"sharding": "none"}


@pytest.mark.parametrize("averaged, copies", [(True, 5), (False, 4)])
def test_the_plan_counts_weights_gradients_adam_average_teacher_and_saved_activations(averaged, copies):
    net = nn.Linear(8, 8, bias=False)
    student = Denoiser(Timeless(net), Flow(), "x0")

    def method(student, x0, *, rng, progress, **cond):
        return student(x0, torch.full((len(x0),), 0.5)).exp().flatten(1).mean(1)

    needed = training_memory(method, student, torch.randn(16, 8), {}, Accelerator(cpu=True), frozen=1000, averaged=averaged)
    assert needed.memory == copies * 64 * 4 + 1000 + needed.activations
    assert needed.activations >= 2 * 16 * 8 * 4  # input of the layer, and the exponential


class Timeless(nn.Module):
    """Call a layer without a time."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x)


def count_bytes():
    """In each of two processes: the bytes that the second step gathers and reduces, against the model, within the padding of shards."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    net = teachers.load("digits").parametric.net
    trained = weights(net)
    root = trained - sum(weights(module) for module in net.modules() if isinstance(module, ResnetBlock2D))
    for sharding in ("none", "gradients", "weights"):
        for method, targets in ((regression, 0), (averaged, 1)):
            if sharding != "none":
                shard(accelerator, sharding == "weights")
            states = steps_of(accelerator, method, f"{sharding} {targets}")
            next(states)
            with counted() as found:
                next(states)
            expected = cost(trained, 2, sharding, root=root, target_calls=targets)
            reduced = "allreduce" if sharding == "none" else "reduce_scatter_base"
            assert found.bytes["allgather_base"] == pytest.approx(expected.gathered, rel=0.01), (sharding, targets)
            assert found.bytes[reduced] == pytest.approx(expected.reduced, rel=0.01), (sharding, targets)
            print("agrees")
    accelerator.end_training()


@pytest.mark.slow
def test_the_bytes_of_collective_calls_are_those_of_the_model(tmp_path):
    codes, out = together(2, count_bytes, log=tmp_path / "log")
    assert codes == {0} and out.count("agrees") == 12, out
