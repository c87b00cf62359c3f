"""Models from anywhere as one thing: a `Teacher` whose denoiser is E[x0 | x_t]. A student is loaded the same way."""

from teachers.load import ACCEPTED, Teacher, load, load_file, save

__all__ = ["ACCEPTED", "Teacher", "load", "load_file", "save"]
