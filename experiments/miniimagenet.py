"""Few-shot classification of MiniImagenet (paper, section 5.2 and table 1), or of any folder of images.

    python -m experiments.miniimagenet --shots 1 --data-dir data/miniimagenet --expect miniimagenet
    python -m experiments.miniimagenet --shots 5 --data-dir my_pictures

Images may be a folder or archive with train.csv, val.csv and test.csv (`filename,label`), class folders, or the
pickles of MiniImagenet in circulation; they are resized to 84x84. Trains by the paper's recipe for MiniImagenet.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.few_shot import options as few_shot
from experiments.few_shot import training
from experiments.few_shot.options import DataSet, Prepared, Recipe, Setting
from experiments.shared import command_line
from maml_jax import losses, validation
from maml_jax.tasks import images
from maml_jax.tasks.image_sources import Division

# Of MiniImagenet, in per cent, (shots, order): paper, table 1.
PUBLISHED = {(1, 2): (48.70, 1.84), (5, 2): (63.11, 0.92), (1, 1): (48.07, 1.75), (5, 1): (63.15, 0.91)}


@dataclasses.dataclass(frozen=True)
class Config(few_shot.Config):
    """Few-shot classification of images. What is not given follows the paper's recipe for MiniImagenet."""

    data_dir: Path = Path("data/miniimagenet")
    """A folder or zip archive: with train.csv, val.csv and test.csv, with class folders, or with the pickles."""
    expect: Literal["miniimagenet", "cifar-fs", "fc100"] | None = None
    """The published data set that this must be, class by class."""
    size: int = 84
    """Height and width in pixels to which images are resized."""
    resampling: images.Resampling = "lanczos"
    """Filter of the resizing."""
    division: Division = "random"
    """Of class folders without splits of their own."""


def recipe(ways: int, shots: int) -> Recipe:
    """Of the paper's appendix A.1. The code's loss is the sum over the queries divided by the shots, and it is that
    loss's gradient which it clips to 10."""
    return Recipe(
        tasks=4,
        queries=15,
        inner_rate=losses.rate_for_mean_loss(0.01, ways),
        inner_steps=5,
        clip=10.0 * shots / (ways * 15),
    )


def settle(config: Config) -> tuple[Config, Setting]:
    """The options with the recipe filled in, checked as far as that needs no data; raises ValueError."""
    validation.at_least("size", config.size, 1)
    return config, few_shot.resolve(config, recipe)


def prepare(config: Config) -> Prepared:
    """Checks the options, then reads the data.

    Raises:
      ValueError, DataError, OSError: saying what is wrong and what to do.
    """
    config, setting = settle(config)
    few_shot.check_workdir(config, setting)
    found = images.load(
        config.data_dir,
        config.cache_dir,
        size=config.size,
        resampling=config.resampling,
        division=config.division,
        min_images=setting.shots + setting.queries,
        expect=config.expect,
    )
    about = found.describe()
    data = DataSet(
        name=about["published"] or config.data_dir.name,
        train=found.train,
        val=found.val,
        test=found.test,
        sha256=dict(found.sha256),
        rotations="none",
        about=about | {"source": config.data_dir.name},
    )
    paper = (setting.ways, setting.net, config.method, config.normalisation) == (5, "conv", "maml", "batch")
    published = PUBLISHED.get((setting.shots, config.order)) if paper and found.published == "miniimagenet" else None
    prepared = Prepared("miniimagenet", config, setting, data, published, published_steps=10, val_tasks=100)
    few_shot.check_tasks(prepared)
    return prepared


if __name__ == "__main__":
    command_line.run(Config, prepare, training.main, several=True)
