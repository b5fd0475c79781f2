"""The same small classifier written with each library that users come with, as `(loss_fn, params)`."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from maml_jax import Task, losses

INPUTS, HIDDEN, WAYS = 3, 8, 4


def linen():
    net = nn.Sequential([nn.Dense(HIDDEN), nn.tanh, nn.Dense(WAYS)])
    params = net.init(jax.random.key(0), jnp.zeros((1, INPUTS)))["params"]
    return losses.cross_entropy(lambda params, x: net.apply({"params": params}, x)), params


def nnx_split():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(INPUTS, HIDDEN, rngs=rngs)
            self.out = nnx.Linear(HIDDEN, WAYS, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    return losses.cross_entropy(lambda params, x: nnx.merge(graph, params, rest)(x)), params


def equinox():
    net = eqx.nn.MLP(INPUTS, WAYS, HIDDEN, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)
    return losses.cross_entropy(lambda params, x: jax.vmap(eqx.combine(params, static))(x)), params


def plain_dict():
    keys = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(keys[0], (INPUTS, HIDDEN)),
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(keys[1], (HIDDEN, WAYS)),
        "b2": jnp.zeros(WAYS),
    }

    def apply(params, x):
        return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]

    return losses.cross_entropy(apply), params


def widened(build):
    """With parameters in float64 where that is enabled: linen and nnx make float32 all the same."""

    def built():
        loss_fn, params = build()
        return loss_fn, jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), params)

    return built


ZOO = {name: widened(b) for name, b in dict(linen=linen, nnx=nnx_split, equinox=equinox, dict=plain_dict).items()}


def tasks(count: int, shots: int = 6, queries: int = 5, seed: int = 1) -> Task:
    """Random inputs and labels: what a classifier makes of them is beside the point of a gradient test."""
    keys = jax.random.split(jax.random.key(seed), 4)

    def batch(x_key, y_key, size):
        x = jax.random.normal(x_key, (count, size, INPUTS))
        return x, jax.random.randint(y_key, (count, size), 0, WAYS)

    return Task(batch(*keys[:2], shots), batch(*keys[2:], queries))
