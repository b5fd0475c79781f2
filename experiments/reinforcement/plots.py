"""Figures: returns over meta-iterations, gradient steps and tasks, and paths of 2D navigation."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # Figures are written to files, without a display.
import matplotlib.pyplot as plt
import numpy as np

from experiments.reinforcement.evaluation import mean_by_task


def returns(
    path: Path,
    history: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    paper: Mapping[Any, Sequence[float]],
) -> None:
    """Plots returns after adaptation over meta-iterations (left), and test returns over gradient steps (right).

    Args:
      path: the file of the figure.
      history: the rows of `metrics.jsonl`.
      rows: the rows of the results.
      paper: the paper's returns by method.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colors = dict(zip(methods, plt.rcParams["axes.prop_cycle"].by_key()["color"]))
    for method in methods:
        name, color = method.replace("_", " "), colors[method]
        training = [row for row in history if row["method"] == method]
        for number, seed in enumerate(dict.fromkeys(row["seed"] for row in training)):
            curve = [(row["step"], row["return"]) for row in training if row["seed"] == seed]
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
    right.plot([], [], "k*", label="paper")
    right.set(xlabel="gradient steps", ylabel="return", title="Test tasks, 95% intervals")
    right.set_xticks(range(max(len(row["return"]) for row in rows)))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def returns_over_tasks(
    path: Path, methods: Mapping[str, Sequence[dict[str, Any]]], oracle: Sequence[dict[str, Any]]
) -> bool:
    """Plots the returns before and after each gradient step over tasks that are one number each, such as velocities.

    Args:
      path: the file of the figure.
      methods: rows of results by the title of their panel. Rows with other tasks, or without returns by task, are
        left out.
      oracle: rows of the oracle, drawn in every panel.

    Returns:
      Whether a panel had rows to plot, so that the file was written.
    """
    panels = {name: found for name, rows in methods.items() if (found := _by_task(rows)) is not None}
    if not panels:
        return False
    bound = _by_task(oracle)
    figure, grid = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (name, (tasks, returns)) in zip(grid[0], panels.items()):
        order = np.argsort(tasks)
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(returns)))
        for step, (task_returns, color) in enumerate(zip(returns, shades)):
            axes.plot(
                tasks[order], task_returns[order], "o-", color=color, markersize=3, linewidth=1, label=_after(step)
            )
        if bound is not None:
            order = np.argsort(bound[0])
            axes.plot(bound[0][order], bound[1][0][order], "k--", linewidth=1, label="oracle")
        axes.set(xlabel="task", title=textwrap.fill(name.replace("`", ""), 36))
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("return")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def _by_task(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Tasks `[T]` and returns `[S + 1, T]`; None for tasks of two numbers or of two kinds."""
    returns = mean_by_task(rows) if rows else None
    if returns is None or len(rows[0]["tasks"]) != 1 or rows[0]["return_of_kind"]:
        return None
    return np.array(rows[0]["tasks"][0].split(), float), returns


def _after(step: int) -> str:
    return "before" if step == 0 else f"after {step} step{'s' if step > 1 else ''}"


def navigation_paths(path: Path, goals: Sequence[Sequence[float]], paths: np.ndarray, mask: np.ndarray) -> None:
    """Plots paths to goals: a row for each goal, a column before adaptation and for each gradient step.

    Args:
      path: the file of the figure.
      goals: `[T, 2]`.
      paths: positions `[T, S + 1, E, H, 2]`.
      mask: `[T, S + 1, E, H]`: 1 for the time steps of an episode.
    """
    tasks, columns = paths.shape[:2]
    figure, grid = plt.subplots(
        tasks, columns, figsize=(2.6 * columns, 2.6 * tasks), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, goal, task_paths, task_mask in zip(grid, goals, paths, mask):
        for step, axes in enumerate(row):
            for episode, valid in zip(task_paths[step], task_mask[step]):
                axes.plot(*episode[valid > 0].T, color="tab:blue", alpha=0.6, linewidth=0.8)
            axes.plot(*goal, "*", color="tab:red", markersize=12)
            axes.plot(0, 0, "o", color="black", markersize=4)
            axes.grid(alpha=0.3)
    for step, axes in enumerate(grid[0]):
        axes.set(title=_after(step))
    # The axes cut off paths that leave the area of the goals.
    grid[0, 0].set(xlim=(-1, 1), ylim=(-1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
