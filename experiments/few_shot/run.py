"""A few-shot run as one record: the options of the command line. `resolved()` fills in the paper's recipe."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args

from experiments.shared import command_line
from experiments.shared.command_line import RUN_OPTIONS, DefaultInHelp, Switch
from maml_jax import validation
from maml_jax.nets.normalisation import NEEDS_CONTEXT, NORMALISATIONS, Normalisation
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
    "zero-head",
    "one-step",
    "prototypes",
    "reptile",
    "imaml",
    "pretrained",
]
Net = Literal["conv", "mlp"]
Optimizer = Literal["adam", "muon"]
Recipe = Literal["paper", "fast"]
Split = Literal["train", "val", "test"]

WITHOUT_ORDER = ("reptile", "imaml", "pretrained")
"""Methods that do not differentiate through the inner steps: `order` has no effect."""
ANNEALED = ("maml++", "reptile")
"""Methods whose outer rate always falls over the meta-steps."""
WITH_HEAD_RATES = ("zero-head", "one-step")
"""Methods whose head starts from zero and may have inner rates of its own."""
WITH_OWN_TASKS = ("reptile", "pretrained")
"""Methods that set the shape of the tasks in training."""
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
    """Values of the options that are not given. 'paper': the paper's values; 'fast': one-step MAML with Muon, in less
    time."""
    method: FromRecipe[Method] = RECIPE
    """The algorithm. 'one-step' is exact MAML with one inner step from a head of zeros. 'pretrained' trains jointly on
    all classes, and fine-tunes at test. Default: maml, or one-step with --recipe fast."""
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
    start_from: DefaultInHelp[Path | None] = None
    """Saved model of the same net to start from, such as last.msgpack of another run. The run takes the model's head if
    the number of classes is the same, and the model's learned inner rates if the run learns rates too. Default: a new
    net."""
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

    def fast_recipe(self) -> dict[str, Any]:
        """Returns the fast recipe: values for the options that are not given. `ways` and `shots` must be set."""
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
        recipe = PAPER | run.paper_recipe() if self.recipe == "paper" else run.fast_recipe()
        run = run.with_defaults(method=recipe["method"])
        self._check_given(run.method)
        run = run.with_defaults(tune=run.method == "pretrained" and self.inner_rate is None)
        if run.with_defaults(optimizer=recipe["optimizer"]).optimizer == "muon":
            recipe["clip"] = None  # Muon sets the size of an update, whatever the size of the gradient.
        run = run.with_defaults(**for_method(run.method, recipe))
        run = run.with_defaults(train_ways=run.ways, train_shots=run.shots, train_queries=run.queries)
        run.check()
        return run

    def _check_given(self, method: Method) -> None:
        """Raises ValueError if options are given that have no effect with the method."""
        if method == "pretrained" and self.inner_steps is not None:
            raise ValueError(
                f"inner_steps is for methods that adapt in training, but got {self.inner_steps} with pretrained. "
                f"Its fine-tuning at test is evaluated after 0 to {TEST_STEPS} steps."
            )
        if self.recipe == "fast" and method != "one-step":
            raise ValueError(f"recipe 'fast' is for the method one-step, but got {method}: give 'paper'.")
        for name in ("train_shots", "train_queries"):
            if method in WITH_OWN_TASKS and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name} cannot be given for {method}, which sets its own task size, but got {value}.")

    def with_defaults(self, **values: Any) -> Self:
        """Returns the run with these values in place of None."""
        return dataclasses.replace(self, **{name: v for name, v in values.items() if getattr(self, name) is None})

    def check(self) -> None:
        """Raises ValueError if an option of this resolved run is not allowed."""
        validation.at_least("ways", self.ways, 2)
        validation.at_least("train_ways", self.train_ways, 2)
        counts = ("shots", "queries", "train_shots", "train_queries", "tasks", "inner_steps", "downscale", "test_tasks")
        for name in counts:
            validation.at_least(name, getattr(self, name), 1)
        validation.meta_steps("steps", self.steps)
        validation.seed("seed", self.seed)
        for name in ("inner_rate", "outer_rate", *(("clip",) if self.clip is not None else ())):
            validation.positive(name, getattr(self, name))
        for rate in self.head_rates:
            validation.positive("head_rates", rate)
        for name, allowed in (
            ("optimizer", get_args(Optimizer)),
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
            raise ValueError(
                "normalisation 'running' gathers statistics over the inner steps of training, but pretrained takes no "
                "inner steps in training: give another normalisation."
            )
        if self.normalisation == "running" and self.method == "reptile":
            raise ValueError(
                "normalisation 'running' needs norm parameters that the inner steps leave unchanged, but reptile "
                "adapts them: give another normalisation."
            )
        self._check_one_step()
        if self.tune and self.method != "pretrained":
            raise ValueError(f"tune is for the method pretrained, but got {self.method}.")
        if self.order == 1 and self.method in WITHOUT_ORDER:
            raise ValueError(f"order 1 is for methods that differentiate the inner loop, but got {self.method}.")
        if self.anneal and self.method in ANNEALED:
            raise ValueError(
                f"anneal is for methods with a constant outer rate, but the outer rate of {self.method} always falls."
            )
        if self.optimizer == "muon" and self.method == "reptile":
            raise ValueError("optimizer 'muon' cannot be given for reptile, whose outer optimizer is SGD.")
        if self.method not in WITH_HEAD_RATES:
            for name in ("head_rates", "learn_rates"):
                if value := getattr(self, name):
                    raise ValueError(
                        f"{name} is for the methods {' and '.join(WITH_HEAD_RATES)}, but got {value} for {self.method}."
                    )
        if len(self.head_rates) > self.inner_steps:
            raise ValueError(
                f"head_rates must be at most {self.inner_steps} rates, one for each inner step, but got "
                f"{' '.join(map(str, self.head_rates))}."
            )

    def _check_one_step(self) -> None:
        if self.method != "one-step":
            for name, neutral in (("train_ways", self.ways), ("downscale", 1)):
                if (value := getattr(self, name)) != neutral:
                    raise ValueError(f"{name} is for the method one-step, but got {value} for {self.method}.")
            return
        if self.inner_steps != 1:
            raise ValueError(f"inner_steps must be 1 for the method one-step, but got {self.inner_steps}.")
        if self.normalisation in NEEDS_CONTEXT:
            raise ValueError(
                f"normalisation {self.normalisation!r} normalises queries by their support set, and one-step exchanges "
                "the two sets: give 'batch', 'instance', 'layer' or 'group'."
            )
        if self.train_queries % self.train_shots:
            raise ValueError(
                f"train_queries must be a multiple of train_shots for the method one-step, but got "
                f"{self.train_queries} and {self.train_shots}."
            )
        height, width, _ = self.image_shape
        if height % self.downscale or width % self.downscale:
            raise ValueError(
                f"downscale must divide the size of the images, {height}x{width}, but got {self.downscale}."
            )
        if self.downscale > 1 and self.net == "mlp":
            raise ValueError(f"downscale is for the convolutional net, but got {self.downscale} for net {self.net!r}.")

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
        shapes: list[tuple[Split, EpisodeShape]] = [(name, self.shape) for name in get_args(Split)]
        for name, shape in [*shapes, ("train", self.train_shape)]:
            try:
                shape.check(data.split(name))
            except ValueError as error:
                tasks = "Tasks in training" if shape != self.shape else f"In the {name} split of {data.name}"
                raise ValueError(f"{tasks}: {error}") from error


NEUTRAL = ("data_dir", "cache_dir", "download", "row", *RUN_OPTIONS)
"""Options that do not change the results."""

PAPER: dict[str, Any] = {
    "method": "maml",
    "steps": 60_000,
    "outer_rate": 1e-3,
    "optimizer": "adam",
    "anneal": False,
    "head_rates": (),
    "learn_rates": False,
    "downscale": 1,
    "flips": False,
}
"""The paper's recipe for all data sets (appendix A.1). The values that depend on the data are in the experiments."""

FAST: dict[str, Any] = PAPER | {
    "method": "one-step",
    "inner_steps": 1,
    "learn_rates": True,
    "optimizer": "muon",
    "outer_rate": 0.01,
    "anneal": True,
}
"""The fast recipe for all data sets: exact MAML with one inner step from a head of zeros and learned inner rates. Muon
starts at a large rate, which decays. The experiments set few tasks per meta-step, with more classes than at test."""

LEAST_STEPS = {"maml++": 5, "reptile": 5, "imaml": 16}
"""Minimum number of inner steps by method. `for_method` raises the number of a recipe to this minimum."""


def for_method(method: Method, recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the recipe of MAML with the changes that a method needs."""
    values = dict(recipe)
    values["inner_steps"] = max(values["inner_steps"], LEAST_STEPS.get(method, 1))
    if method == "one-step":
        values["inner_steps"] = 1
    if method == "imaml":
        # The proximal term adds curvature to the support loss: many inner steps at a large rate diverge.
        values["inner_rate"] = min(values["inner_rate"], 0.2)
    if method == "reptile":
        values |= {"outer_rate": 0.5, "clip": None}
    return values
