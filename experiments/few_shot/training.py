"""Training of few-shot classifiers: from initial parameters to the best in validation, and its accuracy at test."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments.few_shot import methods
from experiments.few_shot.classifier import (
    Classifier,
    classifier,
    drawn_from,
    evaluate,
    fixed_tasks,
    load_state,
    nearest,
    protocol,
)
from experiments.few_shot.options import (
    TEST_STEPS,
    Prepared,
    QueryMode,
    describe,
    image_shape,
    mutable_fields,
    recorded_with_data,
)
from experiments.shared import plots
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.runs import model_file
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.progress import Progress
from maml_jax.runs.resumable import Validate, resumable_train
from maml_jax.types import MetaState, Task

STEPS_PER_CALL = 20
SAVE_EVERY = 500
BEST = 5  # Models kept by their accuracy in validation.


def main(prepared: Prepared) -> dict:
    """Meta-trains, then evaluates the state that is best in validation; returns what it writes to `results.json`.

    Of several processes all train, and process 0 evaluates.
    """
    config, setting, data, shape = prepared.config, prepared.setting, prepared.data, prepared.shape
    model = classifier(config, setting, image_shape(data), len(data.train.counts))
    learner = model.method.learner(task_batch_size=config.task_batch_size, mesh=task_mesh(setting.tasks))
    init_key, train_key, val_key, test_key = jax.random.split(jax.random.key(config.seed), 4)
    params = model.trained.init(init_key, jnp.zeros((1, *image_shape(data))))["params"]
    state = learner.init(params)
    draw, train_data = drawn_from(prepared, train_key)
    val_tasks = fixed_tasks(val_key, data.val, prepared.val_tasks, shape)

    train_tasks = fixed_tasks(jax.random.fold_in(val_key, 1), data.train, prepared.val_tasks, shape)

    name = run_name(prepared)
    run = RunDirectory(
        config.workdir, name, recorded_with_data(prepared), mutable_fields=mutable_fields(config), wandb=config.wandb
    )
    print(f"{config.method}, order {config.order}: {setting}\nWriting to {run.path}", flush=True)
    description = describe(prepared) | {"selected_after": prepared.reported_steps}
    best = Best(run.path / "best", description)
    if config.method == "pretrained" and processes.is_leader():
        best.describe(description)  # As those to come: of a run that goes on they have the rate that was tuned before.

    def validated(state: MetaState) -> dict[str, float]:
        finished = model.finished(state, train_tasks, TEST_STEPS)
        accuracy = model.accuracy(finished, val_tasks(), prepared.reported_steps)
        best.add(finished, accuracy)
        return {"val_accuracy": accuracy}

    # From five validations on, between calls: in short runs more of them would cost as much as the training.
    validate_every = STEPS_PER_CALL * max(1, min(1000, config.steps // 5) // STEPS_PER_CALL)
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
        validate=Validate(validate_every, validated),
        rates={"inner": setting.inner_rate, "outer": methods.outer_rate(model.training)},
        profile=config.profile,
    ):
        progress.update(row["step"], loss=row["loss"], accuracy=row["accuracy"])
    if not processes.is_leader():
        return {}

    if not best.paths():  # A run that was stopped before its first validation, and is now to end there.
        validated(processes.local(state))
    candidates = best.states(processes.local(state))
    selected = candidates[0]
    if config.method == "pretrained":
        prepared, model = tuned(prepared, selected, val_tasks)
        # So that whoever loads a model fine-tunes it as it is tested here.
        chosen = dataclasses.replace(config, inner_rate=prepared.setting.inner_rate)
        best.describe(describe(prepared._replace(config=chosen)) | {"selected_after": prepared.reported_steps})
    test_tasks = fixed_tasks(test_key, data.test, config.test_tasks, shape)
    test_protocol, found = protocol(prepared, "test", config.test_tasks, config.seed), {}
    # With other normalisations the queries of a task are independent of each other.
    both = config.seen == "both" and config.normalisation == "batch"
    for seen in get_args(QueryMode) if both else ("together",):
        found[f"queries {seen}"] = evaluate(
            prepared, [(model, selected)], test_tasks, test_protocol, steps=TEST_STEPS, seen=seen
        )
    if config.ensemble:
        pairs = [(model, candidate) for candidate in candidates]
        found["ensemble"] = evaluate(prepared, pairs, test_tasks, test_protocol, steps=TEST_STEPS)
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
        "selected": {
            "by": f"accuracy on validation tasks after {prepared.reported_steps} inner steps",
            "step": int(selected.step),
        },
        "data": data.about,
        "published": prepared.published,
        "test": {label: each.summary() for label, each in found.items()},
    }
    path = run.write_results(results)
    plots.few_shot(run.path / "curves.png", run.rows(), results)
    plots.adaptation(run.path / "examples.png", examples(prepared, model, selected, test_tasks))
    print(f"Wrote {path}, curves.png and examples.png beside it, and the best {BEST} models below {best.folder}.")
    return results


def examples(
    prepared: Prepared, model: Classifier, state: MetaState, groups: Callable[[], Iterable[Task]]
) -> list[dict[str, np.ndarray]]:
    """What `plots.adaptation` shows of the first test tasks: of each class the first support image and query."""
    tasks = next(iter(groups()))
    log_probabilities, _ = model.predictor(state, TEST_STEPS)(tasks)
    shots, queries = prepared.shape.shots, prepared.shape.queries
    support, query, found = (
        np.asarray(values, np.float32)
        for values in (tasks.support[0][:, ::shots], tasks.query[0][:, ::queries], log_probabilities[:, :, ::queries])
    )
    return [
        {"support": support[task], "query": query[task], "probabilities": np.exp(found[task])}
        for task in range(min(EXAMPLES, len(support)))
    ]


EXAMPLES = 3
"""Tasks that are shown."""


def tuned(prepared: Prepared, state: MetaState, val_tasks: Callable[[], Iterable[Task]]) -> tuple[Prepared, Classifier]:
    """The setting with the inner rate that fine-tunes best on validation tasks, as no training has fitted one.

    A rate that was given is taken as it is.
    """
    if prepared.config.inner_rate is not None:
        image, classes = image_shape(prepared.data), len(prepared.data.train.counts)
        return prepared, classifier(prepared.config, prepared.setting, image, classes)
    found = []
    for factor in FACTORS:
        setting = dataclasses.replace(prepared.setting, inner_rate=prepared.setting.inner_rate * factor)
        other = prepared._replace(setting=setting)
        model = classifier(prepared.config, setting, image_shape(prepared.data), len(prepared.data.train.counts))
        found.append((model.accuracy(state, val_tasks(), other.reported_steps), other, model))
    _, best, model = max(found, key=lambda each: each[0])
    print(f"Fine-tuning at a rate of {best.setting.inner_rate:g}, the best on validation tasks.")
    return best, model


FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Times the recipe's inner rate, to fine-tune with."""


def run_name(prepared: Prepared) -> str:
    """What the run is, as the name of a directory."""
    config, setting = prepared.config, prepared.setting
    parts = [prepared.experiment, f"{setting.ways}way-{setting.shots}shot", config.method]
    parts += ["mlp"] if setting.net == "mlp" else []
    parts += [config.normalisation] if config.normalisation != "batch" else []
    parts += ["order1"] if config.order == 1 else []
    parts += ["annealed"] if config.anneal else []
    return "-".join([*parts, f"seed{config.seed}"])


class Best:
    """The best states by `val_accuracy`, as files `step-N.msgpack` in a folder."""

    def __init__(self, folder: Path, description: dict[str, Any]):
        self.folder, self._description = folder, description
        self._accuracy = {path: self._read(path) for path in folder.glob("step-*.msgpack")}

    @staticmethod
    def _read(path: Path) -> float:
        return model_file.load(path).description["val_accuracy"]

    def add(self, state: MetaState, accuracy: float) -> None:
        """Keeps the state if it is among the best."""
        step = int(state.step)
        path = self.folder / f"step-{step:07d}.msgpack"
        model_file.save(
            path, state.params, state.inner_params, self._description | {"step": step, "val_accuracy": accuracy}
        )
        self._accuracy[path] = accuracy
        for worse in self.paths()[BEST:]:
            worse.unlink()
            del self._accuracy[worse]

    def describe(self, description: dict[str, Any]) -> None:
        """Writes another description into all files, and into those to come."""
        self._description = description
        for path in self._accuracy:
            content = model_file.load(path)
            own = {name: content.description[name] for name in ("step", "val_accuracy")}
            model_file.save(path, content.params, content.inner_params, description | own)

    def paths(self) -> list[Path]:
        """From best to worst; of equals the later first."""
        return sorted(self._accuracy, key=lambda path: (self._accuracy[path], path.name), reverse=True)

    def states(self, like: MetaState) -> list[MetaState]:
        """From best to worst, in the structure of `like`."""
        return [load_state(model_file.load(path), like) for path in self.paths()]
