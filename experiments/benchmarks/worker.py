"""Runs one job of `experiments.accelerator`: compiles, prints "ready", waits for a line, and prints a line of JSON.

    echo | python -m experiments.benchmarks.worker '{"job": "measure", "workload": "sinusoid"}'

The jobs compile at the same time, and use the accelerator one after the other.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

import maml_jax
from experiments.benchmarks import breakdown, measure
from experiments.benchmarks.measure import Variant
from maml_jax import losses
from maml_jax.nets import models


def ready() -> None:
    """Tells the parent process that this process has compiled, and waits for its turn. Exits if the parent ended."""
    print("ready", flush=True)
    if not sys.stdin.readline():
        sys.exit("The parent process has ended.")


def exactness(implementation: str, pooled: bool) -> dict[str, Any]:
    """Checks the second derivatives of the paper's net in float64, with one implementation of the convolution."""
    net = models.ConvNet(3, 4, pooled, implementation=implementation)  # type: ignore[arg-type]
    size = 16 if pooled else 12
    images = jax.random.uniform(jax.random.key(0), (2, 3, size, size, 1))
    batch = images, jnp.tile(jnp.arange(3), (2, 1))
    params = jax.jit(net.init)(jax.random.key(1), images[0])["params"]
    inner = maml_jax.sgd(0.4, steps=2, trainable=models.all_but_norms)
    loss_fn = losses.cross_entropy(models.apply_params(net))
    report = maml_jax.check_meta_gradient(loss_fn, params, maml_jax.Task(batch, batch), inner, directions=1)
    ready()
    return {"exact": report.exact, "report": str(report)}


def main(given: dict[str, Any]) -> dict[str, Any]:
    """Runs the job; returns its result."""
    job = given.pop("job")
    if job == "exactness":
        return exactness(**given)
    if job == "measure":
        seconds = given.pop("seconds")
        return measure.measure(Variant(**given), seconds, ready)
    if job == "breakdown":
        return breakdown.breakdown(Variant(**given), ready)
    found = measure.gradient_error(Variant(**given))
    ready()
    return {"gradient_error": found}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
