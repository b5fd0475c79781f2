"""Evaluation of few-shot classifiers: what was measured, how, and how certain it is, as a value that prints itself."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from maml_jax.statistics import Interval, interval
from maml_jax.types import Task


class Protocol(NamedTuple):
    """All that an accuracy depends on beside the parameters. Accuracies compare only where all of it is said."""

    data: str
    """Name of the data set."""
    split: str
    """Of its classes, such as 'test'."""
    classes: int
    """In the split."""
    split_sha256: str
    """Content hash of the data of the split."""
    tasks: int
    """Tasks evaluated on."""
    seed: int
    """Of the tasks."""
    ways: int
    shots: int
    queries: int
    """Per class."""
    rotations: str
    """Of the classes of a task, see `episodes.Rotations`."""
    inner_steps: int
    """The most that were taken; accuracies are from 0 to this."""
    inner_rate: float | None
    """Step size for the mean loss; None where rates are learned or nothing is adapted."""
    normalisation: str
    """Of the net, see `normalisation.Normalisation`; 'none'."""
    query_mode: str
    """'together' in one batch, or 'one by one'."""
    models: int = 1
    """How many are averaged, in their predicted probabilities."""
    method: str = "not recorded"
    """How a task is learned."""

    def __str__(self) -> str:
        rate = "" if self.inner_rate is None else f" of {self.inner_rate:g}"
        models = "" if self.models == 1 else f", ensemble of {self.models}"
        return (
            f"{self.data}, {self.split} split ({self.classes} classes, sha256 {self.split_sha256[:12]}): {self.tasks} "
            f"tasks (seed {self.seed}) of {self.ways} ways, {self.shots} shots, {self.queries} queries per class, "
            f"rotations {self.rotations}; method {self.method}, 0 to {self.inner_steps} inner steps{rate}; "
            f"normalisation {self.normalisation}, queries {self.query_mode}{models}"
        )

    def same_tasks(self, other: "Protocol") -> bool:
        """Whether both were evaluated on the same tasks, one by one."""
        fields = ("split_sha256", "tasks", "seed", "ways", "shots", "queries", "rotations")
        return all(getattr(self, field) == getattr(other, field) for field in fields)


class Results(NamedTuple):
    """What an evaluation found, task by task."""

    protocol: Protocol
    accuracy: np.ndarray
    """`[T, S + 1]`: fraction of a task's queries that are classified right, after 0 to S inner steps."""
    diverged: np.ndarray
    """`[T, S + 1]` of bools: whether the support loss is above that before adaptation, or not finite."""

    def interval(self) -> Interval:
        """Mean accuracy in per cent, and the half width of its 95% interval over the tasks: `[S + 1]` each."""
        return interval(100 * self.accuracy)

    def __str__(self) -> str:
        mean, half_width = self.interval()
        rows = zip(mean, half_width, 100 * self.diverged.mean(0))
        lines = [f"{step:11d}   {m:8.2f} +-{h:5.2f}   {d:8.1f}%" for step, (m, h, d) in enumerate(rows)]
        return "\n".join([str(self.protocol), "", "inner steps   accuracy (%)       diverged", *lines])

    def summary(self) -> dict[str, Any]:
        """As plain values for JSON, from which `from_summary` makes the same again.

        Task by task it says how many of the queries are right and which tasks diverged: a line of text for
        each number of inner steps, so that the file stays small.
        """
        mean, half_width = self.interval()
        correct = np.rint(self.accuracy * self.protocol.ways * self.protocol.queries).astype(int)
        return {
            "protocol": self.protocol._asdict(),
            "accuracy": mean,
            "half_width": half_width,
            "divergence_rate": self.diverged.mean(0),
            "correct": [" ".join(map(str, column)) for column in correct.T],
            "diverged": ["".join(map(str, column)) for column in self.diverged.T.astype(int)],
        }


def from_summary(summary: Mapping[str, Any]) -> Results:
    """What `Results.summary` was made from.

    Raises:
      ValueError: if the summary says nothing of single tasks, or of another number of them than its protocol.
    """
    protocol = Protocol(**summary["protocol"])
    if "correct" not in summary:
        raise ValueError(f"These results do not say what was right task by task: {protocol}")
    correct, diverged = [line.split() for line in summary["correct"]], list(map(list, summary["diverged"]))
    if {protocol.tasks} != (counts := {len(line) for line in (*correct, *diverged)}):
        raise ValueError(f"The protocol says {protocol.tasks} tasks, but there are results of {sorted(counts)}.")
    right = np.array(correct, int).T
    return Results(protocol, right / (protocol.ways * protocol.queries), np.array(diverged).T == "1")


Predictor = Callable[[Task], tuple[jax.Array, jax.Array]]
"""`tasks -> (log probabilities [T, S + 1, Q, N], support losses [T, S + 1])`."""


def evaluate(predictors: Iterable[Predictor], groups: Callable[[], Iterable[Task]], protocol: Protocol) -> Results:
    """Evaluates one model, or several whose predicted probabilities are averaged.

    Args:
      predictors: one for each model.
      groups: called for each model, gives the same tasks in groups that fit into memory.
      protocol: what is told of it.

    Raises:
      ValueError: if the tasks are not as many as the protocol says.
    """
    probabilities, diverged, labels = [], [], []
    for number, predict in enumerate(predictors):
        for place, tasks in enumerate(groups()):
            log_probabilities, support_loss = map(np.asarray, predict(tasks))
            own = np.exp(log_probabilities.astype(np.float64))
            worse = ~(support_loss <= support_loss[:, :1])
            if number == 0:
                labels.append(np.asarray(tasks.query[1]))
                probabilities.append(own)
                diverged.append(worse)
            else:
                probabilities[place] += own
                diverged[place] |= worse
    found = predicted(np.concatenate(probabilities))
    accuracy = (found == np.concatenate(labels)[:, None]).mean(-1)
    if len(accuracy) != protocol.tasks:
        raise ValueError(f"The protocol says {protocol.tasks} tasks, but {len(accuracy)} were given.")
    return Results(protocol, accuracy, np.concatenate(diverged))


def predicted(probabilities: np.ndarray) -> np.ndarray:
    """`[..., N] -> [...]`: the likeliest class, and -1, which is never right, where all are not a number."""
    known = np.nan_to_num(probabilities, nan=-1.0)
    return np.where(known.max(-1) < 0, -1, known.argmax(-1))


class Difference(NamedTuple):
    """Of two accuracies on the same tasks, in per cent."""

    mean: float
    low: float
    """Lower end of the 95% interval."""
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def difference(first: Results, second: Results, *, steps: tuple[int, int], samples: int = 10_000) -> Difference:
    """How much better the first is, with a paired bootstrap over the tasks.

    Tasks are drawn again with replacement, both results of a task together: what is hard in a task falls on
    both sides, so that the interval is narrower than those of the two accuracies suggest.

    Args:
      steps: inner steps of the first and of the second at which they are compared.
      samples: bootstrap samples.

    Raises:
      ValueError: if the two were not evaluated on the same tasks.
    """
    if not first.protocol.same_tasks(second.protocol):
        raise ValueError(
            "A paired difference needs the same tasks on both sides, but got\n"
            f"  {first.protocol}\nand\n  {second.protocol}"
        )
    pairs = 100 * (first.accuracy[:, steps[0]] - second.accuracy[:, steps[1]])
    random = np.random.default_rng(0)
    means = np.concatenate(
        [pairs[random.integers(0, len(pairs), (100, len(pairs)))].mean(1) for _ in range(-(-samples // 100))]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(pairs.mean()), float(low), float(high))
