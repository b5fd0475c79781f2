"""What the tests of reinforcement learning share: a small problem, and episodes of it that stay as they are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.parallel import backend
from maml_jax.parallel.task_axis import task_axis
from maml_jax.rl.envs.navigation import navigation
from maml_jax.rl.losses import inner_loss
from maml_jax.rl.meta_rl import draw_task_batch, maml_rl
from maml_jax.rl.objective import Objective
from maml_jax.rl.outer import Outer, OuterInfo
from maml_jax.rl.policy import gaussian_mlp

ENVIRONMENT = navigation(horizon=8)
POLICY = gaussian_mlp(2, 2, hidden=(5,))

# Programs that run once are not worth optimising.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def perturbed(policy, seed=0):
    """Parameters off the kinks: with zero biases, the start at the origin sits on that of every unit."""
    rng = np.random.default_rng(seed)
    params = policy.init(jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), params)


def collected(inner, params, *, tasks=3, episodes=4, name="logp", sampling_term=False, environment=ENVIRONMENT):
    """The outer objective on episodes that `params` sampled."""

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
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)
