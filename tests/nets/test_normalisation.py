"""Tests of normalisations: the statistics come only from the examples that the name says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_zoo import drawn_params

from maml_jax import Task, losses
from maml_jax.nets import models
from maml_jax.nets.normalisation import NEEDS_CONTEXT, Norm

X = np.random.default_rng(0).standard_normal((6, 5, 4, 32)) * 3 + 1
SUPPORT = 4  # The first four of the six examples.


def normalised(kind, x=X, support=None, **params):
    variables = {"params": {"offset": jnp.arange(32.0), **params}}
    return Norm(kind).apply(variables, x, support) - jnp.arange(32.0)


def by(mean, variance):
    return (X - mean) / np.sqrt(variance + 1e-3)


def over(axes, x=X):
    return x.mean(axes, keepdims=True), x.var(axes, keepdims=True)


GROUPS = X.reshape(6, 5, 4, 2, 16)
EXPECTED = {
    "batch": by(*over((0, 1, 2))),
    "support": by(*over((0, 1, 2), X[:SUPPORT])),
    "instance": by(*over((1, 2))),
    "layer": by(*over((1, 2, 3))),
    "group": by(*(leaf.repeat(16, -1).reshape(6, 1, 1, 32) for leaf in over((1, 2, 4), GROUPS))),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_statistics_come_from_the_examples_in_the_name(kind, x64):
    np.testing.assert_allclose(normalised(kind, support=SUPPORT), EXPECTED[kind], rtol=1e-9, atol=1e-12)
    params = Norm(kind).init(jax.random.key(0), X)["params"]
    assert jax.tree.map(jnp.shape, params) == {"offset": (32,)}


def test_tasknorm_mixes_support_and_example_with_a_learned_weight(x64):
    """Equation 7 of Bronskill et al. 2020. Its limits are 'support' and 'instance'."""
    scale, shift = 0.3, -0.7
    share = 1 / (1 + np.exp(-(scale * SUPPORT + shift)))
    (mean_s, var_s), (mean_e, var_e) = over((0, 1, 2), X[:SUPPORT]), over((1, 2))
    mean = share * mean_s + (1 - share) * mean_e
    variance = share * (var_s + (mean_s - mean) ** 2) + (1 - share) * (var_e + (mean_e - mean) ** 2)
    got = normalised("tasknorm", support=SUPPORT, share_scale=scale, share_shift=shift)
    np.testing.assert_allclose(got, by(mean, variance), rtol=1e-9, atol=1e-12)
    for shift, kind in ((40.0, "support"), (-40.0, "instance")):
        got = normalised("tasknorm", support=SUPPORT, share_scale=0.0, share_shift=shift)
        np.testing.assert_allclose(got, EXPECTED[kind], rtol=1e-9, atol=1e-12)


NETS = {
    "strided": lambda kind: (models.ConvNet(3, 16, normalisation=kind), (12, 12, 1)),
    "pooled": lambda kind: (models.ConvNet(3, 16, True, kind), (16, 16, 2)),
    "no convolutions": lambda kind: (models.MLP((16, 16), 3, kind), (6,)),
}


@pytest.mark.parametrize(
    ("net", "kind"),
    [("strided", "batch"), ("strided", "layer"), ("strided", "tasknorm"), ("pooled", "tasknorm"), ("pooled", "batch"),
     ("no convolutions", "support")],
)  # fmt: skip
def test_only_batch_normalisation_is_transductive(net, kind, x64):
    net, shape = NETS[net](kind)
    random = np.random.default_rng(1)
    support, queries = random.standard_normal((3, *shape)), random.standard_normal((4, *shape))
    params = drawn_params(net, queries[:1])
    apply = jax.jit(models.apply_params(net))
    together = apply(params, queries, support)
    alone = jnp.concatenate([apply(params, query[None], support) for query in queries])
    assert np.allclose(together, alone, rtol=1e-9) == (kind != "batch")
    # Predictions depend on the support set only through a normalisation that needs it.
    other = apply(params, queries, support + random.standard_normal(support.shape))
    assert np.allclose(together, other, rtol=1e-9) == (kind not in NEEDS_CONTEXT)
    # The support set itself is normalised as in the inner loop.
    np.testing.assert_allclose(apply(params, support, support), apply(params, support), rtol=1e-9)


def test_query_with_support_passes_the_support_set_to_the_net(x64):
    net, shape = NETS["no convolutions"]("support")
    random = np.random.default_rng(2)
    task = Task(
        (random.standard_normal((3, *shape)), jnp.arange(3)),
        (random.standard_normal((4, *shape)), jnp.array([0, 1, 2, 0])),
    )
    params = drawn_params(net, task.query[0])
    apply = models.apply_params(net)
    logits = apply(params, task.query[0], task.support[0])
    query = losses.query_with_support(task).query
    for loss_fn in (losses.cross_entropy(apply), losses.cross_entropy(losses.inductive(apply))):
        loss = jax.jit(loss_fn)(params, query)[0]
        np.testing.assert_allclose(loss, -jax.nn.log_softmax(logits)[jnp.arange(4), task.query[1]].mean(), rtol=1e-9)
    assert abs(losses.cross_entropy(apply)(params, task.query)[0] - loss) > 1e-6


def test_groups_that_do_not_divide_the_channels_raise():
    with pytest.raises(ValueError, match="groups of 16 channels, but 24 channels are not a multiple"):
        Norm("group").init(jax.random.key(0), jnp.zeros((2, 3, 24)))
