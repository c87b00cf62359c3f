"""The comparisons and words of a report, its JSON schema, and its page in a real browser."""

import json
import math
import shutil

import pytest
import torch
from conftest import ROOT
from jsonschema import Draft202012Validator

from distill import files
from eval import compare, report, variance_page, verdict
from eval.cells import picture_path
from eval.metrics import GROUPS

SCHEMA = Draft202012Validator(json.loads((ROOT / "eval" / "report.schema.json").read_text()))


def row(role, sampler, nfe, fid, seconds=1e-3, **more):
    name = f"{role} {sampler} {nfe}"
    return {
        "name": name, "model": role, "role": role, "sampler": sampler, "grid": "uniform", "steps": nfe, "times": None,
        "guidance": 1.0, "images": 100, "model_sha256": role, "protocol": "p", "nfe": float(nfe), "fid": fid,
        "fid_interval": [fid - 0.01, fid + 0.01], "fid_infinity": fid, "fid_infinity_interval": [fid - 0.01, fid + 0.01],
        "fid_left_out": [fid + 1e-4 * (-1) ** g for g in range(GROUPS)], "seconds_per_image": seconds * nfe,
        "seconds_interval": [seconds * nfe] * 2, "seconds_rounds": [seconds * nfe] * 6, "timing": "t",
        "saturated_pixels": 0.0, "peak_memory_gb": 1.0, **more,
    }  # fmt: skip


TEACHER = [row("teacher", "ddim", n, f) for n, f in ((1, 8.0), (4, 4.0), (16, 1.0), (64, 0.5))]
PROTOCOL = {
    "images": 5000, "seed": 0, "chunk": 256, "features": "digits", "features_sha256": "f", "reference": "digits",
    "reference_images": 1797, "reference_sha256": "r", "metrics": "all", "rounding": "", "resize": "none", "labels": "",
    "generation": "",
}  # fmt: skip


def pictures_of(rows):
    return {r["name"]: torch.zeros(4, 1, 8, 8, dtype=torch.uint8) for r in rows}


def test_equivalent_evaluations_lie_on_the_log_log_line_through_the_teachers_front():
    halfway = math.sqrt(4.0 * 1.0)  # in log FID between 4 and 16 evaluations
    for fid, nfe in ((halfway, 8), (1.0, 16), (9.0, 1)):
        assert verdict.equivalent_nfe(row("student", "ddim", 1, fid), TEACHER) == pytest.approx(nfe)
    assert verdict.equivalent_nfe(row("student", "ddim", 1, 0.1), TEACHER) is None


def test_a_student_is_compared_with_the_teacher_at_its_own_guidance_scale():
    strong = [row("teacher", "ddim", n, f + 1, guidance=4.0) for n, f in ((1, 8.0), (16, 1.0))]
    for scale, fid in ((4.0, 9.0), (1.0, 8.0), (2.0, 8.0)):  # 2 was not measured: all rows count
        assert verdict.best_rival(row("student", "ddim", 1, 1.0, guidance=scale), [*TEACHER, *strong])["fid"] == fid
    assert verdict.equivalent_nfe(row("student", "ddim", 1, 2.0, guidance=4.0), [*TEACHER, *strong]) == 16


def test_training_time_is_regained_after_its_seconds_over_those_saved_per_image():
    student = row("student", "ddim", 1, 1.0, training_seconds=300.0)
    out = verdict.with_comparisons([*TEACHER, student], pictures_of([*TEACHER, student]))[-1]
    assert out["equivalent_nfe"] == pytest.approx(16)
    assert out["break_even_images"] == pytest.approx(300 / (16e-3 - 1e-3))
    worse = row("student", "ddim", 16, 4.0, training_seconds=300.0)
    assert verdict.with_comparisons([*TEACHER, worse], pictures_of([*TEACHER, worse]))[-1]["break_even_images"] is None


def test_drift_is_0_for_a_copy_1_for_other_images_and_scales_with_the_distance():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (500, 1, 8, 8), generator=generator, dtype=torch.uint8)
    others = torch.randint(0, 200, (500, 1, 8, 8), generator=generator, dtype=torch.uint8)
    assert verdict.drift(images, images) == 0
    assert verdict.drift(others, images) == pytest.approx(1, abs=0.02)
    near, far = (verdict.drift(images + offset, images) for offset in (5, 10))
    assert far == pytest.approx(2 * near)


def test_no_row_beats_the_front_in_both_cost_and_fid():
    rows = [row("teacher", "a", 2, 1.0), row("teacher", "b", 2, 0.5), row("teacher", "c", 4, 0.7), row("teacher", "d", 8, 0.2)]
    assert [r["sampler"] for r in verdict.pareto(rows, "nfe")] == ["b", "d"]


def test_the_verdict_counts_only_significant_wins():
    rival = row("teacher", "unipc", 4, 1.0)
    won = row("student", "ddim", 4, 0.9)
    said = verdict.verdict([rival, won])
    assert said.startswith("Use the student up to 4 network evaluations. There its FID is 0.900; the teacher's best")
    assert "(unipc) has 1.000. The difference is 0.100 ± 0.000 (95 % interval). No sampler of the teacher" in said
    one = [row("teacher", "ddim", 1, 2.0), row("student", "ddim", 1, 0.9), rival | {"fid": 0.8}]
    assert "up to 1 network evaluation. There" in verdict.verdict(one) and "need about 3.3 evaluations" in verdict.verdict(one)
    noisy = won | {"fid_left_out": [0.9 + 0.05 * (-1) ** g for g in range(GROUPS)]}
    assert verdict.verdict([rival, noisy]).startswith("No student is better")
    assert verdict.verdict([rival]).startswith("There is nothing to compare")


def test_a_reader_is_warned_of_too_few_images_and_of_failed_cells():
    few = verdict.warnings([], PROTOCOL | {"images": 60}, 64)
    assert "do not determine the covariance of 64 features" in few[0] and "biased" in few[1]
    assert verdict.warnings([], PROTOCOL, 64) == []
    failed = {"error": "image 3 of cell 'x' is not finite"}
    assert verdict.warnings([failed], PROTOCOL, 64) == [failed["error"]]
    saturated = row("student", "ddim", 1, 1.0, saturated_pixels=0.5)
    assert "50% of the values" in verdict.warnings([saturated], PROTOCOL, 64)[0]


@pytest.fixture
def written(tmp_path):
    """Return a function that writes the folder of a finished run, with a failed cell and markup in its title."""

    def make(name, rows, protocol=PROTOCOL):
        folder = tmp_path / name
        for r in rows:
            images = torch.randint(0, 255, (16, 1, 8, 8), dtype=torch.uint8)
            files.save(picture_path(folder / "cells", r["name"]), {"images": images}, {})
        rows = verdict.with_comparisons(rows, pictures_of(rows))
        failed = {k: v for k, v in row("student", "ddim", 2, 0).items() if k in SCHEMA.schema["$defs"]["cell"]["required"]}
        rows.append(failed | {"error": "image 3 of cell 'student ddim 2' is not finite"})
        out = report.assemble("A <b>title</b>", rows, protocol, 0.2, 64, {"command": "x < y"})
        report.write(out, folder, folder / "cells")
        return folder

    return make


@pytest.mark.slow
def test_the_schema_describes_report_json(written):
    out = json.loads((written("a", [*TEACHER, row("student", "ddim", 1, 0.6)]) / "report.json").read_text())
    SCHEMA.validate(out)
    del out["rows"][0]["fid_interval"]
    assert not SCHEMA.is_valid(out)


@pytest.mark.slow
def test_finished_runs_are_merged_on_one_page_with_different_names(written):
    one = written("one", [*TEACHER, row("student", "ddim", 1, 0.6)])
    two = written("two", [*TEACHER, row("student", "ddim", 1, 0.7, model_sha256="other")])
    out, sources = compare.merged([one, two])
    assert [r["name"] for r in out["rows"]] == [*(r["name"] for r in TEACHER), "student ddim 1", "two student ddim 1"]
    assert sources["two student ddim 1"].parent == two / "cells"
    SCHEMA.validate(out)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: pip install playwright")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as p:
        try:
            browser = p.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("no Chromium here: apt install chromium, or playwright install chromium")
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390], ids=["wide", "phone"])
def test_the_page_opens_from_disk_in_chromium_with_plots_and_rows_and_loads_nothing_else(written, browser, width):
    rows = [*TEACHER, row("student", "ddim", 1, 0.6)]
    folder = written("a", rows)
    page = browser.new_page(viewport={"width": width, "height": 900})
    loaded, said = [], []
    page.on("request", lambda request: loaded.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((folder / "report.html").as_uri())
    assert [url for url in loaded if not url.startswith("data:")] == [(folder / "report.html").as_uri()] and said == []
    assert page.title() == "A <b>title</b>"
    shown = page.eval_on_selector_all("img", "images => images.map(i => [i.alt, i.complete && i.naturalWidth > 100])")
    assert {r["name"] for r in rows} <= {alt for alt, _ in shown}
    assert page.locator("svg.chart").count() == 4
    assert page.locator("tbody tr").count() == len(rows) + 1
    assert "is not finite" in page.locator("tr.error").inner_text() and page.locator("tr.front").count() == 2
    assert "Most FIDs of a good model therefore lie below the floor" in page.inner_text("body")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # wide tables scroll in their own box
    page.close()


@pytest.mark.slow
def test_the_variance_page_gives_the_images_that_the_teachers_student_needed(tmp_path):
    curves = {"data": [[100, 0.5], [400, 0.3]], "teacher": [[100, 0.3], [400, 0.1]]}
    said = variance_page.verdict({"curves": curves})
    assert "ended 0.3 above" in said and "after 25% of the images" in said
    slower = {"data": curves["teacher"], "teacher": curves["data"]}
    assert "The student trained on the teacher did not reach this error" in variance_page.verdict({"curves": slower})
    target = {"error": [0.1, 0.0], "gradient_snr": [1.0, 2.0]}
    out = {"logsnr": [-8.0, 8.0], "best": [0.5, 1.0], "targets": dict.fromkeys(variance_page.COLOURS, target), "curves": curves}
    variance_page.draw(out, tmp_path / "variance.png")
    page = variance_page.page(out | {"verdict": said})
    assert '<th scope="col">data sample</th><th scope="col">teacher</th>' in page and page.count("<tr") == 3
    assert page.count("<svg") == 3 and (tmp_path / "variance.png").is_file()
