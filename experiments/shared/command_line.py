"""Runs an experiment from the command line. A dataclass defines the options; wrong input ends in a one-line message."""

import dataclasses
import hashlib
import inspect
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import jax
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from experiments.shared import streams
from maml_jax import pretrained
from maml_jax.parallel import backend, processes
from maml_jax.runs import signals
from maml_jax.runs.agreement import DisagreementError, check_agreement
from maml_jax.runs.files import WorkdirError
from maml_jax.runs.provenance import software
from maml_jax.tasks.cache import DataError

Config = TypeVar("Config")
Prepared = TypeVar("Prepared")
T = TypeVar("T")

DefaultInHelp = Annotated[T, tyro.conf.arg(help_behavior_hint="")]
"""Type of an option whose help states the default in words: tyro adds no `(default: None)`."""


def _switch(given: list[str]) -> bool | None:
    values = {"True": True, "False": False, "None": None}
    if given and given[0] not in values:
        raise ValueError(f"expected True or False, but got {given[0]}.")
    return values[given[0]] if given else True


if TYPE_CHECKING:
    Switch = bool
else:
    Switch = Annotated[
        bool | None,
        PrimitiveConstructorSpec(
            nargs=(0, 1),
            metavar="[True|False]",
            instance_from_str=_switch,
            is_instance=lambda value: value is None or isinstance(value, bool),
            str_from_instance=lambda value: [str(value)],
        ),
        tyro.conf.arg(help_behavior_hint=""),
    ]
"""An option that is on as `--option` or `--option True`, off as `--option False`, and None where it is not given."""


PATHS = ConstructorRegistry()
"""Makes an empty path an error: it comes from a shell variable that is not set, and would be the current directory."""


@PATHS.primitive_rule
def _paths(about: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    def path(given: list[str]) -> Path:
        if not given[0]:
            raise ValueError("expected a path, but got an empty text.")
        return Path(given[0])

    if about.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=path,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


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
    """Parses the command line into `config_type`, calls `prepare` with the options, and runs the experiment.

    The help shows the title and the examples from the docstring of the command's module, then the docstring of
    `config_type`. The exit status is 2 for wrong input, with one line on standard error. It is 1 if a loss is not
    finite or the work directory cannot be written. SIGINT and SIGTERM end the command with status 130 or 143; in
    training they first save the state (`maml_jax.runs.signals`).

    Args:
      config_type: dataclass of the options.
      prepare: checks the options and loads the data. Raises ValueError, DataError or OSError for wrong input.
      experiment: runs the experiment with the result of `prepare`.
      default: the defaults of the options, if they differ from those of `config_type`.
      several: whether several processes may train together. The command then has the options of `Hosts`, and all
        processes exit if one finds wrong input or is lost.
      small, calls_host: see `use_cores`.
    """
    streams.tolerate()
    use_cores(small, calls_host)
    given: Any = dataclasses.field() if default is None else dataclasses.field(default=default)
    parts: list[tuple[str, Any, Any]] = [("experiment", config_type, given)]
    parts += [("hosts", Hosts, dataclasses.field(kw_only=True))] if several else []
    module = sys.modules[config_type.__module__]
    options: Any = tyro.cli(
        dataclasses.make_dataclass("Options", parts),
        prog=f"python -m {getattr(module.__spec__, 'name', module.__name__)}",
        description="\n\n".join((inspect.getdoc(module) or "").split("\n\n")[:2]),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        registry=PATHS,
    )
    try:
        if several:
            processes.connect(**dataclasses.asdict(options.hosts))
            check_agreement(lambda: software() | dataclasses.asdict(options.experiment))
        # Several processes compile together. A process with a cached program would not join them, so none has a cache.
        if not processes.multiple():
            keep_compiled(Path("runs") / "compiled")
    except ValueError as error:
        _end(f"error: {error}", 2)
    with signals.ending():
        _run(prepare, experiment, options.experiment)


def _run(prepare: Callable[[Config], Prepared], experiment: Callable[[Prepared], object], options: Config) -> None:
    """Calls `prepare` and `experiment`, and ends the process after an error."""
    problem = ""
    try:
        prepared = prepare(options)
    except (ValueError, DataError, OSError) as error:
        problem = str(error)
    for number, other in enumerate(processes.all_gather_text(problem)):
        if problem or other:
            _end(f"error: {problem or f'process {number}: {other}'}", 2)
    if not processes.is_leader():
        sys.stdout = open(os.devnull, "w")  # Process 0 prints for all.
    try:
        experiment(prepared)
    except (FloatingPointError, WorkdirError, DisagreementError, processes.LeaderError) as error:
        _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        signals.exit_at_once(130)
    except BrokenPipeError:  # The reader of the output, such as `head`, has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        processes.exit_process(1)
    except jax.errors.JaxRuntimeError as error:
        if not (processes.multiple() and any(sign in str(error) for sign in LOST)):
            raise
        _end(f"error: another process is lost; the same command resumes from the last checkpoint: {error}", 1)


LOST = ("Gloo", "UNAVAILABLE", "ABORTED", "onnection")
"""Parts of JAX's error messages for a process that cannot be reached."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of every training: its directory and its monitoring."""

    workdir: DefaultInHelp[Path | None] = None
    """Directory of the run. Default: a new directory in runs/."""
    wandb: DefaultInHelp[str | None] = None
    """Weights & Biases project for a copy of the metrics (pip install wandb). Default: no copy."""
    profile: bool = False
    """Record a profiler trace of the second and third call of each training in `profile` of the run directory."""


RUN_OPTIONS = tuple(field.name for field in dataclasses.fields(RunOptions))
"""Names of the options of `RunOptions`. They do not change the results."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Several processes that train one run. Start the same command in each, with a different --process."""

    coordinator: DefaultInHelp[str | None] = None
    """HOST:PORT of process 0, or 'auto' on Cloud TPU, Slurm and Open MPI. Default: one process alone."""
    processes: DefaultInHelp[int | None] = None
    """Number of processes. Not needed with --coordinator auto."""
    process: DefaultInHelp[int | None] = None
    """Number of this process, from 0; only process 0 writes files. Not needed with --coordinator auto."""


def model_path(given: Path) -> Path:
    """Returns the file of a model that is given as a path, or as a name in `maml_jax.pretrained`.

    Raises:
      FileNotFoundError: if there is no such file and no such name.
    """
    if given.exists():
        return given
    if str(given) in pretrained.NAMES:
        return pretrained.path(str(given))
    raise FileNotFoundError(
        f"{given} is neither a file nor the name of a model of this project: {', '.join(pretrained.NAMES)}."
    )


def check_output(path: Path) -> None:
    """Raises ValueError unless a JSON file can be written to `path`, and a PNG to the same path with suffix .png."""
    if not path.parent.is_dir():
        raise ValueError(f"output must be in a directory that exists, but {path.parent} does not.")
    if path.is_dir() or path.suffix == ".png":
        raise ValueError(
            f"output must be the path of a JSON file, but got {path}. The plot gets the same path with suffix .png."
        )


def keep_compiled(folder: Path) -> None:
    """Caches compiled programs in `folder`, so that the same run starts sooner the next time.

    `JAX_COMPILATION_CACHE_DIR` takes precedence. Programs depend on the features of the processor, so `folder` has a
    subfolder for each kind of processor.
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

    By default there is one device for each core, and each device computes a share of the tasks. Dividing single matrix
    products among the cores is slower.

    Args:
      small: use one device with one thread. For meta-steps below a millisecond, passing work to other threads takes
        longer than the work.
      calls_host: use one more thread than devices, for programs that call simulators on the host. XLA copies a large
        argument of a call in a thread of its pool while the thread of the device waits. If all threads wait, the
        program hangs (jax-ml/jax#24255). With jaxlib 0.10 it also hangs if many large linear systems are solved at
        once, such as those of the ant's baseline.
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
