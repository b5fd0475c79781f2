"""Evaluates saved models on held-out classes.

    python -m experiments.evaluate runs/NAME/best/step-0060000.msgpack --data-dir data/omniglot
    python -m experiments.evaluate runs/NAME/best/*.msgpack --ensemble --data-dir data/omniglot
    python -m experiments.evaluate omniglot-20w1s MINE.msgpack --data-dir data/omniglot

The command prints the accuracy after each number of inner steps. With --output it writes a JSON file and a plot.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro

from experiments.few_shot import testing
from experiments.few_shot.names import Split
from experiments.few_shot.run import TEST_STEPS, DataSet, Run
from experiments.shared import command_line, option_checks, plots
from experiments.shared.command_line import DefaultInHelp
from experiments.table.rows import trained_run
from maml_jax import evaluation, validation
from maml_jax.evaluation import QueryMode
from maml_jax.nets.normalisation import Normalisation
from maml_jax.runs import model_file
from maml_jax.runs.files import now, to_jsonable, write_file
from maml_jax.runs.provenance import provenance
from maml_jax.tasks.fixed import fixed_tasks
from maml_jax.types import MetaState


@dataclasses.dataclass(frozen=True)
class Config:
    """The given options replace those of the model's training.

    If there are several models, each is compared with the first model on the same tasks, by a paired bootstrap.
    """

    models: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]", help_behavior_hint="")
    ]
    """Model files, from the folders best/ of runs, or names of models of `maml_jax.pretrained`."""
    data_dir: Path = Path("data")
    """Folder of the data set."""
    ensemble: bool = False
    """Evaluate the average prediction of all models, not each model."""
    split: Split = "test"
    """Split of the classes of the tasks."""
    tasks: int = 600
    """Number of tasks."""
    seed: DefaultInHelp[int | None] = None
    """Seed of the tasks. Default: the seed of the training, which gives the test tasks of the training's results."""
    shots: DefaultInHelp[int | None] = None
    """Support examples per class. Default: as in training."""
    queries: DefaultInHelp[int | None] = None
    """Query examples per class. Default: as in training."""
    steps: int = TEST_STEPS
    """Largest number of inner steps. Accuracies are measured after 0, 1, 2 ... steps."""
    compare_step: DefaultInHelp[int | None] = None
    """Inner steps after which models are compared. Default: those of the first model's selection, at most --steps."""
    inner_rate: DefaultInHelp[float | None] = None
    """Inner step size for the mean cross-entropy, unless rates are learned. Default: as in training."""
    normalisation: DefaultInHelp[Normalisation | None] = None
    """Normalisation of activations, with the same parameters as in training. Default: as in training."""
    evaluation: Literal[QueryMode, "both"] = "transductive"
    """'transductive': the queries of a task form one batch; 'inductive': each query is a batch of one."""
    cache_dir: DefaultInHelp[Path | None] = None
    """Folder of resized images. Default: maml_jax in the user's cache directory."""
    other_data: bool = False
    """Allow another data set than in training. Its test classes may be training classes of the model."""
    output: DefaultInHelp[Path | None] = None
    """JSON file of the results. The plot gets the same path with suffix .png. Default: no files."""


class Model(NamedTuple):
    """A saved model with its run and its data."""

    name: str
    run: Run
    data: DataSet
    state: MetaState
    selected_after: int
    """Inner steps after which training measured the accuracy that selected the model."""


def prepare(config: Config) -> tuple[Config, list[Model]]:
    """Reads the models and their data.

    Raises:
      ValueError: if an option is not allowed, or a model does not fit the options, the data or the other models.
      DataError: if the data are damaged.
      OSError: if a file cannot be read.
    """
    if not config.models:
        raise ValueError("models must have at least one model file, from the folder best/ of a run, but got none.")
    option_checks.different("models", [str(path) for path in config.models])
    for path in config.models:
        if path.is_dir():
            raise ValueError(f"models must be model files, from the folder best/ of a run, but {path} is a folder.")
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
"""Normalisations that can replace each other: their parameters are the same."""


def load(path: Path, config: Config, loaded: dict[Run, DataSet]) -> Model:
    """Loads a model and its data, with the given options in place of those of the training.

    Args:
      path: the model file.
      config: the options.
      loaded: data sets that were read before, by run. The function adds the data set of this model.

    Raises:
      ValueError: if the options or the data do not fit the model.
      WorkdirError: if the description of the model has another form.
    """
    saved = model_file.load(command_line.model_path(path))
    about = saved.description
    trained = trained_run(path, about)
    if config.inner_rate is not None and jax.tree.leaves(saved.inner_params):
        raise ValueError(f"inner_rate cannot be given for {path}: the inner rates of this model are learned.")
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
            f"{config.data_dir} is not the data set that {path} was trained on: its test classes may be training "
            "classes of the model. Give the data set of the training, or add --other-data."
        )
    run.shape.check(data.split(config.split))
    return Model(str(path), run, data, testing.load_state(run, saved), about["selected_after"])


def main(prepared: tuple[Config, list[Model]]) -> dict[str, Any]:
    """Evaluates the models, prints the results, and writes them to `output` if a path is given.

    Returns:
      The results by model and query mode.
    """
    config, models = prepared
    made_by = provenance()  # Recorded first: the checkout may change during the evaluation.
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
            print(
                f"First model minus this model after {step} inner steps, paired over the tasks: {difference}",
                end="\n\n",
            )
    if config.output is not None:
        content = to_jsonable({"made_by": made_by | {"finished": now()}, "test": rows})
        write_file(config.output, json.dumps(content, indent=1).encode())
        plots.inner_steps(config.output.with_suffix(".png"), rows)
    return rows


def protocol(config: Config, model: Model) -> evaluation.Protocol:
    """Returns the protocol of the evaluation of a model."""
    learned = bool(jax.tree.leaves(model.state.inner_params))
    protocol = testing.protocol(model.run, model.data, config.split, config.tasks)
    return protocol._replace(inner_rate=None if learned else model.run.inner_rate)


def evaluate(config: Config, models: list[Model], mode: QueryMode) -> evaluation.Results:
    """Evaluates one model, or the ensemble of several models."""
    run, data = models[0].run, models[0].data
    # The same keys as in training.
    keys = dict(zip(("init", "train", "val", "test"), jax.random.split(jax.random.key(run.seed), 4)))
    tasks = fixed_tasks(keys[config.split], data.split(config.split), config.tasks, run.shape)
    members = [(model.run, model.state) for model in models]
    return testing.evaluate(members, tasks, protocol(config, models[0]), steps=config.steps, query_mode=mode)


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
