"""A small reinforcement-learning problem for the tests."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import maml_jax
from maml_jax.parallel import backend
from maml_jax.parallel.task_axis import task_axis
from maml_jax.rl.envs.navigation import navigation
from maml_jax.rl.losses import inner_loss
from maml_jax.rl.meta_rl import TaskBatch, draw_task_batch, maml_rl
from maml_jax.rl.objective import Objective
from maml_jax.rl.outer import Outer, OuterInfo
from maml_jax.rl.policy import gaussian_mlp

ENVIRONMENT = navigation(horizon=8)
POLICY = gaussian_mlp(2, 2, hidden=(5,))
INNER = maml_jax.sgd(0.1, steps=1)

# Programs that run once are compiled without optimisation.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def perturbed(policy, seed=0):
    """Random parameters with biases other than zero. With zero biases, the origin is at the kink of every ReLU."""
    rng = np.random.default_rng(seed)
    params = policy.init(jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), params)


def task_batch_of(tasks, seed=0):
    """A batch of the given tasks `[T, ...]`."""
    return TaskBatch(jax.random.split(jax.random.key(seed), len(tasks)), jnp.asarray(tasks))


def small_learner(outer, environment=ENVIRONMENT, inner=INNER, **options):
    """`maml_rl` with 6 episodes of each task."""
    return maml_rl(environment, POLICY, inner, outer, **{"episodes": 6, **options})


def collected(inner, params, *, tasks=3, episodes=4, name="logp", sampling_term=False, environment=ENVIRONMENT):
    """The outer objective on episodes that were sampled with `params`."""

    def update(objective, meta_params, _):
        return meta_params, objective.tasks, OuterInfo(*jnp.zeros(3))

    outer = Outer(lambda meta_params: (), update)
    learner = maml_rl(environment, POLICY, inner, outer, episodes=episodes, inner_loss_name=name)
    state, _ = compiled(learner.step)(learner.init(params), draw_task_batch(environment, jax.random.key(5), tasks))
    return Objective(
        POLICY,
        inner,
        inner_loss(POLICY, name),
        state.opt_state,
        sampling_term,
        task_axis(backend.policy_batch_size(), None),
    )


def direction_like(tree, seed=1):
    """A random direction in the space of a pytree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)
