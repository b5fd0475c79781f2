"""Running statistics of the normalisation for each inner step, for inductive evaluation.

MAML++ (Antoniou et al. 2019, section 4) averages statistics during training, separately for each inner step. Here they
are gathered after training, with the final parameters, from tasks of the training classes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maml_jax.inner import InnerLearner, inner_loop
from maml_jax.types import InnerParams, LossFn, Params, Task


def gather(
    net: nn.Module,
    inner: InnerLearner,
    loss_fn: LossFn,
    params: Params,
    inner_params: InnerParams,
    tasks: Task,
    *,
    steps: int,
) -> Params:
    """Parameters for the same net with the normalisation 'running'.

    Evaluate them with `params_at_step=select_step(models.norms_only)`, from `maml_plus_plus`.

    Args:
      net: the trained net, with the normalisation 'batch'.
      inner: the inner learner.
      loss_fn: the support loss.
      params: meta-trained parameters.
      inner_params: meta-trained parameters of the inner update.
      tasks: tasks of the training classes, `[T, ...]`, with as many queries as at test.
      steps: inner steps, S.

    Returns:
      `params`, in which each normalisation has `mean` and `variance` `[S + 1, C]`, the moments of the batch of queries
      after 0 to S inner steps averaged over the tasks, and `offset` `[S + 1, C]`.

    References:
      Antoniou, Edwards and Storkey 2019, How to train your MAML, arXiv:1810.09502.
    """

    def query_moments(params: Params, queries: jax.Array) -> Any:
        return net.apply({"params": params}, queries, mutable=["intermediates"])[1]["intermediates"]

    def moments_along_inner_steps(task: Task) -> Any:
        queries = task.query[0]
        _, info = inner_loop(
            inner,
            loss_fn,
            params,
            inner_params,
            task.support,
            steps=steps,
            probe=lambda params: query_moments(params, queries),
        )
        return info.probes

    averages = jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(moments_along_inner_steps)(tasks))
    gathered = {}
    for layer, sown in averages.items():
        mean, variance = (leaf.reshape(steps + 1, -1) for leaf in sown["moments"][0])
        gathered[layer] = {
            "offset": _offset_per_step(params[layer]["offset"], steps),
            "mean": mean,
            "variance": variance,
        }
    return {**params, **gathered}


def _offset_per_step(offset: jax.Array, steps: int) -> jax.Array:
    """`[S + 1, C]` from one offset `[C]`, or from one per training step, of which the last is repeated."""
    if offset.ndim == 1:
        return jnp.broadcast_to(offset, (steps + 1, *offset.shape))
    return offset[jnp.minimum(jnp.arange(steps + 1), len(offset) - 1)]
