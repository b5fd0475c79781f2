"""SIGINT and SIGTERM as requests to stop. A training stops when its state is saved."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals

from maml_jax.parallel import processes
from maml_jax.runs.files import print_note

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A signal stopped the run after its state was saved; the same command resumes the run.

    An uncaught `Interrupted` ends the process with status 128 + the number of the signal: 130 after SIGINT, 143 after
    SIGTERM.
    """

    def __init__(self, number: Signals):
        super().__init__(128 + number)
        self.signal = number


class StopRequest:
    """Whether a signal asked this process to stop."""

    signal: Signals | None = None
    """The signal that arrived, or None."""


def signal_of_any_process(stop_request: StopRequest) -> Signals | None:
    """Returns the signal of the first process that received a signal, or None. All processes must call the function."""
    received = processes.all_gather_text(stop_request.signal.name if stop_request.signal else "")
    return next((Signals[name] for name in received if name), None)


@contextmanager
def deferred() -> Iterator[StopRequest]:
    """Defers SIGINT and SIGTERM inside the block.

    The first signal is stored in the yielded `StopRequest`. The second signal ends the process at once, with status
    128 + the number of the signal. Signals that the process ignores stay ignored. In other threads than the main thread
    the function does nothing, because Python lets only the main thread handle signals.

    A separate thread waits for the signals. Python runs signal handlers only between bytecodes of the main thread, and
    the main thread may be in a compilation that takes minutes.
    """
    stop_request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop_request
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while received := os.read(reading, 1):  # One byte for each signal; empty when the other end is closed.
            number = received[0]
            if number not in SIGNALS:
                continue
            if stop_request.signal is not None:
                os._exit(128 + number)
            stop_request.signal = Signals(number)
            print_note(
                f"{stop_request.signal.name}: stopping after this call, once the state is saved. A second signal stops "
                "at once."
            )

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in handlers:
        signal.signal(number, lambda *_: None)  # The watcher handles the signal.
    try:
        yield stop_request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        os.close(writing)
        watcher.join()
        os.close(reading)
