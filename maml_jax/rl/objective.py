"""What the outer step minimises: a function of the meta-parameters, on episodes that are fixed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maml_jax.inner import InnerLearner, inner_loop
from maml_jax.parallel.task_axis import TaskAxis
from maml_jax.rl.losses import clipped_ratio, ratio
from maml_jax.rl.policy import Gaussian, Policy
from maml_jax.types import AdaptInfo, InnerParams, LossFn, Params, Task


class Terms(NamedTuple):
    """Scalars, means over the tasks."""

    loss: jax.Array
    """Minus the mean of likelihood ratio times advantage after adaptation (and E-MAML's term, if asked for)."""
    kl: jax.Array
    """KL divergence from the adapted policies that drew the episodes to the adapted ones now."""
    inner_kl: jax.Array
    """The same of the policies before each inner step, mean over the steps; 0 without inner steps."""


class Objective(NamedTuple):
    """The outer objective of one meta-batch (paper, algorithm 3, line 10).

    Its meta-parameters are the pair `(params, inner_params)`, as in `maml`.
    """

    policy: Policy
    inner: InnerLearner
    loss_fn: LossFn
    """The inner loss."""
    tasks: Task
    """`[T, ...]`: support is an `Experience` with a further axis `S`, that of each inner step, and query
    the `Experience` after the last."""
    sampling_term: bool
    """Whether the loss also credits the choice of the episodes that were adapted to (E-MAML)."""
    over_tasks: TaskAxis
    """How the tasks are gone through."""

    def adapted(self, meta_params: tuple[Params, InnerParams], task: Task) -> tuple[Params, AdaptInfo]:
        """One task's parameters after the inner steps."""
        return inner_loop(self.inner, self.loss_fn, *meta_params, task.support, batch_per_step=True)

    def distributions(self, meta_params: tuple[Params, InnerParams]) -> Gaussian:
        """The adapted policies at each step of the query episodes, with leading axes `[T, E, H]`."""

        def of_task(meta_params: tuple[Params, InnerParams], task: Task) -> Gaussian:
            return self.policy.apply(self.adapted(meta_params, task)[0], task.query.episodes.observation)

        return self.over_tasks.map(of_task, meta_params, self.tasks)

    def kl(self, distributions: Gaussian) -> jax.Array:
        """Mean KL divergence from the policies that drew the query episodes to `distributions`."""
        return jax.vmap(lambda task, new: task.query.kl_to(new))(self.tasks, distributions).mean()

    def terms(self, meta_params: tuple[Params, InnerParams], clip: float | None = None) -> Terms:
        """Loss and divergences; with `clip`, the loss gains nothing from ratios outside 1 +- clip."""

        def of_task(meta_params: tuple[Params, InnerParams], task: Task) -> tuple[Terms, Any]:
            params, info = self.adapted(meta_params, task)
            distribution = self.policy.apply(params, task.query.episodes.observation)
            log_prob = task.query.log_prob_under(distribution)
            loss = ratio(task.query, log_prob) if clip is None else clipped_ratio(task.query, log_prob, clip)
            inner_kl = info.aux.kl.sum() / max(1, self.inner.steps)
            return Terms(loss, task.query.kl_to(distribution), inner_kl), info.aux.log_likelihood.sum()

        terms, log_likelihood = self.over_tasks.map(of_task, meta_params, self.tasks)
        if self.sampling_term:
            terms = terms._replace(loss=terms.loss - self.credit() * log_likelihood)
        return jax.tree.map(jnp.mean, terms)

    def credit(self) -> jax.Array:
        """`[T]`: what each task's query return is above that of the others, in units of the loss (E-MAML).

        The episodes that a task adapted to are credited with it as a whole (Stadie et al. 2018, equation 10).
        The other tasks know nothing of them, so their mean can be taken off.
        """
        query = self.tasks.query
        total = query.reward.sum(2).mean(1)
        others = (total.sum() - total) / (len(total) - 1)
        return (total - others) / jnp.maximum(query.episodes.mask.sum(2).mean(1), 1)
