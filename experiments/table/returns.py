"""Writes the README's tables of returns from the results of reinforcement learning, and draws returns over tasks.

python -m experiments.table.returns --results results --readme README.md
"""

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.reinforcement import testing
from experiments.shared import command_line
from experiments.table import page
from maml_jax.evaluation import interval
from maml_jax.runs.files import read_json

BEGIN, END = "<!-- returns: begin -->\n", "<!-- returns: end -->"
"""Marks of the region of a README that is written."""

LEGEND = (
    "Mean return over held-out tasks, 40 where nothing else is said, before and after each gradient step, each step on "
    "new episodes, with the 95% interval over the tasks; of several seeds the mean and the range. Beside it the share "
    "of the tasks that the first step makes better, what it gains, with the interval of the gains, and the numbers "
    "behind the paper's figures, which had 100 meta-iterations of navigation, 475 and 100 of half-cheetah, 375 and 575 "
    "of ant."
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
    "pretrained": "pretrained on all tasks",
    "random": "not trained",
    "oracle": "oracle, told the task",
}

HEADS = ("meta-iterations", "steps of", "before", "1 step", "2 steps", "3 steps", "better", "gains", "paper")

USUAL = {"outer": "trpo", "sampling_term": False, "inner_steps": 1, "physics": "mujoco"} | dict.fromkeys(
    ("tasks", "episodes", "inner_rate", "kl_limit", "curvature_tasks", "outer_rate", "test_episodes")
)
"""Options that are told where they are others, None being the recipe's."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tables of returns from results."""

    results: Path = Path("results")
    """A folder of runs, each with its results.json."""
    readme: Path = Path("README.md")
    """File whose marked region is written anew."""


class Line(NamedTuple):
    """What one method of one run gave."""

    folder: str
    results: dict[str, Any]
    method: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each seed."""
        return [row for row in self.results["rows"] if row["method"] == self.method]

    @property
    def environment(self) -> str:
        return self.results["protocol"].split(":")[0]

    @property
    def steps(self) -> int:
        """Meta-iterations."""
        return 0 if self.method == "random" else self.results["setting"]["steps"]


def prepare(config: Config) -> tuple[Config, list[Line]]:
    """Reads the results. Raises ValueError or OSError, saying what is wrong and what to do."""
    page.with_region(config.readme.read_text("utf-8"), "", BEGIN, END)
    lines = found(config.results)
    if not lines:
        raise ValueError(f"results: {config.results} holds no runs of reinforcement learning.")
    return config, lines


def found(folder: Path) -> list[Line]:
    """Of every run below a folder that has returns, by environment, method and meta-iterations."""
    lines = []
    for path in sorted(folder.glob("*/results.json")):
        results = read_json(path)
        if results.get("protocol", "").split(":")[0] in TITLES:
            methods = dict.fromkeys(row["method"] for row in results["rows"])
            lines += [Line(path.parent.as_posix(), results, method) for method in methods]
    order = [*METHODS]
    return sorted(lines, key=lambda line: (order.index(line.method), -line.steps, line.folder))


def main(prepared: tuple[Config, list[Line]]) -> None:
    """Writes the region, and beside the runs a picture of returns over tasks where these are velocities."""
    config, lines = prepared
    for environment in TITLES:
        mine = [line for line in lines if line.environment == environment]
        drawn: dict[str, list[dict[str, Any]]] = {}
        for line in (line for line in mine if line.method != "oracle"):
            title = ", ".join([_told(line), *([f"{line.steps}"] if line.steps else ())])
            if title in drawn:  # The same once more.
                title = f"{title} ({Path(line.folder).name})"
            drawn[title] = line.rows
        oracle = next((line.rows for line in mine if line.method == "oracle"), ())
        path = config.results / f"{environment}-tasks.png"
        if testing.draw_tasks(path, drawn, oracle):
            print(f"Wrote {path}.")
    text = page.with_region(config.readme.read_text("utf-8"), markdown(lines), BEGIN, END)
    config.readme.write_text(text, encoding="utf-8")
    print(f"Wrote {len(lines)} lines of returns into {config.readme}.")


def markdown(lines: Sequence[Line]) -> str:
    """A table for each environment."""
    parts = [textwrap.fill(LEGEND, 120), ""]
    for environment, title in TITLES.items():
        mine = [line for line in lines if line.environment == environment]
        if mine:
            names = [title, *HEADS]
            table = [names, ["---"] * len(names), *map(_cells, mine)]
            parts += ["| " + " | ".join(cells) + " |" for cells in table]
            parts.append("")
            made = {line.folder: _made(line) for line in mine}
            parts += [textwrap.fill(f"Made by {', '.join(made.values())}.", 120, break_on_hyphens=False), ""]
    return "\n".join(parts)


def _cells(line: Line) -> list[str]:
    rows = line.rows
    rates = dict.fromkeys("{:g}, {:g}".format(*row["rates"]) for row in rows if row["rates"])
    returns = [_number([row["return"][step] for row in rows], rows, step) for step in range(len(rows[0]["return"]))]
    better = f"{np.mean([row['improved'][0] for row in rows]):.0%}" if rates else ""
    return [
        _told(line),
        f"{line.steps}" if line.steps else "",
        " or ".join(rates),
        *(returns + [""] * (4 - len(returns))),
        better,
        _gain(rows),
        ", ".join(f"{number:g}" for number in line.results["paper"].get(line.method, ())),
    ]


def _gain(rows: list[dict[str, Any]]) -> str:
    """Of the first step, over the tasks."""
    returns = testing.mean_by_task(rows)
    if returns is None or len(returns) == 1:
        return ""
    mean, half_width = interval(returns[1] - returns[0])
    return f"{mean:+.1f} +- {half_width:.1f}"


def _told(line: Line) -> str:
    """The method, with the options that are not the usual ones."""
    config, told = line.results["config"], [METHODS[line.method]]
    if config["inner_loss"] != "logp":
        told.append(f"`{config['inner_loss']}`")
    for name, usual in USUAL.items():
        if config.get(name, usual) != usual:
            told.append(f"{name} {config[name]}")
    if config["test_tasks"] != 40:
        told.append(f"{config['test_tasks']} tasks")
    return ", ".join(told)


def _number(found: list[float], rows: list[dict[str, Any]], step: int) -> str:
    if len(found) == 1:
        return f"{found[0]:.1f} +- {rows[0]['half_width'][step]:.1f}"
    return f"{np.mean(found):.2f} ({min(found):.1f} to {max(found):.1f}, {len(found)} seeds)"


def _made(line: Line) -> str:
    engine = f" (MuJoCo {line.results['mujoco']})" if "mujoco" in line.results else ""
    return f"`{line.folder}`{engine}"


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
