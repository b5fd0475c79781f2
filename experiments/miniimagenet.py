"""Few-shot classification of MiniImagenet (paper, section 5.2 and table 1), or of any folder of images.

    python -m experiments.miniimagenet --shots 1 --data-dir data/miniimagenet --expect miniimagenet
    python -m experiments.miniimagenet --shots 5 --data-dir my_pictures

The option --data-dir takes a folder or zip archive with train.csv, val.csv and test.csv (`filename,label`), with class
folders, or with the widely shared pickle files of MiniImagenet. Images are resized to 84x84 pixels. The command trains
by the paper's recipe for MiniImagenet; the code is `experiments.omniglot.main`.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from experiments import omniglot
from experiments.few_shot import methods
from experiments.few_shot import run as few_shot
from experiments.few_shot.recipes import FAST, ONE_STEP
from experiments.few_shot.run import DataSet
from experiments.shared import command_line
from experiments.shared.command_line import DefaultInHelp
from maml_jax import losses, validation
from maml_jax.tasks import images
from maml_jax.tasks.image_sources import Division
from maml_jax.tasks.published import LISTS

# (shots, order): accuracy on MiniImagenet and half width of its 95% interval, in per cent. Paper, table 1.
PUBLISHED = {(1, 2): (48.70, 1.84), (5, 2): (63.11, 0.92), (1, 1): (48.07, 1.75), (5, 1): (63.15, 0.91)}


def paper_recipe(ways: int, shots: int) -> dict[str, Any]:
    """Returns the paper's recipe (appendix A.1).

    The loss of the authors' code is the sum over the queries divided by the shots. The code clips each entry of its
    gradient to 10. `clip` is the same limit for the mean loss.
    """
    return {
        "tasks": 4,
        "queries": 15,
        "inner_rate": losses.rate_for_mean_loss(0.01, ways),
        "inner_steps": 5,
        "clip": 10.0 * shots / (ways * 15),
    }


def one_step_recipe(ways: int, shots: int) -> dict[str, Any]:
    """The recipe 'one-step': 11,000 meta-steps on flipped images of half the height and width.

    Training is on one task of 20 classes per meta-step, with four images each, which are exchanged. The inner rates
    are in proportion to the ways, because they are for a mean loss.
    """
    return ONE_STEP | {
        "tasks": 1,
        "queries": 15,
        "train_ways": 20,
        "train_shots": 1,
        "train_queries": 3,
        "inner_rate": 0.01 * ways,
        "head_rates": (0.02 * ways,),
        "downscale": 2,
        "flips": True,
        "steps": 11_000,
    }


def fast_recipe(ways: int, shots: int) -> dict[str, Any]:
    """The second phase of the recipe 'fast': 400 meta-steps on images of full size."""
    return FAST | {
        "tasks": 2,
        "queries": 15,
        "train_queries": 3,
        "inner_rate": 0.01 * ways,
        "head_rates": (0.02 * ways,) * 2,
        "flips": True,
        "steps": 400,
        "first_steps": 11_000,
    }


@dataclasses.dataclass(frozen=True)
class Run(few_shot.Run):
    """Few-shot classification of images. Options that are not given follow the recipe for MiniImagenet, `--recipe`."""

    data_dir: Path = Path("data/miniimagenet")
    """A folder or zip archive with train.csv, val.csv and test.csv, with class folders, or with pickle files."""
    expect: DefaultInHelp[Literal["miniimagenet", "cifar-fs", "fc100"] | None] = None
    """Check that the classes are those of this published data set. Default: no check."""
    size: int = 84
    """Height and width in pixels to which images are resized."""
    resampling: images.Resampling = "lanczos"
    """Filter that resizes images."""
    division: Division = "random"
    """Split of class folders without splits. 'random': 64% train, 16% val, 20% test; 'none': all classes train."""

    data_options: ClassVar[tuple[str, ...]] = ("data_dir", "expect", "size", "division")
    experiment: ClassVar[str] = "miniimagenet"
    val_tasks: ClassVar[int] = 100

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    @property
    def published_steps(self) -> int:
        return 10

    def paper_recipe(self) -> dict[str, Any]:
        return paper_recipe(self.ways, self.shots)

    def one_step_recipe(self) -> dict[str, Any]:
        return one_step_recipe(self.ways, self.shots)

    def fast_recipe(self) -> dict[str, Any]:
        return fast_recipe(self.ways, self.shots)

    def check(self) -> None:
        super().check()
        validation.at_least("size", self.size, 1)

    def load(self) -> DataSet:
        data = images.load(
            self.data_dir,
            self.cache_dir,
            size=self.size,
            resampling=self.resampling,
            division=self.division,
            min_images=max(self.shots + self.queries, self.train_shots + self.train_queries),
            expect=self.expect,
        )
        about = data.describe()
        name, source = about["published"] or self.data_dir.name, {"source": self.data_dir.name}
        return DataSet(name, data.train, data.val, data.test, dict(data.sha256), about | source)

    def published(self, data: DataSet) -> tuple[float, float] | None:
        comparable = (self.ways, self.net, self.normalisation) == (5, "conv", "batch")
        comparable = comparable and self.method in ("maml", "one-step")
        comparable = comparable and data.about["published"] == LISTS["miniimagenet"]["title"]
        return PUBLISHED.get((self.shots, self.order)) if comparable else None


if __name__ == "__main__":
    command_line.run(Run, methods.prepare, omniglot.main, several=True)
