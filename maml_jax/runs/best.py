"""The best models of a training, as files."""

from pathlib import Path
from typing import Any

from maml_jax import validation
from maml_jax.runs import model_file
from maml_jax.types import MetaState


class Best:
    """Keeps the models with the highest scores as files `step-N.msgpack` in a folder.

    Files that the folder already holds, as those of a resumed run, count too. Each file has the description, the
    meta-step as `step` and the score as `score`.

    Args:
      folder: where the files are.
      description: a dict that JSON takes, written into each file.
      keep: number of models to keep.

    Raises:
      ValueError: for `keep` below 1, and if a file in the folder is damaged.
    """

    def __init__(self, folder: str | Path, description: dict[str, Any] | None = None, *, keep: int = 5):
        validation.at_least("keep", keep, 1)
        self.folder, self.keep, self._description = Path(folder), keep, description or {}
        files = self.folder.glob("step-*.msgpack")
        self._scores: dict[Path, float] = {path: model_file.load(path).description["score"] for path in files}

    def add(self, state: MetaState, score: float) -> None:
        """Writes the state, and removes the worst model if there are more than `keep`."""
        step = int(state.step)
        path = self.folder / f"step-{step:07d}.msgpack"
        description = self._description | {"step": step, "score": score}
        model_file.save(path, state.params, state.inner_params, description)
        self._scores[path] = score
        for worse in self.paths()[self.keep :]:
            worse.unlink()
            del self._scores[worse]

    def describe(self, description: dict[str, Any]) -> None:
        """Replaces the description of all models, present and future."""
        self._description = description
        for path, score in self._scores.items():
            saved = model_file.load(path)
            about = description | {"step": saved.description["step"], "score": score}
            model_file.save(path, saved.params, saved.inner_params, about)

    def paths(self) -> list[Path]:
        """Files from best to worst; of equal scores the later model comes first."""
        return sorted(self._scores, key=lambda path: (self._scores[path], path.name), reverse=True)

    def models(self) -> list[model_file.Saved]:
        """Models from best to worst. `model_file.restore` gives their parameters the structure of a state's."""
        return [model_file.load(path) for path in self.paths()]
