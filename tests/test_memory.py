"""The memory of training on one GPU: activations on the meta device, what fits, and the tables in the documentation."""

from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
import torch.utils.checkpoint
from conftest import ROOT

from benchmarks import footprint
from distill.speed import checkpoint_activations
from recipes.common.cost import ADAM, CARDS, Cost, calls_of_a_step, cost, largest_batch
from recipes.common.footprint import Lowered, saved_bytes
from teachers.networks.lora import Adapted

PUBLISHED = (859_520_964, 2_567_463_684, 2_028_328_000, 1_604_462_752, 11_901_408_320, 6_154_908_736)


def small(device, adapted=False):
    """A UNet of blocks that have checkpoints, and its call with two images."""
    with torch.device(device):
        net = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=4, cross_attention_dim=8,
            attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        x, t, text = torch.randn(2, 4, 16, 16), torch.zeros(2), torch.randn(2, 5, 8)
    net = Adapted(net, 2, ["to_q", "to_v"]).requires_grad_(True) if adapted else net
    return net.train(), lambda: getattr(net, "net", net)(x, t, encoder_hidden_states=text).sample.square().mean()


@pytest.mark.parametrize("adapted", [False, True])
def test_activations_on_the_meta_device_are_those_of_a_real_pass_and_checkpoints_keep_fewer(adapted):
    found = []
    for recomputed in (False, True):
        for device in ("cpu", "meta"):
            net, call = small(device, adapted)
            if recomputed:
                checkpoint_activations(net)
            found.append(saved_bytes(call, net.parameters(), net))
    assert found[0] == found[1] and found[2] == found[3] and found[2] < found[0] / 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_autocast_halves_what_layers_keep_and_copies_the_weights_of_layers_once(device):
    class Layers(torch.nn.Module):
        """A layer, a norm, and the layer again."""

        def __init__(self):
            super().__init__()
            self.layer, self.norm = torch.nn.Linear(8, 8, bias=False, device=device), torch.nn.LayerNorm(8, device=device)

        def forward(self, x):
            return self.layer(self.norm(self.layer(x))).sum()

    net, lowered = Layers(), Lowered(torch.bfloat16)
    x = torch.randn(4, 8, device=device, requires_grad=True)
    full, half = (saved_bytes(lambda: net(x), net.parameters(), net, mode) for mode in (None, lowered))
    moments = 2 * 4 * 4  # of the norm
    assert full == 3 * 4 * x.numel() + moments and half == (2 + 4 + 2) * x.numel() + moments
    assert lowered.copied == 2 * 8 * 8


def test_the_plan_of_autocast_keeps_what_autocast_keeps():
    x = torch.randn(16, 32, requires_grad=True)
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.SiLU(), torch.nn.Linear(64, 32))

    def under_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).sum()

    lowered = Lowered(torch.bfloat16)
    planned = saved_bytes(lambda: net(x).sum(), net.parameters(), net, lowered)
    assert saved_bytes(under_autocast, net.parameters(), net) == planned + 2 * 2 * 32 * 64  # there, both weights' copies too
    assert lowered.copied == 2 * (2 * 32 * 64 + 64 + 32)


def test_with_checkpoints_the_largest_block_counts_beside_the_inputs_of_all_blocks():
    class Blocks(torch.nn.Module):
        """Two blocks that are computed once more."""

        gradient_checkpointing = True

        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList(torch.randn(4, 4) for _ in range(2))

        def forward(self, x):
            for weight in self.weights:
                x = self._gradient_checkpointing_func(lambda x, w=weight: (x @ w).exp().sin(), x)
            return x.sum()

    checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    net = Blocks()
    net._gradient_checkpointing_func = checkpoint
    x = torch.randn(8, 4)
    # two inputs are kept; a block saves its input, which is counted already, the exponential and the input of the sine
    assert saved_bytes(lambda: net(x), net.parameters(), net) == 4 * x.numel() * (2 + 1)
    assert net._gradient_checkpointing_func is checkpoint


def test_what_fits_is_the_largest_batch_below_nine_tenths_of_a_gpu():
    needed = Cost(4e9, 0, 0, 0, 6e9, 5e9, 0, 0, 0.0)  # 10 GB, and 2.5 GB for each of two images
    assert [largest_batch(needed, 2, size) for size in (*CARDS, 10)] == [4, 13, 24, 0]


def test_an_adapter_with_8_bit_adam_costs_its_own_weights_and_half_a_base():
    one = cost(100, 1, teacher=10_000, teacher_bytes=2, adam_bytes=ADAM["adamw8bit"])
    assert (one.weights, one.gradients, one.adam, one.average, one.teacher) == (400, 400, 200, 400, 20_000)
    assert cost(100, 1).adam == 800


def test_a_step_of_an_adapter_saves_the_gradients_of_weights():
    assert calls_of_a_step(2, adapter=False, recomputed=False) == 1 + 2 + 2
    assert calls_of_a_step(2, adapter=True, recomputed=True) == 1 + 1 + 1 + 2


def test_a_step_of_an_adapter_computes_what_is_counted():
    """The operations of a forward and a backward pass, by the counter of PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(adapted, backward):
        layers = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)))
        net = Adapted(layers, 1, [str(i) for i in range(8)]).requires_grad_(True).net if adapted else layers
        with FlopCounterMode(display=False) as counter:
            loss = net(torch.randn(64, 256)).sum()
            if backward:
                loss.backward()
        return counter.get_total_flops()

    once = count(False, False)
    for adapted in (False, True):
        expected = calls_of_a_step(0, adapted, recomputed=False)
        assert count(adapted, True) / once == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_the_tables_in_the_documentation_are_what_the_networks_need():
    sizes = tuple(footprint.count(network.build().parameters()) for network in footprint.NETWORKS)
    assert sizes == PUBLISHED
    text = (Path(ROOT) / "docs" / "memory.md").read_text(encoding="utf-8")
    some = tuple(network for network in footprint.NETWORKS if network.name == "Sana 1.6B")
    rows = [line for line in footprint.tables(some) if line.startswith("| Sana")]
    assert len(rows) == 3 and all(row in text for row in rows), rows
