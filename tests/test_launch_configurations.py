"""The configurations of `accelerate launch` are read by Accelerate, and the documentation names each of them."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import ROOT

FILES = {
    "one-gpu": (DistributedType.NO, 1, 1),
    "ddp": (DistributedType.MULTI_GPU, 1, 8),
    "ddp-two-nodes": (DistributedType.MULTI_GPU, 2, 16),
    "fsdp2": (DistributedType.FSDP, 1, 8),
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
