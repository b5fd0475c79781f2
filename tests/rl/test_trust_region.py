"""TRPO: the curvature product, the line search, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.rl_cases import compiled, direction_like
from jax.flatten_util import ravel_pytree

from maml_jax.rl.trust_region import curvature_product, line_search, trpo
from maml_jax.types import MetaParams


def test_the_curvature_product_is_the_hessian_of_the_divergence(x64, objective_of_two_steps):
    params, objective = objective_of_two_steps
    meta_params = MetaParams(params, ())

    def divergence(meta_params):
        return objective.kl(objective.distributions(meta_params))

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
    _, moved = loss(optax.tree.add_scale(meta_params, 0.1, direction_like(meta_params)))
    assert moved.kl > 1e-4 and moved.inner_kl > 1e-4


def test_the_line_search_takes_the_longest_step_that_improves(x64, objective_of_two_steps):
    """If all attempts raise the loss, the search takes no step."""
    params, objective = objective_of_two_steps
    meta_params = MetaParams(params, ())

    @compiled
    def search(step, loss, kl_limit):
        return line_search(objective, meta_params, step, loss, kl_limit, 0.5, 12)

    (loss, _), grads = compiled(jax.value_and_grad(objective.loss, has_aux=True))(meta_params)
    new, new_loss, kl = search(optax.tree.scale(30.0, grads), loss, 0.01)
    assert new_loss < loss and 0 < kl <= 0.01
    moved = optax.tree.vdot(optax.tree.sub(meta_params, new), grads) / optax.tree.vdot(grads, grads) / 30.0
    exponent = -float(jnp.log2(moved))
    np.testing.assert_allclose(exponent, round(exponent), atol=1e-6)
    # The step of twice the length is not accepted.
    longer_loss, longer = compiled(objective.loss)(optax.tree.add_scale(meta_params, -30.0 * 2 * moved, grads))
    assert exponent < 0.5 or longer_loss >= loss or longer.kl > 0.01
    # Uphill no step is accepted.
    new, new_loss, kl = search(optax.tree.scale(-1.0, grads), loss, 0.01)
    jax.tree.map(np.testing.assert_array_equal, new, meta_params)
    assert new_loss == loss and kl == 0


def test_arguments_that_are_not_allowed_raise():
    with pytest.raises(ValueError, match="kl_limit must be positive and finite, but got 0"):
        trpo(0.0)
    with pytest.raises(ValueError, match="backtracking must be between 0 and 1, but got 1"):
        trpo(backtracking=1)
    with pytest.raises(ValueError, match="conjugate_steps must be an integer of at least 1, but got 0"):
        trpo(conjugate_steps=0)
