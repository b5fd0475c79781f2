"""TRPO: the curvature product, the line search, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.rl_cases import compiled, direction_like
from jax.flatten_util import ravel_pytree

from maml_jax.inner import inner_loop
from maml_jax.rl.trust_region import curvature_product, line_search, trpo
from maml_jax.types import MetaParams


def test_the_curvature_product_is_the_hessian_of_the_divergence(x64, objective_of_two_steps):
    params, objective = objective_of_two_steps
    meta_params = MetaParams(params, ())

    def divergence(meta_params):
        return objective.loss(meta_params)[1].kl

    @compiled
    def products(along):
        exact = jax.jvp(jax.grad(divergence), (meta_params,), (along,))[1]
        return curvature_product(objective.distributions, objective.kl, meta_params)(along), exact

    product, exact = (ravel_pytree(tree)[0] for tree in products(direction_like(meta_params)))
    np.testing.assert_allclose(product, exact, atol=1e-9 * float(jnp.abs(exact).max()))
    loss = compiled(objective.loss)
    _, at = loss(meta_params)
    # At the parameters that sampled the episodes, the divergences are 0.
    assert abs(at.kl) < 1e-14 and abs(at.inner_kl) < 1e-14
    away = optax.tree.add_scale(meta_params, 0.1, direction_like(meta_params))
    _, moved = loss(away)

    def kl_of_steps(task):
        return inner_loop(objective.inner, objective.loss_fn, *away, task.support, batch_per_step=True)[1].aux.kl

    kl_of_steps = compiled(jax.vmap(kl_of_steps))(objective.tasks)
    assert moved.kl > 1e-4 and kl_of_steps.shape == (3, 2) and kl_of_steps.min() > 1e-5
    np.testing.assert_allclose(moved.inner_kl, kl_of_steps.mean())


def test_the_line_search_takes_the_longest_step_that_improves(x64, objective_of_two_steps):
    """If all attempts raise the loss, the search takes no step."""
    params, objective = objective_of_two_steps
    meta_params = MetaParams(params, ())

    @compiled
    def search(step, loss, kl_limit, attempts=12):
        return line_search(objective, meta_params, step, loss, kl_limit, 0.5, attempts)

    (loss, _), grads = compiled(jax.value_and_grad(objective.loss, has_aux=True))(meta_params)
    new, new_loss, kl = search(optax.tree.scale(30.0, grads), loss, 0.01)
    assert new_loss < loss and 0 < kl <= 0.01
    moved = optax.tree.vdot(optax.tree.sub(meta_params, new), grads) / optax.tree.vdot(grads, grads) / 30.0
    exponent = -float(jnp.log2(moved))
    np.testing.assert_allclose(exponent, round(exponent), atol=1e-6)
    # The step of twice the length is not accepted.
    longer_loss, longer = compiled(objective.loss)(optax.tree.add_scale(meta_params, -30.0 * 2 * moved, grads))
    assert exponent < 0.5 or longer_loss >= loss or longer.kl > 0.01
    # The bound is exact: the divergence of the full step is accepted as the bound, and 0.9 times it is not.
    step = optax.tree.scale(30.0 * moved, grads)
    bound = compiled(objective.loss)(optax.tree.sub(meta_params, step))[1].kl
    for factor, halvings in ((1 + 1e-9, 0), (0.9, 1)):
        new, _, kl = search(step, loss, factor * bound)
        np.testing.assert_allclose(
            optax.tree.norm(optax.tree.sub(meta_params, new)), optax.tree.norm(step) / 2**halvings, rtol=1e-9
        )
        assert kl <= factor * bound
    new, _, _ = search(step, loss, 0.9 * bound, attempts=1)
    jax.tree.map(np.testing.assert_array_equal, new, meta_params)
    # Uphill no step is accepted.
    new, new_loss, kl = search(optax.tree.scale(-1.0, grads), loss, 0.01)
    jax.tree.map(np.testing.assert_array_equal, new, meta_params)
    assert new_loss == loss and kl == 0


def test_a_step_solves_the_damped_system_and_reports_its_effect(x64, objective_of_two_steps):
    """The reference builds the curvature matrix. The conjugate gradients take as many steps as they need."""
    params, objective = objective_of_two_steps
    damping = 0.1
    flat, unravel = ravel_pytree(MetaParams(params, ()))
    outer = trpo(0.01, damping=damping, conjugate_steps=3 * flat.size, backtracking=0.5, curvature_tasks=2)

    @compiled
    def step_and_reference(meta_params):
        first = objective._replace(tasks=jax.tree.map(lambda leaf: leaf[:2], objective.tasks))
        product = curvature_product(first.distributions, first.kl, meta_params)
        matrix = jax.vmap(lambda row: ravel_pytree(product(unravel(row)))[0])(jnp.eye(flat.size))
        (before, _), gradient = jax.value_and_grad(objective.loss, has_aux=True)(meta_params)
        new, _, info = outer.update(objective, meta_params, ())
        return new, info, matrix, before, ravel_pytree(gradient)[0], objective.loss(new)

    new, info, matrix, before, gradient, after = step_and_reference(unravel(flat))
    direction = jnp.linalg.solve(matrix + damping * jnp.eye(flat.size), gradient)
    step = direction * jnp.sqrt(2 * 0.01 / (direction @ gradient + 1e-8))
    moved = flat - ravel_pytree(new)[0]
    halvings = -jnp.log2(moved @ step / (step @ step))
    np.testing.assert_allclose(halvings, jnp.round(halvings), atol=1e-3)
    np.testing.assert_allclose(moved, step / 2 ** jnp.round(halvings), atol=1e-3 * jnp.abs(moved).max())
    np.testing.assert_allclose(info.grad_norm, jnp.linalg.norm(gradient))
    np.testing.assert_allclose(info.improvement, before - after[0])
    np.testing.assert_allclose(info.kl, after[1].kl)
    assert info.improvement > 0 and 0 < info.kl <= 0.01


def test_arguments_that_are_not_allowed_raise():
    with pytest.raises(ValueError, match="kl_limit must be positive and finite, but got 0"):
        trpo(0.0)
    with pytest.raises(ValueError, match="backtracking must be between 0 and 1, but got 1"):
        trpo(backtracking=1)
    with pytest.raises(ValueError, match="conjugate_steps must be an integer of at least 1, but got 0"):
        trpo(conjugate_steps=0)
