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

from maml_jax import validation
from maml_jax.meta import MetaLearner
from maml_jax.parallel import processes
from maml_jax.types import MetaInfo, MetaState, NotFiniteError, Task

DrawFn = Callable[[Any, jax.Array], Task]
"""`(data, step) -> tasks`: the meta-batch of one meta-step. A pure function that runs on the device."""

Metrics = dict[str, Any]
"""Means over the meta-steps of a call: `loss`, `grad_norm`, and the entries of the loss's aux (`aux_loss` and so on
where a name is taken)."""


def many_steps(learner: MetaLearner, draw: DrawFn) -> Callable[[MetaState, Any, jax.Array], tuple[MetaState, Metrics]]:
    """`(state, data, count) -> (state, metrics)`: `count` meta-steps as one pure function.

    `count` may be traced: one compilation serves any number. `data` is handed to `draw`. Arrays that `draw` closes over
    would become constants of the compiled program.
    """

    def run(state: MetaState, data: Any, count: jax.Array) -> tuple[MetaState, Metrics]:
        def one_step(_: Any, carry: Any) -> Any:
            state, total = carry
            state, info = learner.step(state, _drawn(draw, data, state.step))
            metrics = _metrics(info)
            return state, metrics if total is None else jax.tree.map(jnp.add, total, metrics)

        shapes = jax.eval_shape(one_step, 0, (state, None))[1]
        # Sums in float32 at least: a sum of many bfloat16 numbers stops growing.
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shapes)
        state, total = lax.fori_loop(0, count, one_step, (state, zeros))
        return state, jax.tree.map(lambda leaf: leaf / count, total)

    return run


def _drawn(draw: DrawFn, data: Any, step: jax.Array) -> Task:
    """`draw(data, step)`, checked to depend on the data or the step.

    Raises:
      ValueError: if it depends on neither. The loop is compiled once, so every meta-step would train on the tasks that
        `draw` returned while it was traced.
    """
    closed, shapes = jax.make_jaxpr(draw, return_shape=True)(data, step)
    jaxpr = closed.jaxpr
    varying = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(isinstance(atom, Var) and atom in varying for atom in equation.invars):
            varying |= set(equation.outvars)
    if not any(isinstance(atom, Var) and atom in varying for atom in jaxpr.outvars):
        raise ValueError(
            "draw returns the same tasks at every meta-step: they depend neither on data nor on step, because draw is "
            "traced once and compiled. Draw from data and step, for example with jax.random.fold_in(key, step). For "
            "batches from a Python iterator, let data be a function (first_step, count) -> batches of a call, and draw "
            "select from it: see maml_jax.train."
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
    handles the results of the last one. So when the caller leaves the loop, one more call may be running. States that
    were yielded stay valid.

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
      state: where to start: `learner.init(params)`, or the state of an earlier training.
      draw: `(data, step) -> tasks`.
      data: what `draw` draws from, kept on the device. If the device is too small: a function `(first step, count) ->
        data` of one call with `count` meta-steps, such as `host_memory.episodes_by_step` gives. It runs in a thread,
        one call ahead of the device. Every call asks for the same `count`; the last call may use fewer.
      steps: meta-steps in all, including those that `state` has taken.
      steps_per_call: meta-steps per device call. The last call may be shorter.
      stop: asked after every call whether to end early. If any of several processes says so, all end after the same
        call, up to two calls later.

    Yields:
      The state, and the metrics as plain numbers: means over the call's meta-steps, and `step`, the meta-steps taken.

    Raises:
      ValueError: for fewer than 1 step, at once; at the first call, for a `draw` that depends neither on `data` nor
        on `step`.
      NotFiniteError: a FloatingPointError that names the meta-step, if a loss or gradient becomes NaN or infinite.
    """
    validation.at_least("steps", steps, 1)
    validation.at_least("steps_per_call", steps_per_call, 1)
    return _train(learner, state, draw, data, steps, steps_per_call, stop)


def _is_divided(leaf: Any) -> bool:
    """Whether an array is divided over devices, as that of a model too large for one of them."""
    return isinstance(leaf, jax.Array) and not leaf.sharding.is_fully_replicated


def _placed(state: MetaState) -> tuple[MetaState, Sharding]:
    """The state on all devices of its mesh, divided leaves unchanged; and the sharding for data."""
    divided = [leaf.sharding for leaf in jax.tree.leaves(state) if _is_divided(leaf)]
    on_mesh = divided and isinstance(divided[0], NamedSharding)
    sharding = NamedSharding(divided[0].mesh, PartitionSpec()) if on_mesh else jnp.asarray(state.step).sharding
    return jax.tree.map(lambda leaf: leaf if _is_divided(leaf) else processes.put(leaf, sharding), state), sharding


def _train(learner, state, draw, data, steps, steps_per_call, stop):
    state, sharding = _placed(state)
    done = int(state.step)
    starts = range(done, steps, steps_per_call)
    if not starts:
        return
    run_steps = many_steps(learner, draw)

    @jax.jit
    def run(state, data, count, stop_requests):
        # Each call takes this process's stop request and returns whether any process has one. That is found after the
        # meta-steps: XLA's CPU backend runs independent operations in any order, and processes must communicate in one.
        state, metrics = run_steps(state, data, count)
        return state, metrics, (stop_requests & (state.step > 0)).any()

    def one_more(state, data):
        return run(state, data, 1, processes.stop_requests(False, sharding))

    running = None
    with contextlib.closing(_data_of_calls(data, starts, sharding)) as data_of_calls:
        for count in [*(min(steps_per_call, steps - start) for start in starts), None]:
            # Start a call before the results of the previous call are handed over: the device does not wait.
            finished = running
            if count is not None:
                call_data = next(data_of_calls)
                results = run(state, call_data, count, processes.stop_requests(stop(), sharding))
                running = (state, call_data, count, results)
                state = results[0]
            if finished is None:
                continue
            before, used, taken, (after, metrics, stop_requested) = finished
            metrics = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), metrics)
            if not _finite(metrics):
                raise _not_finite(one_more, before, used, taken, metrics)
            done += taken
            yield after, {"step": done, **metrics}
            if bool(stop_requested) if processes.multiple() else stop():
                return


def _data_of_calls(data: Any, starts: range, sharding: Any) -> Generator[Any]:
    """The data of each call, on the devices. A function `data` runs in a thread, which ends with the iterator."""
    if not callable(data):
        data = processes.put(data, sharding)  # Once, not at every call.
        for _ in starts:
            yield data
        return

    def prepare(start: int) -> Any:
        # The same count for the last call as for the others: one compilation serves all.
        made = data(start, starts.step)
        return jax.tree.map(lambda leaf: leaf if _is_divided(leaf) else processes.put(leaf, sharding), made)

    with ThreadPoolExecutor(1, "data of the next call") as thread:
        ahead = thread.submit(prepare, starts[0])
        for following in [*starts[1:], None]:
            ready = ahead.result()
            if following is not None:
                ahead = thread.submit(prepare, following)
            yield ready


def _finite(metrics: Metrics) -> bool:
    return bool(np.isfinite([metrics["loss"], metrics["grad_norm"]]).all())


def _not_finite(one_more, state, data, count, metrics) -> NotFiniteError:
    """Repeats the call's meta-steps one by one, to name the first whose loss or gradient is not finite."""
    first, last = int(state.step) + 1, int(state.step) + count
    for step in range(first, last + 1):
        state, single, _ = one_more(state, data)
        single = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), single)
        if not _finite(single):
            where, metrics = f"At meta-step {step}", single
            break
    else:
        where, step = f"Between meta-steps {first} and {last}, but not when they were repeated one by one,", last
    if np.isfinite(metrics["loss"]):
        hint = "The loss itself is finite: look for a derivative that is not, such as that of a square root at zero"
    else:
        hint = "A smaller inner or outer rate, or optax.clip_by_global_norm before the outer optimizer, usually helps"
    return NotFiniteError(
        f"{where} the meta-loss or its gradient stopped being finite (loss {metrics['loss']}, gradient norm "
        f"{metrics['grad_norm']}). {hint}.",
        step,
    )


def _metrics(info: MetaInfo) -> Metrics:
    aux = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), info.aux)
    named = aux if isinstance(aux, dict) else {"aux": aux}
    metrics = {"loss": info.loss, "grad_norm": info.grad_norm}
    return metrics | {f"aux_{key}" if key in (*metrics, "step") else key: value for key, value in named.items()}
