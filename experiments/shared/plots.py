"""Plots of results. Only this file and `reinforcement/plots.py` import matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib

matplotlib.use("Agg")  # Plots are written to files, without a display.
import matplotlib.pyplot as plt
import numpy as np

matplotlib.rcParams["text.parse_math"] = False  # Names may have dollar signs.


def _shown(name: str) -> str:
    """Escapes the bytes of a file's name that are not UTF-8, which matplotlib cannot draw.

    Matplotlib leaves names with a leading underscore out of legends, so these get a space.
    """
    name = name.encode("utf-8", "backslashreplace").decode()
    return f" {name}" if name.startswith("_") else name


def few_shot(path: Path, history: Sequence[dict[str, Any]], results: dict[str, Any]) -> None:
    """Plots the accuracy over training (left), and over inner steps on the test tasks (right).

    Args:
      path: file to write the PNG to.
      history: rows of `metrics.jsonl`.
      results: content of `results.json`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = np.array([row["step"] for row in history])
    accuracy = 100 * np.array([row["accuracy"] for row in history])
    left.plot(*_smoothed(steps, accuracy), label="training tasks, after adaptation")
    validated = [(row["step"], 100 * row["val_accuracy"]) for row in history if "val_accuracy" in row]
    if validated:  # A run that was stopped before its first validation has none.
        left.plot(*zip(*validated), "o-", markersize=3, label="validation tasks")
    left.set(xlabel="meta-steps", ylabel="accuracy (%)", title="Training")
    _over_inner_steps(right, results["test"])
    if results["published"]:
        right.axhline(results["published"][0], color="grey", linestyle="--", label="published")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def training(
    target: Path | BinaryIO, curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
) -> None:
    """Plots metrics over meta-steps, with a panel for each metric and a line for each training.

    Args:
      target: file to write the PNG to.
      curves: by metric and line, steps and values.
    """
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.5 * columns, 3 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(curves) :]:
        axes.axis("off")
    colours: dict[str, str] = {}  # A line has the same colour in all panels.
    for axes, (metric, lines) in zip(grid.flat, curves.items()):
        for label, (steps, values) in lines.items():
            colour = colours.setdefault(label, f"C{len(colours) % 10}")
            marker = "." if len(steps) <= 20 else None
            axes.plot(*_smoothed(np.array(steps), np.array(values)), color=colour, marker=marker, label=label)
        axes.set(title=metric, xlabel="meta-steps")
        axes.grid(alpha=0.3)
    handles = [plt.Line2D([], [], color=colour, label=_shown(label)) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(target, dpi=120, format="png")
    plt.close(figure)


def inner_steps(target: Path | BinaryIO, found: Mapping[str, dict[str, Any]]) -> None:
    """Plots the accuracy over inner steps, with a line for each evaluation.

    Args:
      target: file to write the PNG to.
      found: summaries of `evaluation.Results` by label, with `accuracy` and `half_width`.
    """
    figure, axes = plt.subplots(figsize=(8, 4 + 0.12 * len(found)), layout="constrained")
    _over_inner_steps(axes, found)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120, format="png")
    plt.close(figure)


def predictions(
    path: Path, labelled: Mapping[str, Sequence[np.ndarray]], predicted: Sequence[tuple[np.ndarray, str, float]]
) -> None:
    """Shows labelled pictures in a column for each class, and below these the classified pictures.

    Args:
      path: file to write the PNG to.
      labelled: pictures by class.
      predicted: picture, class and confidence of each classified picture.
    """
    columns = max(len(labelled), 5)
    examples = max(len(pictures) for pictures in labelled.values())
    rows = examples + -(-len(predicted) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(1.6 * columns, 1.8 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.axis("off")
    for column, (name, pictures) in zip(grid.T, labelled.items()):
        for axes, picture in zip(column, pictures):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        column[0].set_title(_shown(name), fontsize="small", fontweight="bold")
    for axes, (picture, name, confidence) in zip(grid[examples:].flat, predicted):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{_shown(name)}, {confidence:.0%}", fontsize="small", color="tab:blue")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def adaptation(path: Path, examples: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Shows the adaptation to some tasks, for at most five classes.

    Each task has three rows: a support image of each class, a query of each class, and the predicted probability of the
    query's class over the inner steps.

    Args:
      path: file to write the PNG to.
      examples: for each task `support` and `query` images, `[N, H, W, C]` in [0, 1], one of each class, and
        `probabilities` of the queries `[S + 1, N, N]`, by inner step, query and class.
    """
    columns = min(5, len(examples[0]["support"]))
    heights = [1.0, 1.0, 0.7] * len(examples)
    size = (1.5 * columns + 0.6, 1.4 * sum(heights))
    figure, grid = plt.subplots(
        len(heights), columns, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    for number, example in enumerate(examples):
        block = grid[3 * number : 3 * number + 3]
        likeliest = example["probabilities"].argmax(-1)
        for column in range(columns):
            right = likeliest[:, column] == column
            images = (("support", "black"), ("query", "tab:green" if right[-1] else "tab:red"))
            for axes, (name, colour) in zip(block[:, column], images):
                axes.imshow(example[name][column], cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(color=colour, linewidth=2)
            steps = np.arange(len(right))
            lines, axes = example["probabilities"][:, column, column], block[2, column]
            axes.plot(steps, lines, color="grey", linewidth=1)
            for kind, colour in ((right, "tab:green"), (~right, "tab:red")):
                axes.plot(steps[kind], lines[kind], "o", color=colour, markersize=3)
            axes.set(ylim=(-0.05, 1.05), yticks=[0, 1], xticks=[0, steps[-1]])
            axes.tick_params(labelsize="x-small")
        for axes, name in zip(block[:, 0], ("support", "query", "P(true class)")):
            axes.set_ylabel(name, fontsize="small")
    figure.suptitle("Test tasks, before and after each inner step; green: correct", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _over_inner_steps(axes: Any, found: Mapping[str, dict[str, Any]]) -> None:
    for number, (label, summary) in enumerate(found.items()):
        mean, half_width = np.asarray(summary["accuracy"]), np.asarray(summary["half_width"])
        # There are ten colours: every ten lines have another style.
        style = {"linestyle": ("-", "--", ":")[number // 10 % 3], "marker": "o", "markersize": 3}
        axes.errorbar(range(len(mean)), mean, half_width, capsize=2, label=_shown(label), **style)
    axes.set(xlabel="inner steps", ylabel="accuracy (%)", title="Test tasks, 95% intervals")


def _smoothed(steps: np.ndarray, values: np.ndarray, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Returns means over at most `points` groups of neighbouring values."""
    groups = np.array_split(np.arange(len(steps)), min(points, len(steps)))
    return np.array([steps[g].mean() for g in groups]), np.array([values[g].mean() for g in groups])


def sinusoid_errors(path: Path, rows: Sequence[dict[str, Any]], paper: Mapping[str, Sequence[float]]) -> None:
    """Plots the error over gradient steps, with a panel for each number of points, as in the paper's figure 3.

    Lines are medians over the curves, and bands are quartiles: unlike means, these are robust to diverged curves. Stars
    are the paper's means.
    """
    shots = sorted({row["shots"] for row in rows})
    figure, panels = plt.subplots(1, len(shots), figsize=(4.2 * len(shots), 4.6), sharey=True, layout="constrained")
    for axes, count in zip(panels, shots):
        for number, row in enumerate(row for row in rows if row["shots"] == count):
            steps, label = range(len(row["median"])), None if count != shots[0] else row["title"]
            axes.plot(steps, row["median"], "o-", markersize=3, color=f"C{number}", label=label)
            axes.fill_between(steps, *row["quartiles"], alpha=0.12, color=f"C{number}", linewidth=0)
        if count == 5:
            for name, values in paper.items():
                label = "the paper (means)" if name == "maml" else None
                axes.plot((1, 5, 10), values, "k*", markersize=8, label=label)
        axes.set(xlabel="gradient steps", title=f"{count} points", yscale="log", ylim=(2e-3, 10))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("squared error on new curves")
    figure.suptitle("Sine curves: error after adaptation, median and quartiles over the curves")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def sinusoid_fits(path: Path, panels: Sequence[dict[str, Any]]) -> None:
    """Plots predictions before and after adaptation to the marked points in two rows, as in the paper's figure 2.

    The true curves set the limits of the axes. A diverged prediction leaves the panel.
    """
    columns = len(panels) // 2
    figure, grid = plt.subplots(
        2, columns, figsize=(4.2 * columns, 6.4), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    height = 1.5 * max(float(np.abs(panel["truth"]).max()) for panel in panels)
    styles = (("tab:grey", ":", 1.5), ("tab:green", "--", 1.8), ("tab:blue", "-", 2.2))
    for axes, panel in zip(grid.flat, panels):
        axes.plot(panel["x"], panel["truth"], color="tab:red", linewidth=6, alpha=0.3, label="true curve")
        for (steps, fit), (colour, line, width) in zip(panel["fits"].items(), styles):
            label = "before adaptation" if not steps else f"after {steps} gradient step{'s' * (steps > 1)}"
            axes.plot(panel["x"], fit, line, color=colour, linewidth=width, label=label)
        axes.plot(*panel["support"], "^", color="black", markersize=8, label="given points")
        axes.set(title=panel["title"], ylim=(-height, height))
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("x")
    for axes in grid[:, 0]:
        axes.set_ylabel("y")
    figure.suptitle("A new sine curve, learned from a few points")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def benchmark(path: Path, rows: Sequence[dict[str, Any]], peers: Mapping[str, str]) -> None:
    """Plots the time of a meta-step by workload, ours and PyTorch's.

    If the number of inner steps varies, plots time and memory over inner steps instead.
    """
    rows = [row for row in rows if "ms" in row]
    swept = len({row["inner_steps"] for row in rows}) > 1
    figure, panels = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    if swept:
        ours = [row for row in rows if row["kind"] == "ours"]
        names = dict.fromkeys((row["workload"], row["order"], row["remat"]) for row in ours)
        for workload, order, remat in names:
            same = [r for r in ours if (r["workload"], r["order"], r["remat"]) == (workload, order, remat)]
            label = f"{workload}, first order" if order == 1 else f"{workload}, second order, remat '{remat}'"
            style = {"label": label, "marker": "o", "markersize": 4, "linestyle": "--" if order == 1 else "-"}
            steps = [row["inner_steps"] for row in same]
            panels[0].plot(steps, [row["ms"] for row in same], **style)
            panels[1].plot(steps, [(row["memory_compiled"] or np.nan) / 1e6 for row in same], **style)
        for axes, label in zip(panels, ("ms per meta-step", "MB of intermediate values")):
            axes.set(xlabel="inner steps", ylabel=label, xscale="log", yscale="log")
            axes.grid(alpha=0.3)
        panels[1].legend(fontsize="small")
    else:
        workloads = list(dict.fromkeys(row["workload"] for row in rows))
        for axes, order in zip(panels, (2, 1)):
            chosen = [row for row in rows if row["order"] == order]
            kinds = list(dict.fromkeys(_kind(row, peers) for row in chosen))
            for number, kind in enumerate(kinds):
                same = [row for row in chosen if _kind(row, peers) == kind]
                at = [
                    workloads.index(row["workload"]) + (number - (len(kinds) - 1) / 2) * 0.8 / len(kinds)
                    for row in same
                ]
                bars = axes.bar(at, [row["ms"] for row in same], 0.8 / len(kinds), label=kind)
                axes.bar_label(bars, fmt="%.3g", fontsize="x-small", rotation=90, padding=2)
            axes.set(yscale="log", ylabel="ms per meta-step", title="Second order" if order == 2 else "First order")
            axes.set_xticks(range(len(workloads)), workloads, rotation=20, ha="right")
            axes.margins(y=0.15)
        panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _kind(row: dict[str, Any], peers: Mapping[str, str]) -> str:
    if row["kind"] == "peer":
        return peers[row["peer"]]
    extras = [f"{key.replace('_', ' ')} {row[key]}" for key in ("task_batch_size", "implementation") if row[key]]
    extras += [row["dtype"]] if row["dtype"] != "float32" else []
    extras += [f"remat {row['remat']}"] if row["remat"] != "none" else []
    return ", ".join(["maml_jax", *extras])


def shares(path: Path, rows: Mapping[str, Mapping[str, float]], whole: str) -> None:
    """Plots shares of parts, with a bar for each row.

    Args:
      path: file to write the PNG to.
      rows: by row, the share of each part.
      whole: name of the quantity that is divided.
    """
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
    for number, (name, parts) in enumerate(rows.items()):
        left = 0.0
        for color, (part, share) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], parts.items()):
            axes.barh(name, share, left=left, color=color, label=None if number else part)
            left += share
    axes.set(xlabel=f"share of {whole}", xlim=(0, 1))
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
