"""iMAML: the meta-gradient at the end of a regularised inner loop, whatever the way there (Rajeswaran et al. 2019)."""

from typing import Any

import jax
import optax
from jax.scipy.sparse.linalg import cg
from jax.sharding import Mesh

from maml_jax import validation
from maml_jax.autodiff.trees import combine, partition
from maml_jax.inner import InnerLearner, inner_loop
from maml_jax.meta import MetaLearner, meta_learner
from maml_jax.parallel.task_axis import TaskBatchSize, sum_over_tasks
from maml_jax.types import InnerParams, LossFn, Params, Task


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

    The inner loop is to minimise the support loss plus `proximal_weight` / 2 times the squared distance from
    where it started. At that minimum the meta-gradient solves a linear system in the Hessian, which
    conjugate gradients do by Hessian-vector products: memory does not grow with the inner steps. It is
    exact where the inner loop arrives at a minimum at which the loss is smooth.

    Args:
      inner: how a task is learned, e.g. `sgd(0.1, steps=16)`; the regularisation is added to it. Its order
        and checkpoint make no difference.
      proximal_weight: of the regularisation, the paper's lambda.
      cg_steps: iterations of conjugate gradients; the paper takes 5.
      others: as those of `maml`.

    Raises:
      TypeError, ValueError: as `maml`; for a proximal_weight that is not positive, fewer than 1 iteration, and an
        inner learner with a start, a `params_at_step` or learned rates, of which there is no gradient here.
    """
    validation.inner("inner", inner, InnerLearner)
    validation.at_least("cg_steps", cg_steps, 1)
    if inner.start is not None or inner.params_at_step is not None:
        raise ValueError(
            "imaml takes an inner learner without start and params_at_step: it has no gradient through them."
        )
    inner = with_proximal_term(inner, proximal_weight)
    support_loss = validation.checked_loss(loss_fn)
    query_loss = validation.checked_loss(query_loss_fn or loss_fn)

    def gradient(shared: tuple[tuple[Params, InnerParams], jax.Array], task: Task) -> tuple[Any, Any]:
        (params, inner_params), _ = shared
        end, info = inner_loop(inner, support_loss, params, inner_params, task.support)
        (loss, aux), of_query = jax.value_and_grad(query_loss, has_aux=True)(end, task.query)
        adapted, fixed = partition(end, inner.trainable)

        def of_support(adapted: Params) -> Params:
            return jax.grad(lambda params: support_loss(params, task.support)[0])(combine(adapted, fixed))

        def second_derivatives(direction: Params) -> tuple[Params, Params]:
            along = jax.jvp(of_support, (adapted,), (direction,))[1]
            return partition(along, inner.trainable)

        def system(direction: Params) -> Params:
            return optax.tree.add_scale(direction, 1 / proximal_weight, second_derivatives(direction)[0])

        wanted, of_fixed = partition(of_query, inner.trainable)
        solution, _ = cg(system, wanted, tol=0.0, maxiter=cg_steps)
        # What the inner loop leaves as it is moves the minimum too.
        if of_fixed is not None:
            of_fixed = optax.tree.add_scale(of_fixed, -1 / proximal_weight, second_derivatives(solution)[1])
        return (loss, (combine(solution, of_fixed), inner_params)), (aux, info)

    of_tasks = sum_over_tasks(gradient)
    return meta_learner(
        of_tasks,
        support_loss,
        query_loss,
        inner,
        outer,
        learns_inner_params=False,
        task_batch_size=task_batch_size,
        mesh=mesh,
    )


def with_proximal_term(inner: InnerLearner, proximal_weight: float) -> InnerLearner:
    """The same with `proximal_weight` / 2 times the squared distance from the start added to what is minimised.

    The support loss that is reported is without it (Rajeswaran et al. 2019, equation 3).
    """
    validation.positive("proximal_weight", proximal_weight)

    def update(grads: Params, start: Params, params: Params | None = None) -> tuple[Params, Params]:
        return jax.tree.map(lambda g, at, begun: g + proximal_weight * (at - begun), grads, params, start), start

    pull = optax.GradientTransformation(lambda params: params, update)
    return inner._replace(optimizer=lambda inner_params: optax.chain(pull, inner.optimizer(inner_params)))
