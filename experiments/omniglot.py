"""Few-shot classification of Omniglot's characters (paper, section 5.2 and table 1).

    python -m experiments.omniglot --ways 5 --shots 1 --data-dir data/omniglot --download

    python -m experiments.omniglot --ways 20 --shots 1 --recipe fast --data-dir data/omniglot --download

The command trains by the paper's recipe for the number of ways, or by the fast recipe, and evaluates on 600 test tasks
of held-out characters. It writes metrics, results, the best models, the last model and plots to the work directory.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import jax
import jax.numpy as jnp

from experiments.few_shot import methods, testing
from experiments.few_shot import run as few_shot
from experiments.few_shot.names import Net
from experiments.few_shot.recipes import FAST, ONE_STEP
from experiments.few_shot.run import DataSet
from experiments.shared import command_line, plots
from experiments.shared.command_line import DefaultInHelp
from maml_jax import losses, validation
from maml_jax.nets import models
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_axis, task_mesh
from maml_jax.runs import model_file
from maml_jax.runs.best import Best
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.progress import Progress
from maml_jax.runs.resumable import Validate, resumable_train
from maml_jax.tasks import download, episodes, omniglot
from maml_jax.tasks.fixed import fixed_tasks
from maml_jax.types import MetaState

STEPS_PER_CALL, SAVE_EVERY, KEEP = 20, 500, 5

Preset = Literal["5w1s", "5w5s", "20w1s", "20w5s", "5w1s-mlp", "5w5s-mlp"]
PRESETS: dict[str, tuple[int, int, Net]] = {
    "5w1s": (5, 1, "conv"),
    "5w5s": (5, 5, "conv"),
    "20w1s": (20, 1, "conv"),
    "20w5s": (20, 5, "conv"),
    "5w1s-mlp": (5, 1, "mlp"),
    "5w5s-mlp": (5, 5, "mlp"),
}

# (ways, shots, net, order): test accuracy and half width of its 95% interval, in per cent.
# Second order: paper, table 1. First order: Nichol et al. 2018, table 2.
PUBLISHED = {
    (5, 1, "conv", 2): (98.7, 0.4), (5, 5, "conv", 2): (99.9, 0.1),
    (20, 1, "conv", 2): (95.8, 0.3), (20, 5, "conv", 2): (98.9, 0.2),
    (5, 1, "mlp", 2): (89.7, 1.1), (5, 5, "mlp", 2): (97.5, 0.6),
    (5, 1, "conv", 1): (98.3, 0.5), (5, 5, "conv", 1): (99.2, 0.2),
    (20, 1, "conv", 1): (89.4, 0.5), (20, 5, "conv", 1): (97.9, 0.1),
}  # fmt: skip


def main(prepared: tuple[few_shot.Run, DataSet]) -> dict[str, Any]:
    """Meta-trains, selects the best model by validation, and evaluates this model on test tasks.

    All processes train. Process 0 validates and evaluates.

    Args:
      prepared: the resolved run and its data, from `methods.prepare`.

    Returns:
      The content of `results.json`; an empty dict in processes other than 0.

    Raises:
      FloatingPointError: if a loss is not finite.
    """
    run, data = prepared
    directory = run.open_directory(data, wandb=run.wandb)
    print(f"{run}\nWriting to {directory.path}", flush=True)

    # Training, from a new net, from a saved model, or from the first phase of the recipe.
    start = None if run.start_from is None else model_file.load(command_line.model_path(run.start_from))
    first = dataclasses.replace(run, workdir=directory.path).first_phase
    if first is not None:
        state, _ = train(first, data, first.open_directory(data))
        params, inner_params = processes.local(state.meta_params)
        start = model_file.Saved(params, inner_params, first.description(data))
    state, best = train(run, data, directory, start)
    if not processes.is_leader():
        return {}

    # Evaluation of the best models on the test tasks.
    _, _, val_key, test_key = jax.random.split(jax.random.key(run.seed), 4)
    last = testing.finished(run, processes.local(state), methods.statistics_tasks(run, data))
    model_file.save(
        directory.path / "last.msgpack", *last.meta_params, run.description(data) | {"step": int(last.step)}
    )
    states = [testing.load_state(run, saved) for saved in best.models()]
    if run.tune:
        run = testing.tuned(run, states[0], fixed_tasks(val_key, data.val, run.val_tasks, run.shape))
    best.describe(run.description(data))  # The saved models get the inner rate of the evaluation.
    test_tasks = fixed_tasks(test_key, data.test, run.test_tasks, run.shape)
    protocol = testing.protocol(run, data, "test", run.test_tasks)
    found = testing.all_accuracies(run, states, test_tasks, protocol)
    published = run.published(data)
    for label, each in found.items():
        print(f"{label}: {each}", end="\n\n")
    if published:
        print("published: {:.2f} +-{:.2f}".format(*published), f"after {run.published_steps} inner steps, transductive")
    selected_by = f"accuracy on validation tasks after {run.selected_after} inner steps"
    results = {
        "row": run.row,
        **run.description(data),
        "selected": {"by": selected_by, "step": int(states[0].step)},
        "validation": [[row["step"], row["val_accuracy"]] for row in directory.rows() if "val_accuracy" in row],
        "data": data.about,
        "published": published,
        "test": {label: each.summary() for label, each in found.items()},
    }
    path = directory.write_results(results)
    plots.few_shot(directory.path / "curves.png", directory.rows(), results)
    plots.adaptation(directory.path / "examples.png", testing.examples(run, states[0], test_tasks))
    print(
        f"Wrote {path}, with curves.png, examples.png and last.msgpack in the same folder. {best.folder} has the best "
        "models."
    )
    return results


def train(
    run: few_shot.Run, data: DataSet, directory: RunDirectory, start: model_file.Saved | None = None
) -> tuple[MetaState, Best]:
    """Meta-trains a run, and validates all along.

    Args:
      run: the resolved run.
      data: its data.
      directory: its directory. A stopped run resumes from its last checkpoint there.
      start: the model to start from; None: a new net.

    Returns:
      The last state, and the best models in validation.

    Raises:
      FloatingPointError: if a loss is not finite.
    """
    init_key, train_key, val_key, _ = jax.random.split(jax.random.key(run.seed), 4)

    # Model and loss. Joint training has one output for each training class, meta-training one for each way.
    outputs = len(data.train.counts) if run.method == "pretrained" else run.ways
    net = methods.network(run, outputs=outputs, training=True)
    loss_fn = losses.cross_entropy(models.apply_params(net))

    # Learner: the inner loop and the outer optimizer, joined by the algorithm.
    mesh = task_mesh(run.tasks)
    learner = methods.learner(run, net, loss_fn, mesh=mesh)
    state = learner.init(net.init(init_key, jnp.zeros((1, *run.image_shape)))["params"])
    if start is not None:
        meta_params = methods.start_from(run, start, processes.local(state.meta_params))
        state = state._replace(**task_axis(None, mesh).replicate(meta_params)._asdict())

    # Tasks. Each meta-step draws new tasks. All validations use the same tasks.
    draw, train_data = methods.draw_tasks(run, data.train, train_key, mesh)
    val_tasks = fixed_tasks(val_key, data.val, run.val_tasks, run.shape)
    statistics_tasks = methods.statistics_tasks(run, data)
    best = Best(directory.path / "best", run.description(data), keep=KEEP)

    def validate(state: MetaState) -> dict[str, float]:
        finished = testing.finished(run, state, statistics_tasks)
        accuracy = testing.accuracy(run, finished, val_tasks(), run.selected_after)
        best.add(finished, accuracy)
        return {"val_accuracy": accuracy}

    # Training loop. Each call takes STEPS_PER_CALL meta-steps.
    validate_every = STEPS_PER_CALL * max(1, min(1000, run.steps // 5) // STEPS_PER_CALL)
    progress = Progress(run.steps, run.name)
    for state, row in resumable_train(
        learner,
        state,
        draw,
        train_data,
        steps=run.steps,
        steps_per_call=STEPS_PER_CALL,
        run=directory,
        save_every=SAVE_EVERY,
        validate=Validate(validate_every, validate),
        rates={"inner": run.inner_rate, "outer": methods.outer_rate(run)},
        profile=run.profile,
    ):
        progress.update(row["step"], loss=row["loss"], accuracy=row["accuracy"])
    if processes.is_leader() and not best.paths():  # The run was stopped before its first validation, and took no more.
        validate(processes.local(state))
    return state, best


def paper_recipe(ways: int, shots: int) -> dict[str, Any]:
    """Returns the paper's recipe (appendix A.1). The recipe depends on the number of ways."""
    if ways >= 20:
        return {"tasks": 16, "queries": shots, "inner_rate": losses.rate_for_mean_loss(0.1, ways=20), "inner_steps": 5}
    return {"tasks": 32, "queries": shots, "inner_rate": losses.rate_for_mean_loss(0.4, ways=5), "inner_steps": 1}


def one_step_recipe(ways: int, shots: int) -> dict[str, Any]:
    """The recipe 'one-step': 14,000 meta-steps, 11 minutes on one core, the same training for all ways and shots.

    Training is on tasks of 40 classes with two images each, which are exchanged. The inner rates are in proportion to
    the ways, because they are for a mean loss.
    """
    return ONE_STEP | {
        "tasks": 2,
        "queries": shots,
        "train_ways": 40,
        "train_shots": 1,
        "train_queries": 1,
        "inner_rate": 0.02 * ways,
        "head_rates": (0.5 * ways,),
        "steps": 14_000,
    }


def fast_recipe(ways: int, shots: int) -> dict[str, Any]:
    """The second phase of the recipe 'fast', two to six minutes with the test: fewer meta-steps for larger tasks."""
    size = ways * shots
    return FAST | {
        "tasks": 8 if size <= 5 else 4 if size <= 25 else 2,
        "queries": shots,
        "inner_rate": 0.02 * ways,
        "head_rates": (0.5 * ways,) * 2,
        "steps": 600 if size <= 20 else 500 if size <= 25 else 40,
        "first_steps": 14_000,
    }


@dataclasses.dataclass(frozen=True)
class Run(few_shot.Run):
    """Few-shot classification of Omniglot. Options that are not given follow the recipe, `--recipe`."""

    preset: DefaultInHelp[Preset | None] = None
    """A setting of the paper's table 1. It sets --ways, --shots and --net. Default: no preset."""
    split: omniglot.SplitName = "paper"
    """Split of the characters: 'paper' is 1,100/100/423 at random, 'vinyals' is by alphabet (Vinyals et al. 2016)."""
    rotations: episodes.Rotations = "random"
    """'random': rotate each class of a task by a multiple of 90 degrees; 'classes': make each rotation a class."""
    resampling: omniglot.Resampling = "lanczos"
    """Filter that resizes images from 105x105 to 28x28 pixels."""
    data_dir: Path = Path("data/omniglot")
    """Folder of Omniglot: the official archives, their extracted folders, or the files of TensorFlow Datasets."""
    download: bool = False
    """First download the official archives (16 MB) to --data-dir."""

    data_options: ClassVar[tuple[str, ...]] = ("split", "data_dir")
    experiment: ClassVar[str] = "omniglot"
    val_tasks: ClassVar[int] = 160

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return omniglot.SIZE, omniglot.SIZE, 1

    @property
    def published_steps(self) -> int:
        return 5 if self.ways >= 20 else 3

    def paper_recipe(self) -> dict[str, Any]:
        return paper_recipe(self.ways, self.shots)

    def one_step_recipe(self) -> dict[str, Any]:
        return one_step_recipe(self.ways, self.shots)

    def fast_recipe(self) -> dict[str, Any]:
        return fast_recipe(self.ways, self.shots)

    def resolved(self) -> Self:
        validation.one_of("preset", self.preset, (None, *get_args(Preset)))
        run = self
        if self.preset is not None:
            own = {name: getattr(self, name) for name in ("ways", "shots", "net")}
            if given := ", ".join(f"{name} {value}" for name, value in own.items() if value is not None):
                raise ValueError(
                    f"preset {self.preset} sets ways, shots and net: leave these out, or leave preset out, but got "
                    f"{given}."
                )
            ways, shots, net = PRESETS[self.preset]
            run = dataclasses.replace(self, preset=None, ways=ways, shots=shots, net=net)
        return few_shot.Run.resolved(run)

    def check(self) -> None:
        super().check()
        for prefix, shape in (("", self.shape), ("train_", self.train_shape)):
            if shape.shots + shape.queries > omniglot.DRAWINGS:
                raise ValueError(
                    f"{prefix}shots + {prefix}queries must be at most {omniglot.DRAWINGS}, the drawings of a "
                    f"character, but got {shape.shots} + {shape.queries}."
                )

    def load(self) -> DataSet:
        if self.download:
            download.omniglot(self.data_dir)
        data = omniglot.load(self.data_dir, self.cache_dir, resampling=self.resampling)
        parts = omniglot.split(self.split, data.names)
        # In episodes, ink is 1 and paper is 0.
        train, val, test = (episodes.equal_classes(255 - data.images[part]) for part in parts)
        sha256 = {
            name: omniglot.digest(omniglot.Omniglot(data.images[part], tuple(data.names[i] for i in part)))
            for name, part in parts._asdict().items()
        }
        about = {"content_sha256": omniglot.CONTENT_SHA256, "images_sha256": omniglot.digest(data)}
        return DataSet(f"Omniglot, divided as {self.split}", train, val, test, sha256, about)

    def published(self, data: DataSet) -> tuple[float, float] | None:
        comparable = self.method in ("maml", "one-step") and self.normalisation == "batch"
        return PUBLISHED.get((self.ways, self.shots, self.net, self.order)) if comparable else None


if __name__ == "__main__":
    command_line.run(Run, methods.prepare, main, several=True)
