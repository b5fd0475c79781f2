"""What the experiments of few-shot classification have in common: their options, the recipe resolved, the data."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from experiments.few_shot import methods
from experiments.few_shot.methods import METHODS, MethodName
from experiments.shared import command_line
from experiments.shared.command_line import RUN_OPTIONS
from maml_jax import validation
from maml_jax.nets.normalisation import NORMALISATIONS, Normalisation
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.resumable import check_steps
from maml_jax.tasks import episodes
from maml_jax.tasks.episodes import EpisodeShape, ImageClasses

Net = Literal["conv", "mlp"]
Split = Literal["train", "val", "test"]
QueryMode = Literal["together", "one by one"]

TEST_STEPS = 10  # Inner steps shown at test, 0 to 10.


@dataclasses.dataclass(frozen=True)
class Config(command_line.RunOptions):
    """Options of every experiment of few-shot classification. What is not given follows the paper's recipe."""

    ways: int | None = None
    """Classes per task; default: 5."""
    shots: int | None = None
    """Support examples per class; default: 1."""
    net: Net | None = None
    """The four-block convolutional net, or the one without convolutions; default: conv."""
    method: MethodName = "maml"
    """The algorithm; 'pretrained' is joint training on all classes, then fine-tuning at test."""
    order: Literal[1, 2] = 2
    """2: exact meta-gradient; 1: first-order approximation."""
    normalisation: Normalisation = "batch"
    """What activations are normalised by; 'batch', the paper's, lets the queries of a task see each other."""
    steps: int = 60_000
    """Meta-steps."""
    tasks: int | None = None
    """Tasks per meta-step; default: the recipe's."""
    queries: int | None = None
    """Query examples per class, in training and at test; default: the recipe's."""
    inner_rate: float | None = None
    """Inner step size for the MEAN cross-entropy over the support set; default: the recipe's, and to fine-tune what was
    pretrained the best on validation tasks of .03 to 3 times that."""
    inner_steps: int | None = None
    """Inner steps in training; default: the recipe's."""
    outer_rate: float | None = None
    """Adam's rate in the outer loop, or the fraction of the way that Reptile goes at first; default: .001, and .5."""
    anneal: bool = False
    """Let the outer rate fall along a cosine over all meta-steps, to a hundredth, as MAML++'s does anyway."""
    task_batch_size: int | None = None
    """Tasks computed together on a device, the rest after them. Default: what suits the backend and the net."""
    test_tasks: int = 600
    """Tasks to evaluate on."""
    seen: Literal["together", "both"] = "both"
    """Evaluate with the queries of a task in one batch, or also one by one, which takes as long again."""
    ensemble: bool = False
    """Evaluate also the best models of the validation together, their predictions averaged, as MAML++ is published."""
    seed: int = 0
    """Of the parameters and of all episodes."""
    cache_dir: Path | None = None
    """Where resized images are kept; default: maml_jax in the user's cache directory."""


PLACES = ("data_dir", "cache_dir", "download", *RUN_OPTIONS)
"""Options that change no number: the images' content is known wherever they are."""


class Recipe(NamedTuple):
    """What the paper's appendix A.1 sets for a data set, its ways and shots."""

    tasks: int
    queries: int
    inner_rate: float
    inner_steps: int
    clip: float | None = None
    """Bound of each entry of the meta-gradient of the mean loss."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The options that depend on others, resolved. Fields as in `Config` and `Recipe`."""

    ways: int
    shots: int
    queries: int
    net: Net
    tasks: int
    inner_rate: float
    inner_steps: int
    outer_rate: float
    clip: float | None


def resolve(config: Config, recipe: Callable[[int, int], Recipe]) -> Setting:
    """Fills in the recipe and checks everything that needs no data.

    Args:
      config: the options.
      recipe: from ways and shots.

    Raises:
      ValueError: naming the option, what was given and what is allowed.
    """
    ways = 5 if config.ways is None else config.ways
    shots = 1 if config.shots is None else config.shots
    validation.at_least("ways", ways, 2)
    validation.at_least("shots", shots, 1)
    validation.one_of("net", config.net, (None, "conv", "mlp"))
    validation.one_of("method", config.method, METHODS)
    validation.one_of("normalisation", config.normalisation, NORMALISATIONS)
    validation.one_of("order", config.order, (1, 2))
    net = config.net or "conv"
    if net == "mlp" and config.normalisation in ("instance", "tasknorm"):
        raise ValueError(
            f"normalisation {config.normalisation!r} needs axes of space, which the net without convolutions does not "
            "have: give 'batch', 'support', 'layer' or 'group'."
        )
    if config.normalisation == "running" and config.method == "pretrained":
        raise ValueError("normalisation 'running' gathers statistics over inner steps, and pretrained takes none.")
    if config.normalisation == "running" and config.method == "reptile":
        raise ValueError(
            "normalisation 'running' takes the norms' parameters of each inner step by itself, and reptile adapts them "
            "from step to step: give another."
        )
    if config.order == 1 and config.method in methods.FIXED_ORDER:
        raise ValueError(f"order 1 is for methods that differentiate the inner loop, and {config.method} does not.")
    if config.anneal and config.method in methods.ANNEALED:
        raise ValueError(f"anneal is for methods with a constant outer rate, and that of {config.method} falls anyway.")
    if config.method == "pretrained" and config.inner_steps is not None:
        raise ValueError(
            f"inner_steps is for methods that adapt in training, which pretrained does not, but got "
            f"{config.inner_steps}. Fine-tuning is shown after 0 to {TEST_STEPS} steps."
        )
    found = recipe(ways, shots)
    setting = Setting(
        ways=ways,
        shots=shots,
        queries=found.queries if config.queries is None else config.queries,
        net=net,
        tasks=found.tasks if config.tasks is None else config.tasks,
        inner_rate=methods.inner_rate_of(config.method, found.inner_rate)
        if config.inner_rate is None
        else config.inner_rate,
        inner_steps=methods.inner_steps_of(config.method, found.inner_steps)
        if config.inner_steps is None
        else config.inner_steps,
        outer_rate=methods.outer_rate_of(config.method) if config.outer_rate is None else config.outer_rate,
        clip=None if config.method == "reptile" else found.clip,
    )
    for name in ("queries", "tasks", "inner_steps"):
        validation.at_least(name, getattr(setting, name), 1)
    validation.meta_steps("steps", config.steps)
    validation.at_least("test_tasks", config.test_tasks, 1)
    validation.one_of("seen", config.seen, ("together", "both"))
    validation.seed("seed", config.seed)
    validation.positive("inner_rate", setting.inner_rate)
    validation.positive("outer_rate", setting.outer_rate)
    if processes.multiple():
        task_mesh(setting.tasks)  # Raises if they cannot be divided.
    if config.task_batch_size is not None:
        validation.at_least("task_batch_size", config.task_batch_size, 1)
        mesh = task_mesh(setting.tasks)
        share = setting.tasks // (mesh.size if mesh else 1)
        if share % config.task_batch_size:
            raise ValueError(
                f"task_batch_size must divide the tasks of one device, {share}, but got {config.task_batch_size}."
            )
    return setting


def reported_steps(method: MethodName, published: int, trained: int) -> int:
    """Inner steps at test whose accuracy counts: as `published` for MAML, and as many as the method needs.

    MAML++ has rates and norms for the steps that it is `trained` with, and is tested with as many; Reptile is tested
    with 50, more than are shown (Nichol et al. 2018, appendix A).
    """
    if method == "reptile":
        return TEST_STEPS
    return min(TEST_STEPS, trained if method == "maml++" else methods.inner_steps_of(method, published))


class DataSet(NamedTuple):
    """Images of three splits of classes, and what is told of them."""

    name: str
    train: ImageClasses
    val: ImageClasses
    test: ImageClasses
    sha256: dict[str, str]
    """Content hash of each split."""
    rotations: episodes.Rotations
    about: dict[str, Any]
    """What else `results.json` says of the data."""

    def split(self, name: Split) -> ImageClasses:
        return {"train": self.train, "val": self.val, "test": self.test}[name]


class Prepared(NamedTuple):
    """All that an experiment needs, checked and loaded."""

    experiment: str
    """Name of its module, by which `experiments.evaluate` finds it."""
    config: Config
    setting: Setting
    data: DataSet
    published: tuple[float, float] | None
    """Accuracy of this setting elsewhere and the half width of its interval, in per cent."""
    published_steps: int
    """Inner steps at test of what is published."""
    val_tasks: int

    @property
    def reported_steps(self) -> int:
        """Inner steps after which models are selected and compared."""
        return reported_steps(self.config.method, self.published_steps, self.setting.inner_steps)

    @property
    def shape(self) -> EpisodeShape:
        return EpisodeShape(self.setting.ways, self.setting.shots, self.setting.queries, self.data.rotations)


def describe(prepared: Prepared) -> dict[str, Any]:
    """What a saved model says of itself, from which `experiments.evaluate` builds everything again."""
    options = dataclasses.asdict(prepared.config)
    return {
        "experiment": prepared.experiment,
        "config": {name: value for name, value in options.items() if name not in (*PLACES, "task_batch_size")},
        "setting": dataclasses.asdict(prepared.setting),
        "data_sha256": prepared.data.sha256,
    }


def options_of(description: dict[str, Any]) -> dict[str, Any]:
    """The options that a saved model was trained with, as they are taken today."""
    options = dict(description["config"])
    if options["method"] == "pretrained":
        options["inner_steps"] = None  # It could once be given, to no effect.
    return options


def every_option(config: Config, setting: Setting) -> dict[str, Any]:
    """Those that follow from others, too."""
    return dataclasses.asdict(config) | dataclasses.asdict(setting)


def recorded(config: Config, setting: Setting) -> dict[str, Any]:
    """What a run that goes on is compared with: every option, the younger ones only where they are taken.

    So a run that is older than an option goes on without it.
    """
    options = every_option(config, setting)
    return {name: value for name, value in options.items() if name not in YOUNGER or value != YOUNGER[name]}


YOUNGER = {"anneal": False, "ensemble": False}
"""Options that there have not always been, and what they are where they are not taken."""


def mutable_fields(config: Config) -> tuple[str, ...]:
    """Options that may be others when a run goes on."""
    annealed = config.anneal or config.method in methods.ANNEALED  # Over all meta-steps: another number is another run.
    return (*PLACES, "expect", "test_tasks", "seen", "ensemble", "task_batch_size", *(() if annealed else ("steps",)))


def check_workdir(config: Config, setting: Setting) -> None:
    """Raises WorkdirError or FileExistsError if the run cannot be in its work directory, before data are read."""
    RunDirectory.check(
        config.workdir,
        recorded(config, setting),
        mutable_fields=(*mutable_fields(config), "data_sha256", "selected_after"),
        wandb=config.wandb,
    )
    check_steps(config.workdir, config.steps)


def check_data(prepared: Prepared) -> None:
    """Raises WorkdirError if the work directory holds a run on other data."""
    config = prepared.config
    RunDirectory.check(config.workdir, recorded_with_data(prepared), mutable_fields=mutable_fields(config))


def recorded_with_data(prepared: Prepared) -> dict[str, Any]:
    """What a run is compared with once its data are known."""
    return recorded(prepared.config, prepared.setting) | {
        "data_sha256": prepared.data.sha256,
        "selected_after": prepared.reported_steps,  # Accuracies after other numbers of inner steps do not compare.
    }


def check_tasks(prepared: Prepared) -> None:
    """Raises ValueError if a split has not the classes or the images that the tasks need; see also `check_data`."""
    check_data(prepared)
    for name in get_args(Split):
        try:
            prepared.shape.check(prepared.data.split(name))
        except ValueError as error:
            raise ValueError(f"In the {name} split of {prepared.data.name}: {error}") from error


def image_shape(data: DataSet) -> tuple[int, ...]:
    """Height, width and channels of the images."""
    shape = data.train.images.shape[1:]
    return (*shape, 1) if len(shape) == 2 else tuple(shape)
