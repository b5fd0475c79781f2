"""Meta-trained models of the settings of the MAML paper's table 1, by name.

    python -m experiments.adapt omniglot-5w1s my_pictures
    python -m experiments.evaluate omniglot-20w1s --data-dir data/omniglot

Each model is the best in validation of one run of the fast recipe; `results/` has the runs. The description of a model
has the options of the run (`config`), and the accuracy on 600 test tasks in per cent, with the half width of the 95%
interval (`test`).

References:
  Finn, Abbeel and Levine (2017), arXiv:1703.03400, table 1. Lake, Salakhutdinov and Tenenbaum (2015), the data set
  Omniglot.
"""

from pathlib import Path

from maml_jax import validation
from maml_jax.runs import model_file
from maml_jax.runs.model_file import Saved

FOLDER = Path(__file__).parent

NAMES: tuple[str, ...] = tuple(sorted(file.stem for file in FOLDER.glob("*.msgpack")))
"""Names of the models."""


def path(name: str) -> Path:
    """Returns the file of a model.

    Args:
      name: one of `NAMES`.

    Raises:
      ValueError: for an unknown name. The message has the names of all models.
    """
    validation.one_of("name", name, NAMES)
    return FOLDER / f"{name}.msgpack"


def load(name: str) -> Saved:
    """Returns a model: its parameters, its learned inner rates, and its description.

    Args:
      name: one of `NAMES`.

    Raises:
      ValueError: for an unknown name. The message has the names of all models.

    Example:
      >>> model = load("omniglot-5w1s")
      >>> model.params["head"]["kernel"].shape
      (64, 5)
      >>> model.description["test"]["tasks"]
      600
    """
    return model_file.load(path(name))


def summary() -> str:
    """Returns a line for each model: name, accuracy on test tasks, and protocol.

    Example:
      >>> print(summary())  # doctest: +ELLIPSIS
      omniglot-20w1s: 96.12 ± 0.35% ...
    """
    lines = []
    for name in NAMES:
        test = load(name).description["test"]
        lines.append(
            f"{name}: {test['accuracy']:.2f} ± {test['half_width']:.2f}% on {test['tasks']} {test['mode']} test tasks "
            f"after {test['inner_steps']} inner steps ({test['results']})"
        )
    return "\n".join(lines)
