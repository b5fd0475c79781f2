"""A small classifier, written with each supported model library and with plain JAX, as `(loss_fn, params)`."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maml_jax import Task, losses

INPUTS, HIDDEN, WAYS = 3, 8, 4


def drawn_params(net: nn.Module, *inputs):
    """Random parameters for a linen network. NumPy draws them from a normal distribution, scaled by the fan-in.

    This is faster than `net.init`, which compiles a program for every leaf.
    """
    random = np.random.default_rng(0)

    def draw(leaf):
        size = 0.1 if leaf.ndim < 2 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(size * random.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"])


def linen():
    net = nn.Sequential([nn.Dense(HIDDEN), nn.tanh, nn.Dense(WAYS)])
    params = drawn_params(net, jnp.zeros((1, INPUTS)))
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
    random = np.random.default_rng(0)
    shapes = {"w1": (INPUTS, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, WAYS), "b2": (WAYS,)}
    params = {
        name: jnp.asarray(random.standard_normal(shape) if len(shape) == 2 else np.zeros(shape), jnp.float32)
        for name, shape in shapes.items()
    }

    def apply(params, x):
        return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]

    return losses.cross_entropy(apply), params


def widened(build):
    """Converts the parameters of `build()` to float64 if x64 is enabled. linen and nnx always create float32."""

    def built():
        loss_fn, params = build()
        return loss_fn, jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), params)

    return built


ZOO = {name: widened(b) for name, b in dict(linen=linen, nnx=nnx_split, equinox=equinox, dict=plain_dict).items()}


def tasks(count: int, shots: int = 6, queries: int = 5, seed: int = 1) -> Task:
    """Tasks with random inputs and random labels, for tests of gradients."""
    random = np.random.default_rng(seed)

    def batch(size):
        x = jnp.asarray(random.standard_normal((count, size, INPUTS)), float)
        return x, jnp.asarray(random.integers(0, WAYS, (count, size)), jnp.int32)

    return Task(batch(shots), batch(queries))
