"""The words of the library: what a loss, a task and the results of meta-training are.

Dimensions are named once, here, and used in every docstring:
`T` tasks in a meta-batch, `S` inner steps, `B` examples in a batch,
`N` ways (classes per episode), `K` shots (support examples per class).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

Params: TypeAlias = Any
"""Any pytree of floating-point arrays: a linen dict, an `nnx.State`, an equinox partition, a plain dict."""

InnerParams: TypeAlias = Any
"""Meta-learned parameters of the inner update itself (Meta-SGD's rates); `()` when nothing of it is learned."""

Batch: TypeAlias = Any
"""Any pytree that the loss understands; usually `(inputs [B, ...], targets [B, ...])`."""

Aux: TypeAlias = Any
"""Any pytree of arrays that the loss reports beside its value, such as `{"accuracy": ...}`."""

LossFn: TypeAlias = Callable[[Params, Batch], tuple[jax.Array, Aux]]
"""The one way in for user code: `(params, batch) -> (scalar loss, aux)`."""


class Task(NamedTuple):
    """One task, or a batch of tasks when every leaf has a leading axis `T`."""

    support: Batch
    """What the inner loop adapts to."""
    query: Batch
    """What the adapted parameters are judged by."""


class AdaptInfo(NamedTuple):
    """What the inner loop saw on its way, one row per inner step."""

    loss: jax.Array
    """`[S]`: support loss before each step; `adapt` adds a last row, after the last step."""
    aux: Aux
    """Aux of the support loss, with the same leading axis."""
    probes: Any = None
    """`[S + 1, ...]`: the probe before the first and after each step; None without a probe."""


class MetaState(NamedTuple):
    """All that the next meta-step needs, and so all that a checkpoint holds."""

    step: jax.Array
    """Meta-steps taken so far, an int32 scalar."""
    params: Params
    """The meta-parameters: the initialisation from which every task starts."""
    inner_params: InnerParams
    """Learned parameters of the inner update, or `()`."""
    opt_state: Any
    """State of the outer optimizer, which acts on the pair `(params, inner_params)`."""


class MetaInfo(NamedTuple):
    """Diagnostics of one meta-step; nothing in it is needed for the next."""

    loss: jax.Array
    """Mean over the tasks of the query loss after adaptation: what is minimised (paper, equation 1)."""
    aux: Aux
    """`[T, ...]`: aux of each task's query loss after adaptation."""
    support_loss: jax.Array
    """`[T, S]`: support loss before each inner step."""
    grad_norm: jax.Array
    """Global norm of the meta-gradient, before the outer optimizer."""


class Evaluation(NamedTuple):
    """Each task before adaptation (column 0) and after each inner step, or after the last alone (the only column)."""

    loss: jax.Array
    """`[T, S + 1]`: query loss."""
    aux: Aux
    """`[T, S + 1, ...]`: aux of the query loss."""
    support_loss: jax.Array
    """`[T, S + 1]`: what the inner loop minimises; where it grows, the inner loop diverges."""


class NotFiniteError(FloatingPointError):
    """A loss, a gradient or the state after it stopped being finite."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step
        """The meta-step that made it so, counted from 1."""
