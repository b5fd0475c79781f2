"""Metrics for Weights & Biases, when asked: a copy of `metrics.jsonl`, which stays what counts."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from maml_jax.runs.files import WorkdirError
from maml_jax.runs.tensorboard import training_of


def check(project: str | None) -> None:
    """Raises ValueError if there is to be a copy in `project`, and no package to make it."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"wandb {project} needs the package wandb: pip install wandb, or leave the option away.")


class WandB:
    """A run of a project, which goes on where the same run of ours does.

    After a run was killed its rows since the last checkpoint come a second time; they are the same.

    Args:
      project: its name.
      folder: our run's, where the package keeps its files.
      content: `run.json`, of which name, configuration and first start are told.

    Raises:
      WorkdirError: if the package cannot begin, as without an account.
    """

    def __init__(self, project: str, folder: Path, content: dict[str, Any]):
        import wandb

        self._known: set[str] = set()
        first = f"{folder.absolute()} {content['starts'][0]['started']}"
        try:
            self._run = wandb.init(
                project=project,
                name=content["name"],
                id=hashlib.sha256(first.encode()).hexdigest()[:16],
                dir=folder,
                config={**(content["config"] or {}), "made_by": content["starts"][-1]},
                resume="allow",
            )
        except wandb.Error as error:
            raise WorkdirError(
                f"Weights & Biases cannot begin: {error}. Log in (`wandb login`), set WANDB_MODE=offline, or leave "
                "--wandb away."
            ) from error

    def add(self, row: dict[str, Any]) -> None:
        """Takes the numbers of a row, as those of its training, over its steps."""
        if "step" not in row:
            return
        labels, numbers = training_of(row)
        prefix = "".join(f"{label}/" for label in labels)
        if prefix not in self._known:
            self._known.add(prefix)
            self._run.define_metric(f"{prefix}step")
            self._run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
        self._run.log({f"{prefix}{name}": value for name, value in {**numbers, "step": row["step"]}.items()})

    def close(self) -> None:
        """Sends the rest."""
        self._run.finish()
