"""Help, progress and the command ``fewstep`` as a person meets them."""

import io
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import eval.progress as lines
from fewstep import __main__ as command
from recipes import consistency, progressive
from recipes.common.cli import plural


def help_of(main, capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main([*arguments])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_the_short_help_has_examples_and_groups_and_the_full_help_every_flag(capsys):
    short, full = (help_of(progressive.main, capsys, *how) for how in (["--help"], ["--help", "all"]))
    for text in (short, full):
        assert "accelerate launch recipes/progressive.py --preset full" in text and "optimisation:" in text
        assert max(map(len, text.splitlines())) <= 132  # the docstring's own width
    assert "--microbatch" in full and "--microbatch" not in short and "More: --help all" in short
    assert len(short.splitlines()) < 60 < len(full.splitlines())
    assert "default: 1 2 4 8" in full and "fokker-planck" in help_of(consistency.main, capsys, "--help", "all")


def test_the_help_shows_the_defaults_of_the_chosen_method(capsys):
    of_ict = " ".join(help_of(consistency.main, capsys, "--method", "ict", "--help", "all").split())
    of_cd = " ".join(help_of(consistency.main, capsys, "--help", "all").split())
    assert "default: inverse_gap" in of_ict and "default: pseudo_huber" in of_ict
    assert "default: truncated_snr" in of_cd and "default: pseudo_huber" not in of_cd


def test_the_grammars_of_teachers_and_data_are_topics_of_the_help(capsys):
    assert "FOLDER or OWNER/NAME: a diffusers pipeline" in help_of(progressive.main, capsys, "--help", "teacher")
    assert "npz" in help_of(progressive.main, capsys, "--help", "data")


def test_the_command_lists_all_recipes_and_runs_them(capsys, tmp_path):
    command.main([])
    out = capsys.readouterr().out
    assert all(name in out for name in ("progressive", "consistency", "evaluate", "probe", "compare"))
    command.main(["sample", "--steps", "1", "--images", "4", "--output", str(tmp_path / "s.png")])
    assert (tmp_path / "s.png").exists()
    with pytest.raises(SystemExit) as exit_:
        command.main(["progresive"])
    assert exit_.value.code == 2 and "nearest are progressive" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_works_in_a_folder_with_an_eval_py_of_its_own(tmp_path):
    (tmp_path / "eval.py").write_text("raise SystemExit('this is not the package eval')")
    (tmp_path / "recipes").mkdir()
    executable = os.path.join(os.path.dirname(sys.executable), "fewstep")
    run = [executable, "sample", "--steps", "1", "--images", "2", "--output", "s.png"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "s.png").exists(), done.stderr


@pytest.mark.slow
def test_the_shell_completes_commands_and_the_flags_of_the_chosen_one(tmp_path):
    pytest.importorskip("argcomplete")
    script = "import sys; sys.path.insert(0, sys.argv[1]); from fewstep.__main__ import main; main([])"

    def completed(line):
        out = tmp_path / "out"
        environment = os.environ | {
            "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
            "_ARGCOMPLETE_IFS": " ",
        }  # fmt: skip
        subprocess.run([sys.executable, "-c", script, str(ROOT)], env=environment, capture_output=True, timeout=120)
        return out.read_text().split()

    assert "progressive" in "".join(completed("fewstep prog"))
    assert "--start-steps" in " ".join(completed("fewstep progressive --start"))


def test_without_a_terminal_progress_is_a_line_now_and_then_and_not_a_bar(monkeypatch):
    monkeypatch.setattr(lines, "SECONDS", 0.05)
    monkeypatch.setattr(sys, "stderr", out := io.StringIO())
    for _ in lines.progress(range(20), desc="stage 4", unit="img"):
        time.sleep(0.02)
    written = out.getvalue().splitlines()
    assert 2 <= len(written) <= 10 and all(line.startswith("stage 4: ") and "left" in line for line in written)
    assert "\r" not in out.getvalue()
    list(lines.progress(range(20), show=False))
    assert out.getvalue().splitlines() == written


def test_counts_are_words():
    assert [plural(n, "step") for n in (1, 2, 10_000)] == ["1 step", "2 steps", "10,000 steps"]
    assert plural(2, "process") == "2 processes"
