"""Meta-training as a loop: many meta-steps per device call, with tasks drawn inside the call."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from maml_jax import validation
from maml_jax.meta import MetaLearner
from maml_jax.parallel import processes
from maml_jax.types import MetaInfo, MetaState, NotFiniteError, Task

DrawFn = Callable[[Any, jax.Array], Task]
"""`(data, step) -> tasks`: the meta-batch of one step, a pure function that runs on the device."""

Metrics = dict[str, Any]
"""Means over some meta-steps: `loss`, `grad_norm`, and the entries of the loss's aux (`aux_loss` and the
like where a name is taken)."""


def many_steps(learner: MetaLearner, draw: DrawFn) -> Callable[[MetaState, Any, jax.Array], tuple[MetaState, Metrics]]:
    """`(state, data, count) -> (state, metrics)`: `count` meta-steps as one pure function.

    `count` may be traced, so that one compilation serves any number. `data` is passed through to
    `draw`; arrays closed over instead would become constants of the compiled program.
    """

    def one_step(state: MetaState, data: Any) -> tuple[MetaState, Metrics]:
        state, info = learner.step(state, draw(data, state.step))
        return state, _metrics(info)

    def run(state: MetaState, data: Any, count: jax.Array) -> tuple[MetaState, Metrics]:
        def body(_, carry):
            state, total = carry
            state, metrics = one_step(state, data)
            return state, jax.tree.map(jnp.add, total, metrics)

        shapes = jax.eval_shape(one_step, state, data)[1]
        # In float32 at least: a sum of many bfloat16 numbers stops growing.
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shapes)
        state, total = lax.fori_loop(0, count, body, (state, zeros))
        return state, jax.tree.map(lambda leaf: leaf / count, total)

    return run


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
    """Meta-trains until `state.step` is `steps`, and hands over state and metrics after every call.

    `for state, metrics in train(...)` is the whole training loop. While the caller has the results of one
    call in hand, the device is at the next, so that it never waits; states that were handed over stay
    whole, and one more call than was asked for may be under way when the caller stops early.

    Args:
      learner: what to train.
      state: where to start, `learner.init(params)` or an earlier run's.
      draw: `(data, step) -> tasks`.
      data: what `draw` draws from, kept on the device; or, where that is too small, a function `(first step, count)
        -> data of a call` of `count` meta-steps, such as `host_memory.episodes_by_step` gives, that runs in a thread,
        one call ahead of the device. All calls ask for as many steps, though the last may take fewer.
      steps: meta-steps in all, counting those that `state` has behind it.
      steps_per_call: meta-steps per device call; the last call may be shorter.
      stop: asked after every call whether to end early. Of several processes any one can end the training, of all
        after the same call, up to two calls later.

    Yields:
      The state, and as plain numbers the means over the call's meta-steps, with the number of steps
      taken so far as `step`.

    Raises:
      ValueError: for fewer than 1 step, at once.
      NotFiniteError: if loss or gradient stop being finite, a FloatingPointError that names the step.
    """
    validation.at_least("steps", steps, 1)
    validation.at_least("steps_per_call", steps_per_call, 1)
    return _train(learner, state, draw, data, steps, steps_per_call, stop)


def _placed(state: MetaState) -> tuple[MetaState, Sharding]:
    """The state on all devices of its mesh, and where data are to be: with it.

    A leaf that is divided over devices, as of a model that one of them cannot hold, stays as it is.
    """

    def divided(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and not leaf.sharding.is_fully_replicated

    split = [leaf.sharding for leaf in jax.tree.leaves(state) if divided(leaf)]
    on_mesh = split and isinstance(split[0], NamedSharding)
    sharding = NamedSharding(split[0].mesh, PartitionSpec()) if on_mesh else jnp.asarray(state.step).sharding
    return jax.tree.map(lambda leaf: leaf if divided(leaf) else processes.put(leaf, sharding), state), sharding


def _train(learner, state, draw, data, steps, steps_per_call, stop):
    state, sharding = _placed(state)
    starts = range(int(state.step), steps, steps_per_call)
    if not starts:
        return
    steps_of = many_steps(learner, draw)

    @jax.jit
    def run(state, data, count, stop_requests):
        # With each call goes whether this process wants to stop, and from it comes whether any one wants to. That is
        # found after the steps: XLA's CPU runs what is independent in any order, and processes must communicate in one.
        state, metrics = steps_of(state, data, count)
        return state, metrics, (stop_requests & (state.step > 0)).any()

    def call(state, data, count):
        return run(state, data, count, processes.stop_requests(stop(), sharding))

    with contextlib.closing(_data_of_calls(data, starts, sharding)) as data_of_calls:
        yield from _calls(call, state, data_of_calls, starts, stop)


def _calls(call, state, data_of_calls, starts, stop):
    done = starts.start
    counts = [min(starts.step, starts.stop - start) for start in starts]
    before, data = state, next(data_of_calls)
    under_way = call(state, data, counts[0])
    for count, following in zip(counts, [*counts[1:], None]):
        state, metrics, wanted = under_way
        coming = None
        if following is not None:
            coming = next(data_of_calls)
            under_way = call(state, coming, following)
        metrics = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), metrics)
        if not _finite(metrics):
            raise _not_finite(call, before, data, count, metrics)
        before, data, done = state, coming, done + count
        yield state, {"step": done, **metrics}
        if bool(wanted) if processes.multiple() else stop():
            return


def _data_of_calls(data: Any, starts: range, sharding: Any) -> Generator[Any]:
    """The data of each call, on the devices. The thread in which a function makes them ends with the iterator."""
    if not callable(data):
        data = processes.put(data, sharding)  # Once, not at every call.
        for _ in starts:
            yield data
        return

    def made(start: int) -> Any:
        # As many for the last call as for the others, so that one compilation serves all.
        # What is divided over devices already stays so.
        return jax.tree.map(
            lambda leaf: leaf if _divided(leaf) else processes.put(leaf, sharding), data(start, starts.step)
        )

    with ThreadPoolExecutor(1, "data of the next call") as thread:
        ahead = thread.submit(made, starts[0])
        for following in [*starts[1:], None]:
            ready = ahead.result()
            if following is not None:
                ahead = thread.submit(made, following)
            yield ready


def _divided(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def _finite(metrics: Metrics) -> bool:
    return bool(np.isfinite([metrics["loss"], metrics["grad_norm"]]).all())


def _not_finite(call, state, data, count, metrics) -> NotFiniteError:
    """Takes the call's steps again one by one, to name the first that is wrong."""
    first, last = int(state.step) + 1, int(state.step) + count
    for step in range(first, last + 1):
        state, single, _ = call(state, data, 1)
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
