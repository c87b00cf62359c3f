"""Features of several processes are gathered as tensors, whatever part each of them has."""

import pickle

import pytest
import torch
from accelerate import Accelerator
from processes import together

from eval import gathering
from eval.gathering import gather_rows

ROWS = torch.arange(70.0).reshape(10, 7).double()


def gather_parts():
    """In each of three processes: five rows of the first in two parts, none of the second, three of the last."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    parts = [[ROWS[:2], ROWS[2:5]], [], [ROWS[5:8]]][accelerator.process_index]
    sent, gather_object = [], gathering.gather_object
    gathering.gather_object = lambda thing: sent.append(len(pickle.dumps(thing))) or gather_object(thing)
    assert torch.equal(gather_rows(parts), ROWS[:8])
    labels = gather_rows([(part.sum(1) / 7).long() for part in parts])
    assert labels.tolist() == [3, 10, 17, 24, 31, 38, 45, 52]
    assert gather_rows([]) is None
    large = [torch.ones(10_000, 7)] * bool(parts)
    assert gather_rows(large).shape == (20_000, 7)
    assert max(sent) < 200  # bytes; the features are not among the objects
    print("gathered")
    accelerator.end_training()


@pytest.mark.slow
def test_rows_of_all_processes_are_gathered_as_tensors_in_their_order(tmp_path):
    codes, out = together(3, gather_parts, log=tmp_path / "log")
    assert codes == {0} and out.count("gathered") == 3, out


def test_one_process_keeps_its_rows():
    assert torch.equal(gather_rows([ROWS[:4], ROWS[4:]]), ROWS) and gather_rows([]) is None
