"""MAML for reinforcement learning: a meta-iteration as one function (Finn et al. 2017, algorithm 3)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from maml_jax import validation
from maml_jax.inner import InnerLearner, inner_loop
from maml_jax.meta import MetaLearner, init_state
from maml_jax.parallel import backend
from maml_jax.parallel.task_axis import task_axis
from maml_jax.rl.advantage import Experience, experience, summary
from maml_jax.rl.environment import Environment, checked
from maml_jax.rl.losses import InnerLossName, inner_loss
from maml_jax.rl.objective import Objective
from maml_jax.rl.outer import Outer
from maml_jax.rl.policy import Policy
from maml_jax.rl.rollout import rollout
from maml_jax.types import AdaptInfo, Evaluation, MetaInfo, MetaParams, MetaState, Params, Task


class TaskBatch(NamedTuple):
    """Tasks of an environment with PRNG keys for their episodes. Every leaf has a leading axis `T`.

    A single task is a `TaskBatch` without the leading axis.
    """

    key: jax.Array
    """`[T]`: one key for each task, from which the keys of all its episodes are derived."""
    task: jax.Array
    """`[T, ...]`: the result of `Environment.sample_tasks`."""


def draw_task_batch(environment: Environment, key: jax.Array, tasks: int) -> TaskBatch:
    """Samples a meta-batch of `T` tasks.

    Example:
      >>> import jax
      >>> from maml_jax.rl.envs.navigation import navigation
      >>> draw_task_batch(navigation(), jax.random.key(0), tasks=20).task.shape
      (20, 2)

    Args:
      environment: the family of tasks.
      key: a PRNG key.
      tasks: the number of tasks, `T`.

    Raises:
      ValueError: if `sample_tasks` of the environment returns another number of tasks.
    """
    task_key, key = jax.random.split(key)
    return TaskBatch(jax.random.split(key, tasks), checked(environment).sample_tasks(task_key, tasks))


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
    bootstrap: bool = False,
    mesh: Mesh | None = None,
) -> MetaLearner:
    """Model-agnostic meta-learning of a policy.

    Every inner step samples new episodes with the current policy. With `no_adaptation()` the algorithm is joint
    training on all tasks. This is the baseline 'pretrained' of the paper, and the oracle of the paper if
    `environment` comes from `with_task_observation`.

    Example:
      >>> import jax, maml_jax, optax
      >>> from maml_jax.rl.envs.navigation import navigation
      >>> from maml_jax.rl.outer import policy_gradient
      >>> from maml_jax.rl.policy import gaussian_mlp
      >>> environment, policy = navigation(horizon=5), gaussian_mlp(2, 2, hidden=(8,))
      >>> outer = policy_gradient(optax.sgd(0.1))  # The paper uses `trpo(0.01)`.
      >>> learner = maml_rl(environment, policy, maml_jax.sgd(0.1, steps=1), outer, episodes=4)
      >>> state = learner.init(policy.init(jax.random.key(0)))
      >>> task_batch = draw_task_batch(environment, jax.random.key(1), tasks=3)
      >>> state, info = jax.jit(learner.step)(state, task_batch)
      >>> info.aux["return"].shape
      (3,)

    Args:
      environment: the family of tasks.
      policy: the policy, such as `gaussian_mlp(environment.observation_size, environment.action_size)`, or
        `categorical_mlp` for discrete actions.
      inner: the inner learner, such as `maml_jax.sgd(0.1, steps=1)`. The inner loss is a mean over time steps,
        with advantages of standard deviation 1.
      outer: the outer step, such as `trpo(0.01)`.
      episodes: `E`, sampled for each task before each inner step and after the last step.
      inner_loss_name: 'logp' (as in the paper), 'lvc' or 'dice'; see `maml_jax.rl.losses`.
      sampling_term: whether the outer loss has a term for the sampling of the support episodes (E-MAML).
      discount: discount of rewards per time step, 0 to 1.
      gae_lambda: the parameter lambda of generalised advantage estimation, 0 to 1.
      bootstrap: whether the value after a truncated episode is the prediction of the baseline, and not 0; see
        `maml_jax.rl.advantage.experience`.
      mesh: the devices that share the tasks, such as `maml_jax.task_mesh(T)`; None uses one device. On several CPU
        devices, XLA needs more threads than devices if the environment calls the host or observations are large.
        Otherwise large calls can hang. Set the environment variable NPROC to the number of threads before JAX starts.

    Returns:
      A `MetaLearner` whose tasks are a `TaskBatch`. Losses are minus the mean return (paper, equation 4).
      `step(state, task_batch)` is one meta-iteration. The aux is a dict: 'return', 'length', 'num_nonfinite' and,
      with inner steps, 'return_before' are `[T]`; 'kl' and 'improvement' are `[1]`.
      `evaluate(state, task_batch, steps)` returns the loss of each task before the first inner step and after each
      step, on new episodes, with the `Summary` of the episodes as aux. Support loss and query loss are equal.
      `adapt(state, one_task, steps)` adapts to one task. The losses `[steps + 1]` and the aux
      `(Summary, Experience)`, `[steps + 1, ...]`, are those before the first step and after each step.
      Compile the three functions with `jax.jit`; `steps` is static.

    Raises:
      TypeError: if `inner` is not an inner learner, or if `outer` is not an outer step.
      ValueError: for fewer than 1 episode, for a discount or `gae_lambda` outside 0 to 1, for an unknown loss name, for
        `remat='mixflow'`, and in `step` for a sampling term with fewer than 2 tasks. When called, the functions of the
        learner raise TypeError or ValueError as `maml_jax.rl.rollout.rollout`.

    References:
      Finn, Abbeel and Levine 2017, arXiv:1703.03400, algorithm 3; Stadie et al. 2018, arXiv:1803.01118 (E-MAML).
    """
    if not isinstance(inner, InnerLearner):
        raise TypeError(f"inner must come from maml_jax.sgd, unrolled or no_adaptation, but got {inner!r}.")
    if not isinstance(outer, Outer):
        raise TypeError(f"outer must come from trpo, policy_gradient or promp, but got {outer!r}.")
    if inner.remat == "mixflow":
        raise ValueError(
            "remat must be 'none' or 'full', but got 'mixflow'. trpo needs forward-mode derivatives, and promp and the "
            "sampling term need derivatives of the aux of the inner loss: 'mixflow' has neither."
        )
    validation.at_least("episodes", episodes, 1)
    for name, value in (("discount", discount), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, but got {value!r}.")
    loss_fn = inner_loss(policy, inner_loss_name)
    over_tasks = task_axis("all", mesh)  # All tasks together: one call simulates all episodes.

    def init(params: Params) -> MetaState:
        return init_state(inner, params, outer.init, over_tasks)

    def sample(params: Params, one_task: TaskBatch) -> Experience:
        sampled = rollout(environment, policy, params, one_task.key, one_task.task, episodes)
        return lax.stop_gradient(experience(sampled, discount, gae_lambda, bootstrap))

    def sampled_loss(params: Params, one_task: TaskBatch) -> tuple[jax.Array, Experience]:
        """Returns the inner loss on new episodes of the current policy, and the experience as aux."""
        sampled = sample(params, one_task)
        return loss_fn(params, sampled)[0], sampled

    def collect(meta_params: MetaParams, one_task: TaskBatch, *, steps: int) -> tuple[Params, Task]:
        """Adapts to one task.

        Returns:
          The adapted parameters, and the experience: support is the experience of each inner step, query is the
          experience after the last step.
        """
        keys = jax.random.split(one_task.key, steps + 1)
        step_batches = TaskBatch(keys[:-1], jnp.broadcast_to(one_task.task, (steps, *one_task.task.shape)))
        params, info = inner_loop(inner, sampled_loss, *meta_params, step_batches, steps=steps, batch_per_step=True)
        return params, Task(support=info.aux, query=sample(params, TaskBatch(keys[-1], one_task.task)))

    def step(state: MetaState, task_batch: TaskBatch) -> tuple[MetaState, MetaInfo]:
        if sampling_term and len(task_batch.task) < 2:
            raise ValueError("sampling_term compares the return of a task with the other tasks: give 2 tasks or more.")
        # Sample episodes of every task, before and after adaptation.
        _, tasks = over_tasks.map(partial(collect, steps=inner.steps), state.meta_params, task_batch)
        # One outer step on these episodes.
        groups = task_axis(backend.policy_batch_size(), mesh)
        objective = Objective(policy, inner, loss_fn, tasks, sampling_term, groups)
        (params, inner_params), opt_state, info = outer.update(objective, state.meta_params, state.opt_state)
        # Metrics.
        before = jax.vmap(jax.vmap(summary))(tasks.support.episodes)
        after = jax.vmap(summary)(tasks.query.episodes)
        metrics = {
            "return": after.mean_return,
            "length": after.length,
            "num_nonfinite": before.num_nonfinite.sum(1) + after.num_nonfinite,
            "kl": info.kl[None],
            "improvement": info.improvement[None],
        }
        if inner.steps:
            metrics["return_before"] = before.mean_return[:, 0]
        return (
            MetaState(state.step + 1, params, inner_params, opt_state),
            MetaInfo(-after.mean_return.mean(), metrics, -before.mean_return, info.grad_norm),
        )

    def adapt(state: MetaState, one_task: TaskBatch, steps: int | None = None) -> tuple[Params, AdaptInfo]:
        steps = inner.steps if steps is None else steps
        validation.at_least("steps", steps, 0)
        params, task = collect(state.meta_params, one_task, steps=steps)
        sampled = jax.tree.map(lambda each, last: jnp.concatenate([each, last[None]]), task.support, task.query)
        summaries = jax.vmap(summary)(sampled.episodes)
        return params, AdaptInfo(-summaries.mean_return, (summaries, sampled))

    def evaluate(state: MetaState, task_batch: TaskBatch, steps: int | None = None) -> Evaluation:
        def one_evaluation(state: MetaState, one_task: TaskBatch) -> Evaluation:
            _, info = adapt(state, one_task, steps)
            return Evaluation(info.loss, info.aux[0], info.loss)

        return over_tasks.map(one_evaluation, state, task_batch)

    return MetaLearner(init, step, evaluate, adapt)
