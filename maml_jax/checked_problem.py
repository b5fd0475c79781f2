"""The meta-loss that `check_meta_gradient` checks, its derivatives, and the same with another precision or order."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import validation
from maml_jax.autodiff.finite_differences import cast, coarsest_type
from maml_jax.autodiff.widening import in_float64
from maml_jax.inner import InnerLearner, adapted_part
from maml_jax.types import LossFn, MetaParams, Params, Task


class Problem:
    """The meta-loss of one batch of tasks as a function of the meta-parameters, and its gradient."""

    def __init__(
        self,
        support_loss: LossFn,
        objective: Callable[[InnerLearner, MetaParams, Task], tuple[jax.Array, Any]],
        inner: InnerLearner,
        params: Params,
        tasks: Task,
        widen: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn,
    ):
        self._arguments = (support_loss, objective, inner, params, tasks)
        self.inner, self.tasks = inner, tasks
        self.start = MetaParams(params, inner.init_inner_params(adapted_part(inner, params)))

        def loss_before_first_step(started: Params, support: Any) -> jax.Array:
            if inner.params_at_step is not None:
                started = inner.params_at_step(started, jnp.zeros([], int))
            return support_loss(started, support)[0]

        def loss_of_task(meta_params: MetaParams, task: Task) -> jax.Array:
            return objective(inner, meta_params, task)[0]

        def meta_loss(meta_params: MetaParams) -> jax.Array:
            return jax.vmap(partial(loss_of_task, meta_params))(tasks).mean()

        self.support_loss = jax.jit(widen(loss_before_first_step))
        self.support_gradient = jax.jit(widen(jax.grad(loss_before_first_step)))
        self.meta_loss, self.widened_meta_loss = meta_loss, widen(meta_loss)
        self.jitted_meta_loss = jax.jit(self.widened_meta_loss)
        self.value_and_grad = jax.jit(widen(jax.value_and_grad(meta_loss)))
        self.task_gradient = jax.jit(jax.grad(loss_of_task))

    def started(self, task: Task) -> Params:
        """The parameters before the first inner step."""
        params = self.start.params
        return params if self.inner.start is None else self.inner.start(params, task.support)

    def coarsest(self) -> np.dtype:
        """The floating-point type of the lowest precision in the meta-loss."""
        return coarsest_type(jax.make_jaxpr(self.widened_meta_loss)(self.start).jaxpr)

    def with_order(self, order: Literal[1, 2]) -> "Problem":
        support_loss, objective, inner, params, tasks = self._arguments
        return Problem(support_loss, objective, inner._replace(order=order), params, tasks)

    def in_float32(self) -> "Problem":
        support_loss, objective, inner, *data = self._arguments
        with jax.enable_x64(False):
            return Problem(support_loss, objective, inner, *cast(tuple(data), np.float32))

    def in_float64(self) -> "Problem":
        """The same problem without casts to other floating-point types."""
        return Problem(*self._arguments, widen=in_float64)

    def each_task(self) -> list[Task]:
        return [
            jax.tree.map(operator.itemgetter(index), self.tasks) for index in range(validation.num_tasks(self.tasks))
        ]
