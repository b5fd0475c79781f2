"""Pictures of policies that learn: returns over meta-iterations and gradient steps, and where they walk."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # Pictures go to files: no display is needed.
import matplotlib.pyplot as plt
import numpy as np


def returns(
    path: Path,
    history: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    paper: Mapping[str, Sequence[float]],
) -> None:
    """Return over meta-iterations, after the inner steps (left); over gradient steps on the test tasks (right)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colors = dict(zip(methods, plt.rcParams["axes.prop_cycle"].by_key()["color"]))
    for method in methods:
        name, color = method.replace("_", " "), colors[method]
        mine = [row for row in history if row["method"] == method]
        for number, seed in enumerate(dict.fromkeys(row["seed"] for row in mine)):
            curve = [(row["step"], row["return"]) for row in mine if row["seed"] == seed]
            left.plot(*zip(*curve), color=color, alpha=0.8, linewidth=1, label=None if number else name)
        tests = [row for row in rows if row["method"] == method]
        mean = np.mean([row["return"] for row in tests], 0)
        half_width = np.mean([row["half_width"] for row in tests], 0)
        steps = range(len(mean))
        if len(mean) == 1:
            right.axhline(mean[0], color=color, linestyle="--", label=name)
        else:
            right.errorbar(steps, mean, half_width, color=color, marker="o", markersize=3, capsize=2, label=name)
            if method in paper:
                right.plot(steps, paper[method], "*", color=color)
    left.set(xlabel="meta-iterations", ylabel="return after adaptation", title="Training tasks")
    right.plot([], [], "k*", label="the paper's numbers")
    right.set(xlabel="gradient steps", ylabel="return", title="Test tasks, 95% intervals")
    right.set_xticks(range(max(len(row["return"]) for row in rows)))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def returns_of_tasks(
    path: Path, methods: Mapping[str, tuple[np.ndarray, np.ndarray]], bound: tuple[np.ndarray, np.ndarray] | None = None
) -> None:
    """Return before and after each gradient step over tasks that are a number each: where a step helps, and where not.

    Args:
      path: where the picture goes.
      methods: by name, tasks `[T]` and returns `[S + 1, T]`; a panel each.
      bound: tasks and returns `[1, T]` of a policy that is told the task, for every panel.
    """
    figure, grid = plt.subplots(
        1, len(methods), figsize=(4.2 * len(methods), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (name, (tasks, of_steps)) in zip(grid[0], methods.items()):
        order = np.argsort(tasks)
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(of_steps)))
        for step, (of_tasks, color) in enumerate(zip(of_steps, shades)):
            label = "before" if step == 0 else f"after {step} step{'s' if step > 1 else ''}"
            axes.plot(tasks[order], of_tasks[order], "o-", color=color, markersize=3, linewidth=1, label=label)
        if bound is not None:
            order = np.argsort(bound[0])
            axes.plot(bound[0][order], bound[1][0][order], "k--", linewidth=1, label="told the task")
        axes.set(xlabel="task", title=textwrap.fill(name.replace("`", ""), 36))
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("return")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def navigation_paths(path: Path, goals: Sequence[Sequence[float]], paths: np.ndarray, mask: np.ndarray) -> None:
    """Walks towards some goals, a row for each, before adaptation and after each gradient step, a column for each.

    Args:
      path: where the picture goes.
      goals: `[T, 2]`.
      paths: `[T, S + 1, E, H, 2]`.
      mask: `[T, S + 1, E, H]`: the steps that happened.
    """
    tasks, columns = paths.shape[:2]
    figure, grid = plt.subplots(
        tasks, columns, figsize=(2.6 * columns, 2.6 * tasks), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, goal, task, seen in zip(grid, goals, paths, mask):
        for step, axes in enumerate(row):
            for walk, happened in zip(task[step], seen[step]):
                axes.plot(*walk[happened > 0].T, color="tab:blue", alpha=0.6, linewidth=0.8)
            axes.plot(*goal, "*", color="tab:red", markersize=12)
            axes.plot(0, 0, "o", color="black", markersize=4)
            axes.grid(alpha=0.3)
    for step, axes in enumerate(grid[0]):
        axes.set(title="before" if step == 0 else f"after {step} step{'s' if step > 1 else ''}")
    # What walks far off before adaptation is cut.
    grid[0, 0].set(xlim=(-1, 1), ylim=(-1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
