"""Few-shot classification of MiniImagenet (paper, section 5.2 and table 1), or of any folder of images.

    python -m experiments.miniimagenet --shots 1 --data-dir data/miniimagenet --expect miniimagenet
    python -m experiments.miniimagenet --shots 5 --data-dir my_pictures

Images may be a folder or archive with train.csv, val.csv and test.csv (`filename,label`), class folders, or the
pickles of MiniImagenet in circulation; they are resized to 84x84. Training and evaluation are `omniglot.main`, by the
paper's recipe for MiniImagenet.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from experiments import omniglot
from experiments.few_shot import run as few_shot
from experiments.few_shot.run import DataSet
from experiments.shared import command_line
from maml_jax import losses, validation
from maml_jax.tasks import images
from maml_jax.tasks.image_sources import Division
from maml_jax.tasks.published import LISTS

# Accuracy on MiniImagenet and half width of its 95% interval, in per cent: (shots, order). Paper, table 1.
PUBLISHED = {(1, 2): (48.70, 1.84), (5, 2): (63.11, 0.92), (1, 1): (48.07, 1.75), (5, 1): (63.15, 0.91)}


def paper_recipe(ways: int, shots: int) -> dict[str, Any]:
    """The recipe of the paper's appendix A.1.

    The authors' loss is the sum over the queries divided by the shots; they clip its gradient to 10.
    """
    return {
        "tasks": 4,
        "queries": 15,
        "inner_rate": losses.rate_for_mean_loss(0.01, ways),
        "inner_steps": 5,
        "clip": 10.0 * shots / (ways * 15),
    }


@dataclasses.dataclass(frozen=True)
class Run(few_shot.Run):
    """Few-shot classification of images. Options that are not given follow the paper's recipe for MiniImagenet."""

    data_dir: Path = Path("data/miniimagenet")
    """A folder or zip archive: with train.csv, val.csv and test.csv, with class folders, or with the pickles."""
    expect: Literal["miniimagenet", "cifar-fs", "fc100"] | None = None
    """The published data set that this must be, class by class."""
    size: int = 84
    """Height and width in pixels to which images are resized."""
    resampling: images.Resampling = "lanczos"
    """Filter of the resizing."""
    division: Division = "random"
    """Division of class folders that have no splits."""

    experiment: ClassVar[str] = "miniimagenet"
    val_tasks: ClassVar[int] = 100

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    @property
    def published_steps(self) -> int:
        return 10

    def recipe(self) -> dict[str, Any]:
        return paper_recipe(self.ways, self.shots)

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
            min_images=self.shots + self.queries,
            expect=self.expect,
        )
        about = data.describe()
        name, source = about["published"] or self.data_dir.name, {"source": self.data_dir.name}
        return DataSet(name, data.train, data.val, data.test, dict(data.sha256), about | source)

    def published(self, data: DataSet) -> tuple[float, float] | None:
        comparable = (self.ways, self.net, self.method, self.normalisation) == (5, "conv", "maml", "batch")
        comparable = comparable and data.about["published"] == LISTS["miniimagenet"]["title"]
        return PUBLISHED.get((self.shots, self.order)) if comparable else None


if __name__ == "__main__":
    command_line.run(Run, few_shot.prepare, omniglot.main, several=True)
