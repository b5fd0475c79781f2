"""Tests of conjugate gradients against a direct solver and against the solver of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg

from maml_jax.autodiff.conjugate_gradient import conjugate_gradient


def system(size=6):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(size, size))
    return root @ root.T + np.eye(size), jnp.asarray(rng.normal(size=size))


def test_as_many_steps_as_unknowns_solve_the_system(x64):
    matrix, target = system()
    for steps in (2, 6):  # x' A x = x' b after any number of steps, although x is not exact after 2 steps.
        x = conjugate_gradient(lambda vector: matrix @ vector, target, steps=steps)
        np.testing.assert_allclose(x @ target, x @ matrix @ x, rtol=1e-10)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, target), rtol=1e-6)


def test_equals_the_solver_of_jax_with_one_product_fewer(x64):
    matrix, target = system()
    counted = []

    def product(tree):
        counted.append(1)
        return {"x": matrix @ tree["x"]}

    with jax.disable_jit():
        found = conjugate_gradient(product, {"x": target}, steps=3)
        ours = len(counted)
    expected, _ = cg(lambda tree: {"x": matrix @ tree["x"]}, {"x": target}, tol=0.0, maxiter=3)
    np.testing.assert_allclose(found["x"], expected["x"], rtol=1e-12)
    assert ours == 3


def test_a_small_residual_ends_the_iteration():
    target = jnp.array([1.0, 2.0])
    found = conjugate_gradient(lambda vector: 2 * vector, target, steps=50)  # Solved by the first step.
    np.testing.assert_array_equal(found, target / 2)
    without_steps = conjugate_gradient(lambda vector: 2 * vector, target, steps=50, square_tolerance=5.0)
    np.testing.assert_array_equal(without_steps, 0)
