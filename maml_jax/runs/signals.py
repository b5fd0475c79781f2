"""SIGINT and SIGTERM as a request to stop, granted where stopping is safe."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals

from maml_jax.parallel import processes
from maml_jax.runs.files import note

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A signal stopped the run after it was saved; the same command goes on.

    Ends the process, if nobody catches it, with status 128 + the signal's number: 130 after SIGINT, 143
    after SIGTERM.
    """

    def __init__(self, number: Signals):
        super().__init__(128 + number)
        self.signal = number


class StopRequest:
    """Whether to stop."""

    signal: Signals | None = None
    """Which signal came; None as long as none did."""


def of_any_process(stop_request: StopRequest) -> Signals | None:
    """The signal that came to the first process that got one; every process has to ask."""
    names = [
        name for name in processes.all_gather_text(stop_request.signal.name if stop_request.signal else "") if name
    ]
    return Signals[names[0]] if names else None


@contextmanager
def deferred() -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM is noted in the value handed over, and the second ends the
    process at once, with status 128 + its number.

    A thread of its own waits for signals, because Python runs handlers only between two bytecodes of the
    main thread, which may be in a compilation of minutes. A signal that the process ignores stays ignored.
    Outside of the main thread nothing is changed: Python lets only that one handle signals.
    """
    stop_request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop_request
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while received := os.read(reading, 1):  # One byte for each signal; none once the other end is closed.
            number = received[0]
            if number not in SIGNALS:
                continue
            if stop_request.signal is not None:
                os._exit(128 + number)
            stop_request.signal = Signals(number)
            note(f"{stop_request.signal.name}: saving after this call, then stopping. A second signal stops at once.")

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in handlers:
        signal.signal(number, lambda *_: None)  # What there is to do, the watcher does.
    try:
        yield stop_request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        os.close(writing)
        watcher.join()
        os.close(reading)
