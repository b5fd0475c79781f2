"""Meta-training as a loop: many meta-steps per device call, with the tasks drawn inside the call."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Var, jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from maml_jax import diagnosis, validation
from maml_jax.meta import MetaLearner
from maml_jax.parallel import processes
from maml_jax.types import MetaInfo, MetaState, NotFiniteError, Task

DrawFn = Callable[[Any, jax.Array], Task]
"""`(data, step) -> tasks`: the meta-batch of one meta-step. A pure function that runs on the device."""

Metrics = dict[str, Any]
"""Means over the meta-steps of a call: `loss`, `grad_norm` and the entries of aux. An entry of aux whose name is taken
gets the prefix `aux_`, such as `aux_loss`."""


def many_steps(learner: MetaLearner, draw: DrawFn) -> Callable[..., tuple[MetaState, Metrics, jax.Array]]:
    """Returns a pure function `(state, data, count, stop_requests) -> (state, metrics, stop)`.

    The function takes `count` meta-steps. `count` may be traced, so one compilation serves any number of meta-steps.
    `draw` gets `data` as an argument. Arrays that `draw` closes over become constants of the compiled program.
    `stop_requests` are the bools of all processes, and `stop` tells if any of them is true.

    Raises (when traced):
      ValueError: if the tasks of `draw` depend neither on `data` nor on the step.
    """

    def run(state: MetaState, data: Any, count: jax.Array, stop_requests: Any) -> tuple[MetaState, Metrics, jax.Array]:
        def one_step(_: Any, carry: Any) -> Any:
            state, total = carry
            state, info = learner.step(state, _drawn(draw, data, state.step))
            metrics = _metrics(info)
            return state, metrics if total is None else jax.tree.map(jnp.add, total, metrics)

        shapes = jax.eval_shape(one_step, 0, (state, None))[1]
        # Sum in float32 or wider: a sum of many bfloat16 numbers stops growing.
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shapes)
        state, total = lax.fori_loop(0, count, one_step, (state, zeros))
        # `stop` depends on the final state: all processes must communicate in the same order, and XLA's CPU backend
        # runs independent operations in any order.
        stop = (stop_requests & (state.step > 0)).any()
        return state, jax.tree.map(lambda leaf: leaf / count, total), stop

    return run


def _drawn(draw: DrawFn, data: Any, step: jax.Array) -> Task:
    """Returns `draw(data, step)` after a check that the tasks depend on the data or the step.

    Raises:
      ValueError: if the tasks depend on neither. The loop is compiled once, so every meta-step would train on the tasks
        that `draw` returned while it was traced.
    """
    closed, shapes = jax.make_jaxpr(draw, return_shape=True)(data, step)
    jaxpr = closed.jaxpr
    # Follow the data and the step through the program of `draw`.
    varying = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(isinstance(atom, Var) and atom in varying for atom in equation.invars):
            varying |= set(equation.outvars)
    if not any(isinstance(atom, Var) and atom in varying for atom in jaxpr.outvars):
        raise ValueError(
            "draw returns the same tasks at every meta-step: draw is traced only once, and the tasks depend neither on "
            "data nor on step. Sample the tasks from data and step, for example with jax.random.fold_in(key, step). "
            "For batches from a Python iterator, pass as data a function (first_step, count) -> batches of one call, "
            "and select the batch of a step in draw: see maml_jax.train."
        )
    outputs = jaxpr_as_fun(closed)(*jax.tree.leaves((data, step)))
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def train(
    learner: MetaLearner,
    state: MetaState,
    draw: DrawFn,
    data: Any = None,
    *,
    steps: int,
    steps_per_call: int,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[MetaState, Metrics]]:
    """Meta-trains until `state.step` is `steps`; yields state and metrics after every device call.

    `for state, metrics in train(...)` is the whole training loop. The device computes the next call while the caller
    handles the results of the previous call. When the caller leaves the loop, one more call may be running. All yielded
    states stay valid.

    Example:
      >>> import jax, jax.numpy as jnp, maml_jax, optax
      >>> from maml_jax.tasks import sinusoid
      >>> def loss_fn(params, batch):
      ...     x, y = batch
      ...     return jnp.mean((jnp.tanh(x @ params["w1"]) @ params["w2"] - y) ** 2), {}
      >>> params = {"w1": jax.random.normal(jax.random.key(0), (1, 40)), "w2": jnp.zeros((40, 1))}
      >>> learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.01, steps=1), optax.adam(1e-3))
      >>> def draw(key, step):
      ...     return sinusoid.draw_tasks(jax.random.fold_in(key, step), 25, shots=10, queries=10)
      >>> for state, metrics in maml_jax.train(
      ...     learner, learner.init(params), draw, jax.random.key(1), steps=200, steps_per_call=100
      ... ):
      ...     print(metrics["step"], metrics["loss"] < 10)
      100 True
      200 True

    Args:
      learner: the algorithm.
      state: the initial state: `learner.init(params)`, or the state of an earlier training.
      draw: `(data, step) -> tasks`, the meta-batch of one meta-step.
      data: the data that `draw` samples from, a pytree of arrays that is kept on the device. If the device cannot hold
        the data, pass a function `(first_step, count) -> data of one call`, such as the `data` that
        `tasks.host_memory.episodes_by_step` returns. The function runs in a thread, one call ahead of the device.
        `count` is always `steps_per_call`; the last call may use fewer meta-steps.
      steps: total number of meta-steps, including those that `state` has taken.
      steps_per_call: meta-steps per device call. The last call may be shorter.
      stop: called at every device call; training ends after the current call if it returns True. With several
        processes, all processes end after the same call if `stop` returns True in any process, up to two calls later.

    Yields:
      The state, and the metrics as plain numbers: means over the meta-steps of the call, and `step`, the number of
      meta-steps that the state has taken.

    Raises:
      ValueError: if `steps` or `steps_per_call` is below 1; in the first call, if the tasks of `draw` depend neither on
        `data` nor on `step`.
      NotFiniteError: a FloatingPointError that names the meta-step, if a loss or gradient becomes NaN or infinite.
    """
    validation.at_least("steps", steps, 1)
    validation.at_least("steps_per_call", steps_per_call, 1)
    return _train(learner, state, draw, data, steps, steps_per_call, stop)


def _is_sharded(leaf: Any) -> bool:
    """Whether an array is sharded over devices, such as a parameter of a model that is too large for one device."""
    return isinstance(leaf, jax.Array) and not leaf.sharding.is_fully_replicated


def _placed(state: MetaState) -> tuple[MetaState, Sharding]:
    """Returns the state on all devices of its mesh, and the sharding for data. Sharded leaves stay as they are."""
    sharded = [leaf.sharding for leaf in jax.tree.leaves(state) if _is_sharded(leaf)]
    on_mesh = sharded and isinstance(sharded[0], NamedSharding)
    sharding = NamedSharding(sharded[0].mesh, PartitionSpec()) if on_mesh else jnp.asarray(state.step).sharding
    return jax.tree.map(lambda leaf: leaf if _is_sharded(leaf) else processes.put(leaf, sharding), state), sharding


def _train(learner, state, draw, data, steps, steps_per_call, stop):
    state, sharding = _placed(state)
    done = int(state.step)
    starts = range(done, steps, steps_per_call)
    if not starts:
        return
    run = jax.jit(many_steps(learner, draw))

    def one_more(state, data):
        return run(state, data, 1, processes.stop_requests(False, sharding))

    running = None
    with contextlib.closing(_data_of_calls(data, starts, sharding)) as data_of_calls:
        for count in [*(min(steps_per_call, steps - start) for start in starts), None]:
            # Start a call before the results of the previous call are yielded, so that the device does not wait.
            finished = running
            if count is not None:
                call_data = next(data_of_calls)
                results = run(state, call_data, count, processes.stop_requests(stop(), sharding))
                running = (state, call_data, count, results)
                state = results[0]
            if finished is None:
                continue
            # Handle the results of the previous call.
            before, used_data, taken, (after, metrics, stop_requested) = finished
            metrics = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), metrics)
            if not _finite(metrics):
                raise _not_finite(learner, draw, one_more, before, used_data, taken, metrics)
            done += taken
            yield after, {"step": done, **metrics}
            if bool(stop_requested) if processes.multiple() else stop():
                return


def _data_of_calls(data: Any, starts: range, sharding: Any) -> Generator[Any]:
    """Yields the data of each call, on the devices. If `data` is a function, it runs in a thread of this generator."""
    if not callable(data):
        data = processes.put(data, sharding)  # Transferred once, not in every call.
        for _ in starts:
            yield data
        return

    def prepare(start: int) -> Any:
        # The last call gets the same count as the other calls, so that one compilation serves all calls.
        data_of_call = data(start, starts.step)
        return jax.tree.map(lambda leaf: leaf if _is_sharded(leaf) else processes.put(leaf, sharding), data_of_call)

    with ThreadPoolExecutor(1, "data of the next call") as thread:
        ahead = thread.submit(prepare, starts[0])
        for following in [*starts[1:], None]:
            ready = ahead.result()
            if following is not None:
                ahead = thread.submit(prepare, following)
            yield ready


def _finite(metrics: Metrics) -> bool:
    return bool(np.isfinite([metrics["loss"], metrics["grad_norm"]]).all())


def _not_finite(learner, draw, one_more, state, data, count, metrics) -> NotFiniteError:
    """Repeats the meta-steps of a call one by one, to find the first meta-step with a loss or gradient not finite."""
    first, last = int(state.step) + 1, int(state.step) + count
    for step in range(first, last + 1):
        before = state
        state, single, _ = one_more(before, data)
        single = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), single)
        if not _finite(single):
            where, metrics = f"At meta-step {step}", single
            break
    else:
        where, step = f"Between meta-steps {first} and {last}, but not when they were repeated one by one,", last
    hint = ""
    if step == 1 and not processes.multiple():  # At the start, values of the tasks are the likely cause.
        hint = diagnosis.before_adaptation(learner, before, draw(data, before.step))
    if not hint and np.isfinite(metrics["loss"]):
        hint = (
            "The loss itself is finite: look for an infinite derivative, such as that of a square root at zero. In the "
            "inner loop clip with maml_jax.clip_by_global_norm, not with optax's, and give Adam eps_root > 0."
        )
    elif not hint:
        hint = "A smaller inner or outer rate, or optax.clip_by_global_norm before the outer optimizer, usually helps."
    return NotFiniteError(
        f"{where} the meta-loss or its gradient became NaN or infinite (loss {metrics['loss']}, gradient norm "
        f"{metrics['grad_norm']}). {hint}",
        step,
    )


def _metrics(info: MetaInfo) -> Metrics:
    aux = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), info.aux)
    named = aux if isinstance(aux, dict) else {"aux": aux}
    metrics = {"loss": info.loss, "grad_norm": info.grad_norm}
    return metrics | {f"aux_{key}" if key in (*metrics, "step") else key: value for key, value in named.items()}
