"""The rows of the table of few-shot results: the options of each row, and published accuracies."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from experiments import miniimagenet, omniglot
from experiments.few_shot.run import Run
from maml_jax.runs.forms import ABSENT, check_form

EXPERIMENTS: dict[str, type[Run]] = {"omniglot": omniglot.Run, "miniimagenet": miniimagenet.Run}
"""The class of the runs of each experiment, by the experiment's name in saved models and results."""


def trained_run(path: Path, description: dict[str, Any]) -> Run:
    """Returns the run that trained a saved model.

    Args:
      path: the file of the model, for messages.
      description: the description in the file.

    Raises:
      ValueError: if the model is no few-shot classifier, or an option of its training is not allowed.
      WorkdirError: if the description has another form.
    """
    name = description.get("experiment")
    experiment = EXPERIMENTS.get(name) if isinstance(name, str) else None
    if experiment is None:
        raise ValueError(f"{path} must be a few-shot classifier, but is a model of experiment {name!r}.")
    options: dict[str, Any] = {f"{field.name}?": object for field in dataclasses.fields(experiment)}
    config = options | {"head_rates?": list, "*": ABSENT}
    check_form(path, description, {"step": int, "selected_after": int, "data_sha256": dict, "config": config})
    run = experiment(**description["config"])
    run.check()
    return run


class Published(NamedTuple):
    """A published accuracy, in per cent."""

    accuracy: float
    half_width: float | None
    """Half width of its 95% interval; None if it is not published."""
    source: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One training in the table. Results name the row that they belong to."""

    name: str
    data: str
    """'omniglot', 'miniimagenet', or 'images' for any folder of images."""
    setting: str
    """Ways and shots, such as '5w1s'."""
    method: str
    """A key of `METHODS`. No two rows of a data set and setting have the same method."""
    experiment: str
    """A key of `EXPERIMENTS`, and the name of the command's module."""
    options: Mapping[str, Any]
    """Options of the run, without directories, steps and seed."""
    steps: int
    """Meta-steps of the full schedule."""

    @cached_property
    def inner_steps(self) -> int:
        """Inner steps at test, by the published protocol, but at most `TEST_STEPS`."""
        return EXPERIMENTS[self.experiment](**self.options).resolved().selected_after

    @property
    def published(self) -> Published | None:
        return published(self.data, self.setting, self.method)


METHODS = {
    "maml": "MAML, second order",
    "order1": "MAML, first order",
    "mlp": "MAML, no convolutions",
    "annealed": "MAML, 16 tasks a meta-step, outer rate falling from 0.01",
    "fast": "MAML, second order, by the fast recipe",
    "anil": "ANIL",
    "boil": "BOIL",
    "meta-sgd": "Meta-SGD",
    "meta-curvature": "meta-curvature",
    "maml++": "MAML++",
    "shared-head": "MAML, a head shared over classes",
    "prototypes": "MAML, head from prototypes",
    "reptile": "Reptile",
    "imaml": "iMAML",
    "pretrained": "pretraining and fine-tuning",
    "nearest neighbour": "pretraining and nearest neighbour",
    "norm-support": "MAML, norms of the support set",
    "norm-tasknorm": "MAML, TaskNorm",
    "norm-layer": "MAML, layer norm",
    "norm-group": "MAML, group norm",
    "norm-running": "MAML, running statistics",
    "matching nets": "matching nets",
    "LSTM": "meta-learner LSTM",
    "COMLN": "COMLN",
    "NPBML": "NPBML",
}
"""Titles of the methods of rows, and of methods that have only published accuracies."""

DATA = {"omniglot": "Omniglot", "miniimagenet": "MiniImagenet", "images": "A folder of images"}
SETTINGS = {
    "5w1s": "5-way 1-shot",
    "5w5s": "5-way 5-shot",
    "20w1s": "20-way 1-shot",
    "20w5s": "20-way 5-shot",
}

FINN = "Finn et al. 2017, table 1"
NICHOL = "Nichol et al. 2018"
_QUOTED = (
    # Method, source, and (accuracy, half width) for Omniglot 5w1s, 5w5s, 20w1s, 20w5s, MiniImagenet 5w1s, 5w5s.
    ("matching nets", f"Vinyals et al. 2016, from {FINN}",
     ((98.1,), (98.9,), (93.8,), (98.5,), (43.56, 0.84), (55.31, 0.73))),
    ("LSTM", f"Ravi and Larochelle 2017, from {FINN}", (None, None, None, None, (43.44, 0.77), (60.60, 0.71))),
    ("pretrained", FINN, (None, None, None, None, (28.86,), (49.79,))),
    ("nearest neighbour", FINN, (None, None, None, None, (41.08,), (51.04,))),
    ("reptile", f"{NICHOL}, transductive", ((97.68,), (99.48,), (89.43,), (97.12,), (49.97,), (65.99,))),
    ("anil", "Raghu et al. 2020", (None, None, (96.2,), (98.0,), (46.7,), (61.5,))),
    ("meta-sgd", "Li et al. 2017", (None, None, None, None, (50.47,), (64.03,))),
    ("imaml", "Rajeswaran et al. 2019, gradient descent", ((99.16,), (99.67,), (94.46,), (98.69,), (48.96,), None)),
    ("maml++", "Antoniou et al. 2019, ensemble of five checkpoints",
     ((99.47,), (99.85,), (97.65,), (99.33,), (52.15, 0.26), (68.32, 0.44))),
    ("COMLN", "Deleu et al. 2022", (None, None, None, None, (53.01,), (70.54,))),
    ("NPBML", "NPBML, 2024, the best found with this net", (None, None, None, None, (57.49, 0.83), (75.01, 0.64))),
)  # fmt: skip


def _published() -> dict[tuple[str, str], dict[str, Published]]:
    columns = [("omniglot", setting) for setting in SETTINGS] + [("miniimagenet", "5w1s"), ("miniimagenet", "5w5s")]
    found: dict[tuple[str, str], dict[str, Published]] = {column: {} for column in columns}
    for (ways, shots, net, order), number in omniglot.PUBLISHED.items():
        method = "mlp" if net == "mlp" else "maml" if order == 2 else "order1"
        source = FINN if order == 2 else f"{NICHOL}, table 2"
        found["omniglot", f"{ways}w{shots}s"][method] = Published(*number, source)
    for (shots, order), number in miniimagenet.PUBLISHED.items():
        found["miniimagenet", f"5w{shots}s"]["maml" if order == 2 else "order1"] = Published(*number, FINN)
    for method, source, numbers in _QUOTED:
        for column, quoted in zip(columns, numbers):
            if quoted is not None:
                found[column][method] = Published(quoted[0], quoted[1] if len(quoted) > 1 else None, source)
    return found


PUBLISHED = _published()
"""Published accuracies by `(data, setting)` and method. There are none for `images`."""


def published(data: str, setting: str, method: str) -> Published | None:
    """The published accuracy of a method; for the fast recipe, which is MAML trained in another way, that of MAML."""
    return PUBLISHED.get((data, setting), {}).get("maml" if method == "fast" else method)


def _row(data: str, setting: str, method: str) -> Row:
    ways, shots = map(int, setting.removesuffix("s").split("w"))
    options: dict[str, Any] = {"ways": ways, "shots": shots}
    if data == "miniimagenet":
        options["expect"] = "miniimagenet"
    if method == "order1":
        options["order"] = 1
    elif method == "mlp":
        options["net"] = "mlp"
    elif method.startswith("norm-"):
        options["normalisation"] = method.removeprefix("norm-")
    elif method == "annealed":
        options |= {"anneal": True, "tasks": 16, "outer_rate": 0.01}
    elif method == "fast":
        options["recipe"] = "fast"
    elif method != "maml":
        options["method"] = method
    if method == "maml++":
        options["ensemble"] = True
    name = f"{data}-{setting}" if method == "maml" else f"{data}-{setting}-{method}"
    experiment = "omniglot" if data == "omniglot" else "miniimagenet"
    steps = EXPERIMENTS[experiment](**options).resolved().steps
    return Row(name, data, setting, method, experiment, options, steps)


def _rows() -> list[Row]:
    family = ("anil", "boil", "meta-sgd", "meta-curvature", "maml++", "shared-head", "prototypes", "reptile", "imaml")
    norms = ("norm-support", "norm-tasknorm", "norm-layer", "norm-group", "norm-running")
    paper = [_row("omniglot", setting, method) for setting in SETTINGS for method in ("maml", "order1")]
    paper += [_row("omniglot", setting, "mlp") for setting in ("5w1s", "5w5s")]
    paper += [_row("omniglot", setting, method) for method in ("annealed", "fast") for setting in SETTINGS]
    by_family = [
        _row("omniglot", setting, method)
        for setting in SETTINGS
        for method in family
        if setting == "5w1s" or method in PUBLISHED["omniglot", setting]
    ]
    others = [
        _row(data, setting, method)
        for data in ("miniimagenet", "images")
        for setting in ("5w1s", "5w5s")
        for method in ("maml", "order1", "fast", "anil", "meta-sgd", "maml++", "pretrained", "reptile", "imaml")
        if ((data, setting) not in PUBLISHED or method == "fast" or method in PUBLISHED[data, setting])
        and not (data == "images" and method in ("reptile", "imaml"))
    ]
    return [*paper, *by_family, *(_row("omniglot", "5w1s", norm) for norm in norms), *others]


ROWS = tuple(_rows())
BY_NAME = {row.name: row for row in ROWS}


def choose(patterns: Sequence[str]) -> list[Row]:
    """Returns the rows whose names match the patterns, in the order of `ROWS`.

    Args:
      patterns: names of rows, or glob patterns.

    Raises:
      ValueError: if a pattern matches no row. The message has similar names.
    """
    names = [row.name for row in ROWS]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.5)
            similar = f"; similar rows are {', '.join(near)}" if near else ""
            raise ValueError(f"rows: no row matches {pattern!r}{similar}. --list --rows '*' prints all rows.")
    return [row for row in ROWS if any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)]
