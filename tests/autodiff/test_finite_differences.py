"""Tests of comparisons with finite differences, and of the precision of programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax.autodiff.finite_differences import coarsest_type, gradient_checker

pytestmark = pytest.mark.usefixtures("x64")

AT = {"a": np.array([0.5, -1.0]), "b": np.array(2.0)}


def smooth(at):
    return np.sin(at["a"]).sum() * at["b"] ** 2


GRADIENT = {"a": np.cos(AT["a"]) * 4, "b": np.sin(AT["a"]).sum() * 4}


def test_an_error_in_one_leaf_is_found_and_named():
    checker = gradient_checker(1e-6, np.dtype(np.float64), directions=2, seed=0)
    found = checker.compare(smooth, AT, GRADIENT)
    assert found.passed and found.error < 1e-8 and found.limit == 1e-6 and not found.failing
    found = checker.compare(smooth, AT, {**GRADIENT, "b": GRADIENT["b"] * 1.001})
    assert not found.passed and [jax.tree_util.keystr(path) for path in found.failing] == ["['b']"]
    assert not checker.compare(smooth, AT, {**GRADIENT, "b": np.array(np.nan)}).passed


def test_the_limit_follows_the_uncertainty_of_the_differences():
    """Numbers of half the precision change the differences by about 1e-4."""

    def rounded(at):
        return np.float64(np.float32(smooth(at)))

    checker = gradient_checker(1e-6, np.dtype(np.float64), directions=2, seed=0)
    found = checker.compare(rounded, AT, GRADIENT)
    assert found.passed and 1e-6 < found.error < found.limit <= 0.01
    assert not checker.compare(rounded, AT, jax.tree.map(lambda leaf: 1.1 * leaf, GRADIENT)).passed
    assert not checker.compare(lambda at: np.round(smooth(at) * 1e3), AT, GRADIENT).passed  # Too uncertain.


def test_steps_at_which_the_function_overflows_do_not_count():
    def overflows(at):
        return np.where(at > 1.0001, np.inf, np.sin(at)).sum()

    checker = gradient_checker(1e-6, np.dtype(np.float64), directions=2, seed=0)
    assert checker.compare(overflows, np.array(1.0), np.array(np.cos(1.0))).passed
    assert not checker.compare(overflows, np.array(1.0), np.array(2.0)).passed


def test_only_operations_on_the_inputs_decide_about_the_precision():
    constant = jnp.arange(3.0)

    def casts_a_constant(x):
        return x * constant.astype(jnp.bfloat16).astype(float)

    def casts_in_a_loop(x):
        return jax.lax.fori_loop(0, 2, lambda _, x: x.astype(jnp.float16).astype(float), x)

    for fn, expected in ((casts_a_constant, "float64"), (casts_in_a_loop, "float16")):
        assert coarsest_type(jax.make_jaxpr(fn)(constant).jaxpr) == expected
