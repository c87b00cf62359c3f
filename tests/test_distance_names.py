"""The Frechet distance of a user's own features has the user's name for it in every report, and FID only where nothing is named."""

import hashlib
import json
import re
from dataclasses import asdict

import pytest
import torch
from conftest import here, refuses, words
from test_report_truth import TINY

from distill.reading import read_json
from eval.features import Extractor
from eval.names import named
from eval.plots import fid_against
from eval.report import assemble
from recipes import compare, evaluate


class Own(torch.nn.Module):
    """Means of the four quarters."""

    distance = "Mini-FD"

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 2).flatten(1)


class Unnamed(Own):
    distance = None


class Hostile(Own):
    distance = "<b>FD"


@pytest.mark.slow
def test_reports_of_named_features_never_say_fid(ladder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eval.report.fid_against", lambda *given: axes.append(given[-1]) or fid_against(*given))
    axes: list = []
    out = tmp_path / "e"
    options = "--features test_distance_names:Own --images 40 --chunk 40 --samplers ddim --steps 1 --baseline-steps 2"
    here(evaluate.main, *words("--model", ladder, options, "--output-dir", out))
    said = capsys.readouterr()
    compare.main([str(word) for word in words("--runs", out, "--output-dir", tmp_path / "c")])
    for folder in (out, tmp_path / "c"):
        report, page = read_json(folder / "report.json"), (folder / "report.html").read_text()
        assert report["protocol"]["distance"] == "Mini-FD" and axes and set(axes) == {"Mini-FD"}
        shown = [re.sub(r'data:[^"]*', "", page), (folder / "report.md").read_text(), report["verdict"], report["title"]]
        shown += [*report["warnings"], said.out, said.err]
        assert not any(re.search(r"\bFIDs?\b", text) for text in shown) and all("Mini-FD" in text for text in shown[:2])
    assert "Mini-FD" in said.err + said.out and page.count('src="data:image') == page.count('src="data:image/png;base64,iVBOR')


def test_all_words_of_the_json_report_have_the_name(monkeypatch):
    for name, value in (("headline", "FID"), ("verdict", "FID"), ("warnings", ["FID"])):
        monkeypatch.setattr(f"eval.report.{name}", lambda *given, value=value: value)
    made = assemble("FID", [], {"distance": "Mini-FD"}, None, 4, {})
    assert [made["title"], made["headline"], made["verdict"], *made["warnings"]] == ["Mini-FD"] * 4


def test_a_picture_within_a_page_keeps_its_bytes_and_words_that_only_contain_it_stay():
    page = '<img src="data:image/png;base64,aa/FID/+FID+s"> FID, FIDs, CFID fid_vs_nfe.png'
    assert named(page, "X-FD") == '<img src="data:image/png;base64,aa/FID/+FID+s"> X-FD, X-FDs, CFID fid_vs_nfe.png'
    assert named(page, None) == page


def test_cells_of_unnamed_features_are_found_again_as_before_there_were_names():
    before = {name: value for name, value in asdict(TINY).items() if name != "distance"}
    assert TINY.digest == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:16]
    assert Extractor.create("test_distance_names:Unnamed").distance is Extractor.create("digits").distance is None


def test_a_name_that_is_none_is_refused():
    refuses("their distance is named '<b>FD'; accepted are up to 40 letters", Extractor.create, "test_distance_names:Hostile")


@pytest.mark.parametrize("text", ["FID", "Mini-FD"])
def test_a_name_goes_through_the_report_once(text):
    assert named(named(text, "Mini-FD"), "Mini-FD") == "Mini-FD"
