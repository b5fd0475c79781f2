"""Plots show any names of files and classes."""

import os

import numpy as np

from experiments.shared import plots


def test_names_with_dollar_signs_and_names_that_are_not_utf_8_are_drawn(tmp_path):
    picture = np.zeros((4, 4), np.uint8)
    for number, name in enumerate(("$", "a$^$b", r"\frac$x", os.fsdecode(b"caf\xe9"), "_hidden")):
        path = tmp_path / f"{number}.png"
        plots.predictions(path, {name: [picture]}, [(picture, name, 0.5)])
        assert path.stat().st_size
        plots.inner_steps(path, {name: {"accuracy": [1.0], "half_width": [0.1]}})
        plots.training(path, {"loss": {name: ([1], [2.0])}})
