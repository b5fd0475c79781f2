"""The meta-steps of the benchmark in plain JAX, as one writes them first, with no layers of this library.

    python -m experiments.benchmarks.plain_jax '{"workload": "omniglot-5w1s"}'

The nets use `nn.Conv`, `nn.Dense` and `nn.max_pool`. `vmap` maps the inner loop over tasks, and one `jit` compiles the
meta-gradient and Adam. The nets have the parameters of `maml_jax.nets.models`. The module prints a line of JSON.
"""

import json
import sys
import time
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks import workloads
from experiments.shared.command_line import use_cores


class PlainNet(nn.Module):
    """Four blocks of convolution, batch normalisation with an offset, and ReLU."""

    ways: int
    filters: int
    pooled: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stride = 1 if self.pooled else 2
        for block in range(4):
            x = nn.Conv(self.filters, (3, 3), (stride, stride), use_bias=False, name=f"Conv_{block}")(x)
            offset = self.param(f"Norm_{block}", nn.initializers.zeros, x.shape[-1:])
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            x = nn.relu((x - mean) * jax.lax.rsqrt(variance + 1e-3) + offset)
            x = nn.max_pool(x, (2, 2), (2, 2)) if self.pooled else x
        x = x.reshape(len(x), -1) if self.pooled else x.mean((1, 2))
        return nn.Dense(self.ways, name="head")(x)


class PlainMLP(nn.Module):
    """The net of the sinusoid."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(40)(x))
        return nn.Dense(1)(nn.relu(nn.Dense(40)(x)))


def build(workload: str, order: int = 2, inner_steps: int | None = None) -> tuple[Any, Any, Any]:
    """Returns `meta_loss(params, support, query)` of a workload, its initial parameters, and its tasks."""
    work = workloads.build(workload)
    setting = workloads.IMAGES.get(workload)
    net = PlainMLP() if setting is None else PlainNet(setting.ways, setting.filters, setting.pooled)

    def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        outputs: Any = net.apply({"params": params}, inputs)
        if setting is None:
            return jnp.mean((outputs - targets) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()

    def task_loss(params: Any, support: Any, query: Any) -> jax.Array:
        for _ in range(inner_steps or work.inner_steps):
            grads: Any = jax.grad(loss)(params, *support)
            grads = grads if order == 2 else jax.lax.stop_gradient(grads)
            stepped = jax.tree.map(lambda p, g: p - work.inner_rate * g, params, grads)
            params = {layer: params[layer] if layer.startswith("Norm_") else stepped[layer] for layer in params}
        return loss(params, *query)

    def meta_loss(params: Any, support: Any, query: Any) -> jax.Array:
        return jax.vmap(partial(task_loss, params))(support, query).mean()

    return meta_loss, jax.jit(net.init)(jax.random.key(0), work.tasks.support[0][0])["params"], work.tasks


def main(given: dict[str, Any]) -> dict[str, Any]:
    """Measures the meta-step of a workload; returns the times in ms and the time of compilation in seconds."""
    meta_loss, params, tasks = build(given["workload"], given.get("order", 2), given.get("inner_steps"))
    seconds = given.get("seconds", 3.0)
    outer = optax.adam(1e-3)

    def meta_step(params: Any, state: Any, support: Any, query: Any) -> Any:
        updates, state = outer.update(jax.grad(meta_loss)(params, support, query), state)
        return optax.apply_updates(params, updates), state

    state = outer.init(params)
    start = time.perf_counter()
    step = jax.jit(meta_step, donate_argnums=(0, 1)).lower(params, state, *tasks).compile()
    compile_s = time.perf_counter() - start

    def milliseconds(count: int) -> float:
        nonlocal params, state
        start = time.perf_counter()
        for _ in range(count):
            params, state = step(params, state, *tasks)
        jax.block_until_ready(params)
        return 1e3 * (time.perf_counter() - start) / count

    milliseconds(2)
    per_time = max(1, int(300 / milliseconds(1)))
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        times.append(milliseconds(per_time))
    return {"ms": times, "compile_s": compile_s, "version": jax.__version__}


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    use_cores(options["workload"] in workloads.SMALL)
    print(json.dumps(main(options)))
