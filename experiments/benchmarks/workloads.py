"""The workloads of the benchmark: the paper's settings and a small transformer, on random data."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import Task, losses
from maml_jax.nets import models
from maml_jax.nets.convolution import ImplementationName
from maml_jax.types import LossFn, Params

WorkloadName = Literal[
    "sinusoid",
    "omniglot-5w1s",
    "omniglot-5w5s",
    "omniglot-20w1s",
    "omniglot-20w5s",
    "miniimagenet-5w1s",
    "miniimagenet-5w5s",
    "transformer",
]
WORKLOADS: tuple[WorkloadName, ...] = get_args(WorkloadName)

SMALL: tuple[WorkloadName, ...] = ("sinusoid",)
"""Workloads with small nets, which one thread computes fastest."""


class Images(NamedTuple):
    """A few-shot setting of the paper (appendix A.1): sizes, and the inner loop in training."""

    ways: int
    shots: int
    queries: int
    tasks: int
    inner_steps: int
    inner_rate: float
    size: int
    channels: int
    filters: int
    pooled: bool


IMAGES = {
    "omniglot-5w1s": Images(5, 1, 1, 32, 1, 2.0, 28, 1, 64, False),
    "omniglot-5w5s": Images(5, 5, 5, 32, 1, 2.0, 28, 1, 64, False),
    "omniglot-20w1s": Images(20, 1, 1, 16, 5, 2.0, 28, 1, 64, False),
    "omniglot-20w5s": Images(20, 5, 5, 16, 5, 2.0, 28, 1, 64, False),
    "miniimagenet-5w1s": Images(5, 1, 15, 4, 5, 0.05, 84, 3, 32, True),
    "miniimagenet-5w5s": Images(5, 5, 15, 4, 5, 0.05, 84, 3, 32, True),
}


class Workload(NamedTuple):
    """A model, its loss, and a meta-batch."""

    loss_fn: LossFn
    init: Callable[[], Params]
    tasks: Task
    inner_rate: float
    inner_steps: int
    trainable: Any


class Transformer(nn.Module):
    """A decoder of two blocks on sequences of tokens, `[B, L] -> logits [B, L, tokens]`."""

    tokens: int = 64
    width: int = 128
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        x = nn.Embed(self.tokens, self.width)(tokens) + positions
        for _ in range(2):
            attention = nn.MultiHeadDotProductAttention(self.heads)
            x = x + attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.tokens)(nn.LayerNorm()(x))


def build(name: str, dtype: str = "float32", implementation: ImplementationName | None = None) -> Workload:
    """Builds a workload with inputs and parameters of type `dtype`."""
    random = np.random.default_rng(0)

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else None), tree)

    if name == "sinusoid":
        net: nn.Module = models.MLP((40, 40), 1)

        def points() -> Any:
            return random.uniform(-5, 5, (25, 10, 1)), random.standard_normal((25, 10, 1))

        tasks, rate, steps, loss = Task(points(), points()), 0.01, 1, losses.mean_squared_error
        trainable = None
    elif name == "transformer":
        net = Transformer()

        def texts() -> Any:
            text = random.integers(0, 64, (4, 8, 65)).astype(np.int32)
            return text[..., :-1], text[..., 1:]

        tasks, rate, steps, loss = Task(texts(), texts()), 0.1, 5, losses.cross_entropy
        trainable = None
    else:
        setting = IMAGES[name]
        net = models.ConvNet(setting.ways, setting.filters, setting.pooled, implementation=implementation)

        def images(per_class: int) -> Any:
            labels = np.tile(np.arange(setting.ways, dtype=np.int32).repeat(per_class), (setting.tasks, 1))
            return random.random((*labels.shape, setting.size, setting.size, setting.channels)), labels

        tasks, rate, steps = (
            Task(images(setting.shots), images(setting.queries)),
            setting.inner_rate,
            setting.inner_steps,
        )
        loss, trainable = losses.cross_entropy, models.all_but_norms

    tasks = cast(tasks)
    example = tasks.support[0][0]

    def init() -> Params:
        return cast(jax.jit(net.init)(jax.random.key(0), example)["params"])

    return Workload(loss(models.apply_params(net)), init, tasks, rate, steps, trainable)
