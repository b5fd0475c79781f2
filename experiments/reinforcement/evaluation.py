"""Evaluates policies by the paper's protocol, and formats a table of the returns.

The protocol measures returns on 40 held-out tasks, before and after 1 to 3 gradient steps. Each step uses new episodes
(paper, section 5.3, and the authors' code).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import maml_jax
from experiments.reinforcement.options import TEST_SEEDS, Config
from experiments.reinforcement.paper import Rates
from maml_jax.evaluation import interval
from maml_jax.parallel.task_axis import local_mesh, task_axis
from maml_jax.rl.advantage import Summary
from maml_jax.rl.environment import Environment
from maml_jax.rl.losses import InnerLossName
from maml_jax.rl.meta_rl import TaskBatch, draw_task_batch, maml_rl
from maml_jax.rl.outer import policy_gradient
from maml_jax.rl.policy import Policy

TEST_STEPS = 3
TUNING_BATCHES = 8
"""Number of task batches on which inner rates are compared, each as large as the test batch. Fewer are too noisy."""


class Trained(NamedTuple):
    """A policy after training."""

    environment: Environment
    policy: Policy
    state: maml_jax.MetaState
    inner_loss: InnerLossName
    """Loss of the gradient steps."""
    gae_lambda: float = 1.0
    """Lambda of generalised advantage estimation in the gradient steps."""


def adaptation_learner(trained: Trained, rates: Rates, episodes: int) -> maml_jax.MetaLearner:
    """Returns a meta-learner for adaptation at test.

    Args:
      trained: the policy.
      rates: inner rates of the first gradient step and of later steps.
      episodes: episodes of each task for each gradient step.
    """
    first, later = rates
    inner = maml_jax.unrolled(optax.sgd(lambda step: jnp.where(step == 0, first, later)), steps=TEST_STEPS)
    return maml_rl(
        trained.environment,
        trained.policy,
        inner,
        policy_gradient(optax.identity()),  # The outer step is not used.
        episodes=episodes,
        inner_loss_name=trained.inner_loss,
        gae_lambda=trained.gae_lambda,
        mesh=local_mesh(),
    )


def evaluate(config: Config, trained: Trained, pairs: Sequence[Rates]) -> dict[str, Any]:
    """Adapts to the test tasks and summarises the returns.

    Args:
      config: gives the numbers of test tasks and of their episodes.
      trained: the policy.
      pairs: pairs of inner rates. Of several pairs, the best on other tasks is used. If empty, the policy does not
        adapt.

    Returns:
      The `rates`; the mean `return` over tasks and the `half_width` of its 95% interval before and after each gradient
      step; the share of tasks that the first step `improved`; the mean `length` of episodes; the number of episodes
      with a value that is not finite, `num_nonfinite`; and the entries of `returns_by_task`.
    """
    steps = TEST_STEPS if pairs else 0
    test_key, tuning_key = jax.random.split(jax.random.key(TEST_SEEDS[0]))
    state = task_axis("all", local_mesh()).replicate(trained.state)

    @jax.jit
    def test(state: maml_jax.MetaState, rates: Rates, key: jax.Array) -> tuple[jax.Array, Summary]:
        """The tasks `[T, ...]`, and the summaries `[T, S + 1]` of their episodes."""
        task_batch = draw_task_batch(trained.environment, key, config.test_tasks)
        learner = adaptation_learner(trained, rates, config.test_episodes)
        return task_batch.task, learner.evaluate(state, task_batch, steps).aux

    def tuning_return(rates: Rates) -> float:
        """Mean return over the tuning tasks and gradient steps; minus infinity if an episode was not finite."""
        summaries = [test(state, rates, key)[1] for key in jax.random.split(tuning_key, TUNING_BATCHES)]
        if any(batch.num_nonfinite.any() for batch in summaries):
            return -np.inf
        return float(np.mean([batch.mean_return[:, 1:] for batch in summaries]))

    rates = (0.0, 0.0) if not pairs else pairs[0] if len(pairs) == 1 else max(pairs, key=tuning_return)
    tasks, found = test(state, rates, test_key)
    returns = np.asarray(found.mean_return)
    mean, half_width = interval(returns)
    return {
        "rates": rates if steps else None,
        "return": mean,
        "half_width": half_width,
        "improved": (np.diff(returns, axis=1)[:, :1] > 0).mean(0),
        "length": np.asarray(found.length).mean(0),
        "num_nonfinite": float(found.num_nonfinite.sum()),
        **returns_by_task(np.asarray(tasks), returns),
    }


def returns_by_task(tasks: np.ndarray, returns: np.ndarray) -> dict[str, Any]:
    """Formats tasks `[T, ...]` as a line of text for each entry of a task, and returns `[T, S + 1]` as a line for each
    step.

    If there are only two different tasks, such as directions, also returns the mean return of each.
    """
    kinds = np.unique(tasks, axis=0)
    few = kinds.ndim == 1 and len(kinds) <= 2 < len(tasks)
    return {
        "tasks": [" ".join(f"{value:.4g}" for value in column) for column in tasks.reshape(len(tasks), -1).T],
        "return_of_task": [" ".join(f"{value:.2f}" for value in column) for column in returns.T],
        "return_of_kind": {f"{kind:g}": returns[tasks == kind].mean(0) for kind in kinds} if few else {},
    }


def mean_by_task(rows: Sequence[dict[str, Any]]) -> np.ndarray | None:
    """Returns `[S + 1, T]` of one method, averaged over seeds; None if a row has no returns by task."""
    if any("return_of_task" not in row for row in rows):
        return None
    return np.mean([np.array([line.split() for line in row["return_of_task"]], float) for row in rows], 0)


def sample_episodes(trained: Trained, rates: Rates, episodes: int, tasks: Any) -> tuple[np.ndarray, np.ndarray]:
    """Samples episodes before and after each gradient step.

    Args:
      trained: the policy.
      rates: inner rates of the first gradient step and of later steps.
      episodes: number of episodes `E`.
      tasks: tasks `[T, ...]`.

    Returns:
      Observations `[T, S + 1, E, H, O]` and the mask `[T, S + 1, E, H]` of valid time steps.
    """
    task_batch = TaskBatch(jax.random.split(jax.random.key(TEST_SEEDS[1]), len(tasks)), jnp.asarray(tasks))
    learner = adaptation_learner(trained, rates, episodes)
    _, info = jax.jit(jax.vmap(lambda one_task: learner.adapt(trained.state, one_task)))(task_batch)
    sampled = info.aux[1].episodes
    return np.asarray(sampled.observation), np.asarray(sampled.mask)


def last_rates(rows: Sequence[dict[str, Any]], method: str) -> Rates:
    """Returns the inner rates at test of a method's last seed."""
    return next(row["rates"] for row in reversed(rows) if row["method"] == method)


def protocol(config: Config, environment: Environment) -> str:
    """Describes the protocol of the evaluation."""
    return (
        f"{environment.name}: mean return over {config.test_tasks} held-out tasks before and after 1 to {TEST_STEPS} "
        f"gradient steps, each on {config.test_episodes} new episodes of at most {environment.horizon} time steps, "
        "with the given inner rates of the first and of later gradient steps; 95% intervals over the tasks"
    )


def table(results: dict[str, Any]) -> str:
    """Formats the returns of every method and seed, the mean over seeds, and the paper's returns."""
    heads = [f"{step} step{'s' * (step != 1)}" for step in range(TEST_STEPS + 1)]
    title = f"{'':<18}seed       rates" + "".join(f"{head:>18}" for head in heads)
    lines = [results["protocol"], "", title + " improved after 1   CPU seconds per meta-iteration"]
    for method in dict.fromkeys(row["method"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["method"] == method]
        for row in rows:
            cells = "".join(f"{mean:10.2f} +-{half:6.2f}" for mean, half in zip(row["return"], row["half_width"]))
            cells = f"{cells:<{18 * (TEST_STEPS + 1)}}"
            rates, better = "", ""
            if row["rates"]:
                rates, better = "{:g}, {:g}".format(*row["rates"]), f"{row['improved'][0]:.0%}"
            cost = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.2f}"
            name = method.replace("_", " ")
            lines.append(f"{name:<18}{row['seed']:>4} {rates:>11} {cells}{better:>17}{cost:>33}".rstrip())
            for kind, means in row["return_of_kind"].items():
                lines.append(f"{f'  tasks of {kind}':<35}" + "".join(f"{mean:10.2f}        " for mean in means))
            if row["num_nonfinite"]:
                lines.append(f"  {row['num_nonfinite']:.0f} of these episodes ended at a value that is not finite")
        if len(rows) > 1:
            means = np.mean([row["return"] for row in rows], 0)
            lines.append(f"{'  mean of seeds':<35}" + "".join(f"{mean:10.2f}        " for mean in means))
        if method in results["paper"]:
            lines.append(f"{'  paper':<35}" + "".join(f"{v:10.2f}        " for v in results["paper"][method]))
    return "\n".join(lines)
