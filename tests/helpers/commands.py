"""Starts commands in processes, as a user does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax

import maml_jax

ROOT = Path(maml_jax.__file__).parents[1]


def start(stack, compiled, processes, devices, *command, folders=None):
    """Starts `command` in several processes.

    Args:
      stack: an ExitStack that kills the processes when it closes.
      compiled: the folder of compiled programs.
      processes: the number of processes.
      devices: CPU devices of each process.
      command: arguments of Python. `{port}`, `{processes}` and `{process}` are replaced.
      folders: the working directory of each process.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    port, started = free_port(), []
    for number in range(processes):
        arguments = [str(part).format(port=port, processes=processes, process=number) for part in command]
        child = subprocess.Popen(
            [sys.executable, "-u", *arguments],
            cwd=folders and folders[number],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        started.append(stack.enter_context(child))
        stack.callback(child.kill)
    return started


def free_port():
    """Returns a TCP port that no process uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait(processes):
    """Waits for the processes to end. Returns the text on standard error and the exit status of each process."""
    errors = [child.communicate(timeout=120)[1] for child in processes]
    return errors, [child.returncode for child in processes]


def launch(*args, cwd=None, timeout=300):
    """Runs `python -m` with `args`, by default from the root of the checkout. Compiled programs are shared."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if jax.config.jax_compilation_cache_dir:
        environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # The command chooses its number of devices.
    environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=2", "")
    command = [sys.executable, "-m", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, env=environment, timeout=timeout)
