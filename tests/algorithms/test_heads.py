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

pytestmark = pytest.mark.usefixtures("x64")


HEADS = {"shared": heads.shared(), "prototypes": heads.prototypes(features)}


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


def test_parameters_without_the_head_raise_errors():
    support = (jnp.ones((2, 3)), jnp.arange(2))
    with pytest.raises(ValueError, match="have no head 'head', only 'last'"):
        heads.shared()({"last": jnp.ones(2)}, support)
    with pytest.raises(ValueError, match="must be a mapping with the head at 'head', but they are a list"):
        heads.shared()([jnp.ones(2)], support)
