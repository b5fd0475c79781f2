"""Running statistics for each inner step, so that a query can be normalised without the others of its task.

MAML++ (Antoniou et al. 2019, section 4) averages statistics along the training, for each inner step its own.
Here they are gathered when it has ended, with its final parameters, from tasks of the training classes.
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
    """Parameters for the same net with the normalisation 'running', for `select_step(models.norms_only)`.

    Args:
      net: as it was trained, with the normalisation 'batch'.
      inner: how a task is learned.
      loss_fn: the support loss.
      params: meta-trained.
      inner_params: meta-trained inner_params of the inner loop.
      tasks: of the training classes, with queries as many as there will be.
      steps: inner steps, S.

    Returns:
      `params` with, in each normalisation, `mean` and `variance` `[S + 1, C]`: of the batch of queries after 0 to S
      inner steps, averaged over the tasks; and the offset as often.
    """

    def moments(params: Params, inputs: jax.Array) -> Any:
        return net.apply({"params": params}, inputs, mutable=["intermediates"])[1]["intermediates"]

    def one(task: Task) -> Any:
        _, info = inner_loop(
            inner, loss_fn, params, inner_params, task.support, steps=steps, probe=lambda p: moments(p, task.query[0])
        )
        return info.probes

    means = jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(one)(tasks))
    gathered = {}
    for layer, found in means.items():
        mean, variance = (leaf.reshape(steps + 1, -1) for leaf in found["moments"][0])
        gathered[layer] = {"offset": _of_every_step(params[layer]["offset"], steps), "mean": mean, "variance": variance}
    return {**params, **gathered}


def _of_every_step(offset: jax.Array, steps: int) -> jax.Array:
    """`[S + 1, C]` from one for all, or from those of the steps in training, of which the last is taken on."""
    if offset.ndim == 1:
        return jnp.broadcast_to(offset, (steps + 1, *offset.shape))
    return offset[jnp.minimum(jnp.arange(steps + 1), len(offset) - 1)]
