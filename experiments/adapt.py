"""Classifies pictures of one's own from a few labelled ones, with a model that was meta-trained.

    python -m experiments.adapt runs/NAME/best/step-0060000.msgpack my_pictures

In the folder, each class has a folder of a few pictures with its name, and the pictures to classify lie beside them.
Prints a class and a confidence for each, and writes them to a JSON file and a grid of pictures. Each is classified as
if alone: a model that was trained to normalise a batch by itself normalises here by the labelled pictures.
"""

import dataclasses
import json
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro

from experiments.few_shot import classifier
from experiments.few_shot import options as few_shot
from experiments.few_shot.classifier import Classifier
from experiments.shared import command_line, plots
from experiments.table.rows import EXPERIMENTS
from maml_jax import validation
from maml_jax.runs import model_file
from maml_jax.tasks import images, omniglot
from maml_jax.types import MetaState, Task


@dataclasses.dataclass(frozen=True)
class Config:
    """A model and a folder of pictures."""

    model: tyro.conf.Positional[Path]
    """A file that training wrote to `best/`."""
    folder: tyro.conf.Positional[Path]
    """A folder or zip archive: `<class>/<picture>` for each labelled picture, and the others beside these folders."""
    steps: int | None = None
    """Inner steps of adaptation; default: those after which the model was the best."""
    output: Path = Path("predictions.json")
    """Where to write the predictions; the grid of pictures is written beside it as PNG."""


class Prepared(NamedTuple):
    """All that is needed, checked and loaded."""

    config: Config
    model: Classifier
    state: MetaState
    labelled: dict[str, list[np.ndarray]]
    """Pictures of each class, as the model sees them before they are scaled: uint8."""
    others: dict[str, np.ndarray]
    """The pictures to classify, by name."""
    steps: int
    """Inner steps, resolved."""


def prepare(config: Config) -> Prepared:
    """Reads the model and the pictures.

    Raises:
      ValueError, DataError, OSError: saying what is wrong and what to do.
    """
    if config.steps is not None:
        validation.at_least("steps", config.steps, 0)
    command_line.check_output(config.output)
    content = model_file.load(config.model)
    name = content.description.get("experiment")
    if name not in EXPERIMENTS:
        raise ValueError(f"{config.model} is not a few-shot classifier: it says of itself that it is {name!r}.")
    experiment = EXPERIMENTS[name]
    trained, setting = experiment.settle(experiment.Config(**few_shot.options_of(content.description)))
    if trained.normalisation == "batch":
        # The same parameters; and then no picture's class depends on which others there are to classify.
        trained = dataclasses.replace(trained, normalisation="support")
    grey = name == "omniglot"
    size = omniglot.SIZE if grey else trained.size
    labelled, others = sort(
        images.pictures(config.folder, size=size, resampling=trained.resampling), config.folder, setting.ways
    )
    if grey:
        labelled = {name: [_grey(picture) for picture in each] for name, each in labelled.items()}
        others = {name: _grey(picture) for name, picture in others.items()}
    model = classifier.classifier(trained, setting, (size, size, 1 if grey else 3), setting.ways)
    steps = content.description.get("selected_after", few_shot.TEST_STEPS) if config.steps is None else config.steps
    return Prepared(config, model, classifier.load_trained(content, model), labelled, others, steps)


def sort(
    pictures: dict[str, np.ndarray], folder: Path, ways: int
) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
    """Labelled pictures by class, and the others by name.

    Raises:
      ValueError: if there are not 2 to `ways` classes, if a picture lies deeper, or if there is none to classify.
    """
    labelled: dict[str, list[np.ndarray]] = {}
    others = {}
    for name, picture in pictures.items():
        *above, _ = PurePosixPath(name).parts
        if len(above) > 1:
            raise ValueError(f"{name} in {folder} lies too deep: give <class>/<picture> and, beside them, <picture>.")
        if above:
            labelled.setdefault(above[0], []).append(picture)
        else:
            others[name] = picture
    if not 2 <= len(labelled) <= ways:
        raise ValueError(
            f"The model tells up to {ways} classes apart: {folder} must hold 2 to {ways} folders of labelled pictures, "
            f"but has {len(labelled)}{': ' if labelled else ''}{', '.join(labelled)}."
        )
    if not others:
        raise ValueError(f"There is nothing to classify: put the pictures beside the folders in {folder}.")
    return labelled, others


def _grey(picture: np.ndarray) -> np.ndarray:
    return np.rint(picture.mean(-1)).astype(np.uint8)


def predict(prepared: Prepared) -> np.ndarray:
    """Probability of each class for each picture, `[pictures, classes]`."""
    labelled, others = list(prepared.labelled.values()), list(prepared.others.values())

    def inputs(pictures: list[np.ndarray]) -> jnp.ndarray:
        pixels = np.stack(pictures)
        # As in the episodes of training: of drawings the ink is 1, and paper 0.
        pixels = 255 - pixels[..., None] if pixels.ndim == 3 else pixels
        return jnp.asarray(pixels, jnp.float32)[None] / 255

    labels = np.repeat(np.arange(len(labelled), dtype=np.int32), [len(each) for each in labelled])
    support = (inputs([picture for each in labelled for picture in each]), jnp.asarray(labels)[None])
    query = (inputs(others), jnp.zeros((1, len(others)), jnp.int32))  # No label is known, and none is used.
    log_probabilities, _ = prepared.model.predictor(prepared.state, prepared.steps)(Task(support, query))
    of_classes = np.exp(np.asarray(log_probabilities[0, -1, :, : len(labelled)], np.float64))
    if not np.isfinite(of_classes).all():
        raise FloatingPointError(
            f"After {prepared.steps} inner steps the predictions are no numbers any more: give fewer --steps."
        )
    return of_classes / of_classes.sum(-1, keepdims=True)


def main(prepared: Prepared) -> list[dict[str, Any]]:
    """Adapts, prints, and writes the predictions and their picture."""
    config, names = prepared.config, list(prepared.labelled)
    found: list[dict[str, Any]] = []
    for picture, probabilities in zip(prepared.others, predict(prepared)):
        best = int(probabilities.argmax())
        found.append(
            {
                "picture": picture,
                "class": names[best],
                "confidence": float(probabilities[best]),
                "probabilities": dict(zip(names, probabilities.tolist())),
            }
        )
        print(f"{picture}: {names[best]} ({probabilities[best]:.0%})")
    config.output.write_text(json.dumps(found, indent=1))
    shown = [(pixels, each["class"], each["confidence"]) for pixels, each in zip(prepared.others.values(), found)]
    plots.predictions(config.output.with_suffix(".png"), prepared.labelled, shown)
    print(f"Wrote {config.output} and {config.output.with_suffix('.png')}.")
    return found


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
