"""`check_meta_gradient` finds what is wrong, and says where."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from model_zoo import plain_dict, tasks

import maml_jax
from maml_jax import check_meta_gradient


def failed(report):
    return {finding.name for finding in report.findings if not finding.passed}


def test_passes_a_sound_loss_in_float32_and_says_so():
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


def test_finds_a_program_that_disagrees_with_itself():
    """A maximum over windows whose derivative asks for the bits of the maximum, after another rounding.

    What a compiler does when it computes the entries a second time, done by hand: the forward pass
    selects and the derivative compares with values that are a rounding away.
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


def test_finds_a_loss_that_remembers_its_calls():
    loss_fn, params = plain_dict()
    calls = []

    def loss(params, batch):
        calls.append(None)
        value, aux = loss_fn(params, batch)
        return value * (1 + 0.01 * len(calls)), aux

    assert "jit" in failed(check_meta_gradient(loss, params, tasks(2), maml_jax.sgd(0.3, steps=1)))


def test_calls_first_order_an_approximation():
    loss_fn, params = plain_dict()
    report = check_meta_gradient(loss_fn, params, tasks(2), maml_jax.sgd(0.3, steps=2, order=1))
    assert failed(report) == {"meta-gradient"} and "first order" in report["meta-gradient"].meaning


def test_explains_the_square_root_of_adam():
    loss_fn, params = plain_dict()
    zeros = jax.tree.map(jnp.zeros_like, params)  # Most gradients are exactly zero here.
    report = check_meta_gradient(loss_fn, zeros, tasks(2), maml_jax.unrolled(optax.adam(0.1), steps=2))
    assert "meta-gradient" in failed(report) and "eps_root" in report["meta-gradient"].meaning
    sound = maml_jax.unrolled(optax.adam(0.1, eps_root=1e-8), steps=2)
    assert np.isfinite(check_meta_gradient(loss_fn, zeros, tasks(2), sound)["meta-gradient"].error)


def test_says_when_a_loss_computes_in_float32():
    loss_fn, params = plain_dict()

    def casting(params, batch):
        loss, aux = loss_fn(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), batch)
        return loss.astype(jnp.float32), aux

    report = check_meta_gradient(casting, params, tasks(2), maml_jax.sgd(0.3, steps=1))
    assert "float32 whatever it is given" in report["precision"].meaning
    assert report.exact, report


def test_tells_that_second_order_vanishes_for_a_linear_loss():
    def linear(params, batch):
        return jnp.vdot(params["w"], batch), {}

    batch = maml_jax.Task(*jax.random.normal(jax.random.key(0), (2, 3, 4)))
    report = check_meta_gradient(linear, {"w": jnp.ones(4)}, batch, maml_jax.sgd(0.1, steps=2))
    assert report.exact and "equals second" in report["order"].meaning
