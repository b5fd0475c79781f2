"""Files of the best models of a training."""

import math
from pathlib import Path
from typing import Any

from maml_jax import validation
from maml_jax.runs import model_file
from maml_jax.runs.forms import check_form
from maml_jax.types import MetaState


class Best:
    """Keeps the models with the highest scores as files `step-N.msgpack` in a folder.

    Files that are already in the folder, for example those of a resumed run, count too. The description in a file also
    has the meta-step as `step` and the score as `score`.

    Args:
      folder: the folder of the files.
      description: a JSON-serialisable dict to write to each file.
      keep: the number of models to keep.

    Raises:
      ValueError: if `keep` is below 1, or if a file in the folder is damaged.
      WorkdirError: if a file in the folder has no step or no score.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> best = Best(tempfile.mkdtemp(), keep=2)
      >>> for step, accuracy in enumerate([0.5, 0.7, 0.6], 1):
      ...     best.add(MetaState(jnp.int32(step), {"w": jnp.ones(3)}, (), ()), accuracy)
      >>> [path.name for path in best.paths()]
      ['step-0000002.msgpack', 'step-0000003.msgpack']
    """

    def __init__(self, folder: str | Path, description: dict[str, Any] | None = None, *, keep: int = 5):
        validation.at_least("keep", keep, 1)
        self.folder, self.keep, self._description = Path(folder), keep, description or {}
        files = self.folder.glob("step-*.msgpack")
        self._scores = {path: _comparable(_load(path).description["score"]) for path in files}

    def add(self, state: MetaState, score: float) -> None:
        """Saves the parameters of a state, and deletes the file with the lowest score if there are more than `keep`.

        Args:
          state: the state after meta-step `state.step`. The state of the optimizer is not saved.
          score: the score; higher is better.

        Raises:
          WorkdirError: if the file cannot be written.
        """
        step = int(state.step)
        path = self.folder / f"step-{step:07d}.msgpack"
        description = self._description | {"step": step, "score": score}
        model_file.save(path, state.params, state.inner_params, description)
        self._scores[path] = _comparable(score)
        for worse in self.paths()[self.keep :]:
            worse.unlink()
            del self._scores[worse]

    def describe(self, description: dict[str, Any]) -> None:
        """Replaces the description in all existing files, and in files that `add` writes later.

        Raises:
          WorkdirError: if a file cannot be written.
        """
        self._description = description
        for path, score in self._scores.items():
            saved = _load(path)
            new = description | {"step": saved.description["step"], "score": score}
            model_file.save(path, saved.params, saved.inner_params, new)

    def paths(self) -> list[Path]:
        """Returns the files, best first. For equal scores, the later meta-step comes first."""
        return sorted(self._scores, key=lambda path: (self._scores[path], path.name), reverse=True)

    def models(self) -> list[model_file.Saved]:
        """Reads the models, best first. `model_file.restore` gives the parameters the structure of a model."""
        return [_load(path) for path in self.paths()]


def _load(path: Path) -> model_file.Saved:
    saved = model_file.load(path)
    check_form(path, saved.description, {"step": int, "score": float | None})
    return saved


def _comparable(score: float | None) -> float:
    """The score for comparisons: minus infinity for NaN, which is None in a file."""
    return -math.inf if score is None or math.isnan(score) else float(score)
