"""SIGINT and SIGTERM as requests to stop. A training stops when its state is saved."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from signal import Signals
from typing import Any, NoReturn

from maml_jax.parallel import processes
from maml_jax.runs.files import print_note

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 10.0
"""Seconds after SIGTERM in which the main thread must leave a block of `ending`."""


class Interrupted(SystemExit):
    """A signal stopped the run; the same command resumes the run.

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
    """
    stop_request = StopRequest()

    def receive(number: Signals) -> None:
        if stop_request.signal is not None:
            os._exit(128 + number)
        stop_request.signal = number
        print_note(f"{number.name}: stopping after this call, once the state is saved. A second signal stops at once.")

    with _handled(SIGNALS, lambda *_: None, receive):  # The thread alone handles the signals.
        yield stop_request


@contextmanager
def ending() -> Iterator[None]:
    """Ends the process at SIGTERM inside the block, with a message and status 143, after `finally` blocks have run.

    If the main thread is in a compilation or a compiled program, and does not leave the block within `GRACE` seconds,
    the process ends without `finally` blocks. Other handlers that are set inside the block, such as those of
    `deferred`, take precedence.
    """
    received: list[Signals] = []

    def interrupt(number: int, _: object) -> None:
        received.append(Signals(number))
        raise Interrupted(received[0])

    def receive(number: Signals) -> None:
        if signal.getsignal(number) is interrupt:
            print_note(f"Stopped by {number.name}. The same command resumes from the last checkpoint, if there is one.")
            killer = threading.Timer(GRACE, os._exit, (128 + number,))
            killer.daemon = True
            killer.start()

    try:
        with _handled((signal.SIGTERM,), interrupt, receive):
            yield
    finally:
        if received:
            exit_at_once(128 + received[0])


def exit_at_once(status: int) -> NoReturn:
    """Exits with `status`. After an interruption inside JAX, `sys.exit` can end in a segmentation fault."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.flush()
    os._exit(status)


@contextmanager
def _handled(
    numbers: Collection[int], handler: Callable[[int, Any], None], receive: Callable[[Signals], None]
) -> Iterator[None]:
    """Sets the handler of signals inside the block, and calls `receive` for each signal in a separate thread.

    Python runs signal handlers only between bytecodes of the main thread, and the main thread may be in a compilation
    that takes minutes. The separate thread runs at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while received := os.read(reading, 1):  # One byte for each signal; empty when the other end is closed.
            if received[0] in numbers:
                receive(Signals(received[0]))

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    handlers = {number: signal.getsignal(number) for number in numbers}
    handlers = {number: before for number, before in handlers.items() if before is not signal.SIG_IGN}
    descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in handlers:
        signal.signal(number, handler)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        os.close(writing)
        watcher.join()
        os.close(reading)
        for number, before in handlers.items():
            signal.signal(number, before)
