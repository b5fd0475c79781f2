"""How every experiment starts: a dataclass becomes the command line, and a mistake in it becomes one clear line."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import jax
import tyro

from maml_jax.tasks.omniglot import DataError

Config = TypeVar("Config")


def run(config_type: type[Config], main: Callable[[Config], object]) -> None:
    """Parses the command line into `config_type` and calls `main` with it.

    What is wrong with the input, which `main` finds before anything long starts, ends the process
    with status 2 and one line on standard error.
    """
    # As many CPU devices as cores: each goes through its share of the tasks, which uses the cores better
    # than dividing single matrix products does. Without effect where there is an accelerator.
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    config = tyro.cli(config_type, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        main(config)
    except (ValueError, DataError, FileExistsError, PermissionError, NotADirectoryError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
