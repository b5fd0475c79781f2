"""What a device does in a few calls of a training, as a trace to be looked at."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import jax

from maml_jax.runs.files import cannot_write, note

Call = TypeVar("Call")


def profiled(calls: Iterable[Call], folder: Path) -> Iterator[Call]:
    """The same calls, with a trace in `folder` of the time in which the second and the third are waited for and used.

    The first compiles. As `train` is one call ahead, a part of the second may be missing, and the fourth begins within.
    `tensorboard --logdir` shows it with the plugin tensorboard-plugin-profile, and ui.perfetto.dev its
    `perfetto_trace.json.gz`.

    Raises:
      WorkdirError: if it cannot be written.
    """
    waiting, traced = iter(calls), 0
    yield from islice(waiting, 1)
    try:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for traced, call in enumerate(islice(waiting, 2), 1):
                yield call
    except OSError as error:
        raise cannot_write(folder, error) from error
    if traced:
        note(f"A profile of {traced} calls is in {folder}: for TensorBoard, and for ui.perfetto.dev.")
    else:
        note("There is no profile: the training ended with its first call, which compiles.")
    yield from waiting
