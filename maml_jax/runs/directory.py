"""What a run leaves behind: metrics while it runs, results and parameters at its end."""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from maml_jax.parallel import processes
from maml_jax.runs import wandb_copy
from maml_jax.runs.files import (
    InUseError,
    Lock,
    WorkdirError,
    cannot_write,
    make_directory,
    note,
    now,
    plain,
    read_json,
    utc,
    write,
)
from maml_jax.runs.provenance import provenance
from maml_jax.runs.tensorboard import Events
from maml_jax.runs.wandb_copy import WandB


def _by_leader(method: Callable[..., None]) -> Callable[..., None]:
    """In all processes but 0 the method does nothing."""

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> None:
        if processes.is_leader():
            method(*args, **kwargs)

    return guarded


class RunDirectory:
    """The directory of one run: `run.json`, `metrics.jsonl` and the same for TensorBoard in `events`, `results.json`,
    `params.msgpack`, checkpoints, pictures.

    With a configuration, the same command goes on where the run stopped: the directory may hold a run of
    the same configuration. While the object lives, no other process can open the directory. Of several processes of
    one run, `hosts`, process 0 alone opens and writes it; in the others the methods do nothing, and there are no rows.

    Args:
      path: where. None takes the first of `runs/NAME`, `runs/NAME-2`, ... that is free, or that holds an
        unfinished run of the same configuration which no process works on.
      name: what the run is.
      config: all that the numbers of the run depend on, and what else is to be kept of its options. None: a run that
        cannot be gone on with, whose directory must hold none.
      mutable_fields: fields of `config` that may differ from what the run was begun with.
      appendable_fields: fields of `config`, lists, that may have further entries.
      wandb: the project of Weights & Biases that is to get a copy of the metrics, if any.
      devices: those that compute, in words, where they are not this process's.

    Raises:
      FileExistsError: if `path` already holds a run, and either of them has no configuration.
      WorkdirError: if the configurations differ in a field that is not mutable_fields, listing them; if another
        process works in the directory; if nothing can be written there.
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
        self._devices = devices
        self._events: Events | Literal["lost"] | None = None  # Made at the first row, of all rows that there are.
        self._wandb: WandB | None = None
        self.path = Path(
            processes.broadcast_from_leader(
                lambda: str(self._open(path, name, config, mutable_fields, appendable_fields, wandb))
            )
        )

    def _open(
        self,
        path: str | Path | None,
        name: str,
        config: Mapping[str, Any] | None,
        mutable_fields: Collection[str],
        appendable_fields: Collection[str],
        wandb: str | None,
    ) -> Path:
        config = None if config is None else _as_json(config)
        self.path, self._lock = _own_or_free(name, config) if path is None else _locked(Path(path))
        try:
            changed = _compare(self.path, config, mutable_fields, appendable_fields)
        except OSError:
            self.close()
            raise
        self._metrics = self.path / "metrics.jsonl"
        self._made_by = provenance(self._devices)  # Now: the checkout may have moved on by the end of the run.
        self._earlier = read_json(self.path / "run.json")["starts"] if changed is not None else []
        if changed is not None:
            note(f"{self.path} holds this run already, begun {self._earlier[0]['started']}: it goes on.")
            self._tell_changes(changed)
            if self._metrics.exists():  # Nobody wrote since: how long the earlier start went.
                self._earlier[-1]["until"] = utc(self._metrics.stat().st_mtime)
            self._mend()
        start = self._made_by | ({"changed": changed} if changed else {})
        content = {"name": name, "config": config, "starts": [*self._earlier, start]}
        write(self.path / "run.json", json.dumps(content, indent=1).encode())
        self._write_lines("a", [])
        if wandb is not None:
            self._wandb = WandB(wandb, self.path, content)
        return self.path

    @staticmethod
    def check(
        path: str | Path | None,
        config: Mapping[str, Any] | None = None,
        *,
        mutable_fields: Collection[str] = (),
        appendable_fields: Collection[str] = (),
        wandb: str | None = None,
    ) -> None:
        """Raises what opening the directory would, without writing anything, for a check before data are read."""
        wandb_copy.check(wandb)
        if not processes.is_leader() or path is None:
            return
        if Path(path).exists() and not Path(path).is_dir():
            raise WorkdirError(f"{path} is no directory. Give another --workdir.")
        if Path(path).is_dir():
            _compare(Path(path), None if config is None else _as_json(config), mutable_fields, appendable_fields)
            Lock(Path(path)).close()

    @_by_leader
    def close(self) -> None:
        """Lets other processes in."""
        self._close_copies()
        self._lock.close()

    @_by_leader
    def log(self, **row: Any) -> None:
        """Appends one line to `metrics.jsonl`; text in it, and its `seed`, tell its training from others of the run.

        Raises:
          WorkdirError: if it cannot be written.
        """
        self._write_lines("a", [row])
        if self._wandb is not None:
            try:
                self._wandb.add(plain(row))
            except Exception as error:  # Whatever goes wrong with a copy is no reason to stop.
                self._wandb = None
                note(f"Weights & Biases gets no more of this run: {error!r}. metrics.jsonl has it all.")
        if self._events == "lost":
            return
        try:
            if self._events is None:
                self._events = Events(self.path / "events", self.rows())
            else:
                self._events.add(plain(row))
        except OSError as error:
            self._lose_events(error)

    def rows(self, **labels: Any) -> list[dict]:
        """The rows of `metrics.jsonl` that have these entries, those of earlier starts of this run included."""
        rows = [json.loads(line) for line in self._metrics.read_text().splitlines()] if processes.is_leader() else []
        return [row for row in rows if labels.items() <= row.items()]

    @_by_leader
    def drop_rows_after(self, step: int, **labels: Any) -> None:
        """Drops the rows with these entries and a later `step`, which are to be written anew."""
        rows = self.rows()
        kept = [row for row in rows if not (labels.items() <= row.items() and row.get("step", 0) > step)]
        if len(kept) < len(rows):
            note(f"{self._metrics}: {len(rows) - len(kept)} rows after step {step} are dropped, and made again.")
            write(self._metrics, _lines(kept).encode())
            self._close_events()  # To be made anew.

    def write_results(self, results: dict[str, Any]) -> Path:
        """Writes `results.json`: the results, and what made them. By process 0."""
        self._close_copies()
        made_by = self._made_by | {"finished": now()}
        if self._earlier:
            made_by["earlier_starts"] = self._earlier
        return write(self.path / "results.json", json.dumps(plain({"made_by": made_by, **results}), indent=1).encode())

    def write_params(self, params: Any) -> Path:
        """Writes `params.msgpack`, which `flax.serialization.from_bytes(params, data)` reads."""
        from flax import serialization

        return write(self.path / "params.msgpack", serialization.to_bytes(params))

    def _close_copies(self) -> None:
        self._close_events()
        copy, self._wandb = self._wandb, None
        if copy is not None:
            try:
                copy.close()
            except Exception as error:  # Whatever goes wrong with a copy is no reason to stop.
                note(f"Weights & Biases may lack the end of this run: {error!r}. metrics.jsonl has it all.")

    def _close_events(self) -> None:
        events, self._events = self._events, None
        if isinstance(events, Events):
            try:
                events.flush()
            except OSError as error:
                self._lose_events(error)

    def _lose_events(self, error: OSError) -> None:
        """They are a copy: what they lack is no reason to stop."""
        self._events = "lost"
        note(f"{self.path / 'events'}: {error}. TensorBoard shows no more of this run; metrics.jsonl has it all.")

    def _tell_changes(self, changed: dict[str, tuple[Any, Any]]) -> None:
        for field, (old, new) in changed.items():
            note(f"{field} was {old!r}, is {new!r}.")
        old, new = (
            {"commit": start["commit"], "hardware": start["hardware"], **start["versions"]}
            for start in (self._earlier[-1], self._made_by)
        )
        for part, (old, new) in _differences(old, new).items():
            note(f"{part} was {old}, is {new}: the numbers may differ from those of a run in one go.")

    def _mend(self) -> None:
        """Drops what is no row, such as a line that was cut when the disk was full."""
        content = self._metrics.read_bytes() if self._metrics.exists() else b""
        rows = []
        for number, line in enumerate(content.splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                note(f"{self._metrics}: line {number} is cut or damaged, and dropped: {line[:60]!r}")
        if (mended := _lines(rows).encode()) != content:
            write(self._metrics, mended)

    def _write_lines(self, mode: str, rows: list[dict]) -> None:
        try:
            with open(self._metrics, mode) as file:
                file.write(_lines(rows))
        except OSError as error:
            raise cannot_write(self._metrics, error) from error


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(plain(row)) + "\n" for row in rows)


def _locked(path: Path) -> tuple[Path, Lock]:
    make_directory(path)
    return path, Lock(path)


def _own_or_free(name: str, config: Any) -> tuple[Path, Lock]:
    """The default directory, locked."""
    for number in itertools.count(1):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not path.exists():
            with contextlib.suppress(InUseError):  # Another run began at the same time, and has it.
                return _locked(path)
            continue
        unfinished = (path / "run.json").exists() and not (path / "results.json").exists()
        if config is not None and unfinished and read_json(path / "run.json").get("config") == config:
            with contextlib.suppress(InUseError):  # Then the next.
                return _locked(path)
    raise AssertionError


def _compare(
    path: Path, config: Any, mutable_fields: Collection[str], appendable_fields: Collection[str]
) -> dict[str, tuple[Any, Any]] | None:
    """Harmless differences `{field: (was, is)}` from the run in `path`; None if there is no run.

    Raises:
      FileExistsError, WorkdirError: as `RunDirectory`.
    """
    if not (path / "run.json").exists() and not (path / "metrics.jsonl").exists():
        return None
    was = read_json(path / "run.json")["config"] if (path / "run.json").exists() else None
    if config is None or was is None:
        raise FileExistsError(f"{path} already holds a run. Give another --workdir, or move that one away.")
    differing = _differences(was, config)
    grown = [
        field for field in appendable_fields if all(entry in config.get(field, ()) for entry in was.get(field, ()))
    ]
    harmful = {field: values for field, values in differing.items() if field not in {*mutable_fields, *grown}}
    if harmful:
        listed = "".join(f"\n  {field} was {old!r}, is {new!r}" for field, (old, new) in harmful.items())
        raise WorkdirError(
            f"{path} holds a run of another configuration:{listed}\nGive what it was begun with, or another --workdir."
        )
    return differing


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {field: (old.get(field, "absent"), new.get(field, "absent")) for field in sorted({*old, *new})}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be when it is read back."""
    return json.loads(json.dumps(plain(dict(config))))
