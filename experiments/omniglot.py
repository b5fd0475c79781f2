"""Few-shot classification of Omniglot's characters (paper, section 5.2 and table 1).

    python -m experiments.omniglot --ways 5 --shots 1 --data-dir data --download

Trains by the paper's recipe for the number of ways, then adapts to 600 test tasks of held-out
characters. Writes metrics, results, the best models and pictures to the work directory.
"""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from experiments.few_shot import options as few_shot
from experiments.few_shot import training
from experiments.few_shot.options import DataSet, Net, Prepared, Recipe, Setting
from experiments.shared import command_line
from maml_jax import losses, validation
from maml_jax.tasks import download, episodes, omniglot

Preset = Literal["5w1s", "5w5s", "20w1s", "20w5s", "5w1s-mlp", "5w5s-mlp"]
PRESETS: dict[str, tuple[int, int, Net]] = {
    "5w1s": (5, 1, "conv"),
    "5w5s": (5, 5, "conv"),
    "20w1s": (20, 1, "conv"),
    "20w5s": (20, 5, "conv"),
    "5w1s-mlp": (5, 1, "mlp"),
    "5w5s-mlp": (5, 5, "mlp"),
}

# Test accuracy and half width of its 95% interval, in per cent: (ways, shots, net, order).
# Second order: paper, table 1. First order: Nichol et al. 2018, table 2.
PUBLISHED = {
    (5, 1, "conv", 2): (98.7, 0.4), (5, 5, "conv", 2): (99.9, 0.1),
    (20, 1, "conv", 2): (95.8, 0.3), (20, 5, "conv", 2): (98.9, 0.2),
    (5, 1, "mlp", 2): (89.7, 1.1), (5, 5, "mlp", 2): (97.5, 0.6),
    (5, 1, "conv", 1): (98.3, 0.5), (5, 5, "conv", 1): (99.2, 0.2),
    (20, 1, "conv", 1): (89.4, 0.5), (20, 5, "conv", 1): (97.9, 0.1),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(few_shot.Config):
    """Few-shot classification of Omniglot. What is not given follows the paper's recipe for the number of ways."""

    preset: Preset | None = None
    """A setting of the paper's table 1, in place of --ways, --shots and --net."""
    split: omniglot.SplitName = "paper"
    """Division of the characters: 1,100/100/423 at random, or by alphabet as Vinyals et al. did."""
    rotations: episodes.Rotations = "random"
    """Turn each class of a task by a random multiple of 90 degrees, or make four classes of each, or neither."""
    resampling: omniglot.Resampling = "lanczos"
    """Filter from 105x105 to 28x28 pixels."""
    data_dir: Path = Path("data/omniglot")
    """Where Omniglot is: the official archives, the folders in them, or prepared by TensorFlow Datasets."""
    download: bool = False
    """Fetch the official archives (16 MB) into --data-dir first."""


def recipe(ways: int, shots: int) -> Recipe:
    """Of the paper's appendix A.1, by the number of ways."""
    if ways >= 20:
        return Recipe(tasks=16, queries=shots, inner_rate=losses.rate_for_mean_loss(0.1, ways=20), inner_steps=5)
    return Recipe(tasks=32, queries=shots, inner_rate=losses.rate_for_mean_loss(0.4, ways=5), inner_steps=1)


def settle(config: Config) -> tuple[Config, Setting]:
    """The options with the preset and the recipe filled in, checked as far as that needs no data.

    Raises:
      ValueError: naming the option, what was given and what is allowed.
    """
    validation.one_of("preset", config.preset, (None, *get_args(Preset)))
    if config.preset is not None:
        own = {name: getattr(config, name) for name in ("ways", "shots", "net")}
        if given := ", ".join(f"{name} {value}" for name, value in own.items() if value is not None):
            raise ValueError(
                f"preset {config.preset} sets ways, shots and net: give either it or them, not both, but got {given}."
            )
        ways, shots, net = PRESETS[config.preset]
        config = dataclasses.replace(config, preset=None, ways=ways, shots=shots, net=net)
    setting = few_shot.resolve(config, recipe)
    if setting.shots + setting.queries > omniglot.DRAWINGS:
        raise ValueError(
            f"shots + queries must be at most {omniglot.DRAWINGS}, the drawings of a character, but got "
            f"{setting.shots} + {setting.queries}."
        )
    return config, setting


def prepare(config: Config) -> Prepared:
    """Checks the options, then reads the data.

    Raises:
      ValueError, DataError, OSError: saying what is wrong and what to do.
    """
    config, setting = settle(config)
    few_shot.check_workdir(config, setting)
    if config.download:
        download.omniglot(config.data_dir)
    images = omniglot.load(config.data_dir, config.cache_dir, resampling=config.resampling)
    parts = omniglot.split(config.split, images.names)
    # Ink is 1 in the episodes, and paper 0.
    train, val, test = (episodes.equal_classes(255 - images.images[part]) for part in parts)
    data = DataSet(
        name=f"Omniglot, divided as {config.split}",
        train=train,
        val=val,
        test=test,
        sha256={
            name: omniglot.digest(omniglot.Omniglot(images.images[part], tuple(images.names[i] for i in part)))
            for name, part in parts._asdict().items()
        },
        rotations=config.rotations,
        about={"content_sha256": omniglot.CONTENT_SHA256, "images_sha256": omniglot.digest(images)},
    )
    published = None
    if config.method == "maml" and config.normalisation == "batch":
        published = PUBLISHED.get((setting.ways, setting.shots, setting.net, config.order))
    prepared = Prepared(
        "omniglot", config, setting, data, published, published_steps=5 if setting.ways >= 20 else 3, val_tasks=160
    )
    few_shot.check_tasks(prepared)
    return prepared


if __name__ == "__main__":
    command_line.run(Config, prepare, training.main, several=True)
