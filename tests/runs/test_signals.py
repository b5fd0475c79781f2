"""SIGINT and SIGTERM are deferred, and the state of the process is restored."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.commands import ROOT

from maml_jax.runs import signals


def test_the_first_signal_is_stored_and_the_process_state_is_restored():
    def process_state():
        descriptor = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(descriptor)
        handlers = [signal.getsignal(number) for number in signals.SIGNALS]
        pipes = [path for path in Path("/proc/self/fd").iterdir() if path.is_fifo()]
        return descriptor, handlers, sorted(pipes), any(t.name == "signals" for t in threading.enumerate())

    before = process_state()
    with signals.deferred() as stop_request:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while stop_request.signal is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop_request.signal == signal.SIGTERM
        assert signals.signal_of_any_process(stop_request) == signal.SIGTERM
    assert process_state() == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ignored_signals_stay_ignored():
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.deferred() as stop_request:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        assert stop_request.signal is None and signals.signal_of_any_process(stop_request) is None
    finally:
        signal.signal(signal.SIGINT, handler)


def test_signals_are_not_deferred_in_other_threads():
    requests = []

    def defer_in_thread():
        with signals.deferred() as stop_request:
            requests.append(stop_request)

    thread = threading.Thread(target=defer_in_thread)
    thread.start()
    thread.join()
    assert requests[0].signal is None


ENDING = """
import sys, time
import jax, jax.numpy as jnp
from maml_jax.runs import signals
signals.GRACE = 0.2
try:
    with signals.ending():
        print("running", flush=True)
        if sys.argv[1] == "Python":
            time.sleep(60)
        jax.jit(lambda x: jax.lax.while_loop(lambda y: y < 2.0, jnp.sin, x))(1.0).block_until_ready()
finally:
    print("not reached")
"""


@pytest.mark.parametrize("where", ["Python", "a compiled program"])
def test_sigterm_ends_a_block_that_saves_nothing(where):
    command = [sys.executable, "-c", ENDING, where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout.readline() == "running\n"
        time.sleep(0 if where == "Python" else 1)  # The compilation is fast.
        child.terminate()
        assert child.wait(timeout=30) == 143
        assert "note: Stopped by SIGTERM. The same command resumes" in child.stderr.read()
        assert not child.stdout.read()
