"""Losses of the MAML paper's supervised tasks, for a model given as `apply(params, inputs) -> outputs`.

Mean squared error and cross-entropy are means over the batch. A batch may have a third part, the weights `[B]` of its
examples. The losses are then weighted means, and an example of weight 0 does not count in the loss. An example of
weight 0 would still enter the statistics of a batch normalisation. To pad tasks of unequal size, use a normalisation of
each example alone, such as 'layer'. Weights for a network of `maml_jax.nets` with another normalisation are refused.

The paper's code divides the sum of the cross-entropy over N * K examples by K, so its loss is N times the mean.
`rate_for_mean_loss` converts the inner learning rates of the paper's code.

The paper is Finn, Abbeel and Levine 2017, Model-agnostic meta-learning, arXiv:1703.03400.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maml_jax.types import Batch, LossFn, Params, Task

Apply = Callable[..., jax.Array]
"""`(params, inputs) -> outputs`, or `(params, inputs, context) -> outputs` for a `QueryWithSupport` as batch. If it has
an attribute `mixes_examples` that is True, the outputs for an example depend on the other examples of the batch."""


ONE_TASK = (
    "The loss is called for one task: a meta-batch has a leading axis of tasks, also if it holds a single task, and "
    "adapt takes the support set of one task, without this axis."
)


class QueryWithSupport(NamedTuple):
    """A query set and the inputs of the support set. Some normalisations need both."""

    inputs: jax.Array
    """`[B, ...]`: inputs of the query set."""
    targets: jax.Array
    """`[B, ...]`: targets of the query set."""
    context: jax.Array
    """`[B', ...]`: inputs of the support set."""


def query_with_support(tasks: Task) -> Task:
    """Replaces the query set `(inputs, targets)` of a task, or of a batch of tasks, with a `QueryWithSupport`."""
    inputs, targets = tasks.query
    return tasks._replace(query=QueryWithSupport(inputs, targets, tasks.support[0]))


def mean_squared_error(apply: Apply) -> LossFn:
    """Mean squared error (paper, equation 2).

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = mean_squared_error(lambda params, inputs: params * inputs)
      >>> loss, aux = loss_fn(2.0, (jnp.array([[1.0], [2.0]]), jnp.array([[2.0], [6.0]])))
      >>> loss.item()
      2.0

    Args:
      apply: the model, `(params, inputs [B, ...]) -> outputs [B, D]`.

    Returns:
      `(params, (inputs [B, ...], targets [B, D])) -> (loss, {})`.

    Raises (when called):
      ValueError: if targets and outputs have different shapes, or no axis of examples.

    References:
      Finn, Abbeel and Levine 2017, Model-agnostic meta-learning, arXiv:1703.03400.
    """

    def loss_fn(params: Params, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        inputs, targets, weights, context = _parts(batch, apply)
        outputs = apply(params, inputs, *context)
        if jnp.shape(outputs) != jnp.shape(targets) or not jnp.shape(outputs):
            raise ValueError(
                f"The targets must have the shape of the outputs, {jnp.shape(outputs)}, and an axis of examples, but "
                f"have {jnp.shape(targets)}. {ONE_TASK}"
            )
        errors = jnp.square(outputs - targets)
        if weights is None:
            return jnp.mean(errors), {}
        return _weighted_mean(errors.reshape(len(errors), -1).mean(-1), weights), {}

    return loss_fn


def cross_entropy(apply: Apply) -> LossFn:
    """Mean softmax cross-entropy (paper, equation 3, divided by the number of examples).

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = cross_entropy(lambda params, inputs: params * inputs)
      >>> loss, aux = loss_fn(1.0, (jnp.array([[0.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])))
      >>> print(jnp.round(loss, 3), aux["accuracy"])
      0.693 0.5

    Args:
      apply: the model, `(params, inputs [B, ...]) -> logits [B, N]`.

    Returns:
      `(params, (inputs [B, ...], labels [B])) -> (loss, {"accuracy": fraction of correct predictions})`. Labels are
      integers from 0 to N - 1. Compiled programs cannot check this range: the loss is NaN for other labels, unless
      their examples have the weight 0. Labels of sequences are `[B, L]`; the loss is the mean over all positions.

    Raises (when called):
      ValueError: if the labels are not integers `[B, ...]`, one for each row of the logits `[B, ..., N]`.

    References:
      Finn, Abbeel and Levine 2017, Model-agnostic meta-learning, arXiv:1703.03400.
    """

    def loss_fn(params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        inputs, labels, weights, context = _parts(batch, apply)
        logits = apply(params, inputs, *context)
        loss = _mean_cross_entropy(logits, labels, weights)
        return loss, {"accuracy": _mean((jnp.argmax(logits, -1) == labels).astype(logits.dtype), weights)}

    return loss_fn


def log_probabilities(apply: Apply) -> LossFn:
    """`cross_entropy` with the log probabilities `[B, N]` as aux, for evaluation.

    Arguments, loss and errors are those of `cross_entropy`.
    """

    def loss_fn(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        inputs, labels, weights, context = _parts(batch, apply)
        logits = apply(params, inputs, *context)
        return _mean_cross_entropy(logits, labels, weights), jax.nn.log_softmax(logits)

    return loss_fn


def _parts(batch: Batch, apply: Apply) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """Inputs, targets, weights of the examples or None, and the further arguments of the model.

    Raises:
      TypeError: if the batch has another form.
      ValueError: for weights of examples that the model does not treat separately.
    """
    if isinstance(batch, QueryWithSupport):
        return batch.inputs, batch.targets, None, (batch.context,)
    if isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        inputs, targets, *weights = batch
        if weights and getattr(apply, "mixes_examples", False):
            raise ValueError(
                "The batch has weights, but the normalisation of the network takes its statistics from all examples, "
                "those of weight 0 included. Use a normalisation of each example alone, such as 'layer', or "
                "losses.inductive(apply)."
            )
        return inputs, targets, weights[0] if weights else None, ()
    form = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
    raise TypeError(
        "The batch must be (inputs, targets), (inputs, targets, weights [B]) or a losses.QueryWithSupport, but is a "
        f"{form}. For another form of batch, write the loss (params, batch) -> (scalar, aux) yourself."
    )


def _mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    return jnp.mean(values) if weights is None else _weighted_mean(values, weights)


def _weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    if jnp.shape(weights) != jnp.shape(values):
        raise ValueError(
            f"The weights must be one for each example, of shape {jnp.shape(values)}, but have {jnp.shape(weights)}."
        )
    weights = jnp.asarray(weights, values.dtype)
    return (weights * jnp.where(weights == 0, 0, values)).sum() / weights.sum()  # NaN does not count either.


def _mean_cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    rows = jnp.shape(logits)[:-1]
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer) or jnp.shape(labels) != rows or not rows:
        raise ValueError(
            "The labels must be integers [B, ...], one for each row of logits [B, ..., N], but are "
            f"{jnp.result_type(labels)} of shape {jnp.shape(labels)} for logits of shape {jnp.shape(logits)}. "
            f"{ONE_TASK}"
        )
    # A negative index would count from the last class. N is no class, and gives NaN.
    labels = jnp.asarray(labels)
    labels = jnp.where(labels < 0, logits.shape[-1], labels.astype(jnp.promote_types(labels.dtype, jnp.int32)))
    return _mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels), weights)


def inductive(apply: Apply) -> Apply:
    """Applies a model to each example separately, for inductive evaluation.

    If a model normalises with the statistics of the batch, the predictions for a batch depend on each other
    (transductive evaluation). With this function the predictions are independent (inductive evaluation; Bronskill et
    al. 2020, table 1).

    Example:
      >>> import jax.numpy as jnp
      >>> centred = lambda params, inputs: inputs - inputs.mean()
      >>> inputs = jnp.array([1.0, 3.0])
      >>> centred(None, inputs).tolist(), inductive(centred)(None, inputs).tolist()
      ([-1.0, 1.0], [0.0, 0.0])

    Args:
      apply: the model, `(params, inputs [B, ...], ...) -> outputs [B, ...]`.

    Returns:
      A model with the same arguments and shapes. Each example is a batch of one; the context is passed unchanged.

    References:
      Bronskill et al. 2020, TaskNorm: rethinking batch normalization for meta-learning, arXiv:2003.03284.
    """

    def apply_to_each(params: Params, inputs: jax.Array, *context: jax.Array) -> jax.Array:
        return jax.vmap(lambda single: apply(params, single[None], *context)[0])(inputs)

    return apply_to_each


def rate_for_mean_loss(rate: float, ways: int) -> float:
    """Converts an inner rate of the paper's code to the mean cross-entropy of this library.

    The paper's code divides the sum over N * K examples by K. Its loss and gradients are N times those of the mean.
    With the mean, N times the rate gives the same update.

    Example:
      >>> rate_for_mean_loss(0.4, ways=5)
      2.0

    Args:
      rate: inner rate in the paper's code.
      ways: number of classes N.

    Returns:
      The rate that gives the same update with the mean cross-entropy, `rate * ways`.
    """
    return rate * ways
