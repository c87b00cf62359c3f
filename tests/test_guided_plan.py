"""What a guided ladder is forecast to take: guidance doubles the calls of its first stage, and the student teaches all later ones."""

import pytest
from conftest import here

from distill.denoiser import Guided
from recipes import guided
from recipes.common.training import Experiment


@pytest.mark.slow
def test_the_plan_counts_two_calls_in_stage_one_and_one_call_of_the_student_afterwards(new, tmp_path, monkeypatch):
    seen = []

    def plan(self, method, budgets, steps, more=0):
        seen.append((method, budgets, more))
        raise SystemExit(0)

    monkeypatch.setattr(Experiment, "plan", plan)
    few = "--preset smoke --start-steps 64 --images-per-stage 128 --batch-size 64 --force --dry-run --teacher"
    with pytest.raises(SystemExit):
        here(guided.main, few, new, "--output-dir", tmp_path / "run")
    ((method, budgets, more),) = seen
    images = [stage.trained_images for stage in budgets]
    assert images == [384, 64, 128, 128, 256, 256] and not isinstance(method.teacher, Guided)
    calls = [
        2,
        4,
        2,
        2,
        2,
        2,
    ]  # of the target for an image: the guided teacher's, 64 -> 16 in four steps, then two steps in one
    assert sum(images) * method.substeps + more == sum(n * count for n, count in zip(images, calls, strict=True))
