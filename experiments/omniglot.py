"""Few-shot classification of Omniglot's characters (paper, section 5.2 and table 1).

    python -m experiments.omniglot --ways 5 --shots 1 --data-dir data --download

Trains by the paper's recipe for the number of ways, then adapts to 600 test tasks of held-out
characters. Writes metrics, results, parameters and pictures to the work directory.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import maml_jax
from experiments import command_line
from maml_jax import losses, models, plots, validation
from maml_jax.models import all_but_offsets
from maml_jax.record import Progress, RunDirectory
from maml_jax.resumable import Validate, resumable_train
from maml_jax.statistics import interval
from maml_jax.task_axis import task_mesh
from maml_jax.tasks import download, episodes, omniglot

Net = Literal["conv", "mlp"]

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

TEST_STEPS = 10  # Inner steps shown at test, 0 to 10.
VAL_TASKS = 160
STEPS_PER_CALL = 20
SAVE_EVERY = 500

# What may differ when a run goes on: the images' content is checked wherever they are.
HARMLESS = ("steps", "test_tasks", "data_dir", "download", "cache_dir", "workdir")


@dataclasses.dataclass(frozen=True)
class Config:
    """MAML on Omniglot. What is not given follows the paper's recipe for the number of ways."""

    preset: Literal["5w1s", "5w5s", "20w1s", "20w5s", "5w1s-mlp", "5w5s-mlp"] | None = None
    """A setting of the paper's table 1, in place of --ways, --shots and --net."""
    ways: int | None = None
    """Classes per task; default: 5."""
    shots: int | None = None
    """Support examples per class; default: 1."""
    net: Net | None = None
    """The four-block convolutional net, or the one without convolutions; default: conv."""
    order: Literal[1, 2] = 2
    """2: exact meta-gradient; 1: first-order approximation."""
    steps: int = 60_000
    """Meta-steps."""
    tasks: int | None = None
    """Tasks per meta-step; paper: 32 for 5 ways, 16 for 20."""
    queries: int | None = None
    """Query examples per class, in training and at test; paper: as many as shots."""
    inner_rate: float | None = None
    """Inner step size for the MEAN cross-entropy over the support set; paper: 2.0 (.4 x 5 ways, .1 x 20 ways)."""
    inner_steps: int | None = None
    """Inner steps in training; paper: 1 for 5 ways, 5 for 20."""
    outer_rate: float = 1e-3
    """Adam's rate in the outer loop."""
    tasks_at_once: int | None = None
    """Tasks computed together on a device, the rest after them. Default: what suits the backend and the net."""
    split: omniglot.SplitName = "paper"
    """Division of the characters: 1,100/100/423 at random, or by alphabet as Vinyals et al. did."""
    rotations: episodes.Rotations = "random"
    """Turn each class of a task by a random multiple of 90 degrees, or make four classes of each, or neither."""
    resampling: omniglot.Resampling = "lanczos"
    """Filter from 105x105 to 28x28 pixels."""
    test_tasks: int = 600
    """Tasks to evaluate on."""
    seed: int = 0
    """Of the parameters and of all episodes."""
    data_dir: Path = Path("data/omniglot")
    """Where Omniglot is: the official archives, the folders in them, or prepared by TensorFlow Datasets."""
    download: bool = False
    """Fetch the official archives (16 MB) into --data-dir first."""
    cache_dir: Path | None = None
    """Where the 28x28 images are kept; default: maml_jax in the user's cache directory."""
    workdir: Path | None = None
    """Where the run writes; default: a new directory below runs/."""

    def resolve(self) -> "Setting":
        """Fills in the recipe (paper, appendix A.1) and checks everything that needs no data.

        Raises:
          ValueError: naming the option, what was given and what is allowed.
        """
        validation.one_of("preset", self.preset, (None, *PRESETS))
        validation.one_of("net", self.net, (None, "conv", "mlp"))
        if self.preset is not None and (self.ways, self.shots, self.net) != (None, None, None):
            raise ValueError(f"preset {self.preset} sets ways, shots and net: give either it or them, not both.")
        preset = PRESETS[self.preset or "5w1s"]
        ways = preset[0] if self.ways is None else self.ways
        shots = preset[1] if self.shots is None else self.shots
        net = preset[2] if self.net is None else self.net
        validation.at_least("ways", ways, 2)
        recipe = TWENTY_WAYS if ways >= 20 else FIVE_WAYS
        setting = Setting(
            ways=ways,
            shots=shots,
            queries=shots if self.queries is None else self.queries,
            net=net,
            tasks=recipe.tasks if self.tasks is None else self.tasks,
            inner_rate=recipe.inner_rate if self.inner_rate is None else self.inner_rate,
            inner_steps=recipe.inner_steps if self.inner_steps is None else self.inner_steps,
        )
        for name in ("shots", "queries", "tasks", "inner_steps"):
            validation.at_least(name, getattr(setting, name), 1)
        for name in ("steps", "test_tasks"):
            validation.at_least(name, getattr(self, name), 1)
        validation.at_least("seed", self.seed, 0)
        validation.positive("inner_rate", setting.inner_rate)
        validation.positive("outer_rate", self.outer_rate)
        validation.one_of("order", self.order, (1, 2))
        if self.tasks_at_once is not None:
            validation.at_least("tasks_at_once", self.tasks_at_once, 1)
            mesh = task_mesh(setting.tasks)
            share = setting.tasks // (mesh.size if mesh else 1)
            if share % self.tasks_at_once:
                raise ValueError(
                    f"tasks_at_once must divide the tasks of one device, {share}, but got {self.tasks_at_once}."
                )
        if setting.shots + setting.queries > omniglot.DRAWINGS:
            raise ValueError(
                f"shots + queries must be at most {omniglot.DRAWINGS}, the drawings of a character, but got "
                f"{setting.shots} + {setting.queries}."
            )
        return setting


class Recipe(NamedTuple):
    """What the paper's appendix A.1 sets by the number of ways."""

    tasks: int
    inner_rate: float
    inner_steps: int


FIVE_WAYS = Recipe(tasks=32, inner_rate=losses.rate_for_mean_loss(0.4, ways=5), inner_steps=1)
TWENTY_WAYS = Recipe(tasks=16, inner_rate=losses.rate_for_mean_loss(0.1, ways=20), inner_steps=5)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The options that depend on others, resolved. Fields as in `Config`."""

    ways: int
    shots: int
    queries: int
    net: Net
    tasks: int
    inner_rate: float
    inner_steps: int


class Prepared(NamedTuple):
    """All that the experiment needs, checked and loaded."""

    config: Config
    setting: Setting
    data: omniglot.Omniglot
    splits: omniglot.Splits
    shape: episodes.EpisodeShape


def prepare(config: Config) -> Prepared:
    """Checks the options, then reads the data.

    Raises:
      ValueError, DataError, OSError: saying what is wrong and what to do.
    """
    setting = config.resolve()
    RunDirectory.check(config.workdir, recorded(config, setting), harmless=HARMLESS)
    if config.download:
        download.omniglot(config.data_dir)
    data = omniglot.load(config.data_dir, config.cache_dir, resampling=config.resampling)
    splits = omniglot.split(config.split, data.names)
    shape = episodes.EpisodeShape(setting.ways, setting.shots, setting.queries, config.rotations)
    for part in splits:
        shape.check(episodes.ImageClasses(data.images[part]))
    return Prepared(config, setting, data, splits, shape)


def recorded(config: Config, setting: Setting) -> dict:
    """What a run that goes on is compared with: every option, those that follow from others too."""
    return dataclasses.asdict(config) | dataclasses.asdict(setting)


def main(prepared: Prepared) -> dict:
    """Runs the experiment; returns what it writes to `results.json`."""
    config, setting, data, splits, shape = prepared
    train_classes, val_classes, test_classes = (episodes.ImageClasses(data.images[part]) for part in splits)
    net = network(setting)
    loss_fn = losses.cross_entropy(models.apply_params(net))
    build = partial(
        maml_jax.maml,
        loss_fn,
        maml_jax.sgd(setting.inner_rate, steps=setting.inner_steps, order=config.order, trainable=all_but_offsets),
        optax.adam(config.outer_rate),
        tasks_at_once=config.tasks_at_once,
        mesh=task_mesh(setting.tasks),
    )
    learner = build()
    evaluate = jax.jit(learner.evaluate, static_argnums=2)
    evaluate_alone = jax.jit(build(query_loss_fn=losses.one_by_one(loss_fn)).evaluate, static_argnums=2)

    init_key, train_key, val_key, test_key = jax.random.split(jax.random.key(config.seed), 4)
    state = learner.init(net.init(init_key, jnp.zeros((1, omniglot.SIZE, omniglot.SIZE, 1)))["params"])
    val_tasks = episodes.draw_episodes(val_key, val_classes, VAL_TASKS, shape)
    test_tasks = episodes.draw_episodes(test_key, test_classes, config.test_tasks, shape)

    def draw(classes: episodes.ImageClasses, step: jax.Array) -> maml_jax.Task:
        return episodes.draw_episodes(jax.random.fold_in(train_key, step), classes, setting.tasks, shape)

    name = f"omniglot-{setting.ways}way-{setting.shots}shot" + ("-mlp" if setting.net == "mlp" else "")
    run = RunDirectory(
        config.workdir,
        f"{name}-order{config.order}-seed{config.seed}",
        recorded(config, setting),
        harmless=HARMLESS,
    )
    print(f"{setting}\nWriting to {run.path}", flush=True)

    def val_accuracy(state: maml_jax.MetaState) -> dict:
        accuracy = evaluate(state, val_tasks, setting.inner_steps).aux["accuracy"]
        return {"val_accuracy": float(accuracy[:, -1].mean())}

    # The progress of ten to a hundred validations, between calls.
    validate_every = STEPS_PER_CALL * max(1, min(1000, config.steps // 10) // STEPS_PER_CALL)
    progress = Progress(config.steps, name)
    for state, row in resumable_train(
        learner, state, draw, train_classes, steps=config.steps, steps_per_call=STEPS_PER_CALL, run=run,
        save_every=SAVE_EVERY, validate=Validate(validate_every, val_accuracy, lambda row: row["val_accuracy"]),
        rates={"inner": setting.inner_rate, "outer": config.outer_rate},
    ):  # fmt: skip
        progress.update(row["step"], loss=row["loss"], accuracy=row["accuracy"])
    history = run.rows()

    results = {
        "config": dataclasses.asdict(config),
        "setting": dataclasses.asdict(setting),
        "protocol": (
            f"{config.test_tasks} tasks of {setting.ways} held-out characters (split {config.split}: "
            f"{len(splits.test)} test characters, rotations {config.rotations}), {setting.shots} support and "
            f"{setting.queries} query drawings of each, 0 to {TEST_STEPS} inner steps of {setting.inner_rate:g} on the "
            "mean cross-entropy"
        ),
        "normalisation": {
            "together": "statistics of the batch at hand, the query images of a task in one batch (as in the paper)",
            "alone": "statistics of the batch at hand, each query image a batch of its own",
        },
        "content_sha256": omniglot.CONTENT_SHA256,
        "images_sha256": omniglot.digest(data),
        "published": PUBLISHED.get((setting.ways, setting.shots, setting.net, config.order)),
    }
    for way, evaluator in (("together", evaluate), ("alone", evaluate_alone)):
        mean, half_width = interval(100 * np.asarray(evaluator(state, test_tasks, TEST_STEPS).aux["accuracy"]))
        results[way] = {"accuracy": mean, "half_width": half_width}
    print(table(results))
    run.write_params(state.params)
    path = run.write_results(results)
    plots.omniglot(run.path / "curves.png", history, results)
    print(f"Wrote {path}, and curves.png and params.msgpack beside it.")
    return results


def network(setting: Setting) -> nn.Module:
    """The net of the paper's section 5.2."""
    if setting.net == "mlp":
        return models.MLP((256, 128, 64, 64), setting.ways, normalise=True)
    return models.ConvNet(setting.ways)


def table(results: dict) -> str:
    """Accuracies over inner steps, with the published one beside."""
    lines = [results["protocol"], "", "inner steps     queries together   queries one by one"]
    for step in range(TEST_STEPS + 1):
        cells = (results[way] for way in ("together", "alone"))
        row = "   ".join(f"{cell['accuracy'][step]:8.2f} +-{cell['half_width'][step]:5.2f}" for cell in cells)
        lines.append(f"{step:11d}   {row}")
    if results["published"]:
        mean, half_width = results["published"]
        note = "the paper's recipe; 3 inner steps for 5 ways, 5 for 20"
        lines.append(f"  published   {mean:8.2f} +-{half_width:5.2f}   ({note})")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
