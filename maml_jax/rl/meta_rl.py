"""MAML for reinforcement learning: a whole meta-iteration as one function (paper, algorithm 3)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from maml_jax import validation
from maml_jax.inner import InnerLearner, adapted_part, inner_loop
from maml_jax.meta import MetaLearner
from maml_jax.parallel import backend
from maml_jax.parallel.task_axis import task_axis
from maml_jax.rl.advantage import Experience, experience, summary
from maml_jax.rl.environment import Environment
from maml_jax.rl.losses import InnerLossName, inner_loss
from maml_jax.rl.objective import Objective
from maml_jax.rl.outer import Outer
from maml_jax.rl.policy import Policy
from maml_jax.rl.rollout import rollout
from maml_jax.types import AdaptInfo, Evaluation, InnerParams, MetaInfo, MetaState, Params, Task


class TaskBatch(NamedTuple):
    """Tasks to be tried, and the randomness of all episodes; with a leading axis `T`, or of one task without."""

    key: jax.Array
    task: jax.Array


def draw_task_batch(environment: Environment, key: jax.Array, tasks: int) -> TaskBatch:
    """Draws a meta-batch of `T` tasks."""
    task_key, key = jax.random.split(key)
    return TaskBatch(jax.random.split(key, tasks), environment.sample_tasks(task_key, tasks))


def given_trials(environment: Environment, key: jax.Array, tasks: Any) -> TaskBatch:
    """A batch of tasks `[T, ...]` of one's own.

    Raises:
      ValueError: if a task is outside the environment's range.
    """
    environment.check_tasks(tasks)
    drawn = jax.eval_shape(lambda: environment.sample_tasks(jax.random.key(0), 1))
    tasks = jnp.asarray(tasks, drawn.dtype)
    return TaskBatch(jax.random.split(key, len(tasks)), tasks)


def maml_rl(
    environment: Environment,
    policy: Policy,
    inner: InnerLearner,
    outer: Outer,
    *,
    episodes: int,
    inner_loss_name: InnerLossName = "logp",
    sampling_term: bool = False,
    discount: float = 0.99,
    gae_lambda: float = 1.0,
    mesh: Mesh | None = None,
) -> MetaLearner:
    """Model-agnostic meta-learning of a policy.

    Every inner step has episodes of its own, sampled by the policy as it then is. With `no_adaptation()`
    it is joint training on all tasks, the paper's 'pretrained' and, with `environment.told`, its oracle.

    Args:
      environment: what the tasks are, and what happens in them.
      policy: such as `gaussian_mlp(environment.observation_size, environment.action_size)`.
      inner: how a task is learned, e.g. `maml_jax.sgd(0.1, steps=1)`; inner_params are for advantages of deviation 1
        and a mean over steps.
      outer: how the meta-parameters follow, e.g. `trpo(0.01)`.
      episodes: `E`, sampled of each task before each inner step and after the last.
      inner_loss_name: 'logp' (the paper's), 'lvc' or 'dice'; see `maml_jax.rl.losses`.
      sampling_term: also credit the choice of the episodes that were adapted to (E-MAML, Stadie et al. 2018).
      discount, gae_lambda: of the advantages.
      mesh: devices among which the tasks are divided, such as `task_axis.task_mesh(T)`; None uses one. Each samples
        and differentiates its own; what the outer step sums over tasks goes between them. Devices of a
        CPU need a thread more than they are (the environment variable NPROC) where the environment is simulated on the
        host or observations are large: without it, calls with large batches wait for each other for ever.

    Returns:
      A `MetaLearner` whose tasks are `TaskBatch`, and whose losses are minus the mean return (paper, equation 4):
      `step(state, trials)`, one meta-iteration, with the metrics as aux;
      `evaluate(state, trials, steps)`, each task's loss before and after each step on new episodes, with the
      `Summary` of those episodes as aux; in it support and query are the same episodes;
      `adapt(state, trial, steps)`, of one task, with aux `(Summary, Experience)` before and after each step.

    Raises:
      ValueError, TypeError: for an argument that makes no sense, saying what is allowed.
    """
    if not isinstance(inner, InnerLearner):
        raise TypeError(f"inner must come from maml_jax.sgd, unrolled or no_adaptation, but got {inner!r}.")
    if not isinstance(outer, Outer):
        raise TypeError(f"outer must come from trpo, policy_gradient or promp, but got {outer!r}.")
    if inner.remat == "mixflow":
        raise ValueError(
            "remat='mixflow' has no forward-mode derivatives, which trpo takes, and none through what an inner loss "
            "reports, which promp and the sampling term take: use 'none' or 'step'."
        )
    validation.at_least("episodes", episodes, 1)
    for name, value in (("discount", discount), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, but got {value!r}.")
    loss_fn = inner_loss(policy, inner_loss_name)
    over_tasks = task_axis("all", mesh)  # The host simulates all episodes in one call.

    def init(params: Params) -> MetaState:
        validation.floating_params(params)
        params = jax.tree.map(jnp.array, params)
        inner_params = inner.init_inner_params(adapted_part(inner, params))
        # Of copies: an optimizer may keep what it is given, and the same array cannot be donated twice.
        opt_state = outer.init(jax.tree.map(jnp.array, (params, inner_params)))
        return over_tasks.replicate(MetaState(jnp.zeros([], jnp.int32), params, inner_params, opt_state))

    def sample(params: Params, trial: TaskBatch) -> Experience:
        seen = rollout(environment, policy, params, trial.key, trial.task, episodes)
        return lax.stop_gradient(experience(seen, discount, gae_lambda))

    def sampled_loss(params: Params, trial: TaskBatch) -> tuple[jax.Array, Any]:
        """The inner loss on new episodes of the policy itself, which it hands over."""
        seen = sample(params, trial)
        return loss_fn(params, seen)[0], seen

    def collect(meta_params: tuple[Params, InnerParams], trial: TaskBatch, steps: int) -> tuple[Params, Task]:
        """Adapts to one task in `steps` inner steps, and returns the episodes of each of them and after the last."""
        keys = jax.random.split(trial.key, steps + 1)
        own = TaskBatch(keys[:-1], jnp.broadcast_to(trial.task, (steps, *trial.task.shape)))
        params, info = inner_loop(inner, sampled_loss, *meta_params, own, steps=steps, batch_per_step=True)
        return params, Task(info.aux, sample(params, TaskBatch(keys[-1], trial.task)))

    def step(state: MetaState, trials: TaskBatch) -> tuple[MetaState, MetaInfo]:
        if sampling_term and len(trials.task) < 2:
            raise ValueError("sampling_term compares each task's return with the others': give 2 tasks or more.")
        meta_params = (state.params, state.inner_params)
        tasks = over_tasks.map(lambda shared, trial: collect(shared, trial, inner.steps)[1], meta_params, trials)
        objective = Objective(
            policy, inner, loss_fn, tasks, sampling_term, task_axis(backend.policy_batch_size(), mesh)
        )
        (params, inner_params), opt_state, info = outer.update(objective, meta_params, state.opt_state)
        before = jax.vmap(jax.vmap(summary))(tasks.support.episodes)
        after = jax.vmap(summary)(tasks.query.episodes)
        metrics = {
            "return": after.total,
            "length": after.length,
            "broken": before.broken.sum(1) + after.broken,
            "kl": info.kl[None],
            "improvement": info.improvement[None],
        }
        if inner.steps:
            metrics["return_before"] = before.total[:, 0]
        return (
            MetaState(state.step + 1, params, inner_params, opt_state),
            MetaInfo(-after.total.mean(), metrics, -before.total, info.grad_norm),
        )

    def adapt(state: MetaState, trial: TaskBatch, steps: int | None = None) -> tuple[Params, AdaptInfo]:
        steps = inner.steps if steps is None else steps
        validation.at_least("steps", steps, 0)
        params, task = collect((state.params, state.inner_params), trial, steps)
        seen = jax.tree.map(lambda each, last: jnp.concatenate([each, last[None]]), task.support, task.query)
        summaries = jax.vmap(summary)(seen.episodes)
        return params, AdaptInfo(-summaries.total, (summaries, seen))

    def evaluate(state: MetaState, trials: TaskBatch, steps: int | None = None) -> Evaluation:
        def one_task(state: MetaState, trial: TaskBatch) -> Evaluation:
            _, info = adapt(state, trial, steps)
            return Evaluation(info.loss, info.aux[0], info.loss)

        return over_tasks.map(one_task, state, trials)

    return MetaLearner(init, step, evaluate, adapt)
