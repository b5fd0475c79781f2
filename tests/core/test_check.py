"""Tests of `check_meta_gradient`: it finds injected faults and names the leaves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.model_zoo import drawn_params, plain_dict, tasks

import maml_jax
from maml_jax import check_meta_gradient, losses
from maml_jax.algorithms import maml_plus_plus
from maml_jax.nets import layers
from maml_jax.nets.convolution import conv


def failed(report):
    return {finding.name for finding in report.findings if not finding.passed}


def test_a_sound_loss_in_float32_is_exact():
    loss_fn, params = plain_dict()
    report = check_meta_gradient(loss_fn, params, tasks(2), maml_jax.sgd(0.3, steps=2))
    assert report.exact and "is exact" in str(report)
    assert report["meta-gradient"].error < 1e-8
    assert 1e-9 < report["precision"].error < 1e-3
    assert report["order"].error > 1e-3
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_finds_a_stray_stop_gradient_and_names_the_leaves():
    loss_fn, params = plain_dict()

    def stray(params, batch):
        return loss_fn({**params, "w1": jax.lax.stop_gradient(params["w1"])}, batch)

    report = check_meta_gradient(stray, params, tasks(2), maml_jax.sgd(0.3, steps=1))
    assert {"loss gradient", "meta-gradient"} <= failed(report)
    assert "['w1']" in report["loss gradient"].meaning and "['w2']" not in report["loss gradient"].meaning
    assert "stop_gradient" in report["loss gradient"].meaning


def test_finds_a_wrong_second_derivative_behind_a_right_first_one():
    _, params = plain_dict()

    @jax.custom_jvp
    def tanh(x):
        return jnp.tanh(x)

    @tanh.defjvp
    def _(primals, tangents):
        (x,), (t,) = primals, tangents
        return jnp.tanh(x), jax.lax.stop_gradient(1 - jnp.tanh(x) ** 2) * t

    def detached(params, batch):
        inputs, labels = batch
        logits = tanh(inputs @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), {}

    report = check_meta_gradient(detached, params, tasks(2), maml_jax.sgd(0.3, steps=1))
    assert failed(report) == {"meta-gradient"}
    assert "second derivative" in report["meta-gradient"].meaning


def test_finds_a_derivative_that_rounds_differently():
    """The derivative of a maximum over windows compares the entries with a maximum that is rounded differently.

    This happens if a compiler recomputes the entries.
    """
    _, params = plain_dict()

    @jax.custom_jvp
    def pool(x):
        return x.reshape(*x.shape[:-1], -1, 2).max(-1)

    @pool.defjvp
    def _(primals, tangents):
        (x,), (t,) = primals, tangents
        pairs, slopes = (leaf.reshape(*leaf.shape[:-1], -1, 2) for leaf in (x, t))
        rounded = pairs * (1 + 1e-15)
        largest = rounded.max(-1)
        hits = (pairs == largest[..., None]).astype(t.dtype)
        return largest, (slopes * hits).sum(-1)

    def pooled(params, batch):
        inputs, labels = batch
        hidden = pool(inputs @ params["w1"] + params["b1"])
        logits = hidden @ params["w2"][: hidden.shape[-1]]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), {}

    report = check_meta_gradient(pooled, params, tasks(2), maml_jax.sgd(0.3, steps=1))
    assert {"loss gradient", "meta-gradient"} <= failed(report)


def test_finds_a_value_that_changes_under_differentiation():
    loss_fn, params = plain_dict()

    @jax.custom_jvp
    def inconsistent(x):
        return x

    inconsistent.defjvp(lambda primals, tangents: (primals[0] * 1.001, tangents[0]))

    def loss(params, batch):
        value, aux = loss_fn(params, batch)
        return inconsistent(value), aux

    report = check_meta_gradient(loss, params, tasks(2), maml_jax.sgd(0.3, steps=1))
    assert "value" in failed(report) and "max_pool" in report["value"].meaning


def test_finds_behaviour_that_depends_on_vmap():
    loss_fn, params = plain_dict()

    @jax.custom_batching.custom_vmap
    def scaled(x):
        return x

    @scaled.def_vmap
    def _(axis_size, in_batched, x):
        return x * 1.5, True

    def loss(params, batch):
        return loss_fn(params, (scaled(batch[0]), batch[1]))

    assert "vmap" in failed(check_meta_gradient(loss, params, tasks(2), maml_jax.sgd(0.3, steps=1)))


def test_finds_a_loss_with_side_effects():
    loss_fn, params = plain_dict()
    calls = []

    def loss(params, batch):
        calls.append(None)
        value, aux = loss_fn(params, batch)
        return value * (1 + 0.01 * len(calls)), aux

    assert "jit" in failed(check_meta_gradient(loss, params, tasks(2), maml_jax.sgd(0.3, steps=1)))


def test_first_order_is_an_approximation():
    loss_fn, params = plain_dict()
    report = check_meta_gradient(loss_fn, params, tasks(2), maml_jax.sgd(0.3, steps=2, order=1))
    assert failed(report) == {"meta-gradient"} and "first order" in report["meta-gradient"].meaning


def test_adam_without_eps_root_is_explained():
    loss_fn, params = plain_dict()
    (x, labels), query = tasks(2)
    batch = maml_jax.Task((x.at[..., 0].set(0), labels), query)  # A row of w1 has a gradient of exactly zero.
    report = check_meta_gradient(loss_fn, params, batch, maml_jax.unrolled(optax.adam(0.1), steps=2))
    assert failed(report) == {"finite"} and "eps_root" in report["finite"].meaning and "['w1']" in str(report)
    sound = maml_jax.unrolled(optax.adam(0.1, eps_root=1e-8), steps=2)
    assert check_meta_gradient(loss_fn, params, batch, sound)["finite"].passed


def test_gradients_must_be_finite_at_the_given_parameters():
    """At the given parameters a gradient is exactly zero. A random step away, no gradient is zero."""
    loss_fn, params = plain_dict()
    start = params | {"w2": jnp.zeros_like(params["w2"])}
    report = check_meta_gradient(loss_fn, start, tasks(2), maml_jax.unrolled(optax.adam(0.1), steps=2))
    learner = maml_jax.maml(loss_fn, maml_jax.unrolled(optax.adam(0.1), steps=2), optax.sgd(0.1))
    assert not np.isfinite(learner.step(learner.init(start), tasks(2))[1].grad_norm)
    assert failed(report) == {"finite"} and not report.exact and "exactly zero" in report["finite"].meaning


@pytest.mark.parametrize(
    ("where", "rate", "message"),
    [
        ("support", 0.3, "before any adaptation"),
        ("query", 0.3, "check the query sets"),
        (None, 1e30, "use a smaller inner rate"),
    ],
)
def test_values_that_are_not_finite_are_the_only_finding(where, rate, message):
    def loss_fn(params, batch):
        return jnp.square(batch @ params).mean() ** 2, {}

    batch = maml_jax.Task(*np.random.default_rng(0).standard_normal((2, 2, 4, 3)))
    if where:
        getattr(batch, where)[1, 2, 0] = np.nan  # One value of the second task is NaN.
    report = check_meta_gradient(loss_fn, jnp.ones(3), batch, maml_jax.sgd(rate, steps=6))
    (finding,) = report.findings
    assert not report.exact and finding.name == "finite" and message in finding.meaning


def test_a_gradient_of_zero_is_not_exact():
    loss_fn, params = plain_dict()

    def rounded(params, batch):
        return loss_fn(jax.tree.map(lambda leaf: jnp.round(leaf * 8) / 8, params), batch)

    def detached(params, batch):
        return loss_fn(jax.lax.stop_gradient(params), batch)

    report = check_meta_gradient(rounded, params, tasks(2), maml_jax.sgd(0.3, steps=1))
    assert failed(report) == {"loss gradient", "meta-gradient"} and "rounding" in report["loss gradient"].meaning
    report = check_meta_gradient(loss_fn, params, tasks(2), maml_jax.sgd(0.3, steps=1), query_loss_fn=detached)
    assert failed(report) == {"meta-gradient"} and "query loss" in report["meta-gradient"].meaning


def test_difference_steps_may_leave_the_domain_of_the_loss():
    """The longest steps of the finite differences are below zero, where the logarithm is not defined."""

    def loss_fn(params, batch):
        return jnp.square(jnp.log(params["scale"])).sum() + 0 * batch[0].sum(), {}

    report = check_meta_gradient(loss_fn, {"scale": jnp.array(3e-4)}, tasks(1), maml_jax.sgd(1e-10, steps=1))
    assert report["loss gradient"].passed and report["meta-gradient"].passed


def test_a_task_without_gradient_is_not_a_failure():
    """The hinge loss is zero for all examples of the first task."""

    def hinge(params, batch):
        return jax.nn.relu(batch @ params - 1).mean(), {}

    random = np.random.default_rng(0)
    support = np.stack([-np.ones((4, 3)), random.uniform(1, 2, (4, 3))])
    batch = maml_jax.Task(support, random.uniform(1, 2, (2, 4, 3)))
    report = check_meta_gradient(hinge, jnp.ones(3), batch, maml_jax.sgd(0.01, steps=1))
    assert report.exact, str(report)


def test_finite_is_about_the_precision_of_training(x64_everywhere):
    def large(params, batch):
        return jnp.square(1e30 * (batch @ params)).mean() * 1e-60, {}

    batch = maml_jax.Task(*np.random.default_rng(0).standard_normal((2, 2, 4, 3)))
    assert check_meta_gradient(large, jnp.ones(3), batch, maml_jax.sgd(0.01, steps=1))["finite"].passed
    with jax.enable_x64(False):
        report = check_meta_gradient(large, jnp.ones(3), batch, maml_jax.sgd(0.01, steps=1))
    assert failed(report) == {"finite"} and "in float32" in report["finite"].meaning


def test_leaves_that_the_loss_does_not_use_are_named():
    loss_fn, params = plain_dict()
    report = check_meta_gradient(loss_fn, params | {"spare": jnp.ones(3)}, tasks(2), maml_jax.sgd(0.3, steps=1))
    assert report.exact and "zero in .params['spare']" in report["meta-gradient"].meaning


def test_step_weights_may_be_a_function_of_the_meta_step():
    loss_fn, params = plain_dict()
    weights = maml_plus_plus.multi_step_weights(2, until=10)
    as_numbers, followed = (
        check_meta_gradient(loss_fn, params, tasks(2), maml_jax.sgd(0.3, steps=2), step_weights=given)
        for given in (np.asarray(weights(0)).tolist(), weights)
    )
    assert followed.exact and followed["order"].error == pytest.approx(as_numbers["order"].error)
    with pytest.raises(ValueError, match="step_weights must be 4 finite numbers"):
        check_meta_gradient(loss_fn, params, tasks(2), maml_jax.sgd(0.3, steps=3), step_weights=weights)


def test_zero_biases_and_blank_inputs_are_not_a_failure():
    """Initial biases of zero put a ReLU on its kink for a blank input."""
    net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)])
    batch = tasks(2)
    batch = jax.tree.map(lambda leaf: leaf * (jnp.arange(leaf.shape[1]) > 1)[None, :, None].astype(leaf.dtype)
                         if leaf.ndim == 3 else leaf, batch)  # fmt: skip
    params = drawn_params(net, batch.support[0][0])
    params = {name: {**layer, "bias": jnp.zeros_like(layer["bias"])} for name, layer in params.items()}
    loss_fn = losses.cross_entropy(lambda params, x: net.apply({"params": params}, x))
    report = check_meta_gradient(loss_fn, params, batch, maml_jax.sgd(0.3, steps=1))
    assert report.exact, report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_in_the_model_is_information_and_not_a_failure(dtype):
    net = nn.Sequential([nn.Dense(8, dtype=dtype), nn.tanh, nn.Dense(3, dtype=dtype)])
    batch = tasks(2)
    batch = maml_jax.Task(*((x, x) for x, _ in batch))
    params = drawn_params(net, batch.support[0][0])
    loss_fn = losses.mean_squared_error(lambda params, x: net.apply({"params": params}, x))
    report = check_meta_gradient(loss_fn, params, batch, maml_jax.sgd(0.1, steps=1))
    assert f"computes in {dtype} whatever the type of its inputs" in report["precision"].meaning
    assert report.exact and report["meta-gradient"].limit <= 1e-6, report


def squared_errors(dtype):
    """A loss that computes in `dtype`, whatever the type of its inputs."""

    def loss_fn(params, batch):
        x, w, b = (leaf.astype(dtype) for leaf in (batch, params["w"], params["b"]))
        return jnp.square(jnp.tanh(x @ w + b) - 1).mean().astype(batch.dtype), {}

    return loss_fn


PAIR = {"w": jnp.array([0.5, -1.0]), "b": jnp.array(0.3)}
POINTS = maml_jax.Task(*np.random.default_rng(0).standard_normal((2, 2, 4, 2)))


def test_a_loss_in_bfloat16_is_checked_leaf_by_leaf_in_float64():
    loss_fn = squared_errors(jnp.bfloat16)

    def stray(params, batch):
        return loss_fn({**params, "b": jax.lax.stop_gradient(params["b"])}, batch)

    report = check_meta_gradient(stray, PAIR, POINTS, maml_jax.sgd(0.1, steps=1))
    assert failed(report) == {"loss gradient", "meta-gradient"}
    for name in failed(report):
        assert report[name].limit <= 1e-6 and "['b']" in report[name].meaning and "['w']" not in report[name].meaning


def test_a_cast_of_a_small_part_of_the_loss_keeps_the_limits():
    def mostly_float32(params, batch):
        loss, _ = squared_errors(batch.dtype)(params, batch)
        return loss + 1e-9 * jnp.square(params["b"].astype(jnp.bfloat16)).astype(loss.dtype), {}

    report = check_meta_gradient(mostly_float32, PAIR, POINTS, maml_jax.sgd(0.1, steps=1))
    assert report.exact and "bfloat16" in report["precision"].meaning
    assert all(report[name].limit <= 1e-6 for name in ("loss gradient", "value", "meta-gradient", "jit", "vmap"))


def test_the_limit_follows_an_inner_loop_that_amplifies_rounding():
    """The inner loop is chaotic: it iterates the logistic map, and doubles small changes in every step."""

    def loss_fn(params, batch):
        return (params**2 / 2 - 4 * (params**2 / 2 - params**3 / 3)).sum() * batch.mean(), {}

    def detached(params, batch):
        return loss_fn(0.5 * params + 0.5 * jax.lax.stop_gradient(params), batch)

    batch = maml_jax.Task(jnp.ones((1, 1)), jnp.ones((1, 1)))
    inner = maml_jax.sgd(1.0, steps=20)
    report = check_meta_gradient(loss_fn, jnp.array(0.3), batch, inner)
    assert report.exact and report["meta-gradient"].limit > 1e-6, report
    assert "inner loop amplifies" in report["meta-gradient"].meaning
    report = check_meta_gradient(loss_fn, jnp.array(0.3), batch, inner, query_loss_fn=detached)
    assert failed(report) == {"meta-gradient"}


def test_the_loss_is_checked_as_the_inner_loop_calls_it():
    """With parameters of each inner step, a start, and a loss that takes the step."""

    def loss_fn(given, batch):
        params, step = given
        return squared_errors(batch.dtype)(params, batch)[0] * (1 + step), {}

    def params_at_step(params, step):
        return maml_plus_plus.select_step({"w": False, "b": True})(params, step), step

    def start(params, batch):
        return {**params, "w": 0.5 * params["w"] + batch.mean(0)}

    params = maml_plus_plus.replicate_per_step(PAIR, {"w": False, "b": True}, 2)
    inner = maml_jax.sgd(0.1, steps=2, start=start, params_at_step=params_at_step)
    weights = maml_plus_plus.multi_step_weights(2, until=10)
    assert check_meta_gradient(loss_fn, params, POINTS, inner, step_weights=weights).exact


def test_a_maximum_reduction_fails_where_the_compiler_makes_it_wrong():
    """With vmap and several inner steps, some compilers compute a wrong gradient of a maximum reduction."""

    def reduced(x):
        return x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3]).max((2, 4))

    def loss_with(pool):
        def apply(params, x):
            for kernel in params["kernels"]:
                x = conv(x, kernel, implementation="lax")
                x = (x - x.mean((0, 1, 2))) * jax.lax.rsqrt(x.var((0, 1, 2)) + 1e-3)
                x = pool(jax.nn.relu(x))
            return x.reshape(x.shape[0], -1) @ params["head"]

        return losses.cross_entropy(apply)

    random = np.random.default_rng(0)
    params = {
        "kernels": [jnp.asarray(random.standard_normal((3, 3, inputs, 2)), jnp.float32) for inputs in (1, 2)],
        "head": jnp.asarray(random.standard_normal((18, 3)), jnp.float32),
    }
    labels = jnp.asarray(np.tile(np.arange(3), (2, 1)), jnp.int32)
    images = jnp.asarray(random.standard_normal((2, 2, 3, 12, 12, 1)), jnp.float32)
    batch = maml_jax.Task((images[0], labels), (images[1], labels))
    inner = maml_jax.sgd(0.1, steps=5)
    report = check_meta_gradient(loss_with(reduced), params, batch, inner, directions=2)

    def gradient(pool):
        learner = maml_jax.maml(loss_with(pool), inner, optax.sgd(1.0))
        wide = [jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, tree)
                for tree in (params, batch)]  # fmt: skip
        after, _ = jax.jit(learner.step)(learner.init(wide[0]), wide[1])
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(after.params)])

    with jax.enable_x64(True):
        same = np.allclose(gradient(reduced), gradient(layers.max_pool), rtol=1e-6)
    assert report.exact == same, report


def test_wrong_arguments_raise_errors():
    loss_fn, params = plain_dict()
    with pytest.raises(KeyError):
        check_meta_gradient(loss_fn, params, tasks(1), maml_jax.sgd(0.3, steps=1))["other"]
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        check_meta_gradient(loss_fn, params, tasks(1), maml_jax.no_adaptation())
    with pytest.raises(TypeError, match=r"maml_jax\.sgd"):
        check_meta_gradient(loss_fn, params, tasks(1), optax.sgd(0.1))


def test_first_order_equals_second_for_a_linear_loss():
    def linear(params, batch):
        return jnp.vdot(params["w"], batch), {}

    batch = maml_jax.Task(*jax.random.normal(jax.random.key(0), (2, 3, 4)))
    report = check_meta_gradient(linear, {"w": jnp.ones(4)}, batch, maml_jax.sgd(0.1, steps=2))
    assert report.exact and "equals second" in report["order"].meaning
