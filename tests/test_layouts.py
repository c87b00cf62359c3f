"""The folders that the scripts of GenEval and DPG-Bench read."""

import json

import numpy as np
import pytest
import torch
from conftest import refuses, words
from PIL import Image
from pipelines import sd

import teachers
from distill.sampling import Sampling
from eval.generate import images
from eval.layouts import dpg_tasks, geneval_tasks, write_dpg, write_geneval
from recipes import sample


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


@pytest.mark.slow
def test_samples_of_a_benchmark_are_those_of_the_model_with_these_prompts(tmp_path):
    sd(tmp_path).save_pretrained(tmp_path / "sd")
    prompts = ["a red kite", "two cats"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    (tmp_path / "meta.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    (tmp_path / "p").mkdir()
    for number, prompt in enumerate(prompts):
        (tmp_path / "p" / f"{number}.txt").write_text(prompt)
    common, two = f"--model {tmp_path / 'sd'} --steps 2 --chunk 3 --guidance 2", "--images-per-prompt 2"
    sample.main(words(common, two, "--benchmark", f"geneval:{tmp_path / 'meta.jsonl'}", "--output", tmp_path / "geneval"))
    sample.main(words(common, "--benchmark", f"dpg:{tmp_path / 'p'}", "--output", tmp_path / "dpg"))
    model = teachers.load(f"{tmp_path / 'sd'},prompts={tmp_path / 'prompts.txt'}")
    drawn = images(
        model, Sampling(), 2, [range(4)], 0, torch.device("cpu"), denoiser=model.guided(2.0), label_of=lambda i: i // 2
    )
    expected = next(iter(drawn)).pixels
    for i in range(4):
        found = np.asarray(Image.open(tmp_path / "geneval" / f"{i // 2:05d}" / "samples" / f"{i % 2:06d}.png"))
        assert abs(found.astype(int) - expected[i].permute(1, 2, 0).numpy().astype(int)).max() <= 1
    assert json.loads((tmp_path / "geneval" / "00001" / "metadata.jsonl").read_text()) == {"prompt": "two cats"}
    height, width = expected.shape[2:]
    assert np.asarray(Image.open(tmp_path / "dpg" / "1.png")).shape == (2 * height, 2 * width, 3)


def test_a_benchmark_in_a_wrong_form_is_refused_in_one_line(refused, tmp_path):
    (tmp_path / "a.txt").write_text("a cat")
    for flags, line in {
        f"--benchmark dpg:{tmp_path} --output x": "the model takes 10 labels: accepted are text-to-image models",
        f"--benchmark dpg:{tmp_path}": "accepted are --output FOLDER",
        f"--benchmark dpg:{tmp_path} --images-per-prompt 2 --output x": "DPG-Bench reads 4",
        f"--benchmark {tmp_path} --output x": "accepted are geneval:FILE.jsonl and dpg:FOLDER",
        f"--benchmark geneval:{tmp_path}/none --output x": "none",
    }.items():
        assert line in refused(sample.main, flags)
