"""Models from anywhere as one type: a `Teacher` with a denoiser E[x0 | x_t]. Students are loaded the same way."""

from teachers.load import ACCEPTED, load
from teachers.networks.factory import trust
from teachers.saved import load_file, save
from teachers.teacher import Teacher

__all__ = ["ACCEPTED", "Teacher", "load", "load_file", "save", "trust"]
