"""Tests of iMAML: the implicit meta-gradient equals the derivative at the minimum of the inner problem."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.algorithm_cases import LOSS, assert_close, meta_gradient, start_params
from helpers.model_zoo import ZOO, drawn_params, tasks

import maml_jax
from maml_jax import Task, losses
from maml_jax.algorithms import heads
from maml_jax.algorithms.imaml import imaml, with_proximal_term
from maml_jax.nets import models

pytestmark = pytest.mark.usefixtures("x64")


def test_implicit_gradient_of_a_quadratic_in_closed_form():
    """Support loss p'Ap/2 - b'p, query loss |p - c|^2 / 2. Linear systems give the minimum and its derivative."""
    random = np.random.default_rng(3)
    half = random.standard_normal((4, 4))
    hessian, linear, aim, at = half @ half.T, *random.standard_normal((3, 4))
    proximal_weight = 2.0

    def support(params, batch):
        return params["p"] @ hessian @ params["p"] / 2 - batch[0] @ params["p"], {}

    def query(params, batch):
        return jnp.sum((params["p"] - batch[0]) ** 2) / 2, {}

    inner = maml_jax.sgd(0.05, steps=3000)
    learner = imaml(support, inner, optax.sgd(1.0), proximal_weight=proximal_weight, cg_steps=4, query_loss_fn=query)
    task = maml_jax.Task((jnp.asarray(linear)[None],), (jnp.asarray(aim)[None],))
    gradient, _ = meta_gradient(learner, learner.init({"p": jnp.asarray(at)}), task)
    system = hessian + proximal_weight * np.eye(4)
    minimum = np.linalg.solve(system, linear + proximal_weight * at)
    assert_close(gradient["p"], proximal_weight * np.linalg.solve(system, minimum - aim), rtol=1e-8)


def test_implicit_gradient_equals_the_gradient_through_many_inner_steps():
    """The network is small and smooth, and has parameters that the inner loop does not adapt."""
    (loss_fn, params), batch = ZOO["dict"](), tasks(2)
    inner = maml_jax.sgd(0.1, steps=300, trainable={"w1": True, "b1": True, "w2": True, "b2": False})
    implicit = imaml(loss_fn, inner, optax.sgd(1.0), proximal_weight=6.0, cg_steps=60)
    unrolled = maml_jax.maml(loss_fn, with_proximal_term(inner, 6.0), optax.sgd(1.0))
    expected = meta_gradient(unrolled, unrolled.init(params), batch)
    assert_close(meta_gradient(implicit, implicit.init(params), batch), expected, rtol=1e-6, atol=1e-9)
    few = imaml(loss_fn, inner, optax.sgd(1.0), proximal_weight=6.0, cg_steps=1)
    gradient, _ = meta_gradient(few, few.init(params), batch)
    assert np.abs(gradient["w1"] - expected[0]["w1"]).max() > 1e-5


def test_wrong_arguments_raise_errors():
    with pytest.raises(ValueError, match="without start and params_at_step"):
        inner = maml_jax.sgd(0.3, steps=2, start=heads.shared())
        imaml(LOSS, inner, optax.sgd(1.0), proximal_weight=1.0, cg_steps=5)
    with pytest.raises(ValueError, match="proximal_weight must be positive"):
        imaml(LOSS, maml_jax.sgd(0.3, steps=1), optax.sgd(1.0), proximal_weight=0.0, cg_steps=5)
    with pytest.raises(ValueError, match="no gradient for learned parameters of the inner update"):
        inner = maml_jax.sgd(0.3, steps=2, learn_rates="layer")
        imaml(LOSS, inner, optax.sgd(1.0), proximal_weight=1.0, cg_steps=2).init(start_params())


def test_a_relu_net_is_exact_only_where_the_inner_loop_settles():
    """With a small proximal weight gradient descent stops at kinks, with a large one near the start.

    The residual is the gradient of the regularised inner problem after the inner loop, relative to the one before it.
    """
    net = models.ConvNet(ways=2, filters=2)
    random = np.random.default_rng(0)
    tasks = Task(*((jnp.asarray(random.random((1, 4, 4, 4, 1))), jnp.array([[0, 1, 0, 1]])) for _ in range(2)))
    params = jax.tree.map(lambda leaf: leaf.astype(float), drawn_params(net, tasks.support[0][0]))
    loss_fn = losses.cross_entropy(models.apply_params(net))
    support = jax.tree.map(lambda leaf: leaf[0], tasks.support)
    slope = jax.grad(lambda params: loss_fn(params, support)[0])

    @jax.jit
    def residual_and_error(proximal_weight):
        inner = maml_jax.sgd(1 / (proximal_weight + 5), steps=60)
        implicit = imaml(loss_fn, inner, optax.sgd(1.0), proximal_weight=proximal_weight, cg_steps=20)
        unrolled = maml_jax.maml(loss_fn, with_proximal_term(inner, proximal_weight), optax.sgd(1.0))
        state = implicit.init(params)
        adapted, _ = implicit.adapt(state, support)
        residual = jax.tree.map(lambda g, p, p0: g + proximal_weight * (p - p0), slope(adapted), adapted, params)
        got, expected = (meta_gradient(learner, state, tasks)[0] for learner in (implicit, unrolled))
        error = optax.tree.norm(jax.tree.map(jnp.subtract, got, expected)) / optax.tree.norm(expected)
        return optax.tree.norm(residual) / optax.tree.norm(slope(params)), error

    residual, error = residual_and_error(1000.0)
    assert residual < 1e-9 and error < 1e-7
    residual, error = residual_and_error(0.1)
    assert residual > 1e-3 and error > 1e-2
