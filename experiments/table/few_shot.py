"""Tables of sine curves and few-shot classification for README.md and docs/."""

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments.table import compare, page
from experiments.table.compare import Group, Line
from experiments.table.page import table
from experiments.table.rows import PUBLISHED, Published
from maml_jax.runs.files import read_json

SINE_STEPS = (1, 5, 10)
PUBLISHED_STEPS = {5: 3, 20: 5}
"""Inner steps of the paper's accuracies on Omniglot, by the ways of a task."""
FAST_START = "omniglot-20w1s-fast-200"
"""The run of the fast recipe from which the runs of its second phase start."""
FAST = ("omniglot-5w1s-fast", "omniglot-5w5s-fast", "omniglot-20w1s-fast", "omniglot-20w5s-fast")


def paper(results: Path) -> list[list[str]]:
    """Rows of our results beside the paper's."""
    rows = [_sine_row(results)]
    for group in groups(results):
        for line in [line for line in group.lines if line.row.method == "maml" and line.runs][:1]:
            if line.published is not None:
                ours, theirs = page.over_seeds(line.numbers()), page.interval(line.published)
                rows.append([group.title, "accuracy, %", ours, theirs, _meta_steps(line)])
    for folder in FAST:
        found = read_json(results / folder / "results.json")
        step = PUBLISHED_STEPS[found["config"]["ways"]]
        training = f"fast recipe, {_fast_minutes(results, found)} minutes of one core"
        accuracy = _accuracy(found["test"][compare.TRANSDUCTIVE], step)
        rows.append([_setting(found), "accuracy, %", accuracy, page.interval(_paper_accuracy(found)), training])
    return rows


def _sine_row(results: Path) -> list[str]:
    found = read_json(results / "sinusoid-5-seeds" / "results.json")
    rows = [row for row in found["rows"] if (row["method"], row["shots"]) == ("maml", 5)]
    steps = f"{found['config']['steps']:,} meta-steps, {len(rows)} seeds"
    return ["Sine curves, 5 points", "squared error after 1 step", f"{np.median([row['mean'][1] for row in rows]):.3f}",
            f"{found['paper']['maml'][0]:g}", steps]  # fmt: skip


def _meta_steps(line: Line) -> str:
    full = line.row.steps
    return f"{line.steps:,} meta-steps" if line.steps >= full else f"{line.steps:,} of {full:,} meta-steps"


def sine_curves(results: Path) -> str:
    """Errors after 1, 5 and 10 steps from 5 points."""
    errors = read_json(results / "sinusoid-5-seeds" / "results.json")["paper"]["maml"]
    rows = [["paper", *(f"{error:g}" for error in errors), ""]]
    for folder, method, title in (
        ("sinusoid-5-seeds", "maml", "the paper's recipe"),
        ("sinusoid-steady-5-seeds", "steady", "the `steady` recipe"),
    ):
        found = read_json(results / folder / "results.json")["rows"]
        found = [row for row in found if (row["method"], row["shots"]) == (method, 5)]
        rates = [row["divergence"][10] for row in found]
        diverged = f"{min(rates):.1%} to {max(rates):.1%}"
        means = [np.median([_number(row["mean"], step) for row in found]) for step in SINE_STEPS]
        rows.append([f"{title}, mean over curves", *map(_error, means), diverged])
        # A run writes null for a median that was not recorded, and for a mean that is infinite.
        medians = [[row["median"][step] for row in found] for step in SINE_STEPS]
        cells = ["" if None in values else _error(np.median(values)) for values in medians]
        rows.append([f"{title}, median over curves", *cells, ""])
        worst = max(found, key=lambda row: _number(row["mean"], 1))
        rows.append([f"{title}, worst seed", *(_error(_number(worst["mean"], step)) for step in SINE_STEPS), ""])
    return table(("", "1 step", "5 steps", "10 steps", "diverged curves, by seed"), rows)


def _number(values: Sequence[float | None], step: int) -> float:
    value = values[step]
    return np.inf if value is None else value


def _error(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "not finite"


@cache
def groups(results: Path) -> list[Group]:
    """The lines of all few-shot runs, by data set and setting."""
    return compare.group([], compare.find([results]))


def accuracies(results: Path) -> str:
    """All methods of each setting, and differences on the same tasks."""
    return page.accuracies(groups(results))


def protocols(results: Path) -> str:
    """Tasks of the accuracies of each setting."""
    return page.protocols(groups(results))


def runs(results: Path) -> str:
    """Provenance of each accuracy."""
    return page.provenance(groups(results))


def fast_recipe(results: Path) -> str:
    """Accuracies of the fast recipe after its second phase, with the time of both phases."""
    rows = []
    for folder in FAST:
        found = read_json(results / folder / "results.json")
        cells = [_accuracy(found["test"][compare.TRANSDUCTIVE], step) for step in (1, 3, 5, 10)]
        rows.append(
            [
                _setting(found),
                *cells,
                page.interval(_paper_accuracy(found)),
                _fast_minutes(results, found),
                f"`{folder}`",
            ]
        )
    head = ("setting", "1 step", "3 steps", "5 steps", "10 steps", "paper", "minutes of one core", "run")
    return table(head, rows)


def recipe_probes(results: Path) -> str:
    """Validation accuracies of short trainings with other choices of the recipe."""
    found = read_json(results / "recipe-probes" / "probes.json")["rows"]
    rows = [[row["choice"], f"{row['meta_steps']:,}", f"{row['validation']:.1f}"] for row in found]
    return table(("choice", "meta-steps", "validation, %"), rows)


def _accuracy(test: dict[str, Any], step: int) -> str:
    """Accuracy after some inner steps, with its 95% interval."""
    return f"{test['accuracy'][step]:.2f} ± {test['half_width'][step]:.2f}"


def _setting(found: dict[str, Any]) -> str:
    return f"Omniglot, {found['config']['ways']}-way {found['config']['shots']}-shot"


def _paper_accuracy(found: dict[str, Any]) -> Published:
    """The accuracy of the paper's MAML in the setting of a run."""
    config = found["config"]
    return PUBLISHED["omniglot", f"{config['ways']}w{config['shots']}s"]["maml"]


def _fast_minutes(results: Path, found: dict[str, Any]) -> str:
    """Minutes of both phases, with evaluation."""
    both = (read_json(results / FAST_START / "results.json")["made_by"], found["made_by"])
    spans = [datetime.fromisoformat(made["finished"]) - datetime.fromisoformat(made["started"]) for made in both]
    return f"{sum(span.total_seconds() for span in spans) / 60:.0f}"


def normalisation(results: Path) -> str:
    """Accuracy of three normalisations, transductive and inductive."""
    rows = []
    for name, title in (
        ("batch", "batch: statistics of the batch, as in the paper"),
        ("tasknorm", "tasknorm: support set and example"),
        ("layer", "layer: the example"),
    ):
        test = read_json(results / f"omniglot-5w1s-order1-{name}-3k" / "results.json")["test"]
        cells = [_accuracy(test[key], 1) for key in (compare.TRANSDUCTIVE, compare.INDUCTIVE) if key in test]
        rows.append([title, *cells, *(["the same: queries are independent"] * (2 - len(cells)))])
    return table(("normalisation", "transductive, %", "inductive, %"), rows)
