"""The outer objective: the meta-gradient, groups of tasks, and the sampling term."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.rl_cases import POLICY, collected, compiled, direction_like, perturbed
from jax.flatten_util import ravel_pytree

import maml_jax
from maml_jax.parallel.task_axis import task_axis, task_mesh
from maml_jax.rl.losses import inner_loss
from maml_jax.rl.trust_region import curvature_product
from maml_jax.types import MetaParams


@pytest.mark.parametrize(("name", "sampling_term"), [("logp", False), ("lvc", True), ("dice", False)])
def test_the_meta_gradient_equals_finite_differences_on_the_same_episodes(
    x64, objective_of_two_steps, name, sampling_term
):
    params, objective = objective_of_two_steps
    meta_params = MetaParams(params, ())
    objective = objective._replace(loss_fn=inner_loss(POLICY, name), sampling_term=sampling_term)
    along, size = direction_like(meta_params), 1e-6

    @compiled
    def slopes(meta_params):
        def moved(distance):
            return objective.loss(optax.tree.add_scale(meta_params, distance, along))[0]

        losses = jax.lax.map(moved, size * jnp.array([-2.0, -1.0, 1.0, 2.0]))
        # Use differences of fourth order, because the third derivatives of 'dice' are large.
        differences = jnp.dot(jnp.array([1.0, -8.0, 8.0, -1.0]), losses) / (12 * size)
        orders = [objective._replace(inner=maml_jax.sgd(0.3, steps=2, order=order)) for order in (1, 2)]
        gradients = [jax.grad(one.loss, has_aux=True)(meta_params)[0] for one in orders]
        return differences, *(optax.tree.vdot(gradient, along) for gradient in gradients)

    differences, first, second = slopes(meta_params)
    np.testing.assert_allclose(second, differences, rtol=1e-7)
    assert abs(first / second - 1) > 1e-3


def test_groups_and_devices_of_tasks_do_not_change_derivatives(x64):
    """Tasks are computed together, one by one, and on two devices; the curvature product uses three of four tasks."""
    params = perturbed(POLICY)
    meta_params, inner = MetaParams(params, ()), maml_jax.sgd(0.3, steps=1)
    objective, along = collected(inner, params, tasks=4, name="lvc"), direction_like(meta_params)
    found = []
    for over_tasks in (task_axis("all", None), task_axis(1, None), task_axis(1, task_mesh(2))):
        one = objective._replace(over_tasks=over_tasks, sampling_term=True)

        @compiled
        def everything(meta_params, one=one):
            some = one._replace(tasks=jax.tree.map(lambda leaf: leaf[:3], one.tasks))
            clipped = jax.grad(lambda m: one.loss(m, 0.3)[0] + one.loss(m, 0.3)[1].inner_kl)(meta_params)
            product = curvature_product(some.distributions, some.kl, meta_params)(along)
            return one.loss(meta_params), jax.grad(one.loss, has_aux=True)(meta_params)[0], clipped, product

        found.append(everything(over_tasks.replicate(meta_params)))
    for other in found[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13), other, found[0])
    assert len(jax.tree.leaves(found[2][1])[0].sharding.device_set) == 2


def test_the_sampling_term_is_credit_times_the_score_of_the_support_episodes(x64, objective_of_two_steps):
    params, objective = objective_of_two_steps
    flat, unravel = ravel_pytree(params)
    # Use only the first inner step: its episodes were sampled with the initial parameters.
    support = jax.tree.map(lambda leaf: leaf[:, :1], objective.tasks.support)
    objective = objective._replace(inner=maml_jax.sgd(0.3, steps=1), tasks=objective.tasks._replace(support=support))

    def log_likelihood(flat):
        def task_log_likelihood(sampled):
            return sampled.log_prob_under(POLICY.apply(unravel(flat), sampled.episodes.observation)).sum()

        return jax.vmap(task_log_likelihood)(jax.tree.map(lambda leaf: leaf[:, 0], support))

    @compiled
    def added_gradient_and_scores(flat):
        with_and_without = (objective._replace(sampling_term=term) for term in (True, False))
        one, other = (jax.grad(lambda f, o=o: o.loss(MetaParams(unravel(f), ()))[0])(flat) for o in with_and_without)
        return one - other, jax.jacobian(log_likelihood)(flat)

    added, scores = added_gradient_and_scores(flat)
    query = objective.tasks.query
    returns, lengths = np.asarray(query.reward.sum(2).mean(1)), np.asarray(query.episodes.mask.sum(2).mean(1))
    credit = [(returns[i] - np.delete(returns, i).mean()) / lengths[i] for i in range(3)]
    assert np.abs(added).max() > 1e-3
    np.testing.assert_allclose(added, -np.asarray(credit) @ scores / 3, atol=1e-10)
