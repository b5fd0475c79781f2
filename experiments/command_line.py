"""How every experiment starts: a dataclass becomes the command line, and a mistake in it becomes one clear line."""

import hashlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import jax
import tyro

from maml_jax.tasks.cache import DataError
from maml_jax.workdir import WorkdirError

Config = TypeVar("Config")
Prepared = TypeVar("Prepared")


def run(
    config_type: type[Config], prepare: Callable[[Config], Prepared], experiment: Callable[[Prepared], object]
) -> None:
    """Parses the command line into `config_type`, checks and loads with `prepare`, and runs the experiment.

    What is wrong with the input, which `prepare` finds before anything long starts, ends the process
    with status 2 and one line on standard error; a loss that stops being finite, and a work directory that cannot
    be written any more, do so with status 1. After SIGINT or SIGTERM in training everything is saved, and the status
    is 130 or 143 (`maml_jax.signals`).
    """
    # As many CPU devices as cores: each goes through its share of the tasks, which uses the cores better
    # than dividing single matrix products does. Without effect where there is an accelerator.
    jax.config.update("jax_num_cpu_devices", cores())
    keep_compiled(Path("runs") / "compiled")
    config = tyro.cli(config_type, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        prepared = prepare(config)
    except (ValueError, DataError, OSError) as error:
        _end(f"error: {error}", 2)
    try:
        experiment(prepared)
    except (FloatingPointError, WorkdirError) as error:
        _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        _end("interrupted", 130)


def keep_compiled(folder: Path) -> None:
    """Keeps compiled programs in `folder`, so that the same run starts sooner the next time.

    Unless `JAX_COMPILATION_CACHE_DIR` names another place. Programs are for one kind of processor, which its
    name alone does not tell, so each has a folder of its own.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    described = platform.processor() + platform.machine()
    if (information := Path("/proc/cpuinfo")).exists():
        lines = information.read_text().splitlines()
        described += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    kind = hashlib.sha256(described.encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(folder / kind))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    raise SystemExit(status)
