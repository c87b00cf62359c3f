"""The files of an export: readable by all, free of temporary names, and loaded by the lines of their own card."""

import json
import os
import re
import shutil
import stat
from dataclasses import replace

import pytest
from diffusers import ConsistencyModelPipeline, DDIMScheduler
from pipelines import PROMPTS, sd3, unet

import teachers
from distill.sampling import Sampling
from recipes import export
from teachers.export import deliver
from teachers.export.card import card


@pytest.fixture()
def tiny(tmp_path, monkeypatch):
    """A student on a table, whose pipelines are not compared in a process of their own."""
    ConsistencyModelPipeline(unet(), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "origin")
    monkeypatch.setattr(deliver, "verify", lambda *args, **kwargs: 0.0)
    return replace(teachers.load(str(tmp_path / "origin")), sampling=Sampling(steps=(1, 2, 3)))


def test_an_exported_pipeline_and_its_variants_are_readable_by_all_and_hold_no_temporary_name(tiny, tmp_path):
    folder = tmp_path / "out"
    assert deliver.export_pipelines(tiny, folder).keys() == {"pipeline", "pipeline-3"}
    deliver.add_variant(tiny, folder / "pipeline", "fp16")
    umask = os.umask(0)
    os.umask(umask)
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert len([path for path in found if path.suffix == ".safetensors"]) == 3
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
        if path.suffix == ".json":
            assert "_name_or_path" not in json.loads(path.read_text()) and str(tmp_path) not in path.read_text(), path


def test_a_pushed_exports_own_card_loads_it_from_the_hub(tiny, tmp_path, monkeypatch, capsys):
    """The hub is a folder: the upload copies into it, a snapshot is a copy of it."""
    import huggingface_hub

    hub = tmp_path / "hub"

    class Hub:
        def create_repo(self, repository, private, exist_ok):
            pass

        def upload_folder(self, folder_path, repo_id, commit_message):
            shutil.copytree(folder_path, hub / repo_id)
            return "https://hub/" + repo_id

    def snapshot_download(repository):
        return str(shutil.copytree(hub / repository, tmp_path / "cache" / repository, dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    teachers.save(tmp_path / "s.safetensors", tiny)
    arguments = ["--model", str(tmp_path / "s.safetensors"), "--output-dir", str(tmp_path / "out")]
    export.main([*arguments, "--push-to-hub", "me/it"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    blocks = re.findall(r"```python\n(.*?)```", (hub / "me" / "it" / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        names: dict = {}
        exec(block.replace("batch_size=4", "batch_size=1"), names)
        assert len(names["images"]) == 1


def test_a_card_that_is_not_pushed_loads_from_its_own_folder(tiny):
    text = card(tiny, ["pipeline"], {"batch_size": 1}, [], "mit", None)
    assert 'DiffusionPipeline.from_pretrained("pipeline")' in text and "snapshot_download" not in text


@pytest.mark.slow
def test_an_export_of_a_stable_diffusion_3_without_its_third_text_encoder_says_so_to_diffusers(tmp_path):
    made = sd3(tmp_path / "words")
    made.register_modules(text_encoder_3=None, tokenizer_3=None)
    made.save_pretrained(tmp_path / "origin")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    teacher = teachers.load(f"{tmp_path / 'origin'},prompts={tmp_path / 'prompts.txt'}")
    teachers.save(tmp_path / "s.safetensors", replace(teacher, sampling=Sampling(steps=(1,))))
    export.main(["--model", str(tmp_path / "s.safetensors"), "--output-dir", str(tmp_path / "out"), "--variants", "fp16"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("pipeline", text_encoder_3=None, tokenizer_3=None)' in text
