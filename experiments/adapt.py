"""Classifies your own pictures from a few labelled ones, with a meta-trained model.

    python -m experiments.adapt runs/NAME/best/step-0060000.msgpack my_pictures

my_pictures holds one folder of labelled pictures for each class, with the name of the class. The pictures to classify
lie directly in my_pictures, or in a folder with the name `unlabelled`. The command prints a class and a confidence for
each of these, and writes a JSON file and a plot. The result for a picture does not depend on the other pictures: a
model that was trained with batch normalisation normalises with the statistics of the labelled pictures. Files that are
no pictures, and damaged pictures, are left out; the command prints their names.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro

from experiments.few_shot import testing
from experiments.few_shot.run import Run
from experiments.shared import command_line, plots
from experiments.shared.command_line import DefaultInHelp
from experiments.table.rows import trained_run
from maml_jax import validation
from maml_jax.runs import model_file
from maml_jax.runs.files import write_file
from maml_jax.tasks import images
from maml_jax.tasks.image_sources import UNLABELLED
from maml_jax.types import MetaState, Task


@dataclasses.dataclass(frozen=True)
class Config:
    """The command prints and writes a class and a confidence for each picture to classify."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A model file, from the folder best/ of a run, or the name of a model of `maml_jax.pretrained`."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """A folder or zip archive: CLASS/.../PICTURE is a labelled picture; PICTURE or unlabelled/.../PICTURE is a picture
    to classify."""
    steps: DefaultInHelp[int | None] = None
    """Inner steps of the adaptation. Default: the number with which training selected the model."""
    output: Path = Path("predictions.json")
    """JSON file of the predictions. The plot gets the same path with suffix .png."""


class Prepared(NamedTuple):
    """The model and the pictures, checked and loaded."""

    config: Config
    run: Run
    state: MetaState
    labelled: dict[str, list[np.ndarray]]
    """Pictures of each class, uint8 `[H, W]` or `[H, W, C]`, resized to the model's input."""
    others: dict[str, np.ndarray]
    """The pictures to classify, by name."""
    steps: int
    """Inner steps."""


def prepare(config: Config) -> Prepared:
    """Reads the model and the pictures.

    Raises:
      ValueError: if an option is not allowed, the file has no few-shot classifier, or the folder has a wrong layout.
      DataError: if the folder does not exist, or an archive is damaged.
      OSError: if a file cannot be read.
    """
    if config.steps is not None:
        validation.at_least("steps", config.steps, 0)
    command_line.check_output(config.output)
    saved = model_file.load(command_line.model_path(config.model))
    about = saved.description
    run = trained_run(config.model, about)
    if run.normalisation == "batch":
        # 'support' has the same parameters as 'batch', and makes predictions independent of the other pictures.
        run = dataclasses.replace(run, normalisation="support")
    height, _, channels = run.image_shape
    pictures = images.pictures(config.folder, size=height, resampling=run.resampling)
    if channels == 1:
        grey = {name: np.rint(picture.mean(-1)).astype(np.uint8) for name, picture in pictures.images.items()}
        pictures = pictures._replace(images=grey)
    labelled, others = sort(pictures, config.folder, run.ways)
    steps = about["selected_after"] if config.steps is None else config.steps
    return Prepared(config, run, testing.load_state(run, saved), labelled, others, steps)


def sort(
    pictures: images.Pictures, folder: Path, ways: int
) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
    """Returns the labelled pictures by class, and the pictures to classify by name.

    Raises:
      ValueError: if there are not 2 to `ways` classes, if a class has no readable picture, or if there is no picture to
        classify.
    """
    # A folder of which all pictures are left out is not dropped in silence.
    folders = {name.split("/")[0] for name in (*pictures.images, *pictures.left_out) if "/" in name}
    labelled: dict[str, list[np.ndarray]] = {name: [] for name in sorted(folders) if name.lower() not in UNLABELLED}
    others = {}
    for name, picture in pictures.images.items():
        folder_name, slash, _ = name.partition("/")
        if slash and folder_name in labelled:
            labelled[folder_name].append(picture)
        else:
            others[name] = picture
    empty = [name for name in labelled if not labelled[name]]
    if empty:
        raise ValueError(
            f"Every folder in {folder} is a class with labelled pictures, but no picture can be read in "
            f"{', '.join(empty)}. Convert the pictures to PNG or JPEG, or remove the folder."
        )
    if not 2 <= len(labelled) <= ways:
        raise ValueError(
            f"The model distinguishes up to {ways} classes: {folder} must hold 2 to {ways} folders of labelled "
            f"pictures, but has {len(labelled)}{': ' if labelled else ''}{', '.join(labelled)}."
        )
    if not others:
        raise ValueError(
            f"There are no pictures to classify in {folder}: put them in this folder, beside the class folders."
        )
    return labelled, others


def predict(prepared: Prepared) -> np.ndarray:
    """Returns the probability of each class for each picture to classify, `[pictures, classes]`.

    Raises:
      FloatingPointError: if a prediction is not finite.
    """
    labelled, others = list(prepared.labelled.values()), list(prepared.others.values())

    def inputs(pictures: list[np.ndarray]) -> jnp.ndarray:
        pixels = np.stack(pictures)
        # In training, the ink of a drawing is 1 and the paper is 0.
        pixels = 255 - pixels[..., None] if pixels.ndim == 3 else pixels
        return jnp.asarray(pixels, jnp.float32)[None] / 255

    labels = np.repeat(np.arange(len(labelled), dtype=np.int32), [len(each) for each in labelled])
    support = (inputs([picture for each in labelled for picture in each]), jnp.asarray(labels)[None])
    query = (inputs(others), jnp.zeros((1, len(others)), jnp.int32))  # The labels of queries are not used.
    predict = testing.predictor(prepared.run, prepared.state, prepared.steps)
    log_probabilities, _ = predict(Task(support, query))
    # The model may distinguish more classes than the folder has: drop the others and normalise.
    probabilities = np.exp(np.asarray(log_probabilities[0, -1, :, : len(labelled)], np.float64))
    if not np.isfinite(probabilities).all():
        raise FloatingPointError(
            f"After {prepared.steps} inner steps the predictions are not finite: give fewer --steps."
        )
    return probabilities / probabilities.sum(-1, keepdims=True)


def main(prepared: Prepared) -> list[dict[str, Any]]:
    """Adapts the model, prints the predictions, and writes them as JSON and as a plot.

    Returns:
      The content of the JSON file: `picture`, `class`, `confidence` and `probabilities` of each picture to classify.
    """
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
    write_file(config.output, json.dumps(found, indent=1).encode())
    shown = [(pixels, each["class"], each["confidence"]) for pixels, each in zip(prepared.others.values(), found)]
    plots.predictions(config.output.with_suffix(".png"), prepared.labelled, shown)
    print(f"Wrote {config.output} and {config.output.with_suffix('.png')}.")
    return found


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
