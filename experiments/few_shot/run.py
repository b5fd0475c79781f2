"""A few-shot run as one record: the options of the command line. `resolved()` fills in the paper's recipe."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args

from experiments.few_shot import checks
from experiments.few_shot.names import ANNEALED, WITH_HEAD_RATES, WITH_OWN_TASKS, Method, Net, Optimizer, Recipe, Split
from experiments.few_shot.recipes import LEAST_STEPS, PAPER, for_method
from experiments.shared import command_line
from experiments.shared.command_line import RUN_OPTIONS, DefaultInHelp, Switch
from maml_jax import validation
from maml_jax.nets.normalisation import NEEDS_CONTEXT, Normalisation
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.resumable import check_steps
from maml_jax.tasks import images
from maml_jax.tasks.episodes import EpisodeShape, ImageClasses, Rotations

TEST_STEPS = 10
"""Inner steps at test. Accuracies are recorded after 0 to this number of steps."""


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
        """Returns the classes of a split."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


# Type of an option whose default is the recipe's. At run time the option may be None. Type checkers see the type after
# `resolved()`, so that code for resolved runs needs no check for None.
T = TypeVar("T")
if TYPE_CHECKING:
    FromRecipe = Annotated[T, "None until `resolved()`"]
else:
    FromRecipe = DefaultInHelp[T | None]
RECIPE: Any = None
"""Value of an option that is not given and that the recipe sets."""


@dataclasses.dataclass(frozen=True)
class Run(command_line.RunOptions):
    """Options of every few-shot experiment. Options that are not given follow the recipe, `--recipe`.

    `resolved()` fills in the recipe. The functions of `experiments.few_shot` take a resolved run. Each experiment has a
    subclass with the options of its data.
    """

    ways: FromRecipe[int] = RECIPE
    """Classes per task. Default: 5."""
    shots: FromRecipe[int] = RECIPE
    """Support examples per class. Default: 1."""
    net: FromRecipe[Net] = RECIPE
    """'conv': four convolutional blocks; 'mlp': fully connected layers. Default: conv."""
    recipe: Recipe = "paper"
    """Values of the options that are not given. 'paper': the paper's values. 'one-step': one-step MAML with Muon, in
    less time. 'fast': first 'one-step', then plain MAML with two inner steps, for accuracy after any number of inner
    steps. Options such as --tasks are for the second phase; the ways, the net, --order, --normalisation and --rotations
    are for both."""
    method: FromRecipe[Method] = RECIPE
    """The algorithm. 'one-step' is exact MAML with one inner step from a head of zeros. 'pretrained' trains jointly on
    all classes, and fine-tunes at test. Default: maml, or the method of the recipe."""
    order: Literal[1, 2] = 2
    """2: exact meta-gradient; 1: first-order approximation."""
    normalisation: Normalisation = "batch"
    """Normalisation of activations. With 'batch', as in the paper, the queries of a task share statistics."""
    rotations: Rotations = "none"
    """'random': rotate each class of a task by a multiple of 90 degrees; 'classes': make each rotation a class."""
    steps: FromRecipe[int] = RECIPE
    """Number of meta-steps. Default: the recipe's number, 60,000 in the paper's."""
    tasks: FromRecipe[int] = RECIPE
    """Tasks per meta-step. Default: the recipe's number."""
    queries: FromRecipe[int] = RECIPE
    """Query examples per class, in training and at test. Default: the recipe's number."""
    train_ways: FromRecipe[int] = RECIPE
    """Classes per task in training, for one-step. Default: the recipe's number, or --ways."""
    train_shots: FromRecipe[int] = RECIPE
    """Support examples per class in training. Default: the recipe's number, or --shots."""
    train_queries: FromRecipe[int] = RECIPE
    """Query examples per class in training. Default: the recipe's number, or --queries."""
    inner_rate: FromRecipe[float] = RECIPE
    """Inner step size for the MEAN cross-entropy over the support set. Default: the recipe's rate."""
    head_rates: FromRecipe[tuple[float, ...]] = RECIPE
    """Inner step sizes of the head, one for each inner step, for zero-head and one-step. The last rate is for
    all later steps. Default: the recipe's rates, or --inner-rate."""
    learn_rates: Switch = RECIPE
    """Learn the inner step sizes of zero-head and one-step, one for each array of parameters and inner step."""
    tune: Switch = RECIPE
    """Choose the fine-tuning rate of 'pretrained' on validation tasks. Default: True unless --inner-rate is given."""
    inner_steps: FromRecipe[int] = RECIPE
    """Inner steps in training. Default: the recipe's number."""
    optimizer: FromRecipe[Optimizer] = RECIPE
    """Outer optimizer. 'muon' updates the kernels of convolutions by Muon, and the rest by Adam with Nesterov momentum.
    Default: the recipe's optimizer, adam in the paper's."""
    outer_rate: FromRecipe[float] = RECIPE
    """Outer learning rate. Default: the recipe's rate, 0.001 in the paper's; 0.5 for Reptile, where it is the first
    interpolation weight."""
    clip: DefaultInHelp[float | None] = None
    """Clip the entries of the meta-gradient of the mean loss to this absolute value. Default: the recipe's value, and
    none with Muon."""
    anneal: Switch = RECIPE
    """Decay the outer rate to 1% along a cosine over all meta-steps, as MAML++ always does."""
    first_steps: FromRecipe[int] = RECIPE
    """Number of meta-steps of the first phase, for --recipe fast. Default: the recipe's number."""
    start_from: DefaultInHelp[Path | None] = None
    """Saved model of the same net to start from: a file, such as last.msgpack of another run, or a name such as
    omniglot-20w1s. The run takes the model's head if the number of classes is the same, and the model's learned inner
    rates if the run learns rates too. Default: a new net."""
    downscale: FromRecipe[int] = RECIPE
    """Divide height and width of the images in training by this number, for one-step. Default: the recipe's number, or
    1."""
    flips: Switch = RECIPE
    """Flip each image in training left to right with probability 0.5. Not for characters."""
    task_batch_size: DefaultInHelp[int | None] = None
    """Tasks that a device computes at once. Default: chosen by backend and net."""
    test_tasks: int = 600
    """Number of test tasks."""
    evaluation: Literal["transductive", "both"] = "both"
    """'transductive': the queries of a task form one batch; 'both': also evaluate each query alone (inductive)."""
    ensemble: bool = False
    """Also evaluate the average prediction of the best models in validation, as published for MAML++."""
    seed: int = 0
    """Seed of the parameters and of all tasks."""
    resampling: images.Resampling | Literal["nearest"] = "lanczos"
    """Filter that resizes images."""
    cache_dir: DefaultInHelp[Path | None] = None
    """Folder of resized images. Default: maml_jax in the user's cache directory."""
    row: DefaultInHelp[str | None] = None
    """Name of the run's row in the table of results. `experiments.reproduce` sets this name. Default: no row."""

    data_options: ClassVar[tuple[str, ...]]
    """Options of the data, which a subclass adds."""
    experiment: ClassVar[str]
    """Name of the experiment in saved models and results."""
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

    def __post_init__(self) -> None:
        # Descriptions in files have lists and texts in place of tuples and paths.
        if self.head_rates is not None:
            object.__setattr__(self, "head_rates", tuple(self.head_rates))
        if self.start_from is not None:
            object.__setattr__(self, "start_from", Path(self.start_from))

    def paper_recipe(self) -> dict[str, Any]:
        """Returns the paper's recipe of MAML: values for options that are not given. `ways` and `shots` must be set."""
        raise NotImplementedError

    def one_step_recipe(self) -> dict[str, Any]:
        """Returns the recipe 'one-step': values for options that are not given. `ways` and `shots` must be set."""
        raise NotImplementedError

    def fast_recipe(self) -> dict[str, Any]:
        """Returns the second phase of the recipe 'fast'. The first phase is the recipe 'one-step' with one shot."""
        raise NotImplementedError

    def load(self) -> DataSet:
        """Reads the data. Raises ValueError, DataError or OSError if the data are missing or not valid."""
        raise NotImplementedError

    def published(self, data: DataSet) -> tuple[float, float] | None:
        """Returns the published accuracy of this run and the half width of its 95% interval, in per cent.

        Returns None if no accuracy is published.
        """
        raise NotImplementedError

    # Resolving the options

    def resolved(self) -> Self:
        """Returns the run with values for all options, checked as far as possible without data.

        Raises:
          ValueError: if an option is not allowed. The message has the option, the value and the allowed values.
        """
        validation.one_of("recipe", self.recipe, get_args(Recipe))
        validation.one_of("method", self.method, (None, *get_args(Method)))
        run = self.with_defaults(ways=5, shots=1, net="conv")
        validation.at_least("ways", run.ways, 2)
        validation.at_least("shots", run.shots, 1)
        match self.recipe:
            case "paper":
                recipe = PAPER | run.paper_recipe()
            case "one-step":
                recipe = run.one_step_recipe()
            case "fast":
                recipe = run.fast_recipe()
        run = run.with_defaults(method=recipe["method"])
        self._check_given(run.method)
        run = run.with_defaults(tune=run.method == "pretrained" and self.inner_rate is None)
        if run.with_defaults(optimizer=recipe["optimizer"]).optimizer == "muon":
            recipe["clip"] = None  # Muon sets the size of an update, whatever the size of the gradient.
        if self.start_from is not None:
            recipe["first_steps"] = None
        run = run.with_defaults(**for_method(run.method, recipe))
        run = run.with_defaults(train_ways=run.ways, train_shots=run.shots, train_queries=run.queries)
        run.check()
        try:
            _ = run.first_phase
        except ValueError as error:
            raise ValueError(f"In the first phase of the recipe 'fast', {error}") from error
        return run

    def _check_given(self, method: Method) -> None:
        """Raises ValueError if options are given with which the method cannot train, or that have no effect."""
        if method == "one-step" and self.normalisation in NEEDS_CONTEXT:
            raise ValueError(
                f"normalisation {self.normalisation!r} normalises queries by their support set, and one-step exchanges "
                "the two sets: give 'batch', 'instance', 'layer' or 'group'."
            )
        if method == "pretrained" and self.inner_steps is not None:
            raise ValueError(
                f"inner_steps is for methods that adapt in training, but got {self.inner_steps} with pretrained. "
                f"Its fine-tuning at test is evaluated after 0 to {TEST_STEPS} steps."
            )
        if self.recipe != "paper" and method != (own := {"fast": "zero-head", "one-step": "one-step"}[self.recipe]):
            raise ValueError(f"recipe {self.recipe!r} is for the method {own}, but got {method}: give 'paper'.")
        if self.first_steps is not None and (self.recipe != "fast" or self.start_from is not None):
            raise ValueError(
                f"first_steps is for the recipe 'fast' without start_from, but got {self.first_steps} with the recipe "
                f"{self.recipe!r}{' and start_from' if self.start_from is not None else ''}."
            )
        for name in ("train_shots", "train_queries"):
            if method in WITH_OWN_TASKS and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name} cannot be given for {method}, which sets its own task size, but got {value}.")

    def with_defaults(self, **values: Any) -> Self:
        """Returns the run with these values in place of None."""
        return dataclasses.replace(self, **{name: v for name, v in values.items() if getattr(self, name) is None})

    def check(self) -> None:
        """Raises ValueError if an option of this resolved run is not allowed."""
        checks.check(self)

    # Derived values

    @property
    def shape(self) -> EpisodeShape:
        """Shape of the tasks in validation and test."""
        return EpisodeShape(self.ways, self.shots, self.queries, self.rotations)

    @property
    def train_shape(self) -> EpisodeShape:
        """Shape of the tasks in training, for methods that have no tasks of their own."""
        return EpisodeShape(self.train_ways, self.train_shots, self.train_queries, self.rotations)

    @property
    def first_phase(self) -> Self | None:
        """The run of the first phase, one-step MAML with one shot, or None. This run starts from its last parameters.

        The directory of the first phase is `first-phase` in the directory of this run.
        """
        if self.first_steps is None:
            return None
        shared = {name: getattr(self, name) for name in (*SHARED_BY_PHASES, *self.data_options)}
        folder = None if self.workdir is None else self.workdir / FIRST_PHASE
        return type(self)(recipe="one-step", shots=1, steps=self.first_steps, workdir=folder, **shared).resolved()

    @property
    def outer_rate_falls(self) -> bool:
        """Whether the outer rate falls over the meta-steps, so that `steps` changes the training."""
        return bool(self.anneal) or self.method in ANNEALED

    @property
    def selected_after(self) -> int:
        """Inner steps after which models are selected in validation and compared at test.

        MAML++, zero-head and one-step have rates for each inner step of training, and take the same number of steps at
        test. Reptile takes 50 steps at test (Nichol et al. 2018, appendix A); only the first 10 are evaluated here.
        """
        if self.method == "reptile":
            return TEST_STEPS
        as_in_training = self.method in ("maml++", *WITH_HEAD_RATES)
        steps = self.inner_steps if as_in_training else self.published_steps
        return min(TEST_STEPS, max(steps, LEAST_STEPS.get(self.method, 1)))

    @property
    def name(self) -> str:
        """Name of the run. A new run directory has this name."""
        parts = [self.experiment, f"{self.ways}way-{self.shots}shot", self.method]
        parts += ["mlp"] if self.net == "mlp" else []
        parts += [self.normalisation] if self.normalisation != "batch" else []
        parts += ["order1"] if self.order == 1 else []
        parts += ["fast"] if self.recipe == "fast" else ["annealed"] if self.anneal else []
        return "-".join([*parts, f"seed{self.seed}"])

    # Records of the run

    def record(self, data: DataSet | None = None) -> dict[str, Any]:
        """Returns the record of the run's directory. A resumed run must have the same record up to `mutable_fields`."""
        record = dataclasses.asdict(self) | {"selected_after": self.selected_after}
        return record if data is None else record | {"data_sha256": data.sha256}

    @property
    def mutable_fields(self) -> tuple[str, ...]:
        """Fields of `record` that may change when the run is resumed."""
        fields = (*NEUTRAL, "expect", "test_tasks", "evaluation", "ensemble", "task_batch_size")
        return fields if self.outer_rate_falls else (*fields, "steps")

    def description(self, data: DataSet) -> dict[str, Any]:
        """Returns the description for saved models and results. `experiments.evaluate` restores the run from it."""
        left_out = (*NEUTRAL, "task_batch_size")
        return {
            "experiment": self.experiment,
            "config": {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out},
            "selected_after": self.selected_after,
            "data_sha256": data.sha256,
        }

    def open_directory(self, data: DataSet, wandb: str | None = None) -> RunDirectory:
        """Opens the directory of the run, with the Weights & Biases project `wandb`; see `RunDirectory`."""
        return RunDirectory(self.workdir, self.name, self.record(data), mutable_fields=self.mutable_fields, wandb=wandb)

    def check_workdir(self) -> None:
        """Raises WorkdirError or FileExistsError if the work directory holds another run. Needs no data."""
        fields = (*self.mutable_fields, "data_sha256")
        RunDirectory.check(self.workdir, self.record(), mutable_fields=fields, wandb=self.wandb)
        check_steps(self.workdir, self.steps)

    def check_data(self, data: DataSet) -> None:
        """Checks the data against the run.

        Raises:
          WorkdirError: if the run in the work directory was trained on other data.
          ValueError: if a split has too few classes or images.
        """
        RunDirectory.check(self.workdir, self.record(data), mutable_fields=self.mutable_fields)
        checked: list[tuple[str, Split, EpisodeShape]] = [
            *((f"In the {name} split of {data.name}", name, self.shape) for name in get_args(Split)),
            ("Tasks in training", "train", self.train_shape),
        ]
        if (first := self.first_phase) is not None:
            checked.append(("In the first phase of the recipe 'fast'", "train", first.train_shape))
        for place, name, shape in checked:
            try:
                shape.check(data.split(name))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error


FIRST_PHASE = "first-phase"
"""Name of the folder of the first phase, in the directory of a run."""

SHARED_BY_PHASES = ("ways", "net", "order", "normalisation", "rotations", "seed", "resampling", "cache_dir")
"""Options that both phases of the recipe 'fast' have in common, beside the options of the data."""

NEUTRAL = ("data_dir", "cache_dir", "download", "row", *RUN_OPTIONS)
"""Options that do not change the results."""
