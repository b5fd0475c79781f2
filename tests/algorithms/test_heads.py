"""Tests of heads that do not depend on the numbering of the classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.algorithm_cases import LOSS, NET, STEPS, assert_close, assert_exact_meta_gradient, features, start_params
from helpers.model_zoo import WAYS, tasks

import maml_jax
from maml_jax.algorithms import heads
from maml_jax.inner import inner_loop

pytestmark = pytest.mark.usefixtures("x64")


HEADS = {"shared": heads.shared(), "zero": heads.zero(), "prototypes": heads.prototypes(features)}


def sgd(name, order=2):
    return maml_jax.sgd(0.3, steps=STEPS, order=order, start=HEADS[name])


@pytest.mark.parametrize("name", HEADS)
def test_exact_meta_gradient(name):
    assert_exact_meta_gradient(lambda order: sgd(name, order), start_params())


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_does_not_depend_on_the_numbering_of_the_classes(name):
    params, (support, query) = start_params(), jax.tree.map(lambda leaf: leaf[0], tasks(1, shots=2 * WAYS, queries=9))
    support = (support[0], jnp.tile(jnp.arange(WAYS), 2))
    renumbered = jnp.array([2, 0, 3, 1])

    def loss_after(inner, numbering):
        learner = maml_jax.maml(LOSS, inner, optax.sgd(1.0))
        adapted, _ = learner.adapt(learner.init(params), (support[0], numbering[support[1]]))
        return LOSS(adapted, (query[0], numbering[query[1]]))[0]

    same = jnp.arange(WAYS)
    np.testing.assert_allclose(loss_after(sgd(name), renumbered), loss_after(sgd(name), same), rtol=1e-12)
    plain = maml_jax.sgd(0.3, steps=STEPS)
    assert abs(loss_after(plain, renumbered) / loss_after(plain, same) - 1) > 1e-3


def test_prototypes_predict_like_a_prototypical_network():
    params, task = start_params(), jax.tree.map(lambda leaf: leaf[0], tasks(1))
    support = (task.support[0], jnp.array([0, 1, 2, 3, 0, 1]))
    initial = heads.prototypes(features)(params, support)
    support_features, query_features = features(params, support[0]), features(params, task.query[0])
    means = jnp.stack([support_features[support[1] == way].mean(0) for way in range(WAYS)])
    distances = jnp.square(query_features[:, None] - means).sum(-1)
    logits = NET.apply({"params": initial}, task.query[0])
    assert_close(jax.nn.log_softmax(logits), jax.nn.log_softmax(-distances))


def test_a_head_of_zeros_predicts_as_a_shared_head():
    params, (support, query) = start_params(), jax.tree.map(lambda leaf: leaf[0], tasks(1))
    assert not heads.zero()(params, support)["head"]["kernel"].any()

    def predictions(name):
        learner = maml_jax.maml(LOSS, sgd(name), optax.sgd(1.0))
        adapted, _ = learner.adapt(learner.init(params), support)
        return jax.nn.log_softmax(NET.apply({"params": adapted}, query[0]))

    assert_close(predictions("zero"), predictions("shared"))
    assert predictions("zero").std() > 1e-2


@pytest.mark.parametrize("learn_rates", [False, True])
def test_exact_meta_gradient_with_head_rates(learn_rates):
    assert_exact_meta_gradient(
        lambda order: heads.sgd_with_head_rates(
            0.3, [2.0, 1.0], steps=STEPS, learn_rates=learn_rates, order=order, start=heads.zero()
        ),
        start_params(),
    )


@pytest.mark.parametrize("learn_rates", [False, True])
def test_the_head_has_rates_of_its_own(learn_rates):
    """The last rate is for all later steps, also beyond those of training; all rates are scaled."""
    inner = heads.sgd_with_head_rates(0.3, [2.0, 1.0], steps=3, learn_rates=learn_rates, scale=10.0)
    params = {"body": jnp.zeros(2), "head": {"kernel": jnp.zeros(2), "bias": jnp.zeros(1)}}
    rates = inner.init_inner_params(params)
    assert bool(jax.tree.leaves(rates)) is learn_rates

    def linear(params, batch):
        return sum(leaf.sum() for leaf in jax.tree.leaves(params)), {}

    for steps, (body, head) in {1: (3, 20), 2: (6, 30), 5: (15, 60)}.items():
        adapted, _ = inner_loop(inner, linear, params, rates, None, steps=steps)
        expected = {"body": jnp.full(2, -body), "head": {"kernel": jnp.full(2, -head), "bias": jnp.full(1, -head)}}
        assert_close(adapted, expected)


def test_head_rates_are_learned_in_their_logarithms():
    inner = heads.sgd_with_head_rates(0.3, [2.0], steps=1, learn_rates=True)
    params = {"body": jnp.zeros(()), "head": jnp.zeros(())}

    def adapted(rates):
        return inner_loop(inner, lambda params, _: (params["body"] + params["head"], {}), params, rates, None)[0][
            "head"
        ]

    slopes = jax.grad(adapted)(inner.init_inner_params(params))
    assert_close(slopes, {"body": jnp.zeros(1), "head": jnp.full(1, -2.0)})  # The derivative of -exp(log 2).


@pytest.mark.parametrize(
    "rates, message",
    [
        ([], "must be 1 to 2 rates, one for each inner step, but got 0"),
        ([1.0, 1.0, 1.0], "must be 1 to 2 rates, one for each inner step, but got 3"),
        ([1.0, -1.0], "head_rates must be positive and finite, but got -1"),
    ],
)
def test_wrong_head_rates_are_refused(rates, message):
    with pytest.raises(ValueError, match=message):
        heads.sgd_with_head_rates(0.3, rates, steps=2)


def test_parameters_without_the_head_raise_errors():
    support = (jnp.ones((2, 3)), jnp.arange(2))
    with pytest.raises(ValueError, match="have no head 'head', only 'last'"):
        heads.shared()({"last": jnp.ones(2)}, support)
    with pytest.raises(ValueError, match="must be a mapping with the head at 'head', but they are a list"):
        heads.shared()([jnp.ones(2)], support)


def test_prototypes_with_weights_and_without_a_bias():
    params = {"head": {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}}
    inputs, labels = jnp.array([[1.0], [3.0], [5.0], [jnp.nan]]), jnp.array([0, 0, 1, 1])
    start = heads.prototypes(lambda params, inputs: inputs)
    assert_close(start(params, (inputs, labels, jnp.array([1, 1, 0.5, 0]))), start(params, (inputs[:3], labels[:3])))
    with pytest.raises(ValueError, match="head 'head' has no bias, only 'kernel'"):
        start({"head": {"kernel": jnp.zeros((1, 2))}}, (inputs, labels))


@pytest.mark.parametrize("learn_rates", [True, False])
def test_rates_for_a_head_of_another_name_raise(learn_rates):
    inner = heads.sgd_with_head_rates(0.1, [1.0], steps=2, learn_rates=learn_rates, name="haed")
    learner = maml_jax.maml(LOSS, inner, optax.sgd(1.0))
    with pytest.raises(ValueError, match="have no head 'haed', only"):
        learner.step(learner.init(start_params()), tasks(1))
