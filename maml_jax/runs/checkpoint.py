"""Checkpoints of a training: written asynchronously and atomically, and verified by checksums when they are read.

No other module imports orbax. This module imports orbax when a `Checkpoints` object is created.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from maml_jax import validation
from maml_jax.parallel import processes
from maml_jax.runs.files import WorkdirError, make_directory, print_note, write_error
from maml_jax.types import NotFiniteError

DAMAGED = ".damaged"
"""Suffix of the directory of a damaged checkpoint."""
OLD = ".old"
"""Suffix of the directory of a checkpoint that is being deleted."""

STEP = re.compile("0|[1-9][0-9]*")
"""Names of the directories of checkpoints. Other names in the folder are left alone."""
LEFTOVER = re.compile(rf"({STEP.pattern})({re.escape(OLD)}|\.orbax-checkpoint-tmp.*)")
"""Names of unfinished writes and deletions."""
WILDCARDS = re.compile(r"[*?\[\]\\]")

REMOVE_TIMEOUT = 10.0
"""Seconds to retry the removal of a directory while threads of orbax still write into the directory."""


class Restored(NamedTuple):
    """The content of a checkpoint."""

    step: int
    state: Any
    """Bit-equal to the saved state."""
    about: dict[str, Any]
    """The values that were saved with the state."""


class _DamageError(Exception):
    """A checkpoint is damaged; the message says which part and how."""


class Checkpoints:
    """The checkpoints of one training. Each saved step has a directory in `path`, and the newest `keep` are kept.

    Only one run at a time may use `path`; the lock of `RunDirectory` ensures this. The constructor removes unfinished
    writes and deletions of a killed process.

    With several processes, only process 0 reads and writes files, so the processes need no shared file system. All
    processes must call `save`, `wait` and `restore`. `restore` returns the state in all processes.

    Args:
      path: the directory of the checkpoints.
      keep: the number of checkpoints to keep.

    Raises:
      ValueError: if `keep` is not a positive integer.
      WorkdirError: if `path` cannot be written.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> checkpoints = Checkpoints(tempfile.mkdtemp())
      >>> checkpoints.save(10, {"w": jnp.ones(2)}, {"accuracy": 0.5})
      >>> checkpoints.wait()
      >>> restored = checkpoints.restore({"w": jnp.zeros(2)})
      >>> restored.step, restored.state["w"].tolist(), restored.about
      (10, [1.0, 1.0], {'accuracy': 0.5})
      >>> checkpoints.close()
    """

    def __init__(self, path: str | Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        validation.at_least("keep", keep, 1)
        self.path, self._keep = Path(path).absolute(), keep
        self._pending: int | None = None  # The step that is being written.
        if not processes.is_leader():
            return
        make_directory(self.path)
        for leftover in self.path.iterdir():
            if LEFTOVER.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
                _remove(leftover)
        self._link: Path | None = None
        if WILDCARDS.search(str(self.path)):
            # Orbax takes its paths as patterns. A link gives it a path without wildcards.
            self._link = Path(tempfile.mkdtemp(prefix="maml_jax-")) / "checkpoints"
            self._link.symlink_to(self.path)
        self._ocp = ocp
        # Orbax must not wait for the other processes, which do not write.
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="0")
        # Directories are created in `save`. If a thread of orbax created them and failed, other threads would wait for
        # them for ten minutes, and the process could not end.
        directories_first = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone, async_options=directories_first),
            state=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            about=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        )
        self._checkpointer = ocp.AsyncCheckpointer(
            handler, async_options=directories_first, multiprocessing_options=alone
        )

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, intact or damaged, in ascending order."""
        paths = self.path.iterdir() if processes.is_leader() else ()
        return sorted(int(path.name) for path in paths if STEP.fullmatch(path.name) and path.is_dir())

    def save(self, step: int, state: Any, about: dict[str, Any] | None = None) -> None:
        """Starts to write a checkpoint. After the return, `state` may be deleted or donated.

        The checkpoint is on disk after the next `wait`, `save` or `close`.

        Args:
          step: the number of meta-steps taken, which is the name of the checkpoint.
          state: a pytree of arrays.
          about: JSON-serialisable values to store with the state.

        Raises:
          NotFiniteError: if the state holds NaN or infinity. The message names the leaf, and nothing is written. The
            optimizer state may hold infinity.
          WorkdirError: if this checkpoint or the previous checkpoint cannot be written.
        """
        # Check that the state is finite, in all processes.
        leaves = _named_leaves(_for_orbax(state))
        for name, leaf in leaves.items():
            values = _on_host(leaf)
            # Optimizers may start with infinity, for example as the smallest loss so far.
            bad = np.isnan if name.startswith("opt_state") else lambda values: ~np.isfinite(values)
            if np.issubdtype(values.dtype, np.integer) or not bad(values).any():
                continue
            raise NotFiniteError(
                f"After meta-step {step} {name} is not finite. Loss and gradient were finite, so the outer update "
                "overflowed. The state is not saved. Try a smaller outer rate, or optax.clip_by_global_norm before "
                "the outer optimizer.",
                step,
            )
        if not processes.is_leader():
            return
        # Wait for the previous checkpoint.
        self.wait()
        # Write the leaves, with a description and checksums.
        described = {name: _describe(leaf) | {"sha256": _digest(leaf)} for name, leaf in leaves.items()}
        content = {"step": step, "about": about or {}, "leaves": described}
        args = self._ocp.args
        items = args.Composite(
            state=args.StandardSave(leaves),
            about=args.JsonSave({"content": content, "sha256": _digest_of_json(content)}),
        )
        try:
            self._checkpointer.save(self._orbax_directory(step), args=items)
        except Exception as error:
            raise write_error(self._directory(step), error) from error
        self._pending = step

    def wait(self) -> None:
        """Waits until the checkpoint of the last `save` is on disk, then deletes old checkpoints.

        Raises:
          WorkdirError: if the checkpoint cannot be written.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            raise write_error(self._directory(step), error) from error
        for old in self.steps()[: -self._keep]:
            _remove(self._directory(old).rename(self.path / f"{old}{OLD}"))

    def restore(self, like: Any) -> Restored | None:
        """Reads the newest intact checkpoint; returns None if there is no checkpoint.

        Newer checkpoints that are damaged are reported on standard error and renamed to `STEP.damaged`.

        Args:
          like: a state with the structure, shapes, types and devices of the result.

        Returns:
          The step, the state, and the values that were saved with the state.

        Raises:
          WorkdirError: if every checkpoint is damaged, or if the state in the checkpoint has other leaves, shapes or
            types than `like`.
        """
        restored: Restored | None = None

        def read() -> Any:
            nonlocal restored
            restored = self._newest(_for_orbax(like))
            return restored and (restored.step, restored.about)

        if (found := processes.broadcast_from_leader(read)) is None:
            return None
        step, about = found
        state = processes.broadcast_arrays_from_leader(restored.state if restored else like, like)
        return Restored(step, state, about)

    def close(self) -> None:
        """Waits for the last `save`, then stops the threads of orbax.

        Raises:
          WorkdirError: if the checkpoint cannot be written.
        """
        if not processes.is_leader():
            return
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            if self._link is not None:
                shutil.rmtree(self._link.parent, ignore_errors=True)

    def _newest(self, like: Any) -> Restored | None:
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self._read(step, like)
            except _DamageError as error:
                damaged[step] = str(error)
                continue
            for newer, damage in damaged.items():
                print_note(
                    f"The checkpoint {self._directory(newer)} is damaged: {damage}. Resuming from step {step} instead."
                )
                self._set_aside(newer)
            return restored
        if damaged:
            listed = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
            raise WorkdirError(
                f"Every checkpoint in {self.path} is damaged ({listed}). Restore a checkpoint from a backup, or move "
                "the directory away to start at step 0."
            )
        return None

    def _directory(self, step: int) -> Path:
        return self.path / str(step)

    def _orbax_directory(self, step: int) -> Path:
        """The same directory, under a path without wildcards."""
        return (self._link or self.path) / str(step)

    def _read_description(self, step: int) -> dict[str, Any]:
        args = self._ocp.args
        try:
            read = self._checkpointer.restore(
                self._orbax_directory(step), args=args.Composite(about=args.JsonRestore())
            )
            content, digest = read.about["content"], read.about["sha256"]
        except Exception as error:  # Orbax raises almost any exception for a damaged file.
            raise _DamageError(f"its description cannot be read ({_shorten(error)})") from error
        if digest != _digest_of_json(content) or content["step"] != step:
            raise _DamageError("its description has the wrong checksum")
        return content

    def _read(self, step: int, like: Any) -> Restored:
        content = self._read_description(step)
        wanted, saved = _named_leaves(like), content["leaves"]
        for name in sorted({*wanted, *saved}):
            was, now = _format(saved.get(name)), _format(name in wanted and _describe(wanted[name]))
            if was != now:
                raise WorkdirError(
                    f"The checkpoint {self._directory(step)} belongs to another model or optimizer: {name} was {was}, "
                    f"is {now}. Give another --workdir, or the model and optimizer of the checkpoint."
                )
        args = self._ocp.args
        target = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, wanted)
        try:
            read = self._checkpointer.restore(
                self._orbax_directory(step), args=args.Composite(state=args.StandardRestore(target))
            )
            leaves = read.state
        except Exception as error:  # Orbax raises almost any exception for a damaged file.
            raise _DamageError(f"its arrays cannot be read ({_shorten(error)})") from error
        for name, leaf in leaves.items():
            if _digest(leaf) != saved[name]["sha256"]:
                raise _DamageError(f"{name} has the wrong checksum")
        state = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])
        return Restored(step, state, content["about"])

    def _set_aside(self, step: int) -> None:
        target = self.path / f"{step}{DAMAGED}"
        _remove(target)
        os.replace(self._directory(step), target)


def fingerprints(name: str, tree: Any) -> dict[str, str]:
    """Returns the type, shape and checksum of each array that this process holds in full, by path.

    Example:
      >>> fingerprints("state", {"w": np.zeros(2, np.float32)})
      {"state['w']": 'float32[2] af5570f5a1810b7a'}
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                continue
            leaf = leaf.addressable_data(0)
        if isinstance(leaf, (jax.Array, np.ndarray)):
            found[f"{name}{jax.tree_util.keystr(path)}"] = f"{_format(_describe(leaf))} {_digest(leaf)[:16]}"
    return found


def _for_orbax(tree: Any) -> Any:
    """With several processes, copies arrays to host memory: orbax rejects arrays of a single process."""
    return jax.tree.map(_on_host, processes.local(tree)) if processes.multiple() else tree


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Returns `{path: leaf}` in the order of the tree. Checkpoints do not depend on the types of the containers."""
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _on_host(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _describe(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _format(described: Any) -> str:
    return f"{described['dtype']}{described['shape']}" if described else "absent"


def _digest(leaf: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(_on_host(leaf)).tobytes()).hexdigest()


def _digest_of_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _shorten(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _remove(path: Path) -> None:
    """Removes a directory. Retries while threads of orbax still write into the directory."""
    if not path.exists():
        return
    deadline = time.monotonic() + REMOVE_TIMEOUT
    while True:
        try:
            return shutil.rmtree(path)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or time.monotonic() > deadline:
                raise write_error(path, error) from error
            time.sleep(0.01)
