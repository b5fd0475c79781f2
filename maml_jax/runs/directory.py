"""The directory of a run, with its configuration, provenance, metrics and results."""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from maml_jax.parallel import processes
from maml_jax.runs.agreement import check_agreement
from maml_jax.runs.files import (
    InUseError,
    Lock,
    WorkdirError,
    as_json,
    differences,
    make_directory,
    now,
    print_note,
    read_json,
    to_jsonable,
    utc,
    write_error,
    write_file,
)
from maml_jax.runs.forms import check_form
from maml_jax.runs.loggers import Logger, TensorBoardLogger, WandBLogger, check_wandb
from maml_jax.runs.provenance import jax_settings, provenance

START = {"started": str, "commit": str | None, "hardware": str, "versions": dict, "until?": str}
RUN = {"name": str, "config": dict | None, "jax": dict, "starts": [START]}
"""Forms of `run.json` and of its starts."""
ROW = {"step?": float}
"""Form of a row of `metrics.jsonl`."""


def _leader_only(method: Callable[..., None]) -> Callable[..., None]:
    """Makes a method do nothing in all processes except process 0."""

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> None:
        if processes.is_leader():
            method(*args, **kwargs)

    return guarded


class RunDirectory:
    """The directory of one run.

    The directory holds `run.json` (configuration and provenance), `metrics.jsonl` with a copy for TensorBoard in
    `events`, `results.json`, and the checkpoints of `resumable_train`.

    A run with a configuration can be resumed: open its directory again with the same configuration. No other process
    can open the directory until `close` is called or this process ends.

    With several processes, all processes create the object with the same configuration, but only process 0 opens and
    writes the directory. In other processes `log`, `drop_rows_after` and `close` do nothing, and `rows` returns no
    rows.

    Args:
      path: the directory. None selects the first of `runs/NAME`, `runs/NAME-2`, ... that does not exist, or that holds
        an unfinished run with the same configuration. Directories that another process uses are skipped.
      name: the name of the run.
      config: all options that the results depend on, and other options to record. With None, the run cannot be resumed,
        and the directory must not hold a run.
      mutable_fields: fields of `config` that may change when the run resumes.
      appendable_fields: fields of `config` that are lists and may get more entries when the run resumes.
      wandb: the Weights & Biases project that gets a copy of the metrics; None for no copy.
      devices: a description of the devices, for the provenance; None describes the devices of this process.

    Raises:
      FileExistsError: if `path` already holds a run, and the old or the new run has no configuration.
      WorkdirError: if another field of the configuration changed (the message lists the changes), if another process
        uses the directory, or if the directory cannot be written.
      DisagreementError: if the processes have other configurations, apart from paths, or other settings of JAX.
      ValueError: if `wandb` is given and the package `wandb` is not installed.

    Example:
      >>> import tempfile
      >>> run = RunDirectory(tempfile.mkdtemp(), "mine", {"rate": 0.01})
      >>> run.log(step=1, loss=0.5)
      >>> run.rows()
      [{'step': 1, 'loss': 0.5}]
      >>> run.write_results({"accuracy": 0.9}).name
      'results.json'
      >>> run.close()
    """

    def __init__(
        self,
        path: str | Path | None,
        name: str,
        config: Mapping[str, Any] | None = None,
        *,
        mutable_fields: Collection[str] = (),
        appendable_fields: Collection[str] = (),
        wandb: str | None = None,
        devices: str | None = None,
    ):
        check_agreement(lambda: {**jax_settings(), **(config or {})})
        self._devices = devices
        self._loggers: list[Logger] = []
        self.path = Path(
            processes.broadcast_from_leader(
                lambda: str(self._open(path, name, config, mutable_fields, appendable_fields, wandb))
            )
        )

    @staticmethod
    def check(
        path: str | Path | None,
        config: Mapping[str, Any] | None = None,
        *,
        mutable_fields: Collection[str] = (),
        appendable_fields: Collection[str] = (),
        wandb: str | None = None,
    ) -> None:
        """Checks that the run can be opened, before data are read. No file of the run changes.

        The arguments are those of the constructor.

        Raises:
          ValueError: if `wandb` is given and the package `wandb` is not installed.
          FileExistsError, WorkdirError: as the constructor.
        """
        check_wandb(wandb)
        if not processes.is_leader() or path is None:
            return
        _check_name(path)
        if Path(path).exists() and not Path(path).is_dir():
            raise WorkdirError(f"{path} is not a directory. Give another --workdir.")
        if Path(path).is_dir():
            _compare(Path(path), None if config is None else as_json(config), mutable_fields, appendable_fields)
            Lock.check(Path(path))

    @_leader_only
    def close(self) -> None:
        """Closes the loggers and releases the lock of the directory."""
        self._close_loggers()
        self._lock.close()

    @_leader_only
    def log(self, **row: Any) -> None:
        """Appends a row to `metrics.jsonl` and passes the row to the loggers.

        Args:
          row: numbers and strings. The strings and `seed` are labels that identify a training of the run. `step` is the
            meta-step.

        Raises:
          WorkdirError: if `step` is not a number, or the row cannot be written.
        """
        check_form(self._metrics, to_jsonable(row), ROW)
        self._append([row])
        self._for_each_logger(lambda logger: logger.log(to_jsonable(row)))

    def rows(self, **labels: Any) -> list[dict]:
        """Returns the rows of `metrics.jsonl` with the entries `labels`, with those of earlier starts of the run."""
        rows = _read_rows(self._metrics) if processes.is_leader() else []
        return [row for row in rows if labels.items() <= row.items()]

    @_leader_only
    def drop_rows_after(self, step: int, **labels: Any) -> None:
        """Removes the rows with the entries `labels` after step `step`. A resumed training logs these rows again."""
        rows = self.rows()
        kept = [row for row in rows if not (labels.items() <= row.items() and row.get("step", 0) > step)]
        if len(kept) < len(rows):
            dropped = len(rows) - len(kept)
            print_note(f"{self._metrics}: {dropped} rows after step {step} are removed and computed again.")
            write_file(self._metrics, _lines(kept).encode())
            self._for_each_logger(lambda logger: logger.restart())

    def write_results(self, results: dict[str, Any]) -> Path:
        """Writes `results.json`: the results and their provenance. Only process 0 may call this method.

        Returns:
          The path of the file.

        Raises:
          WorkdirError: if the file cannot be written.
        """
        self._close_loggers()
        made_by = self._made_by | {"finished": now()}
        if self._earlier_starts:
            made_by["earlier_starts"] = self._earlier_starts
        content = to_jsonable({"made_by": made_by, **results})
        return write_file(self.path / "results.json", json.dumps(content, indent=1).encode())

    def _open(
        self,
        path: str | Path | None,
        name: str,
        config: Mapping[str, Any] | None,
        mutable_fields: Collection[str],
        appendable_fields: Collection[str],
        wandb: str | None,
    ) -> Path:
        check_wandb(wandb)
        _check_name(path)
        config = None if config is None else as_json(config)
        self.path, self._lock = _lock_default(name, config) if path is None else _lock(Path(path))
        try:
            changed = _compare(self.path, config, mutable_fields, appendable_fields)
        except OSError:
            self.close()
            raise
        self._metrics = self.path / "metrics.jsonl"
        # Record the provenance at the start, because the checkout may change before the run ends.
        self._made_by = provenance(self._devices)
        self._earlier_starts = _read_run(self.path)["starts"] if changed is not None else []
        if changed is not None:
            print_note(f"Resuming the run in {self.path}, started {self._earlier_starts[0]['started']}.")
            self._report_changes(changed)
            if self._metrics.exists():  # The earlier start ended about when its last row was written.
                self._earlier_starts[-1]["until"] = utc(self._metrics.stat().st_mtime)
            self._drop_damaged_rows()
        start = self._made_by | ({"changed": changed} if changed else {})
        run = {"name": name, "config": config, "jax": jax_settings(), "starts": [*self._earlier_starts, start]}
        write_file(self.path / "run.json", json.dumps(run, indent=1).encode())
        self._append([])
        # Not `self.rows`: a reference cycle would keep the lock until the garbage collector runs.
        self._loggers = [TensorBoardLogger(self.path / "events", functools.partial(_read_rows, self._metrics))]
        if wandb is not None:
            self._loggers.append(WandBLogger(wandb, self.path, run))
        return self.path

    def _for_each_logger(self, call: Callable[[Logger], None]) -> None:
        """Applies `call` to every logger. A logger that raises is reported and removed, and the run continues."""
        for logger in [*self._loggers]:
            try:
                call(logger)
            except Exception as error:
                self._loggers.remove(logger)
                print_note(f"{logger.name} gets no more rows of this run: {error!r}. {self._metrics} has all rows.")

    def _close_loggers(self) -> None:
        self._for_each_logger(lambda logger: logger.close())
        self._loggers = []

    def _report_changes(self, changed: dict[str, tuple[Any, Any]]) -> None:
        for field, (old, new) in changed.items():
            print_note(f"{field} was {old!r}, is {new!r}.")
        old, new = (
            {**{part: start.get(part, "") for part in ("commit", "hardware", "xla_flags")}, **start["versions"]}
            for start in (self._earlier_starts[-1], self._made_by)
        )
        for part, (old, new) in differences(old, new).items():
            print_note(f"{part} was {old}, is {new}: the numbers may differ from those of an uninterrupted run.")

    def _drop_damaged_rows(self) -> None:
        """Removes lines that are not rows, such as a line that was truncated when the disk was full."""
        content = self._metrics.read_bytes() if self._metrics.exists() else b""
        rows = []
        for number, line in enumerate(content.splitlines(), 1):
            try:
                row = json.loads(line)
                check_form(self._metrics, row, ROW)
                rows.append(row)
            except (ValueError, RecursionError, WorkdirError):
                print_note(f"{self._metrics}: line {number} is truncated or damaged and is removed: {line[:60]!r}")
        if (intact := _lines(rows).encode()) != content:
            write_file(self._metrics, intact)

    def _append(self, rows: list[dict]) -> None:
        try:
            with open(self._metrics, "a") as file:
                file.write(_lines(rows))
        except OSError as error:
            raise write_error(self._metrics, error) from error


def _read_rows(metrics: Path) -> list[dict]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(to_jsonable(row)) + "\n" for row in rows)


def _check_name(path: str | Path | None) -> None:
    """Raises WorkdirError for the empty text, which would mean the current directory."""
    if path == "":
        raise WorkdirError("path must name a directory, but is empty. Give '.' for the current directory.")


def _lock(path: Path) -> tuple[Path, Lock]:
    make_directory(path)
    return path, Lock(path)


def _lock_default(name: str, config: Any) -> tuple[Path, Lock]:
    """Finds and locks the default directory."""
    for number in itertools.count(1):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not path.exists():
            with contextlib.suppress(InUseError):  # Another run that started at the same time has the directory.
                return _lock(path)
            continue
        if config is not None and (path / "run.json").exists() and not (path / "results.json").exists():
            with contextlib.suppress(WorkdirError):  # A damaged run, or one that another process works on.
                if _read_run(path)["config"] == config:
                    return _lock(path)
    raise AssertionError


def _compare(
    path: Path, config: Any, mutable_fields: Collection[str], appendable_fields: Collection[str]
) -> dict[str, tuple[Any, Any]] | None:
    """Compares `config` with the run in `path`.

    Returns:
      The allowed changes, `{field: (old, new)}`; None if there is no run.

    Raises:
      FileExistsError, WorkdirError: as `RunDirectory`.
    """
    if not (path / "run.json").exists() and not (path / "metrics.jsonl").exists():
        return None
    run = _read_run(path) if (path / "run.json").exists() else {}
    old_config = run.get("config")
    if config is None or old_config is None:
        raise FileExistsError(f"{path} already holds a run. Give another --workdir, or move the old run away.")
    if settings := differences(run["jax"], jax_settings()):
        listed = "".join(f"\n  {name} was {old!r}, is {new!r}" for name, (old, new) in settings.items())
        raise WorkdirError(
            f"{path} holds a run with other settings of JAX, which change the results:{listed}\nSet the "
            "old values in environment variables of these names in capital letters, or give another --workdir."
        )
    changed = differences(old_config, config)
    appended = [
        field
        for field in appendable_fields
        if all(entry in config.get(field, ()) for entry in old_config.get(field, ()))
    ]
    refused = {field: pair for field, pair in changed.items() if field not in {*mutable_fields, *appended}}
    if refused:
        listed = "".join(f"\n  {field} was {old!r}, is {new!r}" for field, (old, new) in refused.items())
        raise WorkdirError(
            f"{path} holds a run with another configuration:{listed}\nGive the same configuration, or another "
            "--workdir."
        )
    return changed


def _read_run(path: Path) -> dict[str, Any]:
    """Reads `run.json` of the run in `path`.

    Raises:
      WorkdirError: if the file is damaged, or does not have the form that `RunDirectory` writes.
    """
    run = read_json(path / "run.json")
    check_form(path / "run.json", run, RUN)
    return run
