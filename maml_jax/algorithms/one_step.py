"""Exact MAML with one inner step from a head that is equal for all classes, at about the cost of ordinary training."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from maml_jax import losses, validation
from maml_jax.algorithms.heads import find_head
from maml_jax.inner import InnerLearner, adapted_part, inner_loop
from maml_jax.meta import MetaLearner, meta_learner
from maml_jax.parallel.task_axis import TaskBatchSize, sum_over_tasks
from maml_jax.types import LossFn, MetaParams, Params, Task


def one_step_maml(
    loss_fn: LossFn,
    features: Callable[..., jax.Array],
    inner: InnerLearner,
    outer: optax.GradientTransformation,
    *,
    ways: int,
    name: str = "head",
    task_batch_size: TaskBatchSize = None,
    mesh: Mesh | None = None,
) -> MetaLearner:
    """Exact MAML for classifiers, with one inner step from a head of zeros.

    If all columns of the head are equal, the loss of an example does not depend on its features. The first inner step
    then changes the head alone, even if the inner loop adapts other layers too. The features of every image are
    therefore computed once, and every set of the task serves as the support set in turn, with the other sets as
    queries.

    A set holds K images of each of the N classes. The support set is one set, and the queries form the other sets. The
    meta-gradient is that of `maml(loss_fn, inner, outer)` with `start=heads.zero()`, averaged over all ordered pairs of
    two sets: the first set is the support set, and the second is the query set. M sets give M (M - 1) pairs.

    Example:
      >>> import jax, jax.numpy as jnp, maml_jax, optax
      >>> from maml_jax import heads, losses
      >>> features = lambda params, inputs: inputs * params["scale"]
      >>> apply = lambda params, inputs: features(params, inputs) @ params["head"]["kernel"] + params["head"]["bias"]
      >>> inner = maml_jax.sgd(1.0, steps=1, start=heads.zero())
      >>> learner = maml_jax.one_step_maml(losses.cross_entropy(apply), features, inner, optax.adam(0.1), ways=2)
      >>> head = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
      >>> state = learner.init({"scale": jnp.ones(2), "head": head})
      >>> inputs, labels = jnp.array([[[2.0, 1.0], [0.0, 1.0]]]), jnp.array([[0, 1]])  # One task, two classes.
      >>> tasks = maml_jax.Task(support=(inputs, labels), query=(inputs + 0.1, labels))
      >>> state, info = jax.jit(learner.step)(state, tasks)
      >>> print(state.params["scale"].round(2))  # Only the first feature differs between the classes.
      [1.1 1. ]

    Args:
      loss_fn: `(params, (inputs [B, ...], labels [B])) -> (scalar loss, aux)`, the cross-entropy of the whole model,
        for evaluation and adaptation.
      features: `(params, inputs [B, ...]) -> [B, features]`, the inputs of the head. Each set is one batch, so batch
        normalisation takes its statistics over the images of one set.
      inner: the inner learner, with one step and a start that makes all columns of the head equal, such as
        `sgd(0.4, steps=1, start=heads.zero())`. Training uses only its update of the head. Evaluation and
        adaptation update all parameters that `inner` adapts, with any number of steps.
      outer: the outer optimizer, as for `maml`.
      ways: classes N of a task in training. Tasks of evaluation have as many classes as the head has columns.
      name: key of the head in the parameters, a mapping with `kernel` `[features, N]` and `bias` `[N]`.
      task_batch_size, mesh: as for `maml`.

    Returns:
      A `MetaLearner`. Its `step` takes tasks with support `(images [T, N * K, ...], labels)` and query
      `(images [T, N * Q, ...], labels)`, where Q is a multiple of K. The examples of a class are adjacent, as in the
      episodes of `tasks.episodes`; `step` does not read the labels. Images may have another size than in evaluation if
      `features` allows it. If F features come from such images and the head has D inputs, training multiplies the
      features by sqrt(D / F), which keeps the size of the logits.

    Raises:
      TypeError, ValueError: as `maml`; for an inner learner with more than one step, without a `start`, or with
        `params_at_step`; and for fewer than two ways.
      ValueError (by `step`): for tasks whose images are not `ways` classes of equal size, for queries that are not a
        multiple of the support set, and for an inner learner that does not adapt the head.

    References:
      Finn, Abbeel and Levine 2017, arXiv:1703.03400; Raghu et al. 2020, arXiv:1909.09157 (adapting the head alone); Ye
      and Chao 2022, arXiv:2106.16245 (a head that is equal for all classes).
    """
    validation.inner("inner", inner, InnerLearner)
    validation.at_least("ways", ways, 2)
    if inner.steps != 1:
        raise ValueError(
            f"one_step_maml takes an inner learner with one step, but got {inner.steps}: further steps change more "
            "than the head."
        )
    if inner.start is None or inner.params_at_step is not None:
        raise ValueError(
            "one_step_maml takes an inner learner with a start that makes all columns of the head equal, such as "
            "start=heads.zero(), and without params_at_step."
        )
    checked_loss = validation.checked_loss(loss_fn)
    head_loss = losses.cross_entropy(lambda params, x: x @ params[name]["kernel"] + params[name]["bias"])
    inner_of_head = inner._replace(start=None, trainable=None)

    def task_loss(meta_params: MetaParams, task: Task, step: jax.Array) -> tuple[jax.Array, Any]:
        params, inner_params = meta_params
        head = _adapted_head(inner, params, name)
        # Features of all sets, each a batch of its own, [M, N * K, features].
        sets = _sets(task, ways)
        x = jax.vmap(partial(features, params))(sets)
        # Images of another size may give another number of features: keep the size of the logits.
        x = x * (len(head["kernel"]) / x.shape[-1]) ** 0.5
        labels = jnp.repeat(jnp.arange(ways), sets.shape[1] // ways)
        # The head has one column for each class of a training task, which may have more classes than a test task.
        zero = {name: {"kernel": jnp.zeros((x.shape[-1], ways), x.dtype), "bias": jnp.zeros(ways, x.dtype)}}
        head_inner_params = {name: inner_params[name]} if jax.tree.leaves(inner_params) else inner_params

        def loss_of_support(index: int) -> tuple[jax.Array, Any]:
            # One inner step of the head on one set, and the loss of all other sets after the step.
            adapted, info = inner_loop(inner_of_head, head_loss, zero, head_inner_params, (x[index], labels))
            others = jnp.stack([x[other] for other in range(len(x)) if other != index])
            loss, aux = jax.vmap(lambda queries: head_loss(adapted, (queries, labels)))(others)
            return loss.mean(), (jax.tree.map(jnp.mean, aux), info)

        # Each set is the support set once. The loss, aux and info are means over these choices.
        found = [loss_of_support(index) for index in range(len(x))]
        return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *found)

    gradient = jax.value_and_grad(sum_over_tasks(task_loss), has_aux=True)
    return meta_learner(gradient, checked_loss, checked_loss, inner, outer, task_batch_size=task_batch_size, mesh=mesh)


def _sets(task: Task, ways: int) -> jax.Array:
    """The images of a task as sets of the size of the support set, class after class, `[M, N * K, ...]`."""
    (support, _), (query, _) = task
    if len(support) % ways or len(query) % len(support):
        raise ValueError(
            f"one_step_maml takes a support set of {ways} classes of equal size, and queries that are a multiple of "
            f"the support set, but got {len(support)} support examples and {len(query)} queries."
        )
    by_class = [images.reshape(ways, -1, *images.shape[1:]) for images in (support, query)]
    sets = jnp.concatenate(by_class, 1).reshape(ways, -1, len(support) // ways, *support.shape[1:]).swapaxes(0, 1)
    return sets.reshape(len(sets), -1, *support.shape[1:])


def _adapted_head(inner: InnerLearner, params: Params, name: str) -> Params:
    """The head, checked to be there and to be adapted by the inner loop."""
    head = find_head(params, name)
    if len(jax.tree.leaves(adapted_part(inner, params)[name])) < len(jax.tree.leaves(head)):
        raise ValueError(f"one_step_maml takes an inner learner that adapts the head {name!r}: change its trainable.")
    return head
