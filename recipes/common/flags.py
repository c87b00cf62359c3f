"""Groups of flags that several recipes share. A recipe's Config inherits them and redefines a field to change its default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import teachers
from distill.names import OPTIMIZERS
from eval.names import REFERENCES
from recipes.common.accepted import BATCH, GENERATED, GUIDANCE, LEARNING_RATE, SEED, STEPS, THREADS, TRAINED, Checked
from recipes.common.cli import TRACKERS, machine_flag, measuring_flag, method_flag, model_flag, training_flag
from recipes.data import spec

TOPICS = {
    "teacher": f"Accepted as --teacher, --model and --student:\n{teachers.ACCEPTED}",
    "data": f"Accepted as --data:\n{spec.ACCEPTED}",
}


def output_dir(default: str) -> Any:
    """Declare --output-dir with a default of the recipe's own."""
    return machine_flag(default, "a new directory, or one with the same run, which is continued", path="folder")


def captions_flag() -> Any:
    """Declare --captions."""
    text = "file of prompts, one per line, for the images of text-to-image models; default are those of the training"
    return measuring_flag(None, text, short=False, path="file")


@dataclass(frozen=True)
class MachineFlags(Checked):
    """Threads, and the output directory."""

    output_dir: str = output_dir("runs/out")
    threads: int = machine_flag(0, "CPU threads per process; 0 divides the cores equally", short=False, **THREADS)


@dataclass(frozen=True)
class RunFlags(MachineFlags):
    """A run that can be continued."""

    seed: int = machine_flag(0, "seed of all random numbers", **SEED)
    log_with: str | None = machine_flag(None, "an Accelerate tracker", choices=TRACKERS, short=False)
    resume: bool = machine_flag(True, "continue a run of the same configuration in the output directory", short=False)


@dataclass(frozen=True)
class TrainingFlags(Checked):
    """How a network is trained. Lengths are in images."""

    batch_size: int = training_flag(128, "images per step, over all processes", **BATCH)
    microbatch: int | None = training_flag(
        None, "largest number of images at once in a process; more accumulate", short=False, **BATCH
    )
    lr: float = training_flag(1e-3, "learning rate; it falls linearly to 0", **LEARNING_RATE)
    warmup_images: int = training_flag(
        4_000, "images over which the learning rate rises at the start", short=False, **(TRAINED | {"at_least": 0})
    )
    mixed_precision: str = training_flag(
        "no", "autocast of the networks during training", choices=("no", "bf16", "fp16"), short=False
    )
    teacher_precision: str = training_flag(
        "same",
        "autocast of the teacher during training: that of --mixed-precision, or its own",
        choices=("same", "bf16", "fp32"),
        short=False,
    )
    optimizer: str = training_flag(
        "adamw", "AdamW in float32, or with moments of 8 bits, a quarter of the memory", choices=OPTIMIZERS, short=False
    )
    rollbacks: int = training_flag(
        2, "how often a stage that diverges goes back to its last checkpoint, with other random numbers", short=False,
        at_least=0, at_most=100,
    )  # fmt: skip
    compile: bool = training_flag(
        False, "torch.compile the networks for training: faster steps after minutes of compiling", short=False
    )
    checkpoint_activations: bool = training_flag(
        False, "keep fewer activations for the backward pass, and compute the others once more", short=False
    )

    @property
    def autocast_of_teacher(self) -> str:
        """The precision of the teacher in training: that of the student, or its own."""
        return self.mixed_precision if self.teacher_precision == "same" else self.teacher_precision

    def check_precision(self, teacher: object | None) -> None:
        """Raise ValueError for a precision of a teacher that there is not."""
        if teacher is None and self.teacher_precision != "same":
            raise ValueError(f"--teacher-precision {self.teacher_precision}: this run has no teacher; accepted is same")


@dataclass(frozen=True)
class LoraFlags(Checked):
    """Train an adapter instead of all weights (`recipes.common.lora`)."""

    lora_rank: int = training_flag(
        0,
        "train a LoRA adapter of this rank, which shares the teacher's weights; 0 trains all weights",
        at_least=0,
        at_most=1024,
    )
    lora_targets: tuple[str, ...] | None = training_flag(
        None,
        "layers with an adapter: all, attention, or the ends of their names",
        short=False,
        own=lambda v: "all",
    )
    base_precision: str = training_flag(
        "fp32", "weights that teacher and adapter share; bf16 needs half of the memory", choices=("fp32", "bf16"), short=False
    )


@dataclass(frozen=True)
class DecodingFlags(Checked):
    """How the images of latent models are decoded."""

    decode: str = measuring_flag(
        "plain",
        "latent models: decode a batch at once, one image after the other, or tile by tile, which changes pixels a little",
        choices=("plain", "sliced", "tiled"),
        short=False,
    )


@dataclass(frozen=True)
class SweepFlags(Checked):
    """How the finished students and the teacher's samplers are measured."""

    images: int = measuring_flag(2_000, "generated images per cell of the sweep", **GENERATED)
    sweep_steps: tuple[int, ...] = measuring_flag(
        (1, 2, 4, 8), "step counts of the teacher's training-free samplers", short=False, **STEPS
    )
    features: str = measuring_flag(
        "digits", "feature extractor of FID: inception-v3-compat for colour; recipes/evaluate.py --help lists all"
    )
    reference: str | None = measuring_flag(
        None,
        f"a stored reference instead of the images of --data; needed with latents: {REFERENCES}",
        short=False,
        path="file",
    )
    captions: str | None = captions_flag()
    chunk: int = measuring_flag(256, "images generated at once", short=False, **BATCH)


@dataclass(frozen=True)
class GuidanceFlags(Checked):
    """Guidance of the teacher that the student learns: one scale, or a range of scales that become an input of the student."""

    guidance: float = method_flag(1.0, "classifier-free guidance of the teacher, learnt by the student; 1 is none", **GUIDANCE)
    guidance_range: tuple[float, ...] | None = method_flag(
        None,
        "lowest and highest guidance scale of a student that takes the scale as an input",
        own=lambda v: "that of the teacher, if its network takes the scale",
        short=False,
        **GUIDANCE,
    )
    sweep_guidance: tuple[float, ...] | None = measuring_flag(
        None,
        "with a range: the scales at which student and teacher are measured",
        own=lambda v: "both ends of the range",
        short=False,
        **(GUIDANCE | {"distinct": True}),
    )


@dataclass(frozen=True)
class PlanFlags(Checked):
    """What a run would take."""

    dry_run: bool = machine_flag(False, "print the plan with time, memory and disk from a measured step, and write nothing")


@dataclass(frozen=True)
class DistillationFlags(PlanFlags, RunFlags, TrainingFlags, LoraFlags, DecodingFlags, SweepFlags, GuidanceFlags):
    """A teacher, data, and the groups above: what every recipe that distils has."""

    teacher: str = model_flag("digits", "the trained model (accepted: --help teacher)")
    data: str = model_flag("digits", "the training data (accepted: --help data)")
    conditions: str = model_flag(
        "cached",
        "captions of a text-to-image teacher: encoded once beside the run, unless the data are, or online for each batch",
        choices=("cached", "online"),
        short=False,
    )
    force: bool = model_flag(False, "distil even if the probe finds that the teacher is not a denoiser", short=False)
    replay: str | None = machine_flag(
        None,
        "a file diverged-*.safetensors of this run: take that step again, print each sample's loss, train nothing",
        short=False,
        path="file",
    )

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("force", "rollbacks", "compile", "checkpoint_activations", "replay", "dry_run")
    TOPICS: ClassVar = TOPICS
