"""How every experiment starts: a dataclass becomes the command line, and a mistake in it becomes one clear line."""

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

    What is wrong with the input, which `prepare` finds before anything long starts, ends the process
    with status 2 and one line on standard error; a loss that stops being finite, and a work directory that cannot
    be written any more, do so with status 1. After SIGINT or SIGTERM in training everything is saved, and the status
    is 130 or 143 (`maml_jax.runs.signals`).

    With `several` the command line has the options of `Hosts` too, which make the process one of several; all end if
    one finds its input wrong or is lost.

    `default` holds the defaults of the options, if they differ from those of `config_type`.

    `small` and `calls_host` are those of `use_cores`.
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
        if not processes.multiple():  # Several compile together, which one that finds its program kept would not.
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
        sys.stdout = open(os.devnull, "w")  # One tells what all of them do.
    try:
        experiment(prepared)
    except (FloatingPointError, WorkdirError, processes.LeaderError) as error:
        _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except BrokenPipeError:  # Whoever read the output, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        processes.exit_process(1)
    except jax.errors.JaxRuntimeError as error:
        if not (processes.multiple() and any(sign in str(error) for sign in LOST)):
            raise
        _end(f"error: another process is lost, and the same command goes on from the last checkpoint: {error}", 1)


LOST = ("Gloo", "UNAVAILABLE", "ABORTED", "onnection")
"""What JAX says, among other things, where a process can no longer be reached."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of everything that trains: where it writes, and how it can be watched."""

    workdir: Path | None = None
    """Where the run writes; default: a new directory below runs/."""
    wandb: str | None = None
    """A project of Weights & Biases, to get a copy of the metrics (pip install wandb)."""
    profile: bool = False
    """Trace the second and the third call of each training into the directory `profile` of the run."""


RUN_OPTIONS = tuple(field.name for field in dataclasses.fields(RunOptions))
"""These change no number."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Several processes as one run: the same command for each, with its own --process."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes train together; 'auto' on Cloud TPU and under Slurm or Open MPI,
    where the other two options are not needed."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which of them this is, from 0, which alone writes."""


def check_output(path: Path) -> None:
    """Raises ValueError unless a JSON file can be written there and a picture of the same name, as PNG, beside it."""
    if not path.parent.is_dir():
        raise ValueError(f"output must be in a directory that exists, but {path.parent} does not.")
    if path.is_dir() or path.suffix == ".png":
        raise ValueError(
            f"output must be a file for JSON, beside which its picture is written as .png, but got {path}."
        )


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


def use_cores(small: bool = False, calls_host: bool = False) -> None:
    """Settles how JAX uses a CPU's cores; to be called before its first computation.

    As many devices as cores: each goes through its share of the tasks, which uses the cores better than dividing
    single matrix products does. With `small` one device of one thread: where a meta-step takes less than a
    millisecond, to hand work to other threads takes longer than the work. With `calls_host`, where programs call
    simulators on the host, a thread more than devices: a large argument of a call is copied by a thread of XLA's pool
    while that of the device waits, and where all of them waited the program would hang (jax-ml/jax#24255). So it would
    in jaxlib .10 for many large systems of equations at once, as those of the baseline of ant's episodes, which are
    divided among the pool's threads by one that waits for the others. Without effect on an accelerator.
    """
    if not small:
        jax.config.update("jax_num_cpu_devices", backend.cores())
    if small:
        os.environ.setdefault("NPROC", "1")  # How XLA is told how many cores there are.
    elif calls_host:
        given = os.environ.get("NPROC", "")
        os.environ["NPROC"] = str(max(int(given) if given.isdigit() else 0, backend.cores() + 1))


def _end(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    processes.exit_process(status)
