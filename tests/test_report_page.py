"""The numbers of a report's page: its charts, its paired column, its headline, its samples, and its tools in a real browser."""

import json
import math
import re
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, here
from jsonschema import Draft202012Validator
from test_report import TEACHER, browser, pictures_of, row, written  # noqa: F401  (fixtures)

from distill import files
from eval import machine, report_charts, report_page, svg, verdict
from eval.cells import picture_path
from eval.html_page import document, figure, table
from eval.metrics import T_975, paired_difference
from eval.svg import Axis, Curve, Point, chart
from recipes import progressive

NFE = Axis("NFE", ticks=[1, 2, 4, 8, 16, 32, 64])


def places(drawn):
    """The positions of the marks of a chart, in order."""
    return [tuple(map(float, at)) for at in re.findall(r'<g transform="translate\(([\d.]+) ([\d.]+)\)"><path', drawn)]


def test_points_lie_at_the_logarithms_of_their_values():
    pairs = [(1, 8.0), (4, 2.0), (16, 0.5), (64, 0.125)]
    at = places(chart("t", [Curve("", [Point(x, y) for x, y in pairs], "c0 student", 0)], NFE, Axis("FID")))
    across, down = ([b[i] - a[i] for a, b in pairwise(at)] for i in (0, 1))
    assert len(at) == 4 and max(across) - min(across) <= 0.2 < min(across)  # factors of 4 are equal distances
    assert max(down) - min(down) <= 0.2 < min(down)


def test_a_symmetric_axis_puts_0_in_the_middle_and_is_logarithmic_far_from_it():
    axis = Axis("d", "symlog", 0.01)
    assert axis(0) == 0 and axis(-3) == -axis(3)
    assert axis(100) - axis(10) == pytest.approx(math.log(10), rel=1e-4) and axis(1e-5) == pytest.approx(1e-3, rel=1e-4)
    assert axis.marks(-1.5, 0.2) == [-1, -0.1, -0.01, 0, 0.01, 0.1]


def test_points_that_an_axis_cannot_show_are_left_out_and_names_do_not_cover_each_other():
    assert chart("t", [Curve("a", [Point(1, 0.0), Point(0, 1.0), Point(1, math.nan)], "thin", 0)], NFE, Axis("FID")) == ""
    drawn = chart("t", [Curve(f"n{i}", [Point(1, 1.0)], "thin", i) for i in range(9)], NFE, Axis("FID"))
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)">n\d<', drawn))
    assert len(heights) == 9 and min(b - a for a, b in pairwise(heights)) >= 12.9
    assert heights[-1] <= svg.BOTTOM + 5 and len({svg.look(i) for i in range(64)}) == 64


def test_long_names_that_differ_at_their_end_alone_have_different_labels():
    ends = ("consistency:0.5", "consistency:1")
    rows = [row(f"student@1 with {end}", end, 1, 0.5) | {"role": "student", "run": "a-long-run"} for end in ends]
    drawn = report_charts.fid_chart(rows, "nfe", NFE, None)
    assert "a-long-ru…tency:0.5<" in drawn and "a-long-ru…istency:1<" in drawn


def test_markup_in_a_chart_is_text():
    bad = "<script>\"'&"
    drawn = chart(bad, [Curve(bad, [Point(1, 1, tip=bad, link=bad)], "thin", 0)], Axis(bad), Axis(bad), [(1.0, bad)])
    assert "<script" not in drawn and drawn.count("&lt;script&gt;") >= 6 and "style=" not in drawn


def test_the_bold_line_is_the_lower_envelope_of_the_samplers():
    rows = [*TEACHER, row("teacher", "ipndm", 4, 2.0), row("teacher", "ipndm", 8, 3.0), row("student", "ddim", 1, 0.6)]
    drawn = report_charts.fid_chart(rows, "nfe", NFE, None)
    bold = re.search(r'<g class="envelope">.*?<path class="line" d="M([^"]*)"', drawn).group(1)
    assert bold.count("L") == 3 and "best training-free" in drawn  # ddim at 1, ipndm at 4, ddim at 16 and 64
    assert "teacher ipndm 4: FID 2.000 (95 %: 1.990 – 2.010), NFE 4" in drawn


def test_students_have_the_paired_difference_from_the_best_sampler_of_at_most_as_many_evaluations():
    rows = [*TEACHER, row("teacher", "ipndm", 4, 2.0), row("student", "ddim", 1, 0.6), row("student", "ddim", 8, 2.5)]
    rows[-1]["fid_left_out"] = [2.5 + 0.05 * (-1) ** g for g in range(20)]
    *others, one, eight = verdict.with_comparisons(rows, pictures_of(rows))
    assert all("paired_difference" not in other for other in others)
    assert one["paired_with"] == "teacher ddim 1" and one["paired_difference"] == pytest.approx(0.6 - 8.0)
    value, error = paired_difference(rows[-1], rows[4])
    assert eight["paired_with"] == "teacher ipndm 4" and eight["paired_difference"] == value
    assert eight["paired_interval"] == [value - T_975 * error, value + T_975 * error]
    half = T_975 * error
    assert report_page.text(eight, "paired_difference") == f"+0.500 ± {half:.3f}"
    assert report_page.text(one, "paired_difference").startswith("−7.400")


def test_the_headline_is_the_win_with_the_fewest_evaluations_and_the_verdict_goes_on_with_the_last():
    rows = [*TEACHER, *(row("student", "ddim", n, f) for n, f in ((1, 0.169), (4, 0.15), (16, 1.0), (64, 0.9)))]
    assert verdict.headline(rows) == "1 network evaluation: FID 0.169 instead of 8 (ddim)."
    said = verdict.verdict(rows)
    assert said.startswith(verdict.headline(rows) + " Use the student up to 4 network evaluations.")
    assert said.endswith(
        " At 16 evaluations the difference is within its interval. At 64 evaluations a training-free sampler is better."
    )
    assert verdict.headline(TEACHER) == verdict.headline([*TEACHER, row("student", "ddim", 1, 9.0)]) == ""


def test_older_reports_without_the_new_entries_have_a_page(tmp_path):
    rows = [*TEACHER, row("student", "ddim", 1, 0.6)]
    old = {"title": "t", "verdict": "v", "warnings": [], "protocol": {"images": 5, "reference_images": 0}, "floor": None,
           "baseline": None, "run": {}, "rows": rows}  # fmt: skip
    html = report_page.page(old, tmp_path, tmp_path)
    assert html.count("<tr") == len(rows) + 1 and html.count("<svg") == 2 and "id" not in rows[0]


def test_images_fill_at_most_their_budget_and_those_of_the_bands_come_first(tmp_path, monkeypatch):
    rows = [*TEACHER, row("student", "ddim", 1, 0.6)]
    for name in (report_page.REAL, *(r["name"] for r in rows)):
        images = torch.randint(0, 255, (12, 3, 128, 128), dtype=torch.uint8)
        files.save(picture_path(tmp_path, name), {"images": images, "labels": torch.arange(12)}, {})
    size = max(len(one.image) for one in report_page._strips(rows, tmp_path).values())
    monkeypatch.setattr(report_page, "BUDGET", 4 * size)
    kept = report_page._strips(rows, tmp_path)
    assert list(kept) == [report_page.REAL, "teacher ddim 64", "teacher ddim 1", "student ddim 1"]
    assert kept[report_page.REAL].heads == tuple(map(str, range(12)))


def test_training_curves_are_read_from_metrics_and_torn_lines_left_out(tmp_path):
    lines = [{"phase": p, "images": 128 * i, "loss": 1 / i} for p in ("2", "1") for i in (1, 2, 3)]
    (tmp_path / "m").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "1", "ima')
    drawn = report_charts.training_chart(tmp_path / "m")
    assert [d.count("L") for d in re.findall(r'class="line" d="([^"]*)"', drawn)] == [2, 2]
    assert report_charts.training_chart(tmp_path / "none") == ""


def test_the_spectrum_of_a_student_is_over_the_references_and_falls_with_its_contrast(tmp_path):
    rows = [*TEACHER, row("student", "ddim", 1, 0.6)]
    images = torch.randint(0, 255, (40, 1, 8, 8), dtype=torch.uint8)
    for one in TEACHER:
        files.save(picture_path(tmp_path, one["name"]), {"images": images}, {})
    assert report_charts.spectrum_chart(rows, tmp_path) == ""
    files.save(picture_path(tmp_path, rows[-1]["name"]), {"images": images // 2}, {})
    drawn = report_charts.spectrum_chart(rows, tmp_path)
    ratios = [float(r) for r in re.findall(r"1 step: (\S+) at \d cycles", drawn)]
    assert len(ratios) == 7 and ratios == pytest.approx([0.25] * 7, abs=0.02)


def test_of_many_spectra_the_ends_of_each_student_are_drawn_over_the_teacher_at_its_own_scale(tmp_path):
    torch.manual_seed(0)
    rows, images = [], torch.randint(0, 255, (40, 1, 8, 8), dtype=torch.uint8)
    for scale, contrast in ((1.0, 2), (2.0, 1)):
        more = {"guidance": scale}
        rows += [row(f"teacher w={scale:g}", "ddim", 64, 0.5) | more | {"role": "teacher"}]
        rows += [row(f"student@{n} w={scale:g}", "ddim", n, 0.6) | more | {"role": "student"} for n in (16, 8, 4, 2, 1)]
        for one in rows[-6:]:
            own = images // contrast if one["role"] == "teacher" else images // contrast // 2
            files.save(picture_path(tmp_path, one["name"]), {"images": own}, {})
    drawn = report_charts.spectrum_chart(rows, tmp_path)
    found = re.findall(r"(student w=\d), (\d+) steps?: (\S+) at 0 cycles", drawn)
    assert [(name, steps) for name, steps, _ in found] == [(f"student w={w}", n) for w in (1, 2) for n in ("1", "16")]
    assert [float(ratio) for *_, ratio in found] == pytest.approx([0.25] * 4, abs=0.03)


def test_spectra_of_runs_that_differ_at_their_ends_alone_have_names_of_their_own(tmp_path):
    rows = [
        *TEACHER,
        *(
            row(f"progressive-{end} student@8", "ddim", 8, 0.6) | {"role": "student", "run": f"progressive-{end}"}
            for end in ("96k", "skip0")
        ),
    ]
    for one in rows:
        files.save(picture_path(tmp_path, one["name"]), {"images": torch.randint(0, 255, (40, 1, 8, 8), dtype=torch.uint8)}, {})
    drawn = report_charts.spectrum_chart(rows, tmp_path)
    names = re.findall(r">([^<>]*, 8 steps)</text>", drawn)
    assert len(set(names)) == 2 and all(len(name) < 21 for name in names)


def test_the_commit_is_that_of_a_checkout_and_the_processor_has_a_name(tmp_path, monkeypatch):
    assert machine.processor()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "eval" / "machine.py"))
    assert machine.commit() is None


@pytest.mark.slow
@pytest.mark.parametrize("width, dark", [(1280, True), (390, False)], ids=["wide-dark", "phone"])
def test_the_tools_of_the_page_work_with_mouse_and_keys(written, browser, width, dark):  # noqa: F811
    folder = written("a", [*TEACHER, row("student", "ddim", 1, 0.6), row("student", "ddim", 4, 0.4)])
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((folder / "report.html").as_uri())
    shade = page.evaluate("getComputedStyle(document.querySelector('svg.chart')).fill.match(/\\d+/g).map(Number)[0]")
    assert (shade > 200) is dark
    visible = page.locator(".cells thead th:visible").count()
    assert visible <= 8
    page.locator("#more").press("Enter")
    assert page.locator(".cells thead th:visible").count() > visible
    page.locator(".cells thead th button", has_text=re.compile("^FID$")).click()
    fids = [float(v) for v in page.eval_on_selector_all(".cells tbody tr:not(.error)", "r => r.map(x => x.cells[6].dataset.v)")]
    assert page.locator("th[aria-sort=ascending]").inner_text() == "FID" and fids == sorted(fids)
    page.locator("#filter").fill("STUDENT 4")
    assert page.locator(".cells tbody tr:visible").count() == 1
    page.locator(".cells tbody tr:visible").press("Enter")
    strip = page.locator("tr.picked").get_attribute("data-strip")
    shown = page.locator("#viewer img").evaluate_all("images => images.map(i => i.src)")
    assert shown[0] == page.locator(f"#{strip}").get_attribute("src") != shown[1]
    page.locator("#viewer input").press("Home")
    assert "100%" in page.locator("#viewer img").nth(1).evaluate("i => i.style.clipPath")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth") and said == []
    context.close()


@pytest.mark.slow
def test_without_script_all_columns_and_all_images_are_there_and_other_pages_fit_a_phone(written, browser, tmp_path):  # noqa: F811
    folder = written("a", [*TEACHER, row("student", "ddim", 1, 0.6)])
    context = browser.new_context(viewport={"width": 390, "height": 900}, java_script_enabled=False)
    page = context.new_page()
    page.goto((folder / "report.html").as_uri())
    assert page.locator(".cells thead th:visible").count() == page.locator(".cells thead th").count() > 8
    assert page.locator(".tools:visible").count() == 0 and page.locator("img.strip").count() == 5
    other = chart("t", [Curve("a", [Point(1, 1)], "c0 student", 0)], NFE, Axis("FID"))
    rows = [["x" * 30] * 9] * 2
    (tmp_path / "other.html").write_text(document("t", "v", figure(other, "c") + table("abcdefghi", rows)))
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto((tmp_path / "other.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()


@pytest.mark.slow
def test_a_run_keeps_real_images_of_the_labels_of_its_samples_and_sends_its_pictures_to_the_tracker(new, tmp_path):
    flags = (
        "--preset smoke --force --start-steps 2 --images-per-stage 256 --batch-size 64 --images 60 --chunk 60 --sweep-steps 1"
    )
    flags += " --log-with tensorboard"
    here(progressive.main, flags, "--teacher", new, "--output-dir", tmp_path / "r")
    kept = files.load(picture_path(tmp_path / "r" / "cells", report_page.REAL))[0]
    assert kept["images"].shape == (12, 1, 8, 8) and kept["labels"].shape == (12,)
    from teachers.digits import digits

    images, labels = digits()
    for image, label in zip(kept["images"], kept["labels"], strict=True):
        assert (images[labels == label] == image).flatten(1).all(1).any()
    out = json.loads((tmp_path / "r" / "report.json").read_text())
    Draft202012Validator(json.loads((ROOT / "eval" / "report.schema.json").read_text())).validate(out)
    assert machine.processor() in out["run"]["device"] and out["run"].get("commit") == machine.commit()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next((tmp_path / "r" / "trackers").rglob("events*")).parent
    found = EventAccumulator(str(events))
    found.Reload()
    assert {"samples", "fid_vs_nfe"} <= set(found.Tags()["images"])
