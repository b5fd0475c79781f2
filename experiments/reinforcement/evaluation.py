"""The paper's evaluation of policies, and the table.

40 held-out tasks, the return before and after 1 to 3 gradient steps, each step taken on new episodes
(section 5.3, and the numbers behind its figures in the authors' code).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import maml_jax
from experiments.reinforcement import plots
from experiments.reinforcement.options import MethodName, Prepared
from maml_jax.parallel.task_axis import local_mesh, task_axis
from maml_jax.rl.advantage import Summary
from maml_jax.rl.environment import Environment
from maml_jax.rl.losses import InnerLossName
from maml_jax.rl.meta_rl import TaskBatch, draw_task_batch, maml_rl
from maml_jax.rl.outer import policy_gradient
from maml_jax.rl.policy import Policy
from maml_jax.statistics import interval

TEST_STEPS = 3
TUNING = 8  # Times as many tasks as are tested choose the rates; with fewer, noise does.
TEST_SEED = 600  # Apart from every training seed's keys: the test tasks are the same for all of them.


class Trained(NamedTuple):
    """A policy after training."""

    environment: Environment
    policy: Policy
    state: maml_jax.MetaState
    inner_loss: InnerLossName = "logp"
    """Of its gradient steps."""
    cpu_seconds: float | None = None
    """Of a meta-iteration, over all cores and without this process's first, which compiles; None for fewer than ten,
    as the next is under way before the last has been read."""


def tester(trained: Trained, rates: tuple[float, float], episodes: int) -> maml_jax.MetaLearner:
    """For adaptation at test alone, by the rates of the first step and of later ones: the outer step plays no part."""
    first, later = rates
    inner = maml_jax.unrolled(optax.sgd(lambda step: jnp.where(step == 0, first, later)), steps=TEST_STEPS)
    outer = policy_gradient(optax.identity())
    return maml_rl(
        trained.environment,
        trained.policy,
        inner,
        outer,
        episodes=episodes,
        inner_loss_name=trained.inner_loss,
        mesh=local_mesh(),
    )


def evaluate(prepared: Prepared, method: MethodName, trained: Trained) -> dict[str, Any]:
    """Adapts to the test tasks. Where there is a choice of rates, the best on other tasks is taken."""
    config, problem, setting = prepared
    steps = 0 if method == "oracle" else TEST_STEPS
    test_key, tuning_key = jax.random.split(jax.random.key(TEST_SEED))
    trained_state = task_axis("all", local_mesh()).replicate(trained.state)

    @jax.jit
    def test(state: maml_jax.MetaState, rates: tuple[float, float], key: jax.Array) -> tuple[jax.Array, Summary]:
        """The tasks, and what came of them."""
        trials = draw_task_batch(trained.environment, key, config.test_tasks)
        return trials.task, tester(trained, rates, setting.test_episodes).evaluate(state, trials, steps).aux

    def tuned(rates: tuple[float, float]) -> float:
        """Mean return over the tuning tasks and the gradient steps; an episode that broke rules the rates out."""
        tested = [test(trained_state, rates, key)[1] for key in jax.random.split(tuning_key, TUNING)]
        broken = any(aux.broken.any() for aux in tested)
        return -np.inf if broken else float(np.mean([aux.total[:, 1:] for aux in tested]))

    own = problem.own_test_rates if config.test_rates is None else {}
    pairs = (own[method],) if method in own else setting.test_rates
    rates = pairs[0] if len(pairs) == 1 or not steps else max(pairs, key=tuned)
    tasks, found = test(trained_state, rates, test_key)
    mean, half_width = interval(np.asarray(found.total))
    return {
        "rates": rates if steps else None,
        "return": mean,
        "half_width": half_width,
        "improved": (np.diff(found.total, axis=1)[:, :1] > 0).mean(0),
        "length": np.asarray(found.length).mean(0),
        "broken": float(found.broken.sum()),
        "cpu_seconds": trained.cpu_seconds,
        **by_task(np.asarray(tasks), np.asarray(found.total)),
    }


def by_task(tasks: np.ndarray, returns: np.ndarray) -> dict[str, Any]:
    """Tasks `[T, ...]` and returns `[T, S + 1]` as lines of text, one for each number of a task and each gradient step.

    Where there are but two kinds of many tasks, such as directions, also the mean return of each: one of them may lag.
    """
    kinds = np.unique(tasks, axis=0)
    few = kinds.ndim == 1 and len(kinds) <= 2 < len(tasks)
    return {
        "tasks": [" ".join(f"{value:.4g}" for value in column) for column in tasks.reshape(len(tasks), -1).T],
        "return_of_task": [" ".join(f"{value:.2f}" for value in column) for column in returns.T],
        "return_of_kind": {f"{kind:g}": returns[tasks == kind].mean(0) for kind in kinds} if few else {},
    }


def mean_by_task(rows: Sequence[dict[str, Any]]) -> np.ndarray | None:
    """Returns `[S + 1, T]`, the mean over seeds, of one method's rows; None of results from before `by_task`."""
    if any("return_of_task" not in row for row in rows):
        return None
    return np.mean([np.array([line.split() for line in row["return_of_task"]], float) for row in rows], 0)


def draw_tasks(path: Path, methods: Mapping[str, Sequence[dict[str, Any]]], oracle: Sequence[dict[str, Any]]) -> bool:
    """Draws `plots.returns_of_tasks` of rows of results, of each method and of the oracle; whether there was any."""

    def found(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray] | None:
        returns = mean_by_task(rows) if rows else None
        if returns is None or len(rows[0]["tasks"]) != 1 or rows[0]["return_of_kind"]:
            return None  # Tasks that are two numbers, or two kinds.
        return np.array(rows[0]["tasks"][0].split(), float), returns

    drawn = {name: of_tasks for name, rows in methods.items() if (of_tasks := found(rows)) is not None}
    if drawn:
        plots.returns_of_tasks(path, drawn, found(oracle))
    return bool(drawn)


def show(trained: Trained, rates: tuple[float, float], episodes: int, tasks: Any) -> tuple[np.ndarray, np.ndarray]:
    """Observations `[T, S + 1, E, H, O]` and mask of episodes before and after each step at the test tasks."""
    trials = TaskBatch(jax.random.split(jax.random.key(TEST_SEED + 1), len(tasks)), jnp.asarray(tasks))
    learner = tester(trained, rates, episodes)
    _, info = jax.jit(jax.vmap(lambda trial: learner.adapt(trained.state, trial)))(trials)
    seen = info.aux[1].episodes
    return np.asarray(seen.observation), np.asarray(seen.mask)


def table(results: dict[str, Any]) -> str:
    """Returns of every method and seed, with the mean over seeds and the paper's numbers."""
    title = f"{'':<18}seed       rates" + "".join(f"{f'{step} steps':>18}" for step in range(TEST_STEPS + 1))
    lines = [results["protocol"], "", title + "   better after 1   cpu seconds a meta-iteration"]
    for method in dict.fromkeys(row["method"] for row in results["rows"]):
        mine = [row for row in results["rows"] if row["method"] == method]
        for row in mine:
            cells = "".join(f"{mean:10.2f} +-{half:6.2f}" for mean, half in zip(row["return"], row["half_width"]))
            cells = f"{cells:<{18 * (TEST_STEPS + 1)}}"
            rates, better = "", ""
            if row["rates"]:
                rates, better = "{:g}, {:g}".format(*row["rates"]), f"{row['improved'][0]:.0%}"
            cost = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.2f}"
            name = method.replace("_", " ")
            lines.append(f"{name:<18}{row['seed']:>4} {rates:>11} {cells}{better:>17}{cost:>32}".rstrip())
            for kind, of_kind in row["return_of_kind"].items():
                lines.append(f"{f'  tasks of {kind}':<35}" + "".join(f"{mean:10.2f}        " for mean in of_kind))
            if row["broken"]:
                lines.append(f"  {row['broken']:.0f} of these episodes ended early by something that was not finite")
        if len(mine) > 1:
            means = np.mean([row["return"] for row in mine], 0)
            lines.append(f"{'  mean of seeds':<35}" + "".join(f"{mean:10.2f}        " for mean in means))
        if method in results["paper"]:
            lines.append(f"{'  the paper':<35}" + "".join(f"{v:10.2f}        " for v in results["paper"][method]))
    return "\n".join(lines)
