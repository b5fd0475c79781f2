"""The notebooks run from top to bottom, and their numbers support their text."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"


@pytest.fixture
def run(monkeypatch):
    """Runs a notebook with a shorter training; returns its variables, and the number of lines in each of its plots."""

    def run(name, steps="", fewer=""):
        shown = []
        plt.close("all")
        matplotlib.use("Agg")
        monkeypatch.setattr(plt, "show", lambda: shown.append([len(axes.lines) for axes in plt.gcf().axes]))
        scope = {"__name__": "__main__"}
        try:
            text = (FOLDER / f"{name}.py").read_text()
            assert steps in text
            exec(compile(text.replace(steps, fewer), name, "exec"), scope)
        finally:
            plt.close("all")
        return scope, shown

    return run


def test_every_notebook_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"first_look", "own_model", "first_and_second_order"}


def test_first_look(run):
    scope, shown = run("first_look", "steps=15_000", "steps=7_000")
    assert scope["error"][1] < 0.6 * scope["error"][0] and scope["error"][10] < 0.5
    assert shown == [[1], [1 + 5]]


def test_own_model(run):
    scope, _ = run("own_model", "steps=2_000", "steps=1_500")
    assert scope["report"].exact
    for error in scope["results"].values():
        assert error[3] < 0.4 * error[0]


def test_first_and_second_order(run):
    scope, shown = run("first_and_second_order", "inner_steps = (1, 4, 16)", "inner_steps = (1, 2, 4)")
    assert scope["report"].exact and shown == [[4, 4]]
    first, exact, full, mixflow = ([row["gradient"] for row in rows] for rows in scope["found"].values())
    for same in (full, mixflow):
        np.testing.assert_allclose(np.linalg.norm(np.subtract(same, exact), axis=1), 0, atol=1e-4)
    assert np.linalg.norm(first[2] - exact[2]) > 0.01 * np.linalg.norm(exact[2])
