"""What the experiments of few-shot classification have in common: options, training, evaluation on held-out classes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

import maml_jax
from experiments import methods
from experiments.methods import METHODS, MethodName, Training
from maml_jax import evaluation, losses, models, per_step, plots, running, saved, validation
from maml_jax.evaluation import Predictor, Protocol, Results
from maml_jax.normalisation import NEEDS_CONTEXT, NORMALISATIONS, Normalisation
from maml_jax.record import Progress, RunDirectory
from maml_jax.resumable import Validate, resumable_train
from maml_jax.task_axis import task_mesh
from maml_jax.tasks import episodes, host
from maml_jax.tasks.episodes import EpisodeShape, ImageClasses
from maml_jax.types import MetaState, Task

Net = Literal["conv", "mlp"]
Split = Literal["train", "val", "test"]
QueriesSeen = Literal["together", "one by one"]

TEST_STEPS = 10  # Inner steps shown at test, 0 to 10.
BEST = 5  # Models kept by their accuracy in validation.


@dataclasses.dataclass(frozen=True)
class Config:
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
    """Inner step size for the MEAN cross-entropy over the support set; default: the recipe's."""
    inner_steps: int | None = None
    """Inner steps in training; default: the recipe's."""
    outer_rate: float = 1e-3
    """Adam's rate in the outer loop."""
    tasks_at_once: int | None = None
    """Tasks computed together on a device, the rest after them. Default: what suits the backend and the net."""
    test_tasks: int = 600
    """Tasks to evaluate on."""
    seed: int = 0
    """Of the parameters and of all episodes."""
    cache_dir: Path | None = None
    """Where resized images are kept; default: maml_jax in the user's cache directory."""
    workdir: Path | None = None
    """Where the run writes; default: a new directory below runs/."""


PLACES = ("data_dir", "cache_dir", "workdir", "download")
"""Options of this machine: the images' content is known wherever they are."""


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
    if config.order == 1 and config.method in methods.FIXED_ORDER:
        raise ValueError(f"order 1 is for methods that differentiate the inner loop, and {config.method} does not.")
    found = recipe(ways, shots)
    setting = Setting(
        ways=ways,
        shots=shots,
        queries=found.queries if config.queries is None else config.queries,
        net=net,
        tasks=found.tasks if config.tasks is None else config.tasks,
        inner_rate=found.inner_rate if config.inner_rate is None else config.inner_rate,
        inner_steps=methods.inner_steps_of(config.method, found.inner_steps)
        if config.inner_steps is None
        else config.inner_steps,
        clip=found.clip,
    )
    for name in ("queries", "tasks", "inner_steps"):
        validation.at_least(name, getattr(setting, name), 1)
    for name in ("steps", "test_tasks"):
        validation.at_least(name, getattr(config, name), 1)
    validation.at_least("seed", config.seed, 0)
    validation.positive("inner_rate", setting.inner_rate)
    validation.positive("outer_rate", config.outer_rate)
    if config.tasks_at_once is not None:
        validation.at_least("tasks_at_once", config.tasks_at_once, 1)
        mesh = task_mesh(setting.tasks)
        share = setting.tasks // (mesh.size if mesh else 1)
        if share % config.tasks_at_once:
            raise ValueError(
                f"tasks_at_once must divide the tasks of one device, {share}, but got {config.tasks_at_once}."
            )
    return setting


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
    def shape(self) -> EpisodeShape:
        return EpisodeShape(self.setting.ways, self.setting.shots, self.setting.queries, self.data.rotations)


class Classifier(NamedTuple):
    """Net and method of a setting."""

    net: nn.Module
    """As it is at test, with a class for each way."""
    trained: nn.Module
    """As it is in training."""
    method: methods.Method
    in_context: bool
    """Whether queries are to see the support set."""
    gathers: bool
    """Whether queries are normalised by statistics that are gathered after training."""

    def tasks(self, tasks: Task) -> Task:
        """Tasks in the form that the net needs."""
        return losses.in_context(tasks) if self.in_context else tasks

    def finished(self, state: MetaState, tasks: Callable[[], Iterable[Task]], steps: int) -> MetaState:
        """From the state of training to that from which tasks are learned.

        Args:
          state: of training.
          tasks: of training classes, the first group of which statistics are gathered from.
          steps: inner steps of which they are.
        """
        params = self.method.finish(state.params)
        if self.gathers:
            loss_fn = losses.cross_entropy(models.apply_params(self.trained))
            params = jax.jit(running.gather, static_argnums=(0, 1, 2), static_argnames="steps")(
                self.trained, self.method.inner, loss_fn, params, state.rates, next(iter(tasks())), steps=steps
            )
        return state._replace(params=params)

    def predictor(self, state: MetaState, steps: int, seen: QueriesSeen = "together") -> Predictor:
        """What the state predicts after 0 to `steps` inner steps."""
        evaluate = _evaluation_of(self, seen)

        def predict(tasks: Task) -> tuple[jax.Array, jax.Array]:
            found = evaluate(state, self.tasks(tasks), steps)
            return found.aux, found.support_loss

        return predict


@functools.cache  # Compiled once, for all validations.
def _evaluation_of(model: Classifier, seen: QueriesSeen) -> Callable[[MetaState, Task, int], maml_jax.Evaluation]:
    apply, inner = models.apply_params(model.net), model.method.inner
    judged = losses.log_probabilities(losses.one_by_one(apply) if seen == "one by one" else apply)
    if model.gathers:
        apply = models.apply_params(model.trained)
        inner = inner._replace(at_step=per_step.choose(models.norms_only))
    learner = maml_jax.maml(losses.cross_entropy(apply), inner, optax.identity(), query_loss_fn=judged)
    return jax.jit(learner.evaluate, static_argnums=2)


def classifier(config: Config, setting: Setting, image: tuple[int, ...], classes: int) -> Classifier:
    """The paper's net for images of that shape, and the method, to be trained on so many classes."""
    gathers = config.normalisation == "running"
    in_training: Normalisation = "batch" if gathers else config.normalisation
    net = network(setting, config.normalisation, image, setting.ways)
    trained = network(setting, in_training, image, classes if config.method == "pretrained" else setting.ways)
    training = Training(
        config.method,
        config.order,
        setting.inner_rate,
        setting.inner_steps,
        config.outer_rate,
        setting.clip,
        config.steps,
    )
    apply, features = models.apply_params(trained), models.apply_params(trained, head=False)
    method = methods.build(training, apply, features, setting.ways)
    return Classifier(net, trained, method, config.normalisation in NEEDS_CONTEXT, gathers)


def network(setting: Setting, normalisation: Normalisation, image: tuple[int, ...], outputs: int) -> nn.Module:
    """The net of the paper's section 5.2: strided for small images, pooled for large ones."""
    if setting.net == "mlp":
        return models.MLP((256, 128, 64, 64), outputs, normalisation)
    large = image[0] > 32
    return models.ConvNet(outputs, filters=32 if large else 64, pooled=large, normalisation=normalisation)


# Tasks


def drawn_from(prepared: Prepared, key: jax.Array) -> tuple[Callable[[Any, jax.Array], Task], Any]:
    """The meta-batch of each step, and the data that it is drawn from, for `train`."""
    data, tasks, shape = prepared.data.train, prepared.setting.tasks, prepared.shape
    if prepared.config.method == "reptile":
        shape = shape._replace(shots=max(shape.shots, min(REPTILE_SHOTS, min(data.counts) - shape.queries)))
    if prepared.config.method != "pretrained":
        return host.by_step(key, data, tasks, shape)
    joint = EpisodeShape(min(JOINT_CLASSES, len(data.counts)), shots=1, queries=1, rotations=shape.rotations)

    def draw(data: ImageClasses, step: jax.Array) -> Task:
        choice = episodes.choose(jax.random.fold_in(key, step), data.counts, tasks, joint)
        drawn = episodes.put_together(jnp.asarray(data.images)[choice.images], choice.turns, joint)
        return methods.joint_tasks(data, choice, drawn)

    return draw, data


REPTILE_SHOTS = 10
"""Support images a class in Reptile's training, more than at test (Nichol et al. 2018, appendix A)."""

JOINT_CLASSES = 64
"""Classes in a batch of joint training, an image of each."""


def fixed_tasks(key: jax.Array, data: ImageClasses, count: int, shape: EpisodeShape) -> Callable[[], Iterable[Task]]:
    """The same `count` tasks at every call, in groups that fit into memory."""
    shape.check(data)
    choice = jax.tree.map(np.asarray, episodes.choose(key, data.counts, count, shape))
    entries = shape.ways * (shape.shots + shape.queries) * int(np.prod(data.images.shape[1:]))
    group = max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * entries <= GROUP_ENTRIES))

    def groups() -> Iterator[Task]:
        for first in range(0, count, group):
            images, turns = (leaf[first : first + group] for leaf in choice)
            yield episodes.put_together(jnp.asarray(data.images[images]), jnp.asarray(turns), shape)

    return groups


GROUP_ENTRIES = 1 << 23
"""Numbers in the images of the tasks that are evaluated together."""


# One run


def main(prepared: Prepared) -> dict:
    """Meta-trains, then evaluates the state that is best in validation; returns what it writes to `results.json`."""
    config, setting, data, shape = prepared.config, prepared.setting, prepared.data, prepared.shape
    model = classifier(config, setting, image_shape(data), len(data.train.counts))
    learner = model.method.learner(tasks_at_once=config.tasks_at_once, mesh=task_mesh(setting.tasks))
    init_key, train_key, val_key, test_key = jax.random.split(jax.random.key(config.seed), 4)
    params = model.trained.init(init_key, jnp.zeros((1, *image_shape(data))))["params"]
    state = learner.init(model.method.start(params))
    draw, train_data = drawn_from(prepared, train_key)
    val_tasks = fixed_tasks(val_key, data.val, prepared.val_tasks, shape)

    train_tasks = fixed_tasks(jax.random.fold_in(val_key, 1), data.train, prepared.val_tasks, shape)
    val_protocol = protocol(prepared, "val", prepared.val_tasks, config.seed)

    name = run_name(prepared)
    run = RunDirectory(config.workdir, name, recorded(config, setting), harmless=harmless(config))
    print(f"{config.method}, order {config.order}: {setting}\nWriting to {run.path}", flush=True)
    best = Best(run.path / "best", describe(prepared))

    def validated(state: MetaState) -> dict[str, float]:
        finished = model.finished(state, train_tasks, TEST_STEPS)
        found = evaluate(prepared, [(model, finished)], val_tasks, val_protocol, steps=setting.inner_steps)
        accuracy = float(found.accuracy[:, -1].mean())
        best.add(finished, accuracy)
        return {"val_accuracy": accuracy}

    # The progress of ten to a hundred validations, between calls.
    validate_every = STEPS_PER_CALL * max(1, min(1000, config.steps // 10) // STEPS_PER_CALL)
    progress = Progress(config.steps, name)
    for state, row in resumable_train(
        learner,
        state,
        lambda data, step: model.tasks(draw(data, step)),
        train_data,
        steps=config.steps,
        steps_per_call=STEPS_PER_CALL,
        run=run,
        save_every=SAVE_EVERY,
        validate=Validate(validate_every, validated, lambda row: row["val_accuracy"]),
        rates={"inner": setting.inner_rate, "outer": config.outer_rate},
    ):
        progress.update(row["step"], loss=row["loss"], accuracy=row["accuracy"])

    selected = best.load(state)
    test_tasks = fixed_tasks(test_key, data.test, config.test_tasks, shape)
    test_protocol, found = protocol(prepared, "test", config.test_tasks, config.seed), {}
    # With other normalisations the queries of a task are independent of each other.
    for seen in get_args(QueriesSeen) if config.normalisation == "batch" else ("together",):
        found[f"queries {seen}"] = evaluate(
            prepared, [(model, selected)], test_tasks, test_protocol, steps=TEST_STEPS, seen=seen
        )
    if config.method == "pretrained":
        found["nearest neighbour"] = nearest(model, selected, test_tasks, test_protocol)
    for label, each in found.items():
        print(f"{label}: {each}", end="\n\n")
    if prepared.published:
        mean, half_width = prepared.published
        print(
            f"published: {mean:.2f} +-{half_width:.2f}, queries together, after {prepared.published_steps} inner steps"
        )
    results = {
        **describe(prepared),
        "setting": dataclasses.asdict(setting),
        "selected": {"by": "accuracy on validation tasks", "step": int(selected.step)},
        "data": data.about,
        "published": prepared.published,
        "test": {label: each.summary() for label, each in found.items()},
    }
    path = run.write_results(results)
    plots.few_shot(run.path / "curves.png", run.rows(), results)
    print(f"Wrote {path}, curves.png beside it, and the best {BEST} models below {best.folder}.")
    return results


def recorded(config: Config, setting: Setting) -> dict[str, Any]:
    """What a run that goes on is compared with: every option, those that follow from others too."""
    return dataclasses.asdict(config) | dataclasses.asdict(setting)


def harmless(config: Config) -> tuple[str, ...]:
    """Options that may be others when a run goes on."""
    annealed = config.method in ("maml++", "reptile")  # Over all meta-steps: another number is another run.
    return (*PLACES, "test_tasks", "tasks_at_once", *(() if annealed else ("steps",)))


def check_workdir(config: Config, setting: Setting) -> None:
    """Raises WorkdirError or FileExistsError if the run cannot be in its work directory."""
    RunDirectory.check(config.workdir, recorded(config, setting), harmless=harmless(config))


STEPS_PER_CALL = 20
SAVE_EVERY = 500


def check_tasks(prepared: Prepared) -> None:
    """Raises ValueError if a split has not the classes or the images that the tasks need."""
    for name in get_args(Split):
        try:
            prepared.shape.check(prepared.data.split(name))
        except ValueError as error:
            raise ValueError(f"In the {name} split of {prepared.data.name}: {error}") from error


def run_name(prepared: Prepared) -> str:
    """What the run is, as the name of a directory."""
    config, setting = prepared.config, prepared.setting
    parts = [prepared.experiment, f"{setting.ways}way-{setting.shots}shot", config.method]
    parts += ["mlp"] if setting.net == "mlp" else []
    parts += [config.normalisation] if config.normalisation != "batch" else []
    parts += ["order1"] if config.order == 1 else []
    return "-".join([*parts, f"seed{config.seed}"])


def image_shape(data: DataSet) -> tuple[int, ...]:
    """Height, width and channels of the images."""
    shape = data.train.images.shape[1:]
    return (*shape, 1) if len(shape) == 2 else tuple(shape)


def evaluate(
    prepared: Prepared,
    models: list[tuple[Classifier, MetaState]],
    groups: Callable[[], Iterable[Task]],
    told: Protocol,
    *,
    steps: int,
    seen: QueriesSeen = "together",
) -> Results:
    """Accuracy of one model, or of several averaged, after 0 to `steps` inner steps.

    Args:
      prepared: of the (first) model.
      models: each with its parameters.
      groups: the tasks, from `fixed_tasks`.
      told: `protocol` of these tasks; what is adapted and how is added here.
      steps: inner steps.
      seen: whether the queries of a task are one batch.
    """
    learned = bool(jax.tree.leaves(models[0][1].rates))
    told = told._replace(
        inner_steps=steps,
        inner_rate=None if learned else prepared.setting.inner_rate,
        queries_seen=seen,
        models=len(models),
    )
    return evaluation.evaluate([model.predictor(state, steps, seen) for model, state in models], groups, told)


def nearest(model: Classifier, state: MetaState, groups: Callable[[], Iterable[Task]], told: Protocol) -> Results:
    """Accuracy of the nearest neighbour in the features of a state."""
    predict = methods.nearest_neighbour(models.apply_params(model.net, head=False), state.params)
    return evaluation.evaluate([lambda tasks: predict(model.tasks(tasks))], groups, told)


def protocol(prepared: Prepared, split: Split, tasks: int, seed: int) -> Protocol:
    """Of an evaluation without adaptation."""
    setting, data = prepared.setting, prepared.data
    return Protocol(
        data=data.name,
        split=split,
        classes=len(data.split(split).counts),
        split_sha256=data.sha256[split],
        tasks=tasks,
        seed=seed,
        ways=setting.ways,
        shots=setting.shots,
        queries=setting.queries,
        rotations=data.rotations,
        inner_steps=0,
        inner_rate=None,
        normalisation=prepared.config.normalisation,
        queries_seen="together",
    )


# Models kept by their accuracy in validation


def describe(prepared: Prepared) -> dict[str, Any]:
    """What a saved model says of itself, from which `experiments.evaluate` builds everything again."""
    config = {name: value for name, value in dataclasses.asdict(prepared.config).items() if name not in PLACES}
    return {"experiment": prepared.experiment, "config": config}


class Best:
    """The best states by `val_accuracy`, as files `step-N.msgpack` in a folder."""

    def __init__(self, folder: Path, description: dict[str, Any]):
        self.folder, self._description = folder, description
        self._accuracy = {path: self._read(path) for path in folder.glob("step-*.msgpack")}

    @staticmethod
    def _read(path: Path) -> float:
        return saved.load(path).description["val_accuracy"]

    def add(self, state: MetaState, accuracy: float) -> None:
        """Keeps the state if it is among the best."""
        step = int(state.step)
        path = self.folder / f"step-{step:07d}.msgpack"
        saved.save(path, state.params, state.rates, self._description | {"step": step, "val_accuracy": accuracy})
        self._accuracy[path] = accuracy
        for worse in self.paths()[BEST:]:
            worse.unlink()
            del self._accuracy[worse]

    def paths(self) -> list[Path]:
        """From best to worst; of equals the later first."""
        return sorted(self._accuracy, key=lambda path: (self._accuracy[path], path.name), reverse=True)

    def load(self, like: MetaState) -> MetaState:
        """The best state, in the structure of `like`."""
        return load_state(saved.load(self.paths()[0]), like)


def load_state(content: saved.Saved, like: MetaState) -> MetaState:
    """A saved state; its rates in the structure of those of another."""
    rates = serialization.from_state_dict(like.rates, content.rates or {})
    params, rates = jax.tree.map(jnp.asarray, (content.params, rates))
    return like._replace(step=jnp.int32(content.description["step"]), params=params, rates=rates)
