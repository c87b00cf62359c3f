"""Two processes train as one: the gradients of every method under DDP, and weights that FSDP2 shards."""

import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from closed_forms import ORACLE, Small, SmallHeads
from collectives import counted
from processes import together
from test_flow_maps import LEARNED

import teachers
from distill import files
from distill.consistency import Consistency, Neighbours, truncated_snr
from distill.decoding import ParallelDecoding
from distill.denoiser import Denoiser, network_of
from distill.landing import Landing
from distill.matching import Matching
from distill.regression import Regression
from distill.regularize import Regularized
from distill.resume import Resumable, whole
from distill.rng import Rng
from distill.schedule import Cosine
from distill.scm import ContinuousConsistency
from distill.second import Second
from distill.target import Mix, PosteriorMean
from distill.train import BatchSplit, Optimization, train
from recipes.data import sets
from teachers.students import with_two_times

pytestmark = pytest.mark.slow


def gradient(method, student, x0, rows):
    rng = Rng(torch.Generator().manual_seed(7), 32, rows)
    return method(student, x0[rows] if rows else x0, rng=rng, progress=0.6).mean()


def compare_gradients():
    """In each of two processes: the gradient of half of the batch, averaged by DDP, and that of the whole batch."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    x0 = torch.randn(32, 2, generator=torch.Generator().manual_seed(1)).double()
    methods = {name: method for name, (method, _) in LEARNED.items() if name != "pdd"}
    methods["regularized"] = Regularized(methods["cd"], (("martingale", 0.1), ("fokker-planck", 0.01)))
    methods["posterior-mean"] = Regression(PosteriorMean())
    fake, other = (Denoiser(Small().double(), Cosine()) for _ in range(2))
    for name, alpha in (("dmd", None), ("sid", 1.0)):
        methods[name] = Matching(ORACLE, Second(fake), 2, alpha)
    methods["fake denoiser"] = lambda second, x0, **given: methods["dmd"].second_loss(second, other, x0, **given)
    methods["pdd"] = ParallelDecoding(Mix(ORACLE), 8)
    methods["pdd without data"] = ParallelDecoding(Mix(ORACLE), 8, data_free=True)
    for name, method in methods.items():
        alone = Denoiser((SmallHeads() if name.startswith("pdd") else Small()).double(), Cosine())
        shared = replace(alone, net=accelerator.prepare(copy.deepcopy(alone.net)))
        assert type(shared.net).__name__ == "DistributedDataParallel"
        gradient(method, alone, x0, None).backward()
        accelerator.backward(gradient(method, shared, x0, slice(16 * rank, 16 * rank + 16)))
        pairs = zip(alone.net.parameters(), shared.net.parameters(), strict=True)
        worst = max((a.grad - b.grad).abs().max().item() / max(1.0, a.grad.abs().max().item()) for a, b in pairs)
        assert worst < 1e-6, (name, worst)
        print(name)
    accelerator.end_training()


def test_two_processes_give_the_gradient_of_one_with_the_doubled_batch(tmp_path):
    """For every method, those with tangents above all: calling the network inside DDP directly would skip the reduction."""
    codes, out = together(2, compare_gradients, log=tmp_path / "log")
    assert codes == {0} and out.count("pdd without data") == 2, out


def shard(accelerator, reshard=True):
    """Make the next training use FSDP2. Accelerate shards on accelerators only: its state is set by hand, its code is the real one."""
    blocks = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["ResnetBlock2D"]}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=reshard, **blocks)
    type(accelerator.state)._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}


def train_sharded(path):
    """Train the digits teacher's copy a few steps, in several processes with shards, and write weights and average."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    world = accelerator.num_processes
    teacher, data = teachers.load("digits"), sets.load("digits")
    pairs = Neighbours(lambda _: 4, grid="uniform")
    methods = {
        "cd": Consistency(Mix(teacher.denoiser), pairs, truncated_snr, averaged=True),
        "scd": ContinuousConsistency(Mix(teacher.denoiser), warmup=0.0),
        "lmd": Landing(Mix(teacher.denoiser)),
        "dmd": Matching(teacher.denoiser, Second(network_of(teacher.denoiser), period=2)),
        "sid": Matching(teacher.denoiser, Second(network_of(teacher.denoiser), period=1), sid=1.0),
    }
    tensors = {}
    for name, method in methods.items():
        if world > 1:
            shard(accelerator)
        batches = data.batches(BatchSplit(32, world, accelerator.process_index), 0, name, accelerator.device, teacher.condition)
        how = Optimization(3 * 32, 32, ema_halflife_images=64)
        model = with_two_times(teacher) if name == "lmd" else teacher
        for state in train(method, model.student(), batches, accelerator, how, seed=0, phase=name):
            for net in (state.student.net, state.ema.net):
                assert all(hasattr(weight, "full_tensor") == (world > 1) for weight in net.parameters())
            assert state.ema(torch.zeros(2, 1, 8, 8), torch.tensor(0.5), **teacher.condition(torch.arange(2))).isfinite().all()
        for kind, net in (("student", state.student.net), ("average", state.ema.net)):
            tensors |= {f"{name} {kind} {key}": whole(value.detach()) for key, value in net.state_dict().items()}
    if accelerator.is_main_process:
        files.save(path, tensors, {})
    accelerator.wait_for_everyone()
    accelerator.end_training()


def test_sharded_weights_train_like_whole_ones(tmp_path):
    """FSDP2 of Accelerate over two processes against one: students, tangents and averages."""
    train_sharded(tmp_path / "one")
    codes, out = together(2, train_sharded, tmp_path / "two", log=tmp_path / "log")
    assert codes == {0}, out
    one, two = (files.load(tmp_path / name)[0] for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        assert torch.allclose(one[key], two[key], atol=2e-5), key


def steps_of(accelerator, method, phase, halflife=64, images=96, microbatch=None, **kwargs):
    """The states of a training of the digits teacher's copy in batches of 32, with the data of this process."""
    teacher, split = teachers.load("digits"), BatchSplit(32, accelerator.num_processes, accelerator.process_index, microbatch)
    batches = sets.load("digits").batches(split, 0, phase, accelerator.device, teacher.condition)
    how = Optimization(images, 32, microbatch, ema_halflife_images=halflife)
    return train(method(teacher), teacher.student(), batches, accelerator, how, seed=0, phase=phase, **kwargs)


def regression(teacher):
    return Regression(Mix(teacher.denoiser))


def averaged(teacher):
    return Consistency(Mix(teacher.denoiser), Neighbours(lambda _: 4, grid="uniform"), truncated_snr, averaged=True)


def count_collectives():
    """In each of two processes: the collectives of the second step with and without an average, on shards that are kept or not."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)

    def second(method, phase, halflife, reshard):
        shard(accelerator, reshard)
        states = steps_of(accelerator, method, phase, halflife)
        next(states)
        with counted() as found:
            next(states)
        return found.calls

    for reshard in (True, False):
        without = second(regression, f"none {reshard}", None, reshard)
        assert without["allgather_base"] > 8 and without["reduce_scatter_base"] > 8
        assert second(regression, f"average {reshard}", 64, reshard) == without
        target = second(averaged, f"target {reshard}", 64, reshard)
        assert (
            target["allgather_base"] - without["allgather_base"] == without["reduce_scatter_base"]
        )  # one more call of a network
    print("counted")
    accelerator.end_training()


def test_the_average_of_sharded_weights_costs_no_collective_call(tmp_path):
    """Without an average as many weights are gathered as with one; an averaged target gathers its own once per call."""
    codes, out = together(2, count_collectives, log=tmp_path / "log")
    assert codes == {0} and out.count("counted") == 2, out


def continue_sharded(folder, stop):
    """Train with shards where there are two processes, from the newest checkpoint. Leave after ``stop`` steps; None: to the end."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes > 1:
        shard(accelerator)
    kept = {"resumable": Resumable(folder), "save_every_images": 32}
    states = steps_of(accelerator, averaged, "p", images=128, **kept)
    first, *_, last = islice(states, stop)
    states.close()
    if accelerator.is_main_process and stop is None:
        files.save(folder / f"end-{first.step}", dict(last.ema.net.state_dict()), {})
    accelerator.wait_for_everyone()
    accelerator.end_training()


def test_a_sharded_run_continues_on_one_process(tmp_path):
    """The checkpoint of two processes holds whole weights, Adam's state and the average."""
    continue_sharded(tmp_path / "one", None)
    codes, out = together(2, continue_sharded, tmp_path / "two", 3, log=tmp_path / "log")
    assert codes == {0}, out
    continue_sharded(tmp_path / "two", None)  # from the checkpoint after step 2
    one, two = files.load(tmp_path / "one" / "end-1")[0], files.load(tmp_path / "two" / "end-3")[0]
    assert one.keys() == two.keys()
    for key in one:
        assert torch.allclose(one[key], two[key], atol=2e-5), key
