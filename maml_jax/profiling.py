"""What a device does in a few calls of a training, as a trace to be looked at."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import jax

from maml_jax.workdir import cannot_write, note

Call = TypeVar("Call")

CALLS = range(1, 3)
"""Those that are traced: not the first, which compiles."""


def profiled(calls: Iterable[Call], folder: Path) -> Iterator[Call]:
    """The same calls, of which the second and the third are traced into `folder`.

    `tensorboard --logdir` shows it with the plugin tensorboard-plugin-profile, and ui.perfetto.dev its
    `perfetto_trace.json.gz`.

    Raises:
      WorkdirError: if it cannot be written.
    """
    tracing = False
    try:
        for number, call in enumerate(calls):
            if tracing and number == CALLS.stop:
                tracing = _stop(folder)
            yield call
            if number == CALLS.start - 1:
                try:
                    jax.profiler.start_trace(folder, create_perfetto_trace=True)
                except OSError as error:
                    raise cannot_write(folder, error) from error
                tracing = True
    finally:
        if tracing:
            _stop(folder)


def _stop(folder: Path) -> bool:
    try:
        jax.profiler.stop_trace()
    except OSError as error:
        raise cannot_write(folder, error) from error
    note(f"A profile is in {folder}: for TensorBoard, and perfetto_trace.json.gz in it for ui.perfetto.dev.")
    return False
