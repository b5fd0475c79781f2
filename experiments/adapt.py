"""Classifies your own pictures from a few labelled ones, with a meta-trained model.

    python -m experiments.adapt runs/NAME/best/step-0060000.msgpack my_pictures

The folder holds a folder of labelled pictures for each class, named as the class, and beside them the pictures to
classify. Prints a class and a confidence for each picture, and writes them to a JSON file and a grid of pictures.
Each picture is classified independently of the others: a model that was trained with batch normalisation takes the
statistics of the labelled pictures here.
"""

import dataclasses
import json
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro

from experiments.few_shot import testing
from experiments.few_shot.run import Run
from experiments.shared import command_line, plots
from experiments.table.rows import EXPERIMENTS
from maml_jax import validation
from maml_jax.runs import model_file
from maml_jax.tasks import images
from maml_jax.types import MetaState, Task


@dataclasses.dataclass(frozen=True)
class Config:
    """A model and a folder of pictures."""

    model: tyro.conf.Positional[Path]
    """A file that training wrote to `best/`."""
    folder: tyro.conf.Positional[Path]
    """A folder or zip archive: `<class>/<picture>` for each labelled picture, and the others beside these."""
    steps: int | None = None
    """Inner steps of adaptation; default: those after which training selected the model."""
    output: Path = Path("predictions.json")
    """Where to write the predictions; the grid of pictures is written beside it as PNG."""


class Prepared(NamedTuple):
    """The model and the pictures, checked and loaded."""

    config: Config
    run: Run
    state: MetaState
    labelled: dict[str, list[np.ndarray]]
    """Pictures of each class, uint8 `[H, W]` or `[H, W, C]` of the model's size."""
    others: dict[str, np.ndarray]
    """The pictures to classify, by name."""
    steps: int
    """Inner steps."""


def prepare(config: Config) -> Prepared:
    """Reads the model and the pictures.

    Raises:
      ValueError, DataError, OSError: saying what is wrong and what to do.
    """
    if config.steps is not None:
        validation.at_least("steps", config.steps, 0)
    command_line.check_output(config.output)
    saved = model_file.load(config.model)
    about = saved.description
    if about.get("experiment") not in EXPERIMENTS:
        raise ValueError(
            f"{config.model} is not a few-shot classifier, but of the experiment {about.get('experiment')!r}."
        )
    run = EXPERIMENTS[about["experiment"]](**about["config"])
    if run.normalisation == "batch":
        # The parameters are the same, and the class of a picture does not depend on the other pictures.
        run = dataclasses.replace(run, normalisation="support")
    height, _, channels = run.image_shape
    pictures = images.pictures(config.folder, size=height, resampling=run.resampling)
    if channels == 1:
        pictures = {name: np.rint(picture.mean(-1)).astype(np.uint8) for name, picture in pictures.items()}
    labelled, others = sort(pictures, config.folder, run.ways)
    steps = about["selected_after"] if config.steps is None else config.steps
    return Prepared(config, run, testing.load_state(run, saved), labelled, others, steps)


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
            f"The model distinguishes up to {ways} classes: {folder} must hold 2 to {ways} folders of labelled "
            f"pictures, but has {len(labelled)}{': ' if labelled else ''}{', '.join(labelled)}."
        )
    if not others:
        raise ValueError(f"There are no pictures to classify: put them beside the folders in {folder}.")
    return labelled, others


def predict(prepared: Prepared) -> np.ndarray:
    """Probability of each class for each picture, `[pictures, classes]`."""
    labelled, others = list(prepared.labelled.values()), list(prepared.others.values())

    def inputs(pictures: list[np.ndarray]) -> jnp.ndarray:
        pixels = np.stack(pictures)
        # As in training: in drawings, ink is 1 and paper 0.
        pixels = 255 - pixels[..., None] if pixels.ndim == 3 else pixels
        return jnp.asarray(pixels, jnp.float32)[None] / 255

    labels = np.repeat(np.arange(len(labelled), dtype=np.int32), [len(each) for each in labelled])
    support = (inputs([picture for each in labelled for picture in each]), jnp.asarray(labels)[None])
    query = (inputs(others), jnp.zeros((1, len(others)), jnp.int32))  # Labels are not used.
    predict = testing.predictor(prepared.run, prepared.state, prepared.steps)
    log_probabilities, _ = predict(Task(support, query))
    of_classes = np.exp(np.asarray(log_probabilities[0, -1, :, : len(labelled)], np.float64))
    if not np.isfinite(of_classes).all():
        raise FloatingPointError(
            f"After {prepared.steps} inner steps the predictions are not finite: give fewer --steps."
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
