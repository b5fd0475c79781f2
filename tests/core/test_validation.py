"""Arguments that are not allowed raise an error before anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.model_zoo import plain_dict, tasks
from jax.sharding import PartitionSpec as P

import maml_jax
from maml_jax import Task, losses
from maml_jax.algorithms import heads


@pytest.mark.parametrize("rate", [0, -0.1, float("nan"), float("inf"), "fast", None])
def test_learning_rates(rate):
    with pytest.raises(ValueError, match="learning_rate must be"):
        maml_jax.sgd(rate, steps=1)


def test_traced_learning_rates_pass():
    loss_fn, params = plain_dict()
    batch = jax.tree.map(lambda leaf: leaf[0], tasks(1)).support

    @jax.jit
    def final(rate):
        return maml_jax.adapt(loss_fn, params, batch, learning_rate=rate, steps=2)[1].loss[-1]

    assert final(0.3) < final(0.01)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, None])
def test_steps(steps):
    with pytest.raises(ValueError, match=f"steps must be an integer of at least 1, but got {steps}"):
        maml_jax.sgd(0.1, steps=steps)


@pytest.mark.parametrize("order", [0, 3, True, "second"])
def test_order(order):
    with pytest.raises(ValueError, match="order must be one of 1, 2, but got"):
        maml_jax.sgd(0.1, steps=1, order=order)


def learner(loss_fn, **options):
    return maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), optax.sgd(0.1), **options)


def test_inner_learners():
    with pytest.raises(TypeError, match=r"maml_jax\.sgd"):
        maml_jax.maml(plain_dict()[0], optax.sgd(0.1), optax.sgd(0.1))
    with pytest.raises(TypeError, match="optax transformation"):
        maml_jax.unrolled(0.1, steps=1)


@pytest.mark.parametrize("weights", [(1.0,), (0, 0), (1, -1), (1, float("nan")), "ab", 1.0])
def test_step_weights(weights):
    with pytest.raises(ValueError, match="step_weights must be 2 "):
        learner(plain_dict()[0], step_weights=weights)


def test_step_weights_from_a_function():
    weighted = learner(plain_dict()[0], step_weights=lambda step: jnp.ones(4) / 4)
    with pytest.raises(ValueError, match=r"step_weights must be 2 weights.*but has the shape \(4,\)"):
        jax.jit(weighted.step)(weighted.init(plain_dict()[1]), tasks(1))


def vector_loss(params, batch):
    return jnp.ones(3), {}


def no_aux(params, batch):
    return jnp.float32(1)


def aux_first(params, batch):
    return {}, jnp.float32(1)


def integer_loss(params, batch):
    return jnp.int32(1), {}


@pytest.mark.parametrize(
    ("loss_fn", "error", "words"),
    [
        (vector_loss, ValueError, ("vector_loss", "shape (3,)", "loss.mean()")),
        (no_aux, TypeError, ("no_aux", "pair (scalar loss, aux)", "return loss, {}")),
        (aux_first, TypeError, ("aux_first", "first")),
        (integer_loss, ValueError, ("integer_loss", "int32")),
    ],
)
def test_losses(loss_fn, error, words):
    params = plain_dict()[1]
    for call in (
        lambda: learner(loss_fn).step(learner(loss_fn).init(params), tasks(2)),
        lambda: learner(loss_fn).evaluate(learner(loss_fn).init(params), tasks(2)),
        lambda: maml_jax.adapt(loss_fn, params, tasks(2).support, learning_rate=0.1, steps=1),
    ):
        with pytest.raises(error) as caught:
            call()
        assert all(word in str(caught.value) for word in words)


def test_the_leading_axis_of_tasks():
    loss_fn, params = plain_dict()
    state = learner(loss_fn).init(params)
    good = tasks(4)
    bad = Task(good.support, (good.query[0], good.query[1][:3]))
    for call in (learner(loss_fn).step, learner(loss_fn).evaluate, jax.jit(learner(loss_fn).step)):
        with pytest.raises(ValueError, match=r"tasks\.support\[0\].*\(4, 6, 3\).*tasks\.query\[1\].*\(3, 5\)"):
            call(state, bad)
    with pytest.raises(ValueError, match=r"tasks\.query is a scalar"):
        learner(loss_fn).step(state, Task(good.support, 1.0))
    with pytest.raises(ValueError, match="at least one task"):
        learner(loss_fn).step(state, jax.tree.map(lambda leaf: leaf[:0], good))
    with pytest.raises(TypeError, match="Task"):
        learner(loss_fn).step(state, good.support)


def test_params():
    loss_fn, _ = plain_dict()
    with pytest.raises(TypeError, match=r"params\['count'\].*int32"):
        learner(loss_fn).init({"w": jnp.ones(3), "count": jnp.zeros(2, jnp.int32)})
    with pytest.raises(ValueError, match="params must hold at least one array, but holds none"):
        learner(loss_fn).init({})
    with pytest.raises(TypeError, match=r"params\['w'\] is a Python number: use jnp\.asarray\(0\.5\)"):
        learner(loss_fn).init({"w": 0.5})
    with pytest.raises(ValueError, match="The parameters have no head 'head', only 'w1', "):
        maml_jax.inner.inner_loop(
            maml_jax.sgd(0.1, steps=1, start=heads.shared()), loss_fn, plain_dict()[1], (), tasks(1).support
        )


def test_targets():
    apply = lambda params, x: x * params  # noqa: E731
    squares, classes = losses.mean_squared_error(apply), losses.cross_entropy(apply)
    with pytest.raises(ValueError, match=r"have the shape of the outputs, \(4, 1\), .* but have \(4,\)"):
        squares(1.0, (jnp.ones((4, 1)), jnp.ones(4)))
    for labels, given in (
        (jnp.zeros((4, 1), int), r"int.* of shape \(4, 1\)"),
        (jnp.zeros(4), r"float.* of shape \(4,\)"),
    ):
        for loss_fn in (classes, losses.log_probabilities(apply)):
            message = rf"labels must be integers \[B, ...\], .*but are {given} for logits of shape \(4, 3\)"
            with pytest.raises(ValueError, match=message):
                loss_fn(1.0, (jnp.ones((4, 3)), labels))


def test_masks():
    loss_fn, params = plain_dict()
    for mask, message in (
        (lambda p: jax.tree.map(lambda _: False, p), "nothing to adapt"),
        ({"w1": True}, "structure of the parameters"),
    ):
        inner = maml_jax.sgd(0.1, steps=1, trainable=mask)
        with pytest.raises(ValueError, match=message):
            maml_jax.maml(loss_fn, inner, optax.sgd(0.1)).init(params)
    rest = {"b1": True, "w2": True, "b2": True}
    for mask, message in (
        ("w2", r"the value at \['b1'\] is 'w2'"),
        ({"w1": "frozen", **rest}, r"the value at \['w1'\] is 'frozen'"),
        ({"w1": 0.0, **rest}, r"the value at \['w1'\] is 0\.0"),
        ({"w1": np.zeros((2, 2), bool), **rest}, r"True or False for each array .*at \['w1'\]"),
    ):
        with pytest.raises(TypeError, match=message):
            maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1, trainable=mask), optax.sgd(0.1)).init(params)
    mask = {"w1": np.bool_(False), **rest, "b2": jnp.array(True)}
    adapted = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1, trainable=mask), optax.sgd(0.1))
    batch = jax.tree.map(lambda leaf: leaf[0], tasks(1).support)
    moved, _ = adapted.adapt(adapted.init(params), batch)
    assert (moved["w1"] == params["w1"]).all() and (moved["w2"] != params["w2"]).any()


def test_outer_optimizers():
    with pytest.raises(TypeError, match=r"outer must be an optax transformation.*0.001"):
        maml_jax.maml(plain_dict()[0], maml_jax.sgd(0.1, steps=1), 1e-3)


def test_evaluation_steps():
    loss_fn, params = plain_dict()
    with pytest.raises(ValueError, match="steps must be an integer of at least 0, but got -1"):
        learner(loss_fn).evaluate(learner(loss_fn).init(params), tasks(2), -1)
    with pytest.raises(ValueError, match="static_argnums"):
        jax.jit(learner(loss_fn).evaluate)(learner(loss_fn).init(params), tasks(2), 3)


def test_complex_parameters():
    with pytest.raises(TypeError, match=r"params\['w'\].*complex64.*as two real parameters"):
        learner(plain_dict()[0]).init({"w": jnp.ones(3, jnp.complex64)})


def test_an_error_of_the_loss_names_the_shapes_of_its_batch():
    def loss_fn(params, batch):
        return (batch[0] @ params).sum(), {}

    with pytest.raises(TypeError) as caught:
        maml_jax.adapt(loss_fn, jnp.ones(4), (jnp.ones((5, 3)), 1), learning_rate=0.1, steps=1)
    note = " ".join(caught.value.__notes__)
    assert "loss_fn was called for one task" in note and "float32[5, 3]" in note and "adapt takes has none" in note


def test_a_checked_shard_map_is_refused():
    """With `check_vma`, the gradient in shared parameters would be summed over the devices."""
    loss_fn, params = plain_dict()
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = learner(loss_fn)

    def evaluate(check_vma):
        return jax.shard_map(
            lambda params, tasks: mapped.evaluate(mapped.init(params), tasks).loss,
            mesh=mesh, in_specs=(P(), P("devices")), out_specs=P("devices"), check_vma=check_vma,
        )(params, tasks(4))  # fmt: skip

    with pytest.raises(ValueError, match="check_vma=True, which sums the inner gradients"):
        evaluate(True)
    np.testing.assert_allclose(evaluate(False), mapped.evaluate(mapped.init(params), tasks(4)).loss, rtol=1e-5)
