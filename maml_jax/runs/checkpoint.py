"""Checkpoints of a training: written beside it in one piece, and proven whole when they are read.

The only file that imports orbax, and only when checkpoints are used.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from maml_jax import validation
from maml_jax.parallel import processes
from maml_jax.runs.files import WorkdirError, cannot_write, make_directory, note
from maml_jax.types import NotFiniteError

DAMAGED = ".damaged"
OLD = ".old"

STRAGGLERS = 10.0
"""Seconds for what still writes into a directory that is removed: other threads of orbax, where one of them failed."""


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: Any
    """As it was saved, bit for bit."""
    about: dict[str, Any]
    """What was saved beside it."""


class _DamageError(Exception):
    """What of a checkpoint is damaged, and how."""


class Checkpoints:
    """The checkpoints below `path`, a directory for each step: the newest `keep`, and the one with the best score.

    Only one run at a time may use them (`RunDirectory` sees to that). What a killed process has not finished writing
    or deleting is removed here. Of several processes of a run, `hosts`, process 0 alone writes and reads, so that
    they need no directory in common; the others call `save`, `wait` and `restore` too, and get what is restored.

    Raises:
      WorkdirError: if `path` cannot be written to.
    """

    def __init__(self, path: str | Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        validation.at_least("keep", keep, 1)
        self.path, self._keep = Path(path).absolute(), keep
        self._under_way: int | None = None
        self._scores: dict[int, float | None] = {}
        if not processes.is_leader():
            return
        make_directory(self.path)
        for leftover in [*self.path.glob("*.orbax-checkpoint-tmp*"), *self.path.glob(f"*{OLD}")]:
            _remove(leftover)
        self._ocp = ocp
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="0")
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
            state=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            about=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        )
        self._checkpointer = ocp.AsyncCheckpointer(handler, multiprocessing_options=alone)
        self._scores = {step: self._score(step) for step in self.steps()}

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, whole or damaged, from old to new."""
        paths = self.path.iterdir() if processes.is_leader() else ()
        return sorted(int(path.name) for path in paths if path.name.isdecimal())

    def best_step(self) -> int | None:
        """The step with the largest score, the first of equals; None if no checkpoint has one."""
        scores = {step: score for step, score in sorted(self._scores.items()) if score is not None}
        return max(scores, key=lambda step: scores[step]) if scores else None

    def save(self, step: int, state: Any, about: dict[str, Any] | None = None, score: float | None = None) -> None:
        """Begins to write a checkpoint, and returns when `state` may be given up; `wait` tells when it is written.

        Args:
          step: meta-steps taken, the checkpoint's name.
          state: a pytree of arrays.
          about: anything for JSON that belongs to this state.
          score: how good the state is, larger is better; the best one's checkpoint is kept.

        Raises:
          NotFiniteError: naming the leaf, if the state holds what is not finite; that is never saved.
          WorkdirError: if this checkpoint, or the one before it, cannot be written.
        """
        leaves = _named_leaves(_own(state))
        for name, leaf in leaves.items():
            values = _on_host(leaf)
            # An optimizer may begin with infinity, such as the least loss so far.
            bad = np.isnan if name.startswith("opt_state") else lambda values: ~np.isfinite(values)
            if np.issubdtype(values.dtype, np.integer) or not bad(values).any():
                continue
            raise NotFiniteError(
                f"After meta-step {step} {name} is not finite, though loss and gradient were: it is not saved. The "
                "outer update overflowed; a smaller outer rate, or optax.clip_by_global_norm before it, usually helps.",
                step,
            )
        if not processes.is_leader():
            return
        self.wait()
        described = {name: _described(leaf) | {"sha256": _digest(leaf)} for name, leaf in leaves.items()}
        content = {"step": step, "score": score, "about": about or {}, "leaves": described}
        args = self._ocp.args
        items = args.Composite(
            state=args.StandardSave(leaves),
            about=args.JsonSave({"content": content, "sha256": _digest_of_json(content)}),
        )
        try:
            self._checkpointer.save(self._directory(step), args=items)
        except Exception as error:
            raise cannot_write(self._directory(step), error) from error
        self._under_way, self._scores[step] = step, score

    def wait(self) -> None:
        """Returns when what `save` began is on disk; then deletes what need not be kept. Raises WorkdirError."""
        if self._under_way is None:
            return
        step, self._under_way = self._under_way, None
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            del self._scores[step]
            raise cannot_write(self._directory(step), error) from error
        kept = {*self.steps()[-self._keep :], self.best_step()}
        for old in self.steps():
            if old not in kept:
                self._scores.pop(old, None)
                _remove(self._directory(old).rename(self.path / f"{old}{OLD}"))

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that is whole; None if there is none at all.

        Damaged ones that are newer are named on standard error and put aside as `STEP.damaged`.

        Args:
          like: a state with the structure, shapes, types and devices that are wanted.

        Raises:
          WorkdirError: if every checkpoint is damaged; if one is whole and of another kind of state.
        """
        found: Restored | None = None

        def read() -> Any:
            nonlocal found
            found = self._newest(_own(like))
            return found and (found.step, found.about)

        if (told := processes.broadcast_from_leader(read)) is None:
            return None
        step, about = told
        return Restored(step, processes.broadcast_arrays_from_leader(found.state if found else like, like), about)

    def _newest(self, like: Any) -> Restored | None:
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self._read(step, like)
            except _DamageError as error:
                damaged[step] = str(error)
                continue
            for newer, what in damaged.items():
                note(f"The checkpoint {self._directory(newer)} is damaged: {what}. Going on from step {step} instead.")
                self._put_aside(newer)
            return restored
        if damaged:
            listed = "; ".join(f"step {step}: {what}" for step, what in damaged.items())
            raise WorkdirError(
                f"Every checkpoint in {self.path} is damaged ({listed}). Restore one from a copy, or move the "
                "directory away to begin at step 0."
            )
        return None

    def restore_best(self, like: Any) -> Restored:
        """The checkpoint with the best score. Raises WorkdirError if there is none or if it is damaged."""
        step = self.best_step()
        if step is None:
            raise WorkdirError(f"No checkpoint in {self.path} has a score.")
        try:
            return self._read(step, like)
        except _DamageError as error:
            raise WorkdirError(f"The best checkpoint, {self._directory(step)}, is damaged: {error}.") from error

    def close(self) -> None:
        """Waits as `wait` does, and ends the threads that write. Raises WorkdirError."""
        if not processes.is_leader():
            return
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _directory(self, step: int) -> Path:
        return self.path / str(step)

    def _read_about(self, step: int) -> dict[str, Any]:
        args = self._ocp.args
        try:
            read = self._checkpointer.restore(self._directory(step), args=args.Composite(about=args.JsonRestore()))
            content, digest = read.about["content"], read.about["sha256"]
        except Exception as error:  # Whatever a damaged file makes orbax raise.
            raise _DamageError(f"its description cannot be read ({_short(error)})") from error
        if digest != _digest_of_json(content) or content["step"] != step:
            raise _DamageError("its description is not what was saved: the checksum differs")
        return content

    def _score(self, step: int) -> float | None:
        try:
            return self._read_about(step)["score"]
        except _DamageError:  # `restore` names it, if this checkpoint is asked for.
            return None

    def _read(self, step: int, like: Any) -> Restored:
        content = self._read_about(step)
        wanted, saved = _named_leaves(like), content["leaves"]
        for name in sorted({*wanted, *saved}):
            was, now = _shown(saved.get(name)), _shown(name in wanted and _described(wanted[name]))
            if was != now:
                raise WorkdirError(
                    f"The checkpoint {self._directory(step)} is of another model or optimizer: {name} was {was}, is "
                    f"{now}. Give another --workdir, or go back to what it was made with."
                )
        args = self._ocp.args
        target = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, wanted)
        try:
            read = self._checkpointer.restore(
                self._directory(step), args=args.Composite(state=args.StandardRestore(target))
            )
            leaves = read.state
        except Exception as error:  # Whatever a damaged file makes orbax raise.
            raise _DamageError(f"its arrays cannot be read ({_short(error)})") from error
        for name, leaf in leaves.items():
            if _digest(leaf) != saved[name]["sha256"]:
                raise _DamageError(f"{name} is not what was saved: the checksum differs")
        state = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])
        return Restored(step, state, content["about"])

    def _put_aside(self, step: int) -> None:
        aside = self.path / f"{step}{DAMAGED}"
        _remove(aside)
        os.replace(self._directory(step), aside)
        self._scores.pop(step, None)


def _own(tree: Any) -> Any:
    """What process 0 writes and reads by itself: orbax takes no arrays of one process alone where there are several."""
    return jax.tree.map(_on_host, processes.local(tree)) if processes.multiple() else tree


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their path, in the tree's order: what is saved does not depend on the types of its containers."""
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _on_host(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _described(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _shown(described: Any) -> str:
    return f"{described['dtype']}{described['shape']}" if described else "absent"


def _digest(leaf: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(_on_host(leaf)).tobytes()).hexdigest()


def _digest_of_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _remove(path: Path) -> None:
    if not path.exists():
        return
    give_up = time.monotonic() + STRAGGLERS
    while True:
        try:
            return shutil.rmtree(path)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or time.monotonic() > give_up:
                raise cannot_write(path, error) from error
            time.sleep(0.01)
