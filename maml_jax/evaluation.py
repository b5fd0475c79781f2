"""Evaluation of few-shot classifiers: accuracies with their protocol, intervals and paired comparisons."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.losses import Apply
from maml_jax.types import Params, Task

QueryMode = Literal["transductive", "inductive"]
"""'transductive': the queries of a task are one batch, and a normalisation may use the statistics of this batch.
'inductive': each query is a separate batch."""


class Protocol(NamedTuple):
    """Everything except the parameters that an accuracy depends on. Compare only accuracies with equal protocols."""

    data: str
    """Name of the data set."""
    split: str
    """Split of the classes, such as 'test'."""
    classes: int
    """Number of classes in the split."""
    split_sha256: str
    """Content hash of the images of the split."""
    tasks: int
    """Number of tasks."""
    seed: int
    """Seed of the tasks."""
    ways: int
    """Classes per task."""
    shots: int
    """Support examples per class."""
    queries: int
    """Queries per class."""
    rotations: str
    """Rotations of the classes of a task, see `tasks.episodes.Rotations`."""
    inner_steps: int
    """Largest number of inner steps, S. There is an accuracy after each of 0 to S inner steps."""
    inner_rate: float | None
    """Inner learning rate for the mean loss; None if rates are learned or there is no adaptation."""
    normalisation: str
    """Normalisation of the network, see `nets.normalisation.Normalisation`."""
    query_mode: QueryMode
    """What a prediction may depend on, see `QueryMode`."""
    models: int = 1
    """Number of models whose predicted probabilities are averaged."""
    method: str = "not recorded"
    """Name of the algorithm."""

    def __str__(self) -> str:
        rate = "" if self.inner_rate is None else f" of {self.inner_rate:g}"
        models = "" if self.models == 1 else f", ensemble of {self.models}"
        return (
            f"{self.data}, {self.split} split ({self.classes} classes, sha256 {self.split_sha256[:12]}): {self.tasks} "
            f"tasks (seed {self.seed}) of {self.ways} ways, {self.shots} shots, {self.queries} queries per class, "
            f"rotations {self.rotations}; method {self.method}, 0 to {self.inner_steps} inner steps{rate}; "
            f"normalisation {self.normalisation}, {self.query_mode}{models}"
        )

    def same_tasks(self, other: "Protocol") -> bool:
        """Whether both evaluations used the same tasks in the same order."""
        fields = ("split_sha256", "tasks", "seed", "ways", "shots", "queries", "rotations")
        return all(getattr(self, field) == getattr(other, field) for field in fields)


class Results(NamedTuple):
    """Accuracy and divergence of each task."""

    protocol: Protocol
    accuracy: np.ndarray
    """`[T, S + 1]`: fraction of correct queries of a task after 0 to S inner steps."""
    diverged: np.ndarray
    """`[T, S + 1]` of bools: whether the support loss is larger than before adaptation, or not finite."""

    def interval(self) -> "Interval":
        """Mean accuracy in per cent, and the half width of its 95% interval over the tasks: `[S + 1]` each."""
        return interval(100 * self.accuracy)

    def __str__(self) -> str:
        mean, half_width = self.interval()
        rows = zip(mean, half_width, 100 * self.diverged.mean(0))
        lines = [f"{step:11d}   {m:8.2f} +-{h:5.2f}   {d:8.1f}%" for step, (m, h, d) in enumerate(rows)]
        return "\n".join([str(self.protocol), "", "inner steps   accuracy (%)       diverged", *lines])

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON, from which `from_summary` restores the results.

        The numbers of correct queries and the divergence of the tasks are stored as text, one string for each number of
        inner steps. This keeps the file small.
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
    """Restores results from `Results.summary`.

    Raises:
      ValueError: if the summary has no results of single tasks, or their number differs from the protocol.
    """
    protocol = Protocol(**summary["protocol"])
    if "correct" not in summary:
        raise ValueError(f"This summary has no results of single tasks: {protocol}")
    correct, diverged = [line.split() for line in summary["correct"]], list(map(list, summary["diverged"]))
    if {protocol.tasks} != (counts := {len(line) for line in (*correct, *diverged)}):
        raise ValueError(f"The protocol says {protocol.tasks} tasks, but the summary has {sorted(counts)}.")
    num_correct = np.array(correct, int).T
    return Results(protocol, num_correct / (protocol.ways * protocol.queries), np.array(diverged).T == "1")


Predictor = Callable[[Task], tuple[jax.Array, jax.Array]]
"""`tasks -> (log probabilities [T, S + 1, Q, N], support losses [T, S + 1])`, for Q queries per task and N classes."""


def evaluate(predictors: Iterable[Predictor], groups: Callable[[], Iterable[Task]], protocol: Protocol) -> Results:
    """Evaluates one model, or an ensemble that averages the predicted probabilities.

    Args:
      predictors: one `Predictor` for each model.
      groups: a function that is called once for each model. It yields the same tasks every time, in groups that fit
        into memory, as `tasks.fixed.fixed_tasks` does.
      protocol: description of the tasks and of the adaptation.

    Returns:
      Results of all tasks. In an ensemble, a task has diverged if it diverged for any of the models.

    Raises:
      ValueError: if the number of tasks differs from the protocol.

    References:
      Averaged predictions: Antoniou et al. 2019, arXiv:1810.09502, section 5.
    """
    probabilities, diverged, labels = [], [], []
    for number, predict in enumerate(predictors):
        for index, tasks in enumerate(groups()):
            log_probabilities, support_loss = map(np.asarray, predict(tasks))
            group_probabilities = np.exp(log_probabilities.astype(np.float64))
            group_diverged = _diverged(support_loss)
            if number == 0:
                labels.append(np.asarray(tasks.query[1]))
                probabilities.append(group_probabilities)
                diverged.append(group_diverged)
            else:
                probabilities[index] += group_probabilities
                diverged[index] |= group_diverged
    # The class with the largest sum also has the largest mean.
    classes = predicted(np.concatenate(probabilities))
    accuracy = (classes == np.concatenate(labels)[:, None]).mean(-1)
    if len(accuracy) != protocol.tasks:
        raise ValueError(f"The protocol says {protocol.tasks} tasks, but {len(accuracy)} were given.")
    return Results(protocol, accuracy, np.concatenate(diverged))


def predicted(probabilities: np.ndarray) -> np.ndarray:
    """The most likely class, `[..., N] -> [...]`. If all probabilities are NaN, the class is -1, which is no label."""
    known = np.nan_to_num(probabilities, nan=-1.0)
    return np.where(known.max(-1) < 0, -1, known.argmax(-1))


def nearest_neighbour(features: Apply, params: Params, ways: int) -> Predictor:
    """The baseline without adaptation: a query gets the class of the support image with the nearest features.

    Distances are Euclidean.

    Args:
      features: `(params, inputs [B, ...]) -> [B, features]`. If the query set is a `QueryWithSupport`, `features` gets
        its context as a third argument.
      params: parameters of `features`.
      ways: classes of a task, N.

    Returns:
      A `Predictor` without inner steps. Its probabilities `[T, 1, Q, N]` are 0 or 1, and its support losses are 0.

    References:
      Finn et al. 2017, arXiv:1703.03400, table 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from maml_jax import Task
      >>> from maml_jax.evaluation import nearest_neighbour
      >>> support = (jnp.array([[[0.0], [1.0]]]), jnp.array([[0, 1]]))  # One task, two classes.
      >>> query = (jnp.array([[[0.9], [0.2]]]), jnp.array([[1, 0]]))
      >>> log_probabilities, _ = nearest_neighbour(lambda params, x: x, {}, ways=2)(Task(support, query))
      >>> log_probabilities[0, 0].argmax(-1).tolist()
      [1, 0]
    """

    def one(task: Task) -> tuple[jax.Array, jax.Array]:
        inputs, labels = task.support
        support = features(params, inputs)
        query = features(params, *task.query[:1], *task.query[2:])
        distances = jnp.square(query[:, None] - support).sum(-1)
        nearest = labels[distances.argmin(-1)]
        return jnp.log(nearest[:, None] == jnp.arange(ways))[None], jnp.zeros(1)

    return jax.jit(jax.vmap(one))


class Interval(NamedTuple):
    """A mean over tasks and the half width of its 95% interval."""

    mean: np.ndarray
    half_width: np.ndarray


def interval(values: Any) -> Interval:
    """Mean over the first axis (tasks) and 1.96 standard errors: `[T, ...] -> [...]` each.

    The half width is NaN or infinite if a value or its square is infinite, such as the loss of a task on which
    the inner loop diverged.

    Example:
      >>> from maml_jax.evaluation import interval
      >>> mean, half_width = interval([1.0, 3.0])
      >>> print(f"{mean:.2f} +- {half_width:.2f}")
      2.00 +- 1.39
    """
    values = np.asarray(values, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return Interval(values.mean(0), 1.96 * values.std(0) / np.sqrt(len(values)))


def divergence_rate(support_loss: Any) -> np.ndarray:
    """Fraction of tasks on which the inner loop has made the support loss larger.

    Args:
      support_loss: `[T, S + 1]`, before adaptation and after each inner step, as `Evaluation.support_loss`.

    Returns:
      `[S + 1]`: the fraction of tasks whose support loss is larger than before adaptation, or not finite.
    """
    return _diverged(np.asarray(support_loss)).mean(0)


def _diverged(support_loss: np.ndarray) -> np.ndarray:
    return ~((support_loss <= support_loss[:, :1]) & np.isfinite(support_loss))


class Difference(NamedTuple):
    """Difference of two accuracies on the same tasks, in percentage points, with its 95% interval."""

    mean: float
    """Mean of the differences of the tasks."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def difference(first: Results, second: Results, *, steps: tuple[int, int], samples: int = 10_000) -> Difference:
    """Mean accuracy of `first` minus mean accuracy of `second`, with a paired bootstrap over the tasks.

    The bootstrap samples tasks with replacement and keeps both results of a task together. A hard task lowers both
    accuracies, so the interval is narrower than the two separate intervals suggest.

    Args:
      first, second: results on the same tasks.
      steps: number of inner steps of `first`, and of `second`.
      samples: number of bootstrap samples, rounded up to a multiple of 100.

    Returns:
      The difference in percentage points, with its 95% interval.

    Raises:
      ValueError: if `first` and `second` were not evaluated on the same tasks.
    """
    if not first.protocol.same_tasks(second.protocol):
        raise ValueError(
            "A paired difference needs the same tasks on both sides, but got\n"
            f"  {first.protocol}\nand\n  {second.protocol}"
        )
    pairs = 100 * (first.accuracy[:, steps[0]] - second.accuracy[:, steps[1]])
    # Resample the tasks. Chunks of 100 samples limit the memory.
    random = np.random.default_rng(0)
    means = np.concatenate(
        [pairs[random.integers(0, len(pairs), (100, len(pairs)))].mean(1) for _ in range(-(-samples // 100))]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(pairs.mean()), float(low), float(high))
