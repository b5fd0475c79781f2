"""A few-shot run as one record: the options of the command line, which `resolved()` completes by the recipe."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Optional, Self, TypeVar, get_args

from experiments.shared import command_line
from experiments.shared.command_line import RUN_OPTIONS
from maml_jax import validation
from maml_jax.nets.normalisation import NORMALISATIONS, Normalisation
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.resumable import check_steps
from maml_jax.tasks import images
from maml_jax.tasks.episodes import ROTATIONS, EpisodeShape, ImageClasses, Rotations

Method = Literal[
    "maml",
    "anil",
    "boil",
    "meta-sgd",
    "meta-curvature",
    "maml++",
    "shared-head",
    "prototypes",
    "reptile",
    "imaml",
    "pretrained",
]
Net = Literal["conv", "mlp"]
Split = Literal["train", "val", "test"]

WITHOUT_ORDER = ("reptile", "imaml", "pretrained")
"""Methods that do not differentiate through the inner steps: `order` has no effect."""
ANNEALED = ("maml++", "reptile")
"""Methods whose outer rate always falls over the meta-steps."""
TEST_STEPS = 10
"""Inner steps at test; accuracies are recorded after 0 to this many."""


class DataSet(NamedTuple):
    """Images of three splits of classes."""

    name: str
    train: ImageClasses
    val: ImageClasses
    test: ImageClasses
    sha256: dict[str, str]
    """Content hash of each split."""
    about: dict[str, Any]
    """Provenance of the data, for `results.json`."""

    def split(self, name: Split) -> ImageClasses:
        return {"train": self.train, "val": self.val, "test": self.test}[name]


# The command line sees an optional option, and mypy the type that it has after `resolved()`.
T = TypeVar("T")
if TYPE_CHECKING:
    FromRecipe = Annotated[T, "None until `resolved()`"]
else:
    FromRecipe = Optional
RECIPE: Any = None
"""Default of the options that the recipe sets."""


@dataclasses.dataclass(frozen=True)
class Run(command_line.RunOptions):
    """Options of every few-shot experiment. Options that are not given follow the recipe.

    `resolved()` completes a run by its recipe; the functions of `experiments.few_shot` take a resolved run. A subclass
    for each experiment adds the options of its data.
    """

    ways: FromRecipe[int] = RECIPE
    """Classes per task; default: 5."""
    shots: FromRecipe[int] = RECIPE
    """Support examples per class; default: 1."""
    net: FromRecipe[Net] = RECIPE
    """The four-block convolutional net, or the fully connected net; default: conv."""
    method: Method = "maml"
    """The algorithm; 'pretrained' is joint training on all classes, then fine-tuning at test."""
    order: Literal[1, 2] = 2
    """2: exact meta-gradient; 1: first-order approximation."""
    normalisation: Normalisation = "batch"
    """Statistics that normalise activations; with 'batch', as in the paper, the queries of a task share them."""
    rotations: Rotations = "none"
    """Rotate each class of a task by a random multiple of 90 degrees, or make four classes of each, or neither."""
    steps: int = 60_000
    """Meta-steps."""
    tasks: FromRecipe[int] = RECIPE
    """Tasks per meta-step; default: the recipe's."""
    queries: FromRecipe[int] = RECIPE
    """Query examples per class, in training and at test; default: the recipe's."""
    inner_rate: FromRecipe[float] = RECIPE
    """Inner step size for the MEAN cross-entropy over the support set; default: the recipe's."""
    tune: FromRecipe[bool] = RECIPE
    """Fine-tune a pretrained net at the best of 0.03 to 3 times the inner rate on validation tasks; default: unless
    --inner-rate is given."""
    inner_steps: FromRecipe[int] = RECIPE
    """Inner steps in training; default: the recipe's."""
    outer_rate: FromRecipe[float] = RECIPE
    """Learning rate of Adam in the outer loop, or Reptile's initial interpolation weight; default: 0.001, and 0.5."""
    clip: float | None = None
    """Largest absolute value of an entry of the meta-gradient of the mean loss; default: the recipe's."""
    anneal: bool = False
    """Reduce the outer rate along a cosine to a hundredth over all meta-steps, as MAML++ always does."""
    task_batch_size: int | None = None
    """Tasks that a device computes at once. Default: chosen by backend and net."""
    test_tasks: int = 600
    """Tasks to evaluate on."""
    evaluation: Literal["transductive", "both"] = "both"
    """Evaluate with the queries of a task in one batch, or also inductively, each query alone: takes twice as long."""
    ensemble: bool = False
    """Evaluate also the averaged predictions of the best models of the validation, as published for MAML++."""
    seed: int = 0
    """Seed of the parameters and of all tasks."""
    resampling: images.Resampling | Literal["nearest"] = "lanczos"
    """Filter with which images are resized."""
    cache_dir: Path | None = None
    """Where resized images are kept; default: maml_jax in the user's cache directory."""
    row: str | None = None
    """Name of the run's row in the table of results; `experiments.reproduce` gives it."""

    experiment: ClassVar[str]
    """Name of the module, under which `experiments.evaluate` finds it."""
    val_tasks: ClassVar[int]
    """Tasks per validation."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        raise NotImplementedError

    @property
    def published_steps(self) -> int:
        """Inner steps at test of the published accuracies."""
        raise NotImplementedError

    def recipe(self) -> dict[str, Any]:
        """Values of the options that are not given, for MAML with the ways and shots of this run."""
        raise NotImplementedError

    def load(self) -> DataSet:
        """Reads the data. Raises ValueError, DataError or OSError, saying what is wrong and what to do."""
        raise NotImplementedError

    def published(self, data: DataSet) -> tuple[float, float] | None:
        """Published accuracy of this run and the half width of its interval, in per cent."""
        raise NotImplementedError

    # From options to numbers

    def resolved(self) -> Self:
        """Returns the run with values for all options, checked as far as possible without data.

        Raises:
          ValueError: naming the option, the value and the allowed values.
        """
        validation.one_of("method", self.method, get_args(Method))
        if self.method == "pretrained" and self.inner_steps is not None:
            raise ValueError(
                f"inner_steps is for methods that adapt in training, unlike pretrained, but got {self.inner_steps}. "
                f"Fine-tuning is evaluated after 0 to {TEST_STEPS} steps."
            )
        run = self.with_defaults(
            ways=5, shots=1, net="conv", tune=self.method == "pretrained" and self.inner_rate is None
        )
        validation.at_least("ways", run.ways, 2)
        validation.at_least("shots", run.shots, 1)
        run = run.with_defaults(**for_method(self.method, run.recipe()))
        run.check()
        return run

    def with_defaults(self, **values: Any) -> Self:
        """Returns the run with these values in place of None."""
        return dataclasses.replace(self, **{name: v for name, v in values.items() if getattr(self, name) is None})

    def check(self) -> None:
        """Raises ValueError, naming the option, the value and the allowed values. The run must be resolved."""
        validation.at_least("ways", self.ways, 2)
        for name in ("shots", "queries", "tasks", "inner_steps", "test_tasks"):
            validation.at_least(name, getattr(self, name), 1)
        validation.meta_steps("steps", self.steps)
        validation.seed("seed", self.seed)
        for name in ("inner_rate", "outer_rate", *(("clip",) if self.clip is not None else ())):
            validation.positive(name, getattr(self, name))
        for name, allowed in (
            ("net", get_args(Net)),
            ("order", (1, 2)),
            ("normalisation", NORMALISATIONS),
            ("rotations", ROTATIONS),
            ("evaluation", ("transductive", "both")),
        ):
            validation.one_of(name, getattr(self, name), allowed)
        self._check_combinations()
        if processes.multiple():
            task_mesh(self.tasks)  # Raises ValueError if the processes cannot have equal shares.
        if self.task_batch_size is not None:
            validation.at_least("task_batch_size", self.task_batch_size, 1)
            mesh = task_mesh(self.tasks)
            share = self.tasks // (mesh.size if mesh else 1)
            if share % self.task_batch_size:
                raise ValueError(
                    f"task_batch_size must divide the tasks of one device, {share}, but got {self.task_batch_size}."
                )

    def _check_combinations(self) -> None:
        if self.net == "mlp" and self.normalisation in ("instance", "tasknorm"):
            raise ValueError(
                f"normalisation {self.normalisation!r} needs spatial axes, which the fully connected net does not "
                "have: give 'batch', 'support', 'layer' or 'group'."
            )
        if self.normalisation == "running" and self.method == "pretrained":
            raise ValueError("normalisation 'running' gathers statistics over inner steps, and pretrained takes none.")
        if self.normalisation == "running" and self.method == "reptile":
            raise ValueError(
                "normalisation 'running' needs norm parameters that the inner steps leave unchanged, but reptile "
                "adapts them: give another normalisation."
            )
        if self.tune and self.method != "pretrained":
            raise ValueError(f"tune is for the method pretrained, but got {self.method}.")
        if self.order == 1 and self.method in WITHOUT_ORDER:
            raise ValueError(f"order 1 is for methods that differentiate the inner loop, and {self.method} does not.")
        if self.anneal and self.method in ANNEALED:
            raise ValueError(f"anneal is for methods with a constant outer rate; the rate of {self.method} falls.")

    # Values that follow from the options

    @property
    def shape(self) -> EpisodeShape:
        """Shape of the tasks in validation and test."""
        return EpisodeShape(self.ways, self.shots, self.queries, self.rotations)

    @property
    def outer_rate_falls(self) -> bool:
        """Whether the outer rate falls over the meta-steps, so that `steps` changes the training."""
        return self.anneal or self.method in ANNEALED

    @property
    def selected_after(self) -> int:
        """Inner steps after which models are selected in validation and compared at test.

        MAML++ has rates and norms for the inner steps of its training, and takes as many at test. Reptile takes 50 at
        test (Nichol et al. 2018, appendix A), more than are recorded.
        """
        if self.method == "reptile":
            return TEST_STEPS
        steps = self.inner_steps if self.method == "maml++" else self.published_steps
        return min(TEST_STEPS, max(steps, LEAST_STEPS.get(self.method, 1)))

    @property
    def name(self) -> str:
        """Name of the run's directory, where none is given."""
        parts = [self.experiment, f"{self.ways}way-{self.shots}shot", self.method]
        parts += ["mlp"] if self.net == "mlp" else []
        parts += [self.normalisation] if self.normalisation != "batch" else []
        parts += ["order1"] if self.order == 1 else []
        parts += ["annealed"] if self.anneal else []
        return "-".join([*parts, f"seed{self.seed}"])

    # Records of the run

    def record(self, data: DataSet | None = None) -> dict[str, Any]:
        """Configuration of the run's directory, with which a resumed run must agree."""
        record = dataclasses.asdict(self) | {"selected_after": self.selected_after}
        return record if data is None else record | {"data_sha256": data.sha256}

    @property
    def mutable_fields(self) -> tuple[str, ...]:
        """Fields of `record` that may change when the run is resumed."""
        fields = (*NEUTRAL, "expect", "test_tasks", "evaluation", "ensemble", "task_batch_size")
        return fields if self.outer_rate_falls else (*fields, "steps")

    def description(self, data: DataSet) -> dict[str, Any]:
        """Description in saved models and results, from which `experiments.evaluate` restores the run."""
        left_out = (*NEUTRAL, "task_batch_size")
        return {
            "experiment": self.experiment,
            "config": {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out},
            "selected_after": self.selected_after,
            "data_sha256": data.sha256,
        }

    def check_workdir(self) -> None:
        """Raises WorkdirError or FileExistsError if the work directory holds another run, before data are read."""
        fields = (*self.mutable_fields, "data_sha256")
        RunDirectory.check(self.workdir, self.record(), mutable_fields=fields, wandb=self.wandb)
        check_steps(self.workdir, self.steps)

    def check_data(self, data: DataSet) -> None:
        """Raises WorkdirError for a work directory with other data, ValueError for too few classes or images."""
        RunDirectory.check(self.workdir, self.record(data), mutable_fields=self.mutable_fields)
        for name in get_args(Split):
            try:
                self.shape.check(data.split(name))
            except ValueError as error:
                raise ValueError(f"In the {name} split of {data.name}: {error}") from error


NEUTRAL = ("data_dir", "cache_dir", "download", "row", *RUN_OPTIONS)
"""Options without effect on any number."""

LEAST_STEPS = {"maml++": 5, "reptile": 5, "imaml": 16}
"""Inner steps that a method needs at least; a recipe with fewer steps is changed to these."""


def for_method(method: Method, recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe for MAML, changed where the method needs other values."""
    values = {"outer_rate": 1e-3} | recipe
    values["inner_steps"] = max(values["inner_steps"], LEAST_STEPS.get(method, 1))
    if method == "imaml":
        # The proximal term adds curvature to the support loss: many inner steps at a large rate diverge.
        values["inner_rate"] = min(values["inner_rate"], 0.2)
    if method == "reptile":
        values |= {"outer_rate": 0.5, "clip": None}
    return values


def prepare(options: Run) -> tuple[Run, DataSet]:
    """Resolves and checks the options, then reads the data.

    Raises:
      ValueError, DataError, OSError: saying what is wrong and what to do.
    """
    run = options.resolved()
    run.check_workdir()
    data = run.load()
    run.check_data(data)
    return run, data
