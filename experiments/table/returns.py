"""Tables of returns from the results of reinforcement learning, and plots of returns over tasks.

    python -m experiments.table.returns --results results

The command plots returns over tasks, for each environment whose tasks are velocities.
"""

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import locomotion, navigation
from experiments.reinforcement import options, plots
from experiments.reinforcement.evaluation import mean_by_task
from experiments.shared import command_line
from maml_jax.evaluation import interval
from maml_jax.runs.files import read_json

LEGEND = (
    "Mean return over 40 held-out tasks (or as many as stated) before and after each gradient step, each step on new "
    "episodes, with the 95% interval over the tasks; for several seeds the mean and the range. 'better' is the share "
    "of the tasks whose return the first step improves, and 'gain' the mean improvement with its 95% interval. 'paper' "
    "has the numbers behind the paper's figures, after 100 meta-iterations of navigation, 475 and 100 of half-cheetah, "
    "and 375 and 575 of ant."
)

TITLES = {
    "navigation": "2D navigation",
    "half-cheetah-velocity": "Half-cheetah, velocity",
    "half-cheetah-direction": "Half-cheetah, direction",
    "ant-velocity": "Ant, velocity",
    "ant-direction": "Ant, direction",
}
METHODS = {
    "maml": "MAML",
    "first_order": "MAML, first order",
    "pretrained": "joint training on all tasks",
    "random": "untrained",
    "oracle": "oracle (observes the task)",
}

HEADS = ("meta-iterations", "test rates", "before", "1 step", "2 steps", "3 steps", "better", "gain", "paper")

NAMED_OPTIONS = (
    *("outer", "sampling_term", "inner_steps", "physics", "tasks", "episodes", "inner_rate", "kl_limit"),
    *("curvature_tasks", "outer_rate", "test_episodes"),
)
"""Options that a table names if they differ from the paper's settings."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Plots returns over tasks."""

    results: Path = Path("results")
    """Folder of runs, each with a results.json."""


class Line(NamedTuple):
    """One method of one run."""

    folder: str
    results: dict[str, Any]
    method: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row for each seed."""
        return [row for row in self.results["rows"] if row["method"] == self.method]

    @property
    def environment(self) -> str:
        return self.results["environment"]

    @property
    def steps(self) -> int:
        """Meta-iterations."""
        return 0 if self.method == "random" else self.results["config"]["steps"]


def prepare(config: Config) -> tuple[Config, list[Line]]:
    """Reads the results.

    Raises:
      ValueError: if there are no results of reinforcement learning.
      OSError: if a file cannot be read.
    """
    lines = found(config.results)
    if not lines:
        raise ValueError(f"results: {config.results} holds no runs of reinforcement learning.")
    return config, lines


def found(folder: Path) -> list[Line]:
    """Finds the methods of all runs in a folder that have returns, sorted by method and meta-iterations."""
    lines = []
    for path in sorted(folder.glob("*/results.json")):
        results = read_json(path)
        if results.get("environment") in TITLES:
            methods = dict.fromkeys(row["method"] for row in results["rows"])
            lines += [Line(path.parent.as_posix(), results, method) for method in methods]
    order = [*METHODS]
    return sorted(lines, key=lambda line: (order.index(line.method), -line.steps, line.folder))


def main(prepared: tuple[Config, list[Line]]) -> None:
    """Writes `ENVIRONMENT-tasks.png` beside the runs."""
    config, lines = prepared
    for environment in TITLES:
        chosen = [line for line in lines if line.environment == environment]
        panels: dict[str, list[dict[str, Any]]] = {}
        for line in (line for line in chosen if line.method != "oracle"):
            title = ", ".join([_description(line), *([f"{line.steps}"] if line.steps else ())])
            if title in panels:  # Another run with the same settings.
                title = f"{title} ({Path(line.folder).name})"
            panels[title] = line.rows
        oracle = next((line.rows for line in chosen if line.method == "oracle"), ())
        path = config.results / f"{environment}-tasks.png"
        if plots.returns_over_tasks(path, panels, oracle):
            print(f"Wrote {path}.")


def markdown(lines: Sequence[Line]) -> str:
    """The legend and a table in Markdown for each environment."""
    parts = [textwrap.fill(LEGEND, 120), ""]
    for environment, title in TITLES.items():
        chosen = [line for line in lines if line.environment == environment]
        if chosen:
            names = [title, *HEADS]
            table = [names, ["---"] * len(names), *map(_cells, chosen)]
            parts += ["| " + " | ".join(cells) + " |" for cells in table]
            parts.append("")
            runs = {line.folder: _run(line) for line in chosen}
            parts += [textwrap.fill(f"Runs: {', '.join(runs.values())}.", 120, break_on_hyphens=False), ""]
    return "\n".join(parts)


def _cells(line: Line) -> list[str]:
    rows = line.rows
    rates = dict.fromkeys("{:g}, {:g}".format(*row["rates"]) for row in rows if row["rates"])
    returns = [_number([row["return"][step] for row in rows], rows, step) for step in range(len(rows[0]["return"]))]
    better = f"{np.mean([row['improved'][0] for row in rows]):.0%}" if rates else ""
    return [
        _description(line),
        f"{line.steps}" if line.steps else "",
        " or ".join(rates),
        *(returns + [""] * (4 - len(returns))),
        better,
        _gain(rows),
        ", ".join(f"{number:g}" for number in line.results["paper"].get(line.method, ())),
    ]


def _gain(rows: list[dict[str, Any]]) -> str:
    """The mean gain of the first gradient step with its interval over the tasks."""
    returns = mean_by_task(rows)
    if returns is None or len(returns) == 1:
        return ""
    mean, half_width = interval(returns[1] - returns[0])
    return f"{mean:+.1f} +- {half_width:.1f}"


def _description(line: Line) -> str:
    """The method, with the options that differ from the paper's settings."""
    config, parts = line.results["config"], [METHODS[line.method]]
    if config["inner_loss"] != "logp":
        parts.append(f"`{config['inner_loss']}`")
    presets: dict[Any, options.Config] = {**locomotion.PRESETS, "navigation": navigation.Config()}
    defaults = presets[line.environment]
    for name in NAMED_OPTIONS:
        usual = getattr(defaults, name, None)
        if config.get(name, usual) != usual:
            parts.append(f"{name} {config[name]}")
    if config["test_tasks"] != 40:
        parts.append(f"{config['test_tasks']} tasks")
    return ", ".join(parts)


def _number(means: list[float], rows: list[dict[str, Any]], step: int) -> str:
    if len(means) == 1:
        return f"{means[0]:.1f} +- {rows[0]['half_width'][step]:.1f}"
    return f"{np.mean(means):.2f} ({min(means):.1f} to {max(means):.1f}, {len(means)} seeds)"


def _run(line: Line) -> str:
    engine = f" (MuJoCo {line.results['mujoco']})" if "mujoco" in line.results else ""
    return f"`{line.folder}`{engine}"


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
