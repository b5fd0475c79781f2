"""Derivatives and statistics of reinforcement learning, against differences, exact products and plain loops."""

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
from maml_jax.rl.advantage import experience
from maml_jax.rl.baseline import RIDGE, features, linear_baseline
from maml_jax.rl.losses import SURROGATES, inner_loss
from maml_jax.rl.rollout import Episodes
from maml_jax.rl.trust_region import conjugate_gradient, curvature_product


@pytest.fixture(scope="module")
def fixed():
    """Parameters, and the objective on episodes that they sampled before and after each of two inner steps."""
    with jax.enable_x64(True):
        params = perturbed(POLICY)
        return params, collected(maml_jax.sgd(0.3, steps=2), params)


@pytest.mark.parametrize(("name", "sampling_term"), [("logp", False), ("lvc", True), ("dice", False)])
def test_the_meta_gradient_is_that_of_differences_with_the_episodes_fixed(x64, fixed, name, sampling_term):
    params, objective = fixed
    meta_params = (params, ())
    objective = objective._replace(loss_fn=inner_loss(POLICY, name), sampling_term=sampling_term)
    along, size = direction_like(meta_params), 1e-6

    @compiled
    def slopes(meta_params):
        def moved(distance):
            return objective.terms(optax.tree.add_scale(meta_params, distance, along)).loss

        losses = jax.lax.map(moved, size * jnp.array([-2.0, -1.0, 1.0, 2.0]))
        # Of fourth order: the third derivatives of 'dice' are large.
        differences = jnp.dot(jnp.array([1.0, -8.0, 8.0, -1.0]), losses) / (12 * size)
        orders = [objective._replace(inner=maml_jax.sgd(0.3, steps=2, order=order)) for order in (1, 2)]
        gradients = [jax.grad(lambda m, one=one: one.terms(m).loss)(meta_params) for one in orders]
        return differences, *(optax.tree.vdot(gradient, along) for gradient in gradients)

    differences, first, second = slopes(meta_params)
    np.testing.assert_allclose(second, differences, rtol=1e-7)
    assert abs(first / second - 1) > 1e-3


def test_the_curvature_product_is_the_hessian_of_the_divergence(x64, fixed):
    params, objective = fixed
    meta_params = (params, ())

    def divergence(meta_params):
        return objective.kl(objective.distributions(meta_params))

    @compiled
    def products(along):
        exact = jax.jvp(jax.grad(divergence), (meta_params,), (along,))[1]
        return curvature_product(objective.distributions, objective.kl, meta_params)(along), exact

    product, exact = (ravel_pytree(tree)[0] for tree in products(direction_like(meta_params)))
    np.testing.assert_allclose(product, exact, atol=1e-9 * float(jnp.abs(exact).max()))
    terms = compiled(objective.terms)
    at = terms(meta_params)
    assert abs(at.kl) < 1e-14 and abs(at.inner_kl) < 1e-14  # At the parameters that sampled.
    moved = terms(optax.tree.add_scale(meta_params, 0.1, direction_like(meta_params)))
    assert moved.kl > 1e-4 and moved.inner_kl > 1e-4


def test_however_the_tasks_are_gone_through_the_derivatives_are_the_same(x64):
    """Together, one by one, and over two devices, also with a task too few for that."""
    params = perturbed(POLICY)
    meta_params, inner = (params, ()), maml_jax.sgd(0.3, steps=1)
    objective, along = collected(inner, params, tasks=4, name="lvc"), direction_like(meta_params)
    found = []
    for over_tasks in (task_axis("all", None), task_axis(1, None), task_axis(1, task_mesh(2))):
        one = objective._replace(over_tasks=over_tasks, sampling_term=True)

        @compiled
        def everything(meta_params, one=one):
            some = one._replace(tasks=jax.tree.map(lambda leaf: leaf[:3], one.tasks))
            clipped = jax.grad(lambda m: one.terms(m, 0.3).loss + one.terms(m, 0.3).inner_kl)(meta_params)
            product = curvature_product(some.distributions, some.kl, meta_params)(along)
            return one.terms(meta_params), jax.grad(lambda m: one.terms(m).loss)(meta_params), clipped, product

        found.append(everything(over_tasks.replicate(meta_params)))
    for other in found[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13), other, found[0])
    assert len(jax.tree.leaves(found[2][1])[0].sharding.device_set) == 2


def test_the_conjugate_gradient_solves_and_knows_its_quadratic_form(x64):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    matrix, target = root @ root.T + np.eye(6), rng.normal(size=6)
    for steps in (2, 6):  # The form is exact before the solution is.
        x, form = conjugate_gradient(lambda v: matrix @ v, jnp.asarray(target), steps)
        np.testing.assert_allclose(form, x @ matrix @ x, rtol=1e-10)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, target), rtol=1e-6)


def test_second_derivatives_are_those_that_the_names_promise(x64, fixed):
    """'lvc' adds E[A grad log pi (grad log pi)'] to the Hessian of 'logp'; 'dice' takes the past of a step along."""
    params, objective = fixed
    seen = jax.tree.map(lambda leaf: leaf[0, 0], objective.tasks.support)
    flat, unravel = ravel_pytree(params)
    count = seen.episodes.mask.sum()
    following = jnp.cumsum(seen.reward[:, ::-1], 1)[:, ::-1] - seen.baseline

    def log_prob(flat):
        return seen.log_prob_under(POLICY.apply(unravel(flat), seen.episodes.observation))

    @compiled
    def derivatives(flat):
        losses = [lambda flat, n=name: inner_loss(POLICY, n)(unravel(flat), seen)[0] for name in SURROGATES]
        plain = jax.hessian(lambda flat: -(following * log_prob(flat)).sum() / count)(flat)
        scores = jax.jacobian(log_prob)(flat)
        return scores, plain, [jax.grad(loss)(flat) for loss in losses], [jax.hessian(loss)(flat) for loss in losses]

    assert tuple(SURROGATES) == ("logp", "lvc", "dice")
    scores, plain, gradients, hessians = derivatives(flat)
    products = jnp.einsum("ehi,ehj->ehij", scores, scores)
    np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-12)
    added = -jnp.einsum("eh,ehij->ij", seen.advantage, products) / count
    np.testing.assert_allclose(hessians[1] - hessians[0], added, atol=1e-9)
    np.testing.assert_allclose(gradients[2], -jnp.einsum("eh,ehi->i", following, scores) / count, atol=1e-12)
    past = jnp.cumsum(scores, 1)
    added = jnp.einsum("eh,ehi,ehj->ij", seen.reward, past, past)
    added = -(added - jnp.einsum("eh,ehij->ij", seen.baseline, products)) / count
    np.testing.assert_allclose(hessians[2] - plain, added, atol=1e-9)


def test_the_sampling_term_credits_the_episodes_that_were_adapted_to(x64, fixed):
    params, objective = fixed
    flat, unravel = ravel_pytree(params)
    # Of the first inner step alone, whose policy is that of the parameters themselves.
    support = jax.tree.map(lambda leaf: leaf[:, :1], objective.tasks.support)
    objective = objective._replace(inner=maml_jax.sgd(0.3, steps=1), tasks=objective.tasks._replace(support=support))

    def log_likelihood(flat):
        def of_task(seen):
            return seen.log_prob_under(POLICY.apply(unravel(flat), seen.episodes.observation)).sum()

        return jax.vmap(of_task)(jax.tree.map(lambda leaf: leaf[:, 0], support))

    @compiled
    def both(flat):
        with_and_without = (objective._replace(sampling_term=term) for term in (True, False))
        one, other = (jax.grad(lambda f, o=o: o.terms((unravel(f), ())).loss)(flat) for o in with_and_without)
        return one - other, jax.jacobian(log_likelihood)(flat)

    added, scores = both(flat)
    query = objective.tasks.query
    returns, lengths = np.asarray(query.reward.sum(2).mean(1)), np.asarray(query.episodes.mask.sum(2).mean(1))
    credit = [(returns[i] - np.delete(returns, i).mean()) / lengths[i] for i in range(3)]
    assert np.abs(added).max() > 1e-3
    np.testing.assert_allclose(added, -np.asarray(credit) @ scores / 3, atol=1e-10)


def test_the_baseline_is_ridge_regression_in_float32_too():
    """On observations that depend on each other, as the cheetah's do."""
    rng = np.random.default_rng(0)
    observation = rng.normal(size=(10, 50, 3)).astype(np.float32)
    observation = np.concatenate([observation, observation[..., :1] * 2, observation[..., 1:] - 1], -1)
    mask = (np.arange(50) < rng.integers(20, 51, size=(10, 1))).astype(np.float32)
    returns = (observation.sum(-1) + 5 * np.cos(np.arange(50) / 20) + rng.normal(size=(10, 50))).astype(np.float32)
    predicted = np.asarray(jax.jit(linear_baseline)(observation, returns, mask), np.float64)

    happened = mask > 0
    with jax.enable_x64(True):
        design = np.asarray(features(jnp.asarray(observation, jnp.float64)))[happened]
    design = design / np.linalg.norm(design, axis=0)
    ridge = np.sqrt(RIDGE) * np.eye(design.shape[1])
    stacked = np.concatenate([design, ridge]), np.concatenate([returns[happened], np.zeros(design.shape[1])])
    expected = design @ np.linalg.lstsq(*stacked, rcond=None)[0]
    np.testing.assert_allclose(predicted[happened], expected, atol=2e-3 * returns.std())
    free = design @ np.linalg.lstsq(design, returns[happened], rcond=None)[0]  # And the ridge is a light one.
    np.testing.assert_allclose(expected, free, atol=0.06 * returns.std())


def test_masked_episodes_are_those_of_their_own_lengths(x64):
    rng = np.random.default_rng(0)
    lengths, horizon, discount, smoothing = (3, 7, 1, 5), 7, 0.9, 0.8
    params = perturbed(POLICY)
    mask = (np.arange(horizon) < np.array(lengths)[:, None]).astype(float)
    observation, action = rng.normal(size=(2, 4, horizon, 2))
    reward = mask * rng.normal(size=(4, horizon))

    @partial(compiled, static_argnums=2)
    def loss_and_gradient(observation, action, name):
        sampled = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, action.shape), POLICY.apply(params, observation))
        episodes = Episodes(observation, action, sampled, jnp.asarray(reward), jnp.asarray(mask), jnp.zeros(4))
        seen = experience(episodes, discount, smoothing)
        return jax.value_and_grad(lambda p: inner_loss(POLICY, name)(p, seen), has_aux=True)(params), seen

    ((loss, _), gradient), seen = loss_and_gradient(observation, action, "logp")
    # One after the other, with the lengths that they have.
    design = np.asarray(features(jnp.asarray(observation)))
    design = np.concatenate([design[i, :n] for i, n in enumerate(lengths)])
    summed = [sum(discount ** (k - t) * reward[i, k] for k in range(t, n)) for i, n in enumerate(lengths)
              for t in range(n)]  # fmt: skip
    unit = design / np.linalg.norm(design, axis=0)
    values = unit @ np.linalg.solve(unit.T @ unit + RIDGE * np.eye(unit.shape[1]), unit.T @ np.array(summed))
    advantages, start = [], 0
    for i, n in enumerate(lengths):
        value = np.append(values[start : start + n], 0)
        deltas = reward[i, :n] + discount * value[1:] - value[:-1]
        advantages += [sum((discount * smoothing) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        start += n
    advantages = (advantages - np.mean(advantages)) / (np.std(advantages) + 1e-8)
    np.testing.assert_allclose(np.asarray(seen.advantage)[mask > 0], advantages, atol=1e-9)

    def concatenated(params):
        parts = [POLICY.apply(params, observation[i, :n]).log_prob(action[i, :n]) for i, n in enumerate(lengths)]
        return -(jnp.concatenate(parts) * advantages).mean()

    np.testing.assert_allclose(loss, concatenated(params), rtol=1e-9)
    for masked, expected in zip(*map(jax.tree.leaves, (gradient, compiled(jax.grad(concatenated))(params)))):
        np.testing.assert_allclose(masked, expected, atol=1e-9)
    # What comes after an end changes nothing.
    other = mask[..., None] * observation + (1 - mask[..., None]) * 7.0, action - (1 - mask[..., None]) * 3.0
    for name in ("logp", "dice"):
        (first, _), (second, _) = (loss_and_gradient(*inputs, name) for inputs in ((observation, action), other))
        for one, two in zip(*map(jax.tree.leaves, (first, second))):
            np.testing.assert_allclose(one, two, atol=1e-12)
