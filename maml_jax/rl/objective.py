"""The outer objective as a function of the meta-parameters, on episodes that were sampled before."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maml_jax.inner import InnerLearner, inner_loop
from maml_jax.parallel.task_axis import TaskAxis
from maml_jax.rl.losses import clipped_ratio, ratio
from maml_jax.rl.policy import Distribution, Policy
from maml_jax.types import LossFn, MetaParams, Task


class Divergences(NamedTuple):
    """KL divergences of policies from the policies that sampled the episodes; scalars, means over the tasks."""

    kl: jax.Array
    """KL divergence from the policies that sampled the query episodes to the adapted policies."""
    inner_kl: jax.Array
    """KL divergence from the policies that sampled the support episodes to the policies before each inner step: the
    mean over the steps, 0 without inner steps."""


class Objective(NamedTuple):
    """The outer objective of one meta-batch (Finn et al. 2017, arXiv:1703.03400, algorithm 3, line 10)."""

    policy: Policy
    inner: InnerLearner
    loss_fn: LossFn
    """The inner loss."""
    tasks: Task
    """`[T, ...]`: `support` is the `Experience` of each inner step, with a second axis `S`; `query` is the `Experience`
    after the last step."""
    sampling_term: bool
    """Whether the loss has the E-MAML term for the sampling of the support episodes."""
    over_tasks: TaskAxis
    """How the tasks are divided into groups and over devices."""

    def distributions(self, meta_params: MetaParams) -> Distribution:
        """Returns the action distributions of the adapted policies in the query episodes, `[T, E, H, A]`."""

        def task_distribution(meta_params: MetaParams, task: Task) -> Distribution:
            params, _ = inner_loop(self.inner, self.loss_fn, *meta_params, task.support, batch_per_step=True)
            return self.policy.apply(params, task.query.episodes.observation)

        return self.over_tasks.map(task_distribution, meta_params, self.tasks)

    def kl(self, distributions: Distribution) -> jax.Array:
        """Returns the mean KL divergence from the policies that sampled the query episodes to `distributions`."""
        return jax.vmap(lambda task, new: task.query.kl_to(new))(self.tasks, distributions).mean()

    def loss(self, meta_params: MetaParams, clip: float | None = None) -> tuple[jax.Array, Divergences]:
        """Returns the outer loss and the divergences, means over the tasks.

        The loss is minus the mean of likelihood ratio times advantage after adaptation, plus the E-MAML term with
        `sampling_term`. With `clip`, likelihood ratios outside 1 +- clip do not lower the loss.
        """

        def task_loss(meta_params: MetaParams, task: Task) -> tuple[jax.Array, Divergences, jax.Array]:
            # Adapt on the support episodes.
            params, info = inner_loop(self.inner, self.loss_fn, *meta_params, task.support, batch_per_step=True)
            # Evaluate the adapted policy on the query episodes.
            distribution = self.policy.apply(params, task.query.episodes.observation)
            log_prob = task.query.log_prob_under(distribution)
            loss = ratio(task.query, log_prob) if clip is None else clipped_ratio(task.query, log_prob, clip)
            inner_kl = info.aux.kl.sum() / max(1, self.inner.steps)
            divergences = Divergences(task.query.kl_to(distribution), inner_kl)
            return loss, divergences, info.aux.log_likelihood.sum()

        loss, divergences, log_likelihood = self.over_tasks.map(task_loss, meta_params, self.tasks)
        if self.sampling_term:
            loss = loss - self.sampling_credit() * log_likelihood
        return loss.mean(), jax.tree.map(jnp.mean, divergences)

    def sampling_credit(self) -> jax.Array:
        """Returns the factors of the E-MAML term: each query return minus the mean of the other tasks, `[T]`.

        In E-MAML the factor of the log probability of the support episodes is the query return of the same task
        (Stadie et al. 2018, arXiv:1803.01118, equation 10). The returns of other tasks do not depend on these episodes,
        so their mean is a valid baseline. The factors are divided by the mean length of an episode, because the loss is
        a mean over time steps.
        """
        query = self.tasks.query
        total = query.reward.sum(2).mean(1)
        others = (total.sum() - total) / (len(total) - 1)
        return (total - others) / jnp.maximum(query.episodes.mask.sum(2).mean(1), 1)
