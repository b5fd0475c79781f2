"""Running statistics of the normalisation for each inner step, for inductive evaluation.

MAML++ (Antoniou et al. 2019, section 4) averages statistics during training, separately for each inner step. This
module averages them after training, with the final parameters, over tasks of the training classes.
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
    """Returns parameters for the same network with normalisation 'running' in place of 'batch'.

    To evaluate these parameters, give the inner learner the option `params_at_step=select_step(models.norms_only)`
    (see `maml_plus_plus.select_step`).

    Args:
      net: the trained network, with normalisation 'batch'.
      inner: the inner learner of training.
      loss_fn: the support loss.
      params: meta-trained parameters.
      inner_params: meta-trained parameters of the inner update.
      tasks: tasks of the training classes, `[T, ...]`, with as many queries as in evaluation.
      steps: inner steps, S.

    Returns:
      `params` with `mean`, `variance` and `offset` `[S + 1, C]` in each normalisation. Mean and variance are moments of
      the batch of queries after 0 to S inner steps, averaged over the tasks.

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
    """`[S + 1, C]` from one offset `[C]`, or from one offset per training step. The last offset is repeated."""
    if offset.ndim == 1:
        return jnp.broadcast_to(offset, (steps + 1, *offset.shape))
    return offset[jnp.minimum(jnp.arange(steps + 1), len(offset) - 1)]
