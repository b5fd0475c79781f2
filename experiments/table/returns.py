"""Finds the runs of reinforcement learning in a folder of results, and plots their returns over tasks.

    python -m experiments.table.returns --results results

The command writes a plot for each environment with goal velocities.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from experiments import locomotion, navigation
from experiments.reinforcement import options, plots
from experiments.shared import command_line
from maml_jax.runs.files import read_json

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
    "pretrained": "pretrained",
    "random": "untrained",
    "oracle": "oracle",
}

PAPER: dict[Any, options.Config] = {**locomotion.PRESETS, "navigation": navigation.Config()}
"""The paper's settings, by environment."""

OPTIONS = {
    "inner_loss": "`{}`",
    "gae_lambda": "lambda of GAE {}",
    "physics": "physics of {}",
    "test_tasks": "{} test tasks",
    "test_episodes": "{} test episodes",
}
"""Options that a description names if they differ from the paper's settings."""
TRAINING_OPTIONS = {
    "outer": "outer step {}",
    "sampling_term": "sampling term",
    "tasks": "{} tasks",
    "episodes": "{} episodes",
    "inner_steps": "{} inner steps",
    "inner_rate": "inner rate {}",
    "kl_limit": "trust region {}",
    "curvature_tasks": "curvature of {} tasks",
    "outer_rate": "outer rate {}",
}
"""Further such options. They have no effect on an untrained policy, and are left out of its description."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Plots returns over tasks."""

    results: Path = Path("results")
    """Folder of run directories, each with a results.json."""


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
        """Number of meta-iterations; 0 for the untrained policy."""
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
    """Returns the methods of all reinforcement-learning runs in a folder, sorted by method and meta-iterations."""
    lines = []
    for path in sorted(folder.glob("*/results.json")):
        results = read_json(path)
        if results.get("environment") in TITLES:
            methods = dict.fromkeys(row["method"] for row in results["rows"])
            lines += [Line(path.parent.as_posix(), results, method) for method in methods]
    order = [*METHODS]
    return sorted(lines, key=lambda line: (order.index(line.method), -line.steps, line.folder))


def main(prepared: tuple[Config, list[Line]]) -> None:
    """Writes `ENVIRONMENT-tasks.png` to the folder of results."""
    config, lines = prepared
    for environment in TITLES:
        chosen = [line for line in lines if line.environment == environment]
        panels: dict[str, list[dict[str, Any]]] = {}
        for line in (line for line in chosen if line.method != "oracle"):
            title = ", ".join([description(line), *([f"{line.steps}"] if line.steps else ())])
            if title in panels:  # Another run with the same settings.
                title = f"{title} ({Path(line.folder).name})"
            panels[title] = line.rows
        oracle = next((line.rows for line in chosen if line.method == "oracle"), ())
        path = config.results / f"{environment}-tasks.png"
        if plots.returns_over_tasks(path, panels, oracle):
            print(f"Wrote {path}.")


def description(line: Line) -> str:
    """Describes the method of a line by its name and by the options that differ from the paper's settings."""
    config, defaults = line.results["config"], PAPER[line.environment]
    named = OPTIONS if line.method == "random" else OPTIONS | TRAINING_OPTIONS
    changed = [name for name in named if name in config and config[name] != getattr(defaults, name, config[name])]
    return ", ".join([METHODS[line.method], *(named[name].format(config[name]) for name in changed)])


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
