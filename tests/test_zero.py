"""Two processes with DeepSpeed's ZeRO stage 2 train as two with DDP, and their checkpoints and refusals are those of all trainings."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from conftest import refuses
from processes import together
from test_parallel import averaged, regression, steps_of

from distill import files, zero
from distill.consistency import Consistency, Neighbours, truncated_snr
from distill.resume import Resumable
from distill.scm import ContinuousConsistency
from distill.target import Mix
from recipes.common.run import processes

missing = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def shard(accelerator):
    """Make the next training use DeepSpeed. Accelerate does so on accelerators only: its state is set by hand, its code is the real one."""
    plugin = DeepSpeedPlugin(zero_stage=2)
    plugin.select(_from_accelerator_state=True)
    kind = {"distributed_type": DistributedType.DEEPSPEED}
    PartialState._shared_state |= kind
    type(accelerator.state)._shared_state |= kind | {"deepspeed_plugins": {"default": plugin}}
    accelerator.deepspeed_engine_wrapped = None


def tangent(teacher):
    return ContinuousConsistency(Mix(teacher.denoiser), warmup=0.0)


def pairs(teacher):
    return Consistency(Mix(teacher.denoiser), Neighbours(lambda _: 4, grid="uniform"), truncated_snr)


class Bad:
    """A method whose loss is not finite for the data of step 8 of 48, and a million times too large for those of step 40."""

    def __init__(self, teacher):
        self.method, self.bad = pairs(teacher), {}

    def __call__(self, student, x0, *, progress, **rest):
        data = float(x0.sum())
        factor = {8 / 48: torch.nan, 40 / 48: 1e7}.get(progress)
        if factor is not None and factor not in self.bad.values():
            self.bad[data] = factor
        return self.method(student, x0, progress=progress, **rest) * self.bad.get(data, 1.0)


CASES = [
    ("regression", regression, 5, None),
    ("averaged", averaged, 5, 8),
    ("tangent", tangent, 5, None),
    ("pairs", pairs, 5, None),
    ("bad", Bad, 48, None),
]


def compare():
    """In each of two processes: losses, gradient norms, weights and averages under DDP and under ZeRO."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    found, told = {}, {}
    for kind in ("DistributedDataParallel", "DeepSpeedEngine"):
        if kind == "DeepSpeedEngine":
            shard(accelerator)
        for name, method, steps, microbatch in CASES:
            states = list(steps_of(accelerator, method, name, images=32 * steps, microbatch=microbatch))
            last = states[-1]
            assert type(last.student.net).__name__ == kind
            numbers = [x for state in states for x in (state.loss, state.grad_norm)]
            weights = [p.detach().reshape(-1) for net in (last.student.net, last.ema.net) for p in net.parameters()]
            found[kind, name] = torch.stack(numbers), torch.cat(weights)
            told[kind, name] = [state.rollback.partition("(")[0] for state in states if state.rollback]
            accelerator.free_memory()
    for name, *_ in CASES:
        pair = [found[kind, name] for kind in ("DistributedDataParallel", "DeepSpeedEngine")]
        worst = [float((a - b).abs().max()) for a, b in zip(*pair, strict=True)]
        print(name, worst, flush=True)
        assert max(worst) < 1e-5, (name, worst)
        assert told["DistributedDataParallel", name] == told["DeepSpeedEngine", name]
    assert [len(told["DeepSpeedEngine", name]) for name, *_ in CASES] == [0, 0, 0, 0, 2], told
    print("agrees")
    accelerator.end_training()


@missing
@pytest.mark.slow
def test_two_processes_with_zero_train_as_with_ddp_through_bad_steps_too(tmp_path):
    """Methods with several calls of the network, tangents, microbatches and an averaged target; and steps that are not taken."""
    codes, out = together(2, compare, log=tmp_path / "log")
    assert codes == {0} and out.count("agrees") == 2, out


def continue_zero(folder, stop):
    """Train with ZeRO where there are two processes, from the newest checkpoint, to the end or to step ``stop``."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes > 1:
        shard(accelerator)
    kept = {"resumable": Resumable(folder), "save_every_images": 32}
    first = None
    for state in steps_of(accelerator, averaged, "p", images=160, **kept):
        first = first or state.step
        if state.step == stop:
            break
    if accelerator.is_main_process and stop is None:
        files.save(folder / f"end-{first}", dict(state.ema.net.state_dict()), {})
    accelerator.wait_for_everyone()
    accelerator.end_training()


@missing
@pytest.mark.slow
def test_a_run_with_zero_continues_to_the_same_bits_and_on_one_process_without_it(tmp_path):
    """The checkpoint holds whole weights, Adam's state and the average, as that of any other run."""
    for name, stop in (("whole", None), ("again", 4), ("one", 4)):
        codes, out = together(2, continue_zero, tmp_path / name, stop, log=tmp_path / "log")
        assert codes == {0}, out
    codes, out = together(2, continue_zero, tmp_path / "again", None, log=tmp_path / "log")
    assert codes == {0}, out
    continue_zero(tmp_path / "one", None)
    whole, again, one = (files.load(tmp_path / name)[0] for name in ("whole/end-1", "again/end-4", "one/end-4"))
    for key in whole:
        assert torch.equal(whole[key], again[key]), key
        assert torch.allclose(whole[key], one[key], atol=2e-5), key


def settings(stage=2, device="none", precision="no"):
    config = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": device}}}
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision=precision)


@pytest.mark.parametrize(("wrong", "line"), [
    ({"stage": 3}, "ZeRO stage 3: accepted is 2"),
    ({"stage": 1}, "ZeRO stage 1: accepted is 2"),
    ({"device": "cpu"}, "accepted is offload_optimizer_device none"),
    ({"precision": "bf16"}, "--mixed-precision bf16: DeepSpeed would round the weights; accepted with it is no"),
])  # fmt: skip
def test_settings_of_deepspeed_that_would_train_something_else_are_refused(wrong, line):
    zero.check_settings(settings())
    refuses(line, zero.check_settings, settings(**wrong))


def test_a_launch_with_deepspeed_is_refused_without_gpus_and_without_the_package(monkeypatch):
    zero.check_launch(gpu=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refuses("DeepSpeed needs GPUs here: accepted on CPUs is torchrun", processes)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuses("DeepSpeed is not installed: pip install 'fewstep[deepspeed]'", zero.check_launch, True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    zero.check_launch(gpu=True)
