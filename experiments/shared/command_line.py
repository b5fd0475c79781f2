"""The command line of every experiment, made from a dataclass, with one-line messages for wrong input."""

import dataclasses
import hashlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import tyro

from maml_jax.parallel import backend, processes
from maml_jax.runs.files import WorkdirError
from maml_jax.tasks.cache import DataError

Config = TypeVar("Config")
Prepared = TypeVar("Prepared")


def run(
    config_type: type[Config],
    prepare: Callable[[Config], Prepared],
    experiment: Callable[[Prepared], object],
    *,
    default: Config | None = None,
    several: bool = False,
    small: bool = False,
    calls_host: bool = False,
) -> None:
    """Parses the command line into `config_type`, checks and loads with `prepare`, and runs the experiment.

    Exit status: 2, with one line on standard error, for wrong input, which `prepare` finds before anything long
    starts; 1 for a loss that is not finite and a work directory that cannot be written; 130 or 143 after SIGINT or
    SIGTERM in training, which saves the state first (`maml_jax.runs.signals`).

    Args:
      config_type: dataclass of the options.
      prepare: raises ValueError, DataError or OSError for wrong input.
      experiment: the experiment, given what `prepare` returns.
      several: whether the command has the options of `Hosts`, for several processes that train together. All processes
        exit if one finds wrong input or is lost.
      default: the defaults of the options, if they differ from those of `config_type`.
      small, calls_host: as in `use_cores`.
    """
    use_cores(small, calls_host)
    given: Any = dataclasses.field() if default is None else dataclasses.field(default=default)
    parts: list[tuple[str, Any, Any]] = [("experiment", config_type, given)]
    parts += [("hosts", Hosts, dataclasses.field(kw_only=True))] if several else []
    options: Any = tyro.cli(
        dataclasses.make_dataclass("Options", parts),
        description=config_type.__doc__,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )
    try:
        if several:
            processes.connect(**dataclasses.asdict(options.hosts))
        # Several processes must compile together: a process with a cached program would not take part.
        if not processes.multiple():
            keep_compiled(Path("runs") / "compiled")
    except ValueError as error:
        _end(f"error: {error}", 2)
    problem = ""
    try:
        prepared = prepare(options.experiment)
    except (ValueError, DataError, OSError) as error:
        problem = str(error)
    for number, other in enumerate(processes.all_gather_text(problem)):
        if problem or other:
            _end(f"error: {problem or f'process {number}: {other}'}", 2)
    if not processes.is_leader():
        sys.stdout = open(os.devnull, "w")  # Process 0 prints for all.
    try:
        experiment(prepared)
    except (FloatingPointError, WorkdirError, processes.LeaderError) as error:
        _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except BrokenPipeError:  # The reader of the output, such as `head`, has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        processes.exit_process(1)
    except jax.errors.JaxRuntimeError as error:
        if not (processes.multiple() and any(sign in str(error) for sign in LOST)):
            raise
        _end(f"error: another process is lost; the same command resumes from the last checkpoint: {error}", 1)


LOST = ("Gloo", "UNAVAILABLE", "ABORTED", "onnection")
"""Parts of JAX's messages when a process cannot be reached."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of every training: its directory and its monitoring."""

    workdir: Path | None = None
    """Where the run writes; default: a new directory below runs/."""
    wandb: str | None = None
    """Project of Weights & Biases for a copy of the metrics (pip install wandb)."""
    profile: bool = False
    """Trace the second and the third call of each training to `profile` in the run's directory."""


RUN_OPTIONS = tuple(field.name for field in dataclasses.fields(RunOptions))
"""Names of these options, which change no number."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Several processes as one run: the same command for each, with a different --process."""

    coordinator: str | None = None
    """HOST:PORT of process 0 if several processes train together; 'auto' on Cloud TPU and under Slurm or Open MPI,
    where the other two options are not needed."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Number of this process, from 0. Only process 0 writes files."""


def check_output(path: Path) -> None:
    """Raises ValueError unless a JSON file can be written to `path`, and beside it a PNG of the same name."""
    if not path.parent.is_dir():
        raise ValueError(f"output must be in a directory that exists, but {path.parent} does not.")
    if path.is_dir() or path.suffix == ".png":
        raise ValueError(
            f"output must be a file for JSON, beside which its picture is written as .png, but got {path}."
        )


def keep_compiled(folder: Path) -> None:
    """Caches compiled programs in `folder`, so that the same run starts sooner the next time.

    `JAX_COMPILATION_CACHE_DIR` takes precedence. Programs depend on the features of the processor, so each kind of
    processor has its own folder.
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


def use_cores(small: bool = False, calls_host: bool = False) -> None:
    """Sets the CPU devices and threads of JAX. Call it before the first computation. No effect on an accelerator.

    By default there is one device for each core, and each device computes its share of the tasks: this uses the cores
    better than dividing single matrix products.

    Args:
      small: use one device with one thread. For meta-steps below a millisecond, passing work to other threads takes
        longer than the work.
      calls_host: use one more thread than devices, for programs that call simulators on the host. XLA copies a large
        argument of a call in a thread of its pool while the thread of the device waits; if all threads wait, the
        program hangs (jax-ml/jax#24255). In jaxlib 0.10, so do many large linear systems at once, as those of the
        ant's baseline.
    """
    if not small:
        jax.config.update("jax_num_cpu_devices", backend.cores())
    if small:
        os.environ.setdefault("NPROC", "1")  # The number of cores for XLA.
    elif calls_host:
        given = os.environ.get("NPROC", "")
        os.environ["NPROC"] = str(max(int(given) if given.isdigit() else 0, backend.cores() + 1))


def _end(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    processes.exit_process(status)
