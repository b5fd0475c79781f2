"""Pictures of results, drawn from what a run has recorded. Only this file imports matplotlib."""

from pathlib import Path
from typing import Any, Sequence

import matplotlib

matplotlib.use("Agg")  # Pictures go to files: no display is needed.
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402


def omniglot(path: Path, history: Sequence[dict[str, Any]], results: dict[str, Any]) -> None:
    """Accuracy over training (left), and over inner steps on the test tasks (right)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = np.array([row["step"] for row in history])
    accuracy = 100 * np.array([row["accuracy"] for row in history])
    left.plot(*_smoothed(steps, accuracy), label="training tasks, after adaptation")
    validated = [(row["step"], 100 * row["val_accuracy"]) for row in history if "val_accuracy" in row]
    left.plot(*zip(*validated), "o-", markersize=3, label="validation tasks")
    left.set(xlabel="meta-steps", ylabel="accuracy (%)", title="Training")
    for way, label in (("together", "queries together"), ("alone", "queries one by one")):
        mean, half_width = (np.asarray(results[way][key]) for key in ("accuracy", "half_width"))
        right.errorbar(range(len(mean)), mean, half_width, marker="o", markersize=3, capsize=2, label=label)
    if results["published"]:
        right.axhline(results["published"][0], color="grey", linestyle="--", label="published")
    right.set(xlabel="inner steps", ylabel="accuracy (%)", title="Test tasks, 95% intervals")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smoothed(steps: np.ndarray, values: np.ndarray, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Means over groups of neighbours, at most `points` of them."""
    groups = np.array_split(np.arange(len(steps)), min(points, len(steps)))
    return np.array([steps[g].mean() for g in groups]), np.array([values[g].mean() for g in groups])
