"""Run alone and by torchrun: trains the digits teacher's copy a few steps and writes weights and average to a file.

Accelerate shards on accelerators only; on CPUs its state is therefore set by hand; its FSDP2 code is the real one.
"""

import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

import teachers
from distill.consistency import Consistency, Neighbours, truncated_snr
from distill.files import save
from distill.resume import whole
from distill.scm import ContinuousConsistency
from distill.target import Mix
from distill.train import BatchSplit, Optimization, train
from recipes.data import sets as datasets


def main(path):
    accelerator = Accelerator(cpu=True)
    blocks = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["ResnetBlock2D"]}
    teacher, data = teachers.load("digits"), datasets.load("digits")
    pairs = Neighbours(lambda _: 4, grid="uniform")
    methods = {
        "cd": Consistency(Mix(teacher.denoiser), pairs, truncated_snr, averaged=True),
        "scd": ContinuousConsistency(Mix(teacher.denoiser), warmup=0.0),
    }
    tensors = {}
    for name, method in methods.items():
        if accelerator.num_processes > 1:
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True, **blocks)
            type(accelerator.state)._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        split = BatchSplit(32, accelerator.num_processes, accelerator.process_index)
        batches = data.batches(split, 0, name, accelerator.device, teacher.condition)
        how = Optimization(3 * 32, 32, ema_halflife_images=64)
        for state in train(method, teacher.student(), batches, accelerator, how, seed=0, phase=name):
            sharded = hasattr(next(state.student.net.parameters()), "full_tensor")
            assert sharded == (accelerator.num_processes > 1)
        for kind, net in (("student", state.student.net), ("average", state.ema.net)):
            tensors |= {f"{name} {kind} {key}": whole(value.detach()) for key, value in net.state_dict().items()}
        accelerator.free_memory()
    if accelerator.is_main_process:
        save(path, tensors, {})
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
