"""Plots show any names of files and classes."""

import os

import numpy as np

from experiments.shared import plots


def test_names_with_dollar_signs_and_names_that_are_not_utf_8_are_drawn(tmp_path):
    picture = np.zeros((4, 4), np.uint8)
    names = ("$", "a$^$b", r"\frac$x", os.fsdecode(b"caf\xe9"), "_hidden")
    path = tmp_path / "plot.png"
    plots.predictions(path, {name: [picture] for name in names}, [(picture, name, 0.5) for name in names])
    plots.inner_steps(path, {name: {"accuracy": [1.0], "half_width": [0.1]} for name in names})
    plots.training(path, {"loss": {name: ([1], [2.0]) for name in names}})
    assert path.stat().st_size
