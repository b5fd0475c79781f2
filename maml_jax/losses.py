"""Losses of the paper's supervised tasks, for a model given as `apply(params, inputs) -> outputs`.

Both are MEANS over the batch. The paper's code takes its classification loss as a sum over the N*K
examples divided by K, N times this mean, and states its inner rates in those units:
`rate_for_mean_loss` converts them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maml_jax.types import Batch, LossFn, Params, Task

Apply = Callable[..., jax.Array]
"""`(params, inputs) -> outputs`, or `(params, inputs, context) -> outputs` for batches that are `QueryWithSupport`."""


class QueryWithSupport(NamedTuple):
    """A batch that is seen beside another, as queries beside the support set: what some normalisations need."""

    inputs: jax.Array
    """`[B, ...]`"""
    targets: jax.Array
    """`[B, ...]`"""
    context: jax.Array
    """`[B', ...]`: the inputs of the other."""


def query_with_support(tasks: Task) -> Task:
    """A task, or a batch of tasks, whose queries are seen beside the support set."""
    inputs, targets = tasks.query
    return tasks._replace(query=QueryWithSupport(inputs, targets, tasks.support[0]))


def mean_squared_error(apply: Apply) -> LossFn:
    """Regression loss (paper, equation 2, as a mean). Batches are `(inputs [B, ...], targets [B, D])`; aux is `{}`.

    Raises (when called):
      ValueError: for targets of another shape than the outputs, which broadcasting would set against each other.
    """

    def loss_fn(params: Params, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        inputs, targets, *context = batch
        outputs = apply(params, inputs, *context)
        if jnp.shape(outputs) != jnp.shape(targets):
            raise ValueError(
                f"The targets must have the shape of the outputs, {jnp.shape(outputs)}, but have {jnp.shape(targets)}."
            )
        return jnp.mean(jnp.square(outputs - targets)), {}

    return loss_fn


def cross_entropy(apply: Apply) -> LossFn:
    """Mean softmax cross-entropy (paper, equation 3, over B).

    Batches are `(inputs [B, ...], labels [B] of integers)`; `apply` returns logits `[B, N]`. Aux is
    `{"accuracy": fraction of the batch that is classified right}`. Labels are from 0 to N - 1: what is outside gives
    NaN or, below, another class, as no compiled program can raise an error for it.

    Raises (when called):
      ValueError: for labels that are no integers, or not one for each row of logits.
    """

    def loss_fn(params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        inputs, labels, *context = batch
        logits = apply(params, inputs, *context)
        loss = _mean_cross_entropy(logits, labels)
        return loss, {"accuracy": jnp.mean((jnp.argmax(logits, -1) == labels).astype(logits.dtype))}

    return loss_fn


def log_probabilities(apply: Apply) -> LossFn:
    """`cross_entropy`, with the log probabilities `[B, N]` as aux: for evaluation."""

    def loss_fn(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        inputs, labels, *context = batch
        logits = apply(params, inputs, *context)
        return _mean_cross_entropy(logits, labels), jax.nn.log_softmax(logits)

    return loss_fn


def _mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    rows = jnp.shape(logits)[:-1]
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer) or jnp.shape(labels) != rows:
        raise ValueError(
            f"The labels must be integers of shape {rows}, one for each row of logits {jnp.shape(logits)}, but are "
            f"{jnp.result_type(labels)} of shape {jnp.shape(labels)}."
        )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def inductive(apply: Apply) -> Apply:
    """The same model, given each of its inputs alone, or alone beside the context.

    Where a model normalises with the statistics of the batch at hand, examples of one batch see each
    other; this shows what is left of the accuracy when they do not (Bronskill et al. 2020, table 1).
    """

    def alone(params: Params, inputs: jax.Array, *context: jax.Array) -> jax.Array:
        return jax.vmap(lambda single: apply(params, single[None], *context)[0])(inputs)

    return alone


def rate_for_mean_loss(rate: float, ways: int) -> float:
    """The inner rate for a MEAN cross-entropy that equals `rate` in the paper's code.

    The code divides the sum over N*K examples by K, which makes its loss and gradients `ways` times
    those of the mean: .4 there is 2.0 here for 5 ways.
    """
    return rate * ways
