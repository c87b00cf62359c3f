"""What a report says of several students, of time, of the floor, and of cells that are equal."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from jsonschema import Draft202012Validator
from test_report import PROTOCOL, TEACHER, browser, pictures_of, row, written  # noqa: F401  (fixtures)

import teachers
from distill.samplers import BASELINES
from distill.sampling import Sampling
from eval import compare, fidelity, image_grid, plots, report, timing, verdict
from eval.arithmetic import arithmetic
from eval.cells import Cell, Protocol
from eval.columns import floor_note
from eval.features import Extractor
from eval.generate import images
from eval.metrics import Reference
from eval.reference import extract
from eval.sweep import sweep
from recipes import evaluate
from recipes.common.cells import cells_of, run_of
from recipes.common.measurement import baselines

SCHEMA = Draft202012Validator(json.loads((ROOT / "eval" / "report.schema.json").read_text()))
CPU = torch.device("cpu")
TINY = Protocol(images=40, seed=0, chunk=40, features="digits", features_sha256="", reference="digits", reference_images=1797,
                reference_sha256="")  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """Record the axes of every plot."""
    axes, drawing = [], plots.drawing

    class Recorded:
        def __init__(self, *args, **kwargs):
            self.inner = drawing(*args, **kwargs)

        def __enter__(self):
            figure, made = self.inner.__enter__()
            axes.append(made)
            return figure, made

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

    monkeypatch.setattr(plots, "drawing", Recorded)
    return axes


def test_students_of_several_runs_have_their_own_names_colours_markers_and_sample_rows(written, drawn, monkeypatch, tmp_path):  # noqa: F811
    one = written("ladder", [*TEACHER, row("student", "ddim", 1, 0.6)])
    two = written(
        "cd", [row("student", "ddim", 1, 0.7, model_sha256="other"), row("student", "ddim", 2, 0.3, model_sha256="other")]
    )
    merged, sources = compare.merged([one, two])
    SCHEMA.validate(merged)
    labels, grid = [], report.sample_grid
    monkeypatch.setattr(report, "sample_grid", lambda rows, path: labels.extend(label for label, _ in rows) or grid(rows, path))
    drawn.clear()
    compare.copy_pictures(sources, tmp_path / "page" / "cells")
    report.write(merged, tmp_path / "page", tmp_path / "page" / "cells")
    assert labels == ["teacher, ddim 64 steps", "ladder 1 step", "cd 2 steps", "cd 1 step"]
    for axes in drawn[:2]:
        lines = {c.get_label(): c[0] for c in axes.containers}
        assert lines.keys() == {"ladder", "cd", "teacher, ddim"}
        assert {t.get_text() for t in axes.get_legend().get_texts()} >= lines.keys()
        assert len({line.get_color() for line in lines.values()}) == len({line.get_marker() for line in lines.values()}) == 3


def test_all_samplers_of_a_teacher_and_all_students_look_different():
    rows = [row("teacher", name, 4, 1.0) for name in BASELINES] + [row("student", "ddim", 4, 1.0, run=str(i)) for i in range(8)]
    looks = plots.styles(plots.curves(rows)).values()
    assert len({(look["color"], look.get("linestyle"), look["marker"]) for look in looks}) == len(rows)


def test_searched_and_plain_times_are_two_curves():
    plain, searched = (
        row("student", "ddim", 4, 1.0),
        row("student", "ddim", 4, 1.0, grid="searched", times=[1.0, 0.5, 0.2, 0.1, 0.0]),
    )
    assert list(plots.curves([plain, searched])) == ["student", "student searched"]


def test_runs_of_equal_names_are_told_apart_by_their_folders(written):  # noqa: F811
    one = written("a/run", [*TEACHER, row("student", "ddim", 1, 0.6)])
    two = written("b/run", [row("student", "ddim", 1, 0.7, model_sha256="other")])
    students = [r for r in compare.merged([one, two, one])[0]["rows"] if r["role"] == "student"]
    assert [(r["run"], r["name"]) for r in students] == [("a/run", "student ddim 1"), ("b/run", "b/run student ddim 1")]


def test_the_verdict_names_the_better_of_two_students_and_the_best_at_fewer_evaluations():
    rival = row("teacher", "ddim", 1, 9.0)
    worse, better = (row("student", "ddim", 1, fid, run=run) for fid, run in ((7.978, "cd"), (5.598, "ladder")))
    for rows in ([rival, worse, better], [rival, better, worse]):
        said = verdict.verdict(rows)
        assert said.startswith(
            "Use the student ladder up to 1 network evaluation. There its FID is 5.598, the lowest of 2 students;"
        )
    later = row("student", "ddim", 2, 3.0, run="cd")
    said = verdict.verdict([rival, worse, better, later])
    assert said.startswith(
        "1 network evaluation: FID 5.6 (ladder) instead of 9 (ddim). Use the student cd up to 2 network evaluations."
    )
    assert "There its FID is 3.000; the" in said
    assert said.endswith("At fewer evaluations other students have a lower FID: ladder at 1 (5.598).")


def timed(rows, rounds):
    """The rows with these seconds per network evaluation in each round."""
    return [r | {"seconds_rounds": [s * r["nfe"] for s in rounds]} for r in rows]


def with_student(rounds, **more):
    """The student among teachers of 1 ms per evaluation, 16 of which reach its FID."""
    rows = [*TEACHER, *timed([row("student", "ddim", 1, 1.0, training_seconds=300.0, **more)], rounds)]
    return verdict.with_comparisons(rows, pictures_of(rows))[-1]


def test_a_break_even_has_the_interval_of_the_rounds_and_is_left_out_where_they_disagree():
    steady = with_student([1e-3, 2e-3, 3e-3, 3e-3, 4e-3, 5e-3])
    assert steady["break_even_images"] == pytest.approx(300 / 13e-3)
    assert steady["break_even_interval"] == pytest.approx([300 / 15e-3, 300 / 11e-3])
    said = verdict.verdict([*TEACHER, steady])
    assert "regained after about 23,000 images (20,000 to 27,000 over the rounds of timing)" in said
    for rounds in ([1e-3] * 5 + [9e-3], [1e-3] * 5 + [17e-3]):  # saves 7 to 15, and -1 to 15 ms an image
        noisy = with_student(rounds)
        assert noisy["break_even_images"] is noisy["break_even_interval"] is None
        assert "regained" not in verdict.verdict([*TEACHER, noisy])


def test_a_break_even_pairs_the_rounds_so_that_a_slow_minute_cancels():
    rounds = [1e-3, 1.1e-3, 1.2e-3, 1.3e-3, 1.4e-3, 1.5e-3]
    rows = timed([*TEACHER, row("student", "ddim", 1, 1.0, training_seconds=300.0)], rounds)
    out = verdict.with_comparisons(rows, pictures_of(rows))[-1]
    assert out["break_even_interval"] == pytest.approx([300 / (15 * 1.5e-3), 300 / (15 * 1e-3)])


def test_times_of_two_runs_are_not_mixed_and_old_reports_have_no_break_even():
    known = {"break_even_images": 5000.0, "break_even_interval": [4000.0, 6000.0]}
    elsewhere = with_student([1e-3] * 6, timing="elsewhere", **known)
    assert {key: elsewhere[key] for key in known} == known
    old = row("student", "ddim", 1, 1.0, training_seconds=300.0, break_even_images=5000.0)
    del old["timing"], old["seconds_rounds"], old["seconds_interval"]
    assert verdict.with_comparisons([*TEACHER, old], pictures_of([*TEACHER, old]))[-1]["break_even_images"] is None


def test_a_reader_is_warned_of_times_that_were_not_taken_side_by_side():
    assert verdict.warnings(TEACHER, PROTOCOL, 64) == []
    old = {key: value for key, value in TEACHER[0].items() if key != "timing"}
    for other in (old, TEACHER[0] | {"timing": "another"}):
        assert verdict.warnings([*TEACHER, other], PROTOCOL, 64)[0].startswith("The times were taken in 2 sweeps")


def tiny_sweep(cells, folder, accelerator=None):
    extractor = Extractor.create("digits")
    real = Reference(extractor(torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8)).fid)
    return {r["name"]: r for r in sweep(cells, TINY, extractor, real, accelerator or Accelerator(cpu=True), folder)}


def test_cells_of_equal_arithmetic_are_found_and_generate_equal_images(teacher):
    cells = baselines(teacher, "teacher", (1, 2, 4, 8), BASELINES)
    groups = {}
    for cell in cells:
        groups.setdefault(arithmetic(cell), []).append(cell)
    equal = [[c.name.removeprefix("teacher ") for c in group] for group in groups.values() if len(group) > 1]
    assert equal == [["ddim 2", "heun 2", "dpm++2m 2", "dpm++3m 2", "unipc 2", "deis 2"], ["dpm++2m 4", "dpm++3m 4"]]
    for group in groups.values():
        drawn = [next(iter(images(teacher, c.sampling, c.steps, [range(5)], 0, CPU))).images for c in group]
        assert all(torch.equal(one, two) for one, two in pairwise(drawn))


def test_other_models_guidance_and_noise_are_other_arithmetic(teacher):
    plain = Cell("a", "teacher", teacher, Sampling(), 2)
    for other in (
        replace(plain, model=replace(teacher)),
        replace(plain, guidance=2.0),
        replace(plain, sampling=Sampling("ancestral")),
        replace(plain, sampling=Sampling(times={2: (1.0, 0.4, 0.0)})),
    ):
        assert arithmetic(other) != arithmetic(plain)
    assert arithmetic(replace(plain, label="b")) == arithmetic(plain)


@pytest.mark.slow
def test_equal_cells_are_measured_once_and_the_page_says_so(teacher, tmp_path, monkeypatch):
    generated, run = [], Sampling.run

    def recorded(self, denoiser, x, *args, **kwargs):
        generated.append((self.name, len(x)))
        return run(self, denoiser, x, *args, **kwargs)

    monkeypatch.setattr(Sampling, "run", recorded)
    cells = baselines(teacher, "teacher", (2, 4), ("ddim", "heun", "deis"))
    rows = tiny_sweep(cells, tmp_path)
    assert [n for n, size in generated if size == TINY.images] == ["ddim", "ddim", "heun", "deis"]
    for name in ("teacher heun 2", "teacher deis 2"):
        assert rows[name]["same_as"] == "teacher ddim 2" and rows[name]["nfe"] == 2
        for key in ("fid", "seconds_per_image", "seconds_rounds"):
            assert rows[name][key] == rows["teacher ddim 2"][key]
    assert "same_as" not in rows["teacher heun 4"] and len({p.stem for p in tmp_path.iterdir()} - {"timings"}) == 4
    protocol = {**PROTOCOL, "images": TINY.images}
    out = report.build("t", list(rows.values()), protocol, Reference(torch.randn(90, 64)), {}, tmp_path)
    SCHEMA.validate(out)
    report.write(out, tmp_path / "page", tmp_path)
    html = (tmp_path / "page" / "report.html").read_text()
    assert "Measurements shared with a cell of equal arithmetic: 2 rows." in html and html.count(">teacher ddim 2</td>") == 2


@pytest.mark.slow
def test_every_cell_is_timed_once_a_round_in_alternating_order_and_not_again(teacher, tmp_path, monkeypatch):
    cells = baselines(teacher, "teacher", (1, 3), ("ddim", "ipndm"))
    order, generate = [], timing.generate

    def recorded(denoiser, sampling, times, noise, *args):
        order.append((sampling.name, len(times) - 1, len(noise.noise)))
        return generate(denoiser, sampling, times, noise, *args)

    monkeypatch.setattr(timing, "generate", recorded)
    ticks = iter(range(10**6))
    monkeypatch.setattr(timing, "clock", lambda device: next(ticks) ** 2 * 1e-3)  # a machine that becomes ever slower
    rows = tiny_sweep(cells, tmp_path)
    forth = [("ddim", 1, 16), ("ddim", 3, 16), ("ipndm", 3, 16)]
    assert order == [*forth, *forth[::-1]] * (timing.ROUNDS // 2)
    one = rows["teacher ddim 3"]
    assert one["seconds_interval"] == [min(one["seconds_rounds"]), max(one["seconds_rounds"])]
    assert one["seconds_per_image"] == pytest.approx(
        sorted(one["seconds_rounds"])[2:4][0] / 2 + sorted(one["seconds_rounds"])[3] / 2
    )
    means = [sum(r["seconds_rounds"]) for r in rows.values()]
    assert max(means) / min(means) < 1.01  # the drift meets every cell alike
    order.clear()
    assert tiny_sweep(cells, tmp_path) == rows and order == []
    more = tiny_sweep([*cells, Cell("teacher", "teacher", teacher, Sampling(), 2)], tmp_path)
    assert len({r["timing"] for r in more.values()}) == 1 and len(order) == 4 * timing.ROUNDS


@pytest.mark.parametrize("n, batch", [(40, 16), (2000, 27), (10_000, 138), (50_000, 256)])
def test_timing_generates_at_most_a_twelfth_of_the_images_or_96(n, batch):
    assert timing.batch_size(replace(TINY, images=n, chunk=256)) == batch
    assert batch * timing.ROUNDS <= max(96, n / 12) and timing.batch_size(replace(TINY, chunk=4)) == 4


def test_the_range_of_six_rounds_covers_the_median_as_often_as_the_page_says():
    draws = torch.randn(20_000, timing.ROUNDS, generator=torch.Generator().manual_seed(0)).exp()  # its median is 1
    covered = ((draws.min(1).values < 1) & (draws.max(1).values > 1)).float().mean()
    assert covered == pytest.approx(1 - 2 / 2**6, abs=0.005)


def test_the_floors_note_gives_both_parts_and_the_rows_below():
    rows = [*TEACHER, {"error": "x"}]
    out = {"floor": 1.5, "protocol": PROTOCOL | {"images": 2000, "reference_images": 4000}, "rows": rows}
    note = floor_note(out)
    assert "2,000 fresh real images: 1.500. Of it, 1.000 come from these 2,000 images, and 0.500 from the 4,000 images" in note
    assert "2 of 4 rows lie below" in note
    assert floor_note(out | {"floor": None}) == floor_note(out | {"protocol": PROTOCOL | {"reference_images": 0}}) == ""


def test_images_drawn_again_from_the_reference_have_the_part_of_the_floor_that_the_note_says():
    from teachers.digits import digits

    real = extract(digits()[0], Extractor.create("digits"), 256, Accelerator(cpu=True))
    reference, n = Reference(real), 2000
    own = reference.floor(n) * len(real) / (n + len(real))
    generator = torch.Generator().manual_seed(0)
    drawn = [real[torch.randint(len(real), (n,), generator=generator)] for _ in range(40)]
    fids = [fidelity.frechet(fidelity.statistics(features), reference.statistics) for features in drawn]
    assert sum(fids) / 40 == pytest.approx(own, rel=0.1)


@pytest.mark.slow
def test_students_of_two_runs_and_a_baseline_among_the_steps_can_be_evaluated(teacher, tmp_path):
    student = replace(teacher, sampling=Sampling(steps=(1,)))
    other = replace(student, denoiser=replace(teacher.denoiser), record={"other": True})
    for name, model in (("a", student), ("b", other)):
        teachers.save(tmp_path / name / "stages" / "1" / "student.safetensors", model)
    specs = [str(tmp_path / name / "stages" / "1" / "student.safetensors") for name in "ab"]
    assert [run_of(spec) for spec in (*specs, "python-0a1b")] == ["a", "b", ""]
    config = evaluate.Config(model=(*specs, "digits"), steps=(1, 4), baseline_steps=4, samplers=("ddim",))
    named = [(str(tmp_path / name), [(spec, teachers.load(spec))]) for name, spec in zip("ab", specs)]
    cells = cells_of(config, named)
    assert [(cell.name, cell.run) for cell in cells] == [("a student@1 ddim 1", "a"), ("b student@1 ddim 1", "b")]
    assert [c.name for c in cells_of(config, [("digits", [("digits", teacher)])])] == [
        "teacher ddim 1",
        "teacher ddim 4",
    ]
    beside = cells_of(config, [*named, ("digits", [("digits", teacher)])])
    assert {c.name for c in beside} >= {"teacher ddim 1", "teacher ddim 4"}  # found again when a student is added
    two = [(spec, [(spec, teacher)]) for spec in ("digits", "runs/mine.safetensors")]
    assert {cell.label for cell in cells_of(config, two)} == {spec for spec, _ in two}


def test_labels_beside_samples_are_not_cut_and_markup_of_plots_is_text(tmp_path, drawn):
    from PIL import Image

    pixels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    short, long = "student 1 step", "a run with a very long name of its own 16 steps"
    for label in (short, long):
        image_grid.sample_grid([(label, pixels)], tmp_path / "grid.png")
        grey = torch.tensor(list(Image.open(tmp_path / "grid.png").convert("L").tobytes())).view(46, -1)
        left = int((grey[20] == 0).nonzero()[-1]) - 3 * 43 + 4  # where the three black tiles begin
        assert (grey[:, left - 8 : left] == 255).all() and (grey[:, :left] < 128).any()
    rows = [row("student", "ddim", 1, 1.0, run=name) for name in ("$\\broken{$", "_hidden", "Größe")]
    plots.fid_against(rows, "nfe", "NFE", tmp_path / "plot.png")
    shown = [text.get_text() for text in drawn[-1].get_legend().get_texts()]
    assert len(shown) == 3 and (tmp_path / "plot.png").stat().st_size > 1000


PLANTED = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">\"'&|`$x$"


@pytest.mark.slow
def test_markup_planted_in_every_text_of_a_report_is_shown_as_text_and_nothing_runs_or_loads(written, browser, tmp_path):  # noqa: F811
    texts = ("name", "model", "sampler", "grid", "model_sha256", "run")
    rows = [*TEACHER, row("student", "ddim", 1, 0.6) | {key: f"{key} {PLANTED}" for key in texts}]
    folder = written("a", rows, PROTOCOL | {key: f"{key} {PLANTED}" for key in PROTOCOL if isinstance(PROTOCOL[key], str)})
    out = json.loads((folder / "report.json").read_text())
    out |= {"title": PLANTED, "verdict": PLANTED, "warnings": [PLANTED], "baseline": PLANTED, "run": {PLANTED: PLANTED}}
    out["rows"][-1]["error"] = PLANTED
    out["rows"][0]["same_as"] = PLANTED
    html = report.page(out, folder, folder / "cells")
    for where, text in (
        ("escaped", html),
        ("unescaped", html.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')),
    ):
        (folder / f"{where}.html").write_text(text)
        page, asked, said = browser.new_page(), [], []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, said=said: said.append(message.text))
        page.goto((folder / f"{where}.html").as_uri())
        assert [url for url in asked if not url.startswith(("data:", "file:"))] == [] and page.title() != "ran"
        if where == "escaped":
            assert page.locator("script").count() == 1 and page.title() == PLANTED and said == []
            body = page.text_content("body")
            assert PLANTED in body and all(f"{key} {PLANTED}" in body for key in ("model", "sampler", "grid"))
            assert all(line in body for line in ("features " + PLANTED, "reference_sha256 " + PLANTED))
            styled = page.evaluate("getComputedStyle(document.querySelector('.verdict')).borderLeftWidth")
            assert styled == "4px"  # the policy lets the page's own style through
        else:  # the second line of defence: the policy alone
            assert page.locator("script").count() > 0 and any("Content Security Policy" in line for line in said)
        page.close()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("script-src 'sha256-") == 1
    markdown = report._markdown(out)
    assert "<script" not in markdown and "&lt;script" in markdown
    assert len({line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")}) == 1
