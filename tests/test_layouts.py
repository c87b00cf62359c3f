"""The folders that the scripts of GenEval and DPG-Bench read."""

import json

import numpy as np
import torch
from conftest import refuses
from PIL import Image

from eval.layouts import dpg_tasks, geneval_tasks, write_dpg, write_geneval


def pictures(n):
    return torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1).expand(n, 3, 2, 2) * 60


def test_geneval_gets_a_folder_per_prompt_with_its_own_line_of_metadata(tmp_path):
    lines = [{"tag": "single_object", "prompt": "a photo of a bench"}, {"tag": "counting", "prompt": "two cats"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    tasks = geneval_tasks(tmp_path / "prompts.jsonl")
    assert [task.prompt for task in tasks] == ["a photo of a bench", "two cats"]
    for task in tasks:
        write_geneval(tmp_path / "out", task, pictures(4))
    for number, line in enumerate(lines):
        own = tmp_path / "out" / f"{number:05d}"
        assert json.loads((own / "metadata.jsonl").read_text()) == line
        files = sorted((own / "samples").glob("*.png"))
        assert len(files) == 4 and np.asarray(Image.open(files[2])).max() == 120
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"tag": 1}\n')
    refuses("line 2 is no JSON object with a prompt", geneval_tasks, tmp_path / "bad.jsonl")


def test_dpg_gets_four_images_two_by_two_under_the_name_of_the_prompt(tmp_path):
    (tmp_path / "7.txt").write_text("a red kite\n")
    (task,) = dpg_tasks(tmp_path)
    assert (task.name, task.prompt) == ("7", "a red kite")
    write_dpg(tmp_path / "out", task, pictures(4))
    found = np.asarray(Image.open(tmp_path / "out" / "7.png"))
    assert found.shape == (4, 4, 3)
    assert [int(found[y, x, 0]) for y, x in ((0, 0), (0, 3), (3, 0), (3, 3))] == [0, 60, 120, 180]
    refuses("reads 4 images per prompt, these are 3", write_dpg, tmp_path, task, pictures(3))
    refuses("one .txt file per prompt", dpg_tasks, tmp_path / "out")
