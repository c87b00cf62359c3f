"""DeepSpeed's ZeRO stage 2 under the training loop: gradients, Adam's state and a second copy of the weights are sharded, in float32.

Accelerate's own wrapper takes the optimizer's step in `backward`. Here `Engine` computes the gradient alone and `ZeroAdam` takes the step, so
that a bad step is found before it. Checkpoints hold whole tensors, as those of all other trainings. Rajbhandari et al., arXiv 1910.02054.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, gather
from torch import Tensor, nn

BUCKET = 50_000_000  # gradients that are reduced together; DeepSpeed's own 500 million take 2 GB
State = dict[Tensor, dict[str, Tensor]]


def is_zero(accelerator: Accelerator) -> bool:
    """Return whether DeepSpeed shards the training."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_launch(gpu: bool) -> None:
    """Raise ValueError where the launcher selects DeepSpeed, and it is not installed or ``gpu`` is false: there is none."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    if not gpu:
        raise ValueError("DeepSpeed needs GPUs here: accepted on CPUs is torchrun --nproc_per_node N, which trains with DDP")
    if not importlib.util.find_spec("deepspeed"):
        raise ValueError(
            "DeepSpeed is not installed: pip install 'fewstep[deepspeed]', or choose configs/ddp.yaml or configs/fsdp2.yaml"
        )


def check_settings(accelerator: Accelerator) -> None:
    """Raise ValueError for settings of DeepSpeed under which the training loop would not do what it says."""
    plugin = accelerator.state.deepspeed_plugin
    zero = plugin.deepspeed_config["zero_optimization"]
    if plugin.zero_stage != 2:
        raise ValueError(f"DeepSpeed ZeRO stage {plugin.zero_stage}: accepted is 2; configs/fsdp2.yaml shards the weights too")
    if any(zero.get(f"offload_{what}", {}).get("device") not in (None, "none") for what in ("optimizer", "param")):
        raise ValueError(
            "DeepSpeed with offload: accepted is offload_optimizer_device none; configs/fsdp2.yaml needs less memory"
        )
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"--mixed-precision {accelerator.mixed_precision}: DeepSpeed would round the weights; accepted with it is no"
        )


def prepare(
    accelerator: Accelerator, net: nn.Module, adam: torch.optim.Optimizer, clip_norm: float
) -> tuple[Any, AcceleratedOptimizer]:
    """Return DeepSpeed's engine of the network, and its optimizer, to be used like those of `Accelerator.prepare`.

    ``adam``: over all parameters of ``net``, in one group. ``clip_norm``: largest gradient norm. Raises ValueError for settings that
    `check_settings` refuses.
    """
    check_settings(accelerator)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    # the loop splits the batch and divides the loss by itself
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": clip_norm}
    own = {"reduce_bucket_size": BUCKET, "use_multi_rank_bucket_allreduce": False}  # gradients are sent to their owner alone
    config["zero_optimization"] = own | config["zero_optimization"]
    engine, _ = accelerator.prepare(net, adam)
    accelerator.deepspeed_engine_wrapped = Engine(engine)
    return engine, AcceleratedOptimizer(ZeroAdam(engine, adam), device_placement=False)


@dataclass(frozen=True)
class Engine:
    """Take the place of Accelerate's `DeepSpeedEngineWrapper`: compute gradients, and leave the step to `ZeroAdam`."""

    engine: Any

    def backward(self, loss: Tensor, sync_gradients: bool = True) -> None:
        self.engine.backward(loss)

    def get_global_grad_norm(self) -> Tensor:
        """Return the norm of the reduced gradient before it is clipped, []. DeepSpeed writes -1 or infinity for NaN. A collective call."""
        norm = self.engine.optimizer.scaled_global_norm()
        return torch.where(norm < 0, torch.nan, norm)


class ZeroAdam:
    """AdamW on this process's part of the weights, with `state` by whole parameters.

    ``found_inf``: 1 for a step that leaves weights and state alone, as of the fused AdamW of PyTorch.
    """

    found_inf: Tensor | None = None

    def __init__(self, engine: Any, adam: torch.optim.Optimizer):
        self.engine, self.adam, self.zero = engine, adam, engine.optimizer

    @property
    def defaults(self) -> dict[str, Any]:
        return self.adam.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.adam.param_groups

    def step(self, closure: None = None) -> None:
        """Clip the gradient, take the step and send the new weights to all processes. A collective call."""
        self.adam.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.engine.step()

    def zero_grad(self) -> None:
        """Drop the gradient of a step that was not taken; `step` drops its own."""
        if any(part is not None for part in self.zero.averaged_gradients.values()):
            kept, self.found_inf = self.found_inf, torch.ones((), device=self.engine.device)
            self.step()
            self.found_inf = kept

    @property
    def state(self) -> State:
        """Gather Adam's state of all parameters. A collective call."""
        parts = self.adam.state.get(self._part, {})
        whole: State = {parameter: {} for parameter in self._parameters} if parts else {}
        for key, value in parts.items():
            if value.shape != self._part.shape:
                for states in whole.values():
                    states[key] = value.clone()
                continue
            pieces = gather(value)[: sum(self._sizes)].split(self._sizes)
            for (parameter, states), piece in zip(whole.items(), pieces, strict=True):
                states[key] = piece.view_as(parameter)
        return whole

    def restore(self, state: State) -> None:
        """Take over the weights of the module, and Adam's ``state`` of whole parameters; an empty one is that before the first step."""
        self.zero.refresh_fp32_params()
        self.adam.state.clear()
        self.zero._hp_optimizer_states_linked = False
        if not state:
            return
        states = [(parameter, state[parameter]) for parameter in self._parameters]
        first, size = self._parameters[0], self._part.numel()
        start = torch.distributed.get_rank() * size
        for key, value in states[0][1].items():
            if value.shape == first.shape:
                flat = torch.cat([values.get(key, torch.zeros_like(p)).reshape(-1) for p, values in states])[
                    start : start + size
                ]
                value = nn.functional.pad(flat, (0, size - len(flat))).to(self._part)
            self.adam.state[self._part][key] = value

    @property
    def _part(self) -> Tensor:
        return self.zero.single_partition_of_fp32_groups[0]

    @property
    def _parameters(self) -> list[Tensor]:
        return self.zero.bit16_groups[0]

    @property
    def _sizes(self) -> list[int]:
        return [parameter.numel() for parameter in self._parameters]
