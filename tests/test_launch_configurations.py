"""The configurations of `accelerate launch` are read by Accelerate, and the documentation names each of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType
from conftest import ROOT

from distill import zero

FILES = {
    "one-gpu": (DistributedType.NO, 1, 1),
    "ddp": (DistributedType.MULTI_GPU, 1, 8),
    "ddp-two-nodes": (DistributedType.MULTI_GPU, 2, 16),
    "fsdp2": (DistributedType.FSDP, 1, 8),
    "deepspeed-zero2": (DistributedType.DEEPSPEED, 1, 8),
}


def test_every_configuration_is_in_the_documentation():
    assert {path.stem for path in Path(ROOT, "configs").glob("*.yaml")} == FILES.keys()
    text = Path(ROOT, "docs", "many-gpus.md").read_text(encoding="utf-8")
    assert all(
        f"--config_file configs/{name}.yaml recipes/" in text or f"configs/{name}.yaml --machine_rank 1" in text
        for name in FILES
    )


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_a_configuration(name):
    found = load_config_from_file(str(Path(ROOT, "configs", f"{name}.yaml")))
    assert (found.distributed_type, found.num_machines, found.num_processes) == FILES[name]
    assert (found.fsdp_config.get("fsdp_version") == 2) == (name == "fsdp2")


def test_the_configuration_of_deepspeed_gives_settings_that_the_training_loop_accepts():
    """Through the plugin of Accelerate itself, which needs no DeepSpeed."""
    found = load_config_from_file(str(Path(ROOT, "configs", "deepspeed-zero2.yaml")))
    plugin = DeepSpeedPlugin(**found.deepspeed_config)
    plugin.set_mixed_precision(found.mixed_precision)
    zero.check_settings(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision=found.mixed_precision))
    assert plugin.zero_stage == 2
