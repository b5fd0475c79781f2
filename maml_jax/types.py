"""The core types: losses, tasks, the state of meta-training, and metrics.

Docstrings name dimensions by these letters: `T` tasks in a meta-batch, `S` inner steps, `B` examples in a batch,
`N` ways (classes of an episode), `K` shots (support examples of a class).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

Params: TypeAlias = Any
"""Any pytree of floating-point arrays: a linen dict, an `nnx.State`, an equinox partition, a plain dict."""

InnerParams: TypeAlias = Any
"""Meta-learned parameters of the inner update, such as Meta-SGD's learning rates; `()` if there are none."""

Batch: TypeAlias = Any
"""Any pytree that the loss takes; usually `(inputs [B, ...], targets [B, ...])`."""

Aux: TypeAlias = Any
"""Any pytree of arrays that the loss function returns together with the loss, such as `{"accuracy": ...}`."""

LossFn: TypeAlias = Callable[[Params, Batch], tuple[jax.Array, Aux]]
"""The only function that a user has to write: `(params, batch) -> (scalar loss, aux)`, for one task."""


class Task(NamedTuple):
    """One task, or a meta-batch of tasks if every leaf has a leading axis `T`."""

    support: Batch
    """The batch that the inner loop adapts to."""
    query: Batch
    """The batch that the adapted parameters are evaluated on."""


class MetaParams(NamedTuple):
    """Everything that meta-training learns."""

    params: Params
    """The initial parameters, from which every task is adapted."""
    inner_params: InnerParams = ()
    """Learned parameters of the inner update, or `()`."""


class AdaptInfo(NamedTuple):
    """Metrics of the inner loop, one row per inner step."""

    loss: jax.Array
    """`[S]`: support loss before each step. `maml_jax.adapt` adds a row for the loss after the last step."""
    aux: Aux
    """`[S, ...]`: aux of the support loss, with the same rows as `loss`."""
    probes: Any = None
    """`[S + 1, ...]`: outputs of `probe` (see `inner.inner_loop`) before the first step and after each; or None."""


class MetaState(NamedTuple):
    """The state of meta-training: the input of the next meta-step, and the content of a checkpoint."""

    step: jax.Array
    """Number of meta-steps taken, an int32 scalar."""
    params: Params
    """The initial parameters, from which every task is adapted."""
    inner_params: InnerParams
    """Learned parameters of the inner update, or `()`."""
    opt_state: Any
    """State of the outer optimizer."""

    @property
    def meta_params(self) -> MetaParams:
        """`params` and `inner_params` as one `MetaParams`."""
        return MetaParams(self.params, self.inner_params)


class MetaInfo(NamedTuple):
    """Metrics of one meta-step, for logging. They are not an input of the next meta-step."""

    loss: jax.Array
    """The meta-loss: the mean over the tasks of the query loss after adaptation (Finn et al. 2017, equation 1)."""
    aux: Aux
    """`[T, ...]`: aux of each task's query loss after adaptation."""
    support_loss: jax.Array
    """`[T, S]`: support loss before each inner step."""
    grad_norm: jax.Array
    """Global norm of the meta-gradient, before the outer optimizer."""


class Evaluation(NamedTuple):
    """Losses of every task before adaptation (column 0) and after each inner step.

    With `only_last=True` there is one column: the losses after the last step.
    """

    loss: jax.Array
    """`[T, S + 1]`: query loss."""
    aux: Aux
    """`[T, S + 1, ...]`: aux of the query loss."""
    support_loss: jax.Array
    """`[T, S + 1]`: support loss, which the inner loop minimises. If this loss grows, the inner loop diverges."""


class NotFiniteError(FloatingPointError):
    """A loss, a gradient or a state became NaN or infinite."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step
        """Number of the meta-step with this loss, gradient or state, counted from 1."""
