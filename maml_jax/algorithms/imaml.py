"""iMAML: the meta-gradient at the minimum of a regularised inner problem, without derivatives of the inner steps."""

from typing import Any

import jax
import optax
from jax.sharding import Mesh

from maml_jax import validation
from maml_jax.autodiff.conjugate_gradient import conjugate_gradient
from maml_jax.autodiff.trees import combine, partition
from maml_jax.inner import InnerLearner, inner_loop
from maml_jax.meta import MetaLearner, meta_learner
from maml_jax.parallel.task_axis import TaskBatchSize, sum_over_tasks
from maml_jax.types import LossFn, MetaParams, Params, Task


def imaml(
    loss_fn: LossFn,
    inner: InnerLearner,
    outer: optax.GradientTransformation,
    *,
    proximal_weight: float,
    cg_steps: int,
    query_loss_fn: LossFn | None = None,
    task_batch_size: TaskBatchSize = None,
    mesh: Mesh | None = None,
) -> MetaLearner:
    """MAML with implicit gradients (Rajeswaran et al. 2019, algorithms 1 and 2).

    The inner loop minimises the support loss plus `proximal_weight / 2` times the squared distance from the
    initial parameters. At the minimum the meta-gradient is the solution of a linear system in the Hessian of the
    support loss, `(I + Hessian / proximal_weight) x = query gradient`. Conjugate gradients solve it with
    Hessian-vector products, so the memory does not grow with the inner steps. The meta-gradient is exact if the inner
    loop reaches a minimum at which the support loss is smooth, and the conjugate gradients converge. With ReLU, the
    minimum is often at a kink. Gradient descent then does not settle, the Hessian can have eigenvalues below
    `-proximal_weight`, and the error can be as large as the meta-gradient. For such a network the meta-gradient is
    exact if `proximal_weight` is so large that no ReLU switches between the initial parameters and the minimum.

    Example:
      >>> import jax, jax.numpy as jnp, maml_jax, optax
      >>> def loss_fn(params, batch):
      ...     return jnp.sum((params - batch) ** 2) / 2, {}
      >>> learner = maml_jax.imaml(
      ...     loss_fn, maml_jax.sgd(0.5, steps=50), optax.sgd(1.0), proximal_weight=1.0, cg_steps=1
      ... )
      >>> state = learner.init(jnp.zeros(1))
      >>> task = maml_jax.Task(support=jnp.array([[2.0]]), query=jnp.array([[2.0]]))
      >>> state, info = jax.jit(learner.step)(state, task)
      >>> # The minimum is 1, half-way to 2. There the query gradient is -1, and (1 + 1) x = -1.
      >>> print(jnp.round(state.params, 3))
      [0.5]

    Args:
      loss_fn: `(params, batch) -> (scalar loss, aux)`, of one task.
      inner: the inner learner, such as `sgd(0.1, steps=16)`. `imaml` adds the proximal term. `order` and `remat` have
        no effect.
      outer: the outer optimizer, any optax transformation.
      proximal_weight: weight of the proximal term, lambda in the paper.
      cg_steps: iterations of conjugate gradients for each task; 5 in the paper.
      query_loss_fn, task_batch_size, mesh: as for `maml`.

    Returns:
      A `MetaLearner`. Its inner loop has the proximal term in evaluation and adaptation too.

    Raises:
      TypeError, ValueError: as `maml`; if `proximal_weight` is not positive and finite, if `cg_steps` is below 1, and
        for an inner learner without steps, with `start` or with `params_at_step`.
      ValueError (by `init`): for an inner learner with learned parameters. iMAML has no gradient for them.

    References:
      Rajeswaran et al. 2019, Meta-learning with implicit gradients, arXiv:1909.04630.
    """
    validation.inner("inner", inner, InnerLearner)
    validation.at_least("inner.steps", inner.steps, 1)
    validation.at_least("cg_steps", cg_steps, 1)
    if inner.start is not None or inner.params_at_step is not None:
        raise ValueError(
            "imaml takes an inner learner without start and params_at_step: its meta-gradient does not include them."
        )
    inner = with_proximal_term(inner, proximal_weight)
    support_loss = validation.checked_loss(loss_fn)
    query_loss = validation.checked_loss(query_loss_fn or loss_fn)

    def task_gradient(meta_params: MetaParams, task: Task, step: jax.Array) -> tuple[Any, Any]:
        params, inner_params = meta_params

        # Adapt to the support set, and differentiate the query loss at the adapted parameters.
        minimum, info = inner_loop(inner, support_loss, params, inner_params, task.support)
        (loss, aux), query_grads = jax.value_and_grad(query_loss, has_aux=True)(minimum, task.query)
        adapted, fixed = partition(minimum, inner.trainable)
        adapted_grads, fixed_grads = partition(query_grads, inner.trainable)

        def support_grads(adapted: Params) -> Params:
            return jax.grad(lambda params: support_loss(params, task.support)[0])(combine(adapted, fixed))

        def hessian_product(direction: Params) -> tuple[Params, Params]:
            """Products of the second derivatives, adapted-adapted and fixed-adapted, with a direction."""
            return partition(jax.jvp(support_grads, (adapted,), (direction,))[1], inner.trainable)

        # Solve (I + Hessian / proximal_weight) x = query gradient, for the adapted parameters.
        def system(direction: Params) -> Params:
            return optax.tree.add_scale(direction, 1 / proximal_weight, hessian_product(direction)[0])

        solution = conjugate_gradient(system, adapted_grads, steps=cg_steps)

        # The minimum also depends on the fixed parameters: subtract the mixed second derivatives times the solution,
        # divided by proximal_weight.
        if fixed_grads is not None:
            fixed_grads = optax.tree.add_scale(fixed_grads, -1 / proximal_weight, hessian_product(solution)[1])
        return (loss, MetaParams(combine(solution, fixed_grads), inner_params)), (aux, info)

    def gradient(meta_params: MetaParams, tasks: Task, step: jax.Array) -> tuple[Any, MetaParams]:
        (loss, grads), info = sum_over_tasks(task_gradient)(meta_params, tasks, step)
        return (loss, info), grads

    return meta_learner(
        gradient,
        support_loss,
        query_loss,
        inner,
        outer,
        learns_inner_params=False,
        task_batch_size=task_batch_size,
        mesh=mesh,
    )


def with_proximal_term(inner: InnerLearner, proximal_weight: float) -> InnerLearner:
    """An inner learner that also minimises `proximal_weight / 2` times the squared distance from the start.

    The support loss in `AdaptInfo` does not include the proximal term (Rajeswaran et al. 2019, equation 3).

    Example:
      >>> import jax.numpy as jnp, maml_jax
      >>> inner = with_proximal_term(maml_jax.sgd(0.5, steps=50), 1.0)
      >>> params, _ = maml_jax.inner.inner_loop(
      ...     inner, lambda params, batch: (jnp.sum((params - batch) ** 2) / 2, {}), jnp.zeros(1), (), jnp.array([2.0])
      ... )
      >>> print(jnp.round(params, 3))  # Half-way from the start 0 to the target 2.
      [1.]

    Args:
      inner: the inner learner to extend.
      proximal_weight: weight of the proximal term, lambda in the paper.

    Returns:
      An `InnerLearner`. The state of its optimizer also holds the initial parameters.

    Raises:
      ValueError: if `proximal_weight` is not positive and finite.

    References:
      Rajeswaran et al. 2019, Meta-learning with implicit gradients, arXiv:1909.04630.
    """
    validation.positive("proximal_weight", proximal_weight)

    # Add the gradient of the proximal term. The state of this transformation is the initial parameters.
    def update(grads: Params, initial: Params, params: Params | None = None) -> tuple[Params, Params]:
        grads = jax.tree.map(lambda g, p, p0: g + proximal_weight * (p - p0), grads, params, initial)
        return grads, initial

    proximal_term = optax.GradientTransformation(lambda params: params, update)
    return inner._replace(optimizer=lambda inner_params: optax.chain(proximal_term, inner.optimizer(inner_params)))
