"""A profiler trace of two calls of a training."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import jax

from maml_jax.runs.files import print_note, write_error

Call = TypeVar("Call")


def profile_calls(calls: Iterable[Call], folder: Path) -> Iterator[Call]:
    """Yields the results of `calls`, and traces the second and the third call with the JAX profiler.

    The first call is not traced, because the first call compiles. `train` computes one call ahead, so the trace may
    lack the start of the second call and hold the start of the fourth call. `tensorboard --logdir` shows the trace with
    the plugin tensorboard-plugin-profile. ui.perfetto.dev shows the file `perfetto_trace.json.gz`.

    Args:
      calls: the iterator of `train`.
      folder: the folder of the trace.

    Raises:
      WorkdirError: if the trace cannot be written.
    """
    remaining, traced = iter(calls), 0
    yield from islice(remaining, 1)
    try:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for traced, call in enumerate(islice(remaining, 2), 1):
                yield call
    except OSError as error:
        raise write_error(folder, error) from error
    if traced:
        print_note(f"A profile of {traced} calls is in {folder}, for TensorBoard and ui.perfetto.dev.")
    else:
        print_note("There is no profile: the training ended after the first call, which is not traced.")
    yield from remaining
