"""Evaluates saved models on held-out classes, by the protocol of their training or by another.

    python -m experiments.evaluate runs/NAME/best/step-0060000.msgpack --data-dir data/omniglot
    python -m experiments.evaluate runs/NAME/best/*.msgpack --ensemble --data-dir data/omniglot
    python -m experiments.evaluate FIRST.msgpack SECOND.msgpack --data-dir data/omniglot

Several models are compared with the first on the same tasks, by a paired bootstrap.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro

from experiments.few_shot import testing
from experiments.few_shot.run import TEST_STEPS, DataSet, Run, Split
from experiments.shared import command_line, plots
from experiments.table.rows import EXPERIMENTS
from maml_jax import evaluation, validation
from maml_jax.evaluation import QueryMode
from maml_jax.nets.normalisation import Normalisation
from maml_jax.runs import model_file
from maml_jax.runs.files import now, to_jsonable
from maml_jax.runs.provenance import provenance
from maml_jax.tasks.fixed import fixed_tasks
from maml_jax.types import MetaState


@dataclasses.dataclass(frozen=True)
class Config:
    """Options that are not given are those of the model's training."""

    models: tyro.conf.Positional[tuple[Path, ...]]
    """Files that training wrote to `best/`."""
    data_dir: Path = Path("data")
    """Where the data set is."""
    ensemble: bool = False
    """Average the predictions of all models, instead of evaluating each model."""
    split: Split = "test"
    """Classes to draw tasks from."""
    tasks: int = 600
    """Tasks to evaluate on."""
    seed: int | None = None
    """Seed of the tasks; with the seed of the training, 600 tasks of 'test' are those of its results."""
    shots: int | None = None
    """Support examples per class."""
    queries: int | None = None
    """Query examples per class."""
    steps: int = TEST_STEPS
    """Inner steps; accuracies are shown after 0 to this many."""
    compare_step: int | None = None
    """Inner step at which models are compared; default: that after which the first was selected, or the last."""
    inner_rate: float | None = None
    """Inner step size for the mean cross-entropy; not allowed for models with learned rates."""
    normalisation: Normalisation | None = None
    """Statistics that normalise activations; allowed are those with the same parameters as in training."""
    evaluation: Literal[QueryMode, "both"] = "transductive"
    """Transductive: the queries of a task are one batch. Inductive: each query is a batch of its own."""
    cache_dir: Path | None = None
    """Where resized images are kept; default: maml_jax in the user's cache directory."""
    other_data: bool = False
    """Allow another data set than that of the training. The model may have seen its test classes in training."""
    output: Path | None = None
    """Where to write the results as JSON, and beside it a plot as PNG."""


class Model(NamedTuple):
    """A saved model with its run and its data."""

    name: str
    run: Run
    data: DataSet
    state: MetaState
    selected_after: int
    """Inner steps after which training selected it."""


def prepare(config: Config) -> tuple[Config, list[Model]]:
    """Reads the models and their data.

    Raises:
      ValueError, DataError, OSError: saying what is wrong and what to do.
    """
    if not config.models:
        raise ValueError("models must be at least one file that training wrote to best/, but none was given.")
    validation.different("models", [str(path) for path in config.models])
    for path in config.models:
        if path.is_dir():
            raise ValueError(f"models must be files that training wrote to best/, but {path} is a folder.")
    validation.at_least("tasks", config.tasks, 1)
    validation.at_least("steps", config.steps, 0)
    if config.output is not None:
        command_line.check_output(config.output)
    if config.compare_step is not None and not 0 <= config.compare_step <= config.steps:
        raise ValueError(f"compare_step must be from 0 to steps, {config.steps}, but got {config.compare_step}.")
    loaded: dict[Run, DataSet] = {}
    models = [load(path, config, loaded) for path in config.models]
    first = models[0]
    for other in models[1:]:
        if not protocol(config, first).same_tasks(protocol(config, other)):
            raise ValueError(
                f"{other.name} cannot be compared with {first.name}: their tasks differ. Give --shots, --queries and "
                f"--seed.\n  {protocol(config, first)}\n  {protocol(config, other)}"
            )
        if config.ensemble and protocol(config, other) != protocol(config, first):
            raise ValueError(
                f"ensemble is for models that learn a task in the same way, but {other.name} and {first.name} do not:\n"
                f"  {protocol(config, first)}\n  {protocol(config, other)}"
            )
    return config, models


SAME_PARAMETERS = ("batch", "support", "instance", "layer", "group")
"""Normalisations with the same parameters, which can replace each other."""


def load(path: Path, config: Config, loaded: dict[Run, DataSet]) -> Model:
    """A saved model whose run has the given options. Data that are in `loaded` are not read again."""
    saved = model_file.load(path)
    about = saved.description
    if about.get("experiment") not in EXPERIMENTS:
        raise ValueError(f"{path} is not a few-shot classifier, but of the experiment {about.get('experiment')!r}.")
    if config.inner_rate is not None and jax.tree.leaves(saved.inner_params):
        raise ValueError(f"inner_rate cannot be given for {path}: its rates are learned.")
    trained = EXPERIMENTS[about["experiment"]](**about["config"])
    wanted = config.normalisation or trained.normalisation
    if wanted != trained.normalisation and not {wanted, trained.normalisation} <= {*SAME_PARAMETERS}:
        raise ValueError(
            f"normalisation cannot be {wanted!r} for {path}, which was trained with {trained.normalisation!r} and has "
            f"other parameters: only {', '.join(SAME_PARAMETERS)} can replace each other."
        )
    names = ("shots", "queries", "normalisation", "inner_rate", "seed", "data_dir", "cache_dir")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    run = dataclasses.replace(trained, **given)
    run.check()
    if run not in loaded:
        loaded[run] = run.load()
    data = loaded[run]
    if data.sha256 != about["data_sha256"] and not config.other_data:
        raise ValueError(
            f"{config.data_dir} is not the data set that {path} was trained on, and may divide its classes "
            "otherwise. Give that data set, or --other-data."
        )
    run.shape.check(data.split(config.split))
    return Model(str(path), run, data, testing.load_state(run, saved), about["selected_after"])


def main(prepared: tuple[Config, list[Model]]) -> dict[str, Any]:
    """Evaluates, prints, and writes the results where `output` is given."""
    config, models = prepared
    made_by = provenance()  # At the start: the checkout may change until the end.
    groups = [models] if config.ensemble else [[model] for model in models]
    modes: tuple[QueryMode, ...]
    modes = ("transductive", "inductive") if config.evaluation == "both" else (config.evaluation,)
    step = min(config.steps, models[0].selected_after) if config.compare_step is None else config.compare_step
    rows: dict[str, Any] = {}
    first: dict[str, evaluation.Results] = {}
    for group in groups:
        for mode in modes:
            found = evaluate(config, group, mode)
            label = f"{' + '.join(model.name for model in group)}, {mode}"
            print(f"{label}\n{found}", end="\n\n")
            rows[label] = found.summary()
            if mode not in first:
                first[mode] = found
                continue
            difference = evaluation.difference(first[mode], found, steps=(step, step))
            rows[label]["first_minus_this"] = {"inner_steps": step, **difference._asdict()}
            print(f"First minus this after {step} inner steps, paired over the tasks: {difference}", end="\n\n")
    if config.output is not None:
        content = to_jsonable({"made_by": made_by | {"finished": now()}, "test": rows})
        config.output.write_text(json.dumps(content, indent=1))
        plots.inner_steps(config.output.with_suffix(".png"), rows)
    return rows


def protocol(config: Config, model: Model) -> evaluation.Protocol:
    """Protocol of the evaluation of a model."""
    learned = bool(jax.tree.leaves(model.state.inner_params))
    of_tasks = testing.protocol(model.run, model.data, config.split, config.tasks)
    return of_tasks._replace(inner_rate=None if learned else model.run.inner_rate)


def evaluate(config: Config, models: list[Model], mode: QueryMode) -> evaluation.Results:
    """Results of one model, or of the ensemble of several."""
    run, data = models[0].run, models[0].data
    keys = dict(zip(("init", "train", "val", "test"), jax.random.split(jax.random.key(run.seed), 4)))
    tasks = fixed_tasks(keys[config.split], data.split(config.split), config.tasks, run.shape)
    members = [(model.run, model.state) for model in models]
    return testing.evaluate(members, tasks, protocol(config, models[0]), steps=config.steps, query_mode=mode)


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
