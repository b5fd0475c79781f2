"""Clipped inner gradients: the updates of optax, and derivatives that are finite at zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.model_zoo import plain_dict, tasks

import maml_jax


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 50.0])
def test_updates_are_those_of_optax(max_norm):
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
    ours, theirs = (
        clip(max_norm).update(grads, clip(max_norm).init(grads))[0]
        for clip in (maml_jax.clip_by_global_norm, optax.clip_by_global_norm)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_the_meta_gradient_behind_a_head_of_zeros_is_that_without_clipping():
    """The first layer's first inner gradient is zero everywhere."""
    loss_fn, params = plain_dict()
    params = params | {"w2": jnp.zeros_like(params["w2"])}

    def meta_gradient(*clip):
        only_first = {name: name in ("w1", "b1") for name in params}
        inner = maml_jax.unrolled(optax.chain(*clip, optax.sgd(0.1)), steps=2, trainable=only_first)
        learner = maml_jax.maml(loss_fn, inner, optax.sgd(1.0))
        state = learner.init(params)
        return jax.tree.map(jnp.subtract, params, jax.jit(learner.step)(state, tasks(2))[0].params)

    expected = meta_gradient()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        meta_gradient(maml_jax.clip_by_global_norm(1e6)),
        expected,
    )
    theirs = meta_gradient(optax.clip_by_global_norm(1e6))
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(theirs))
