"""Evaluates saved models on held-out classes, by the protocol of their training or by another.

    python -m experiments.evaluate runs/NAME/best/step-0060000.msgpack --data-dir data/omniglot
    python -m experiments.evaluate runs/NAME/best/*.msgpack --ensemble --data-dir data/omniglot
    python -m experiments.evaluate FIRST.msgpack SECOND.msgpack --data-dir data/omniglot

With several models, each is compared with the first on the same tasks, by a paired bootstrap.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro

from experiments.few_shot import classifier
from experiments.few_shot import options as few_shot
from experiments.few_shot.classifier import Classifier
from experiments.few_shot.options import Prepared, QueryMode, Split
from experiments.shared import command_line, plots
from experiments.table.rows import EXPERIMENTS
from maml_jax import evaluation, validation
from maml_jax.nets.normalisation import Normalisation
from maml_jax.runs import model_file
from maml_jax.runs.files import now, to_jsonable
from maml_jax.runs.provenance import provenance
from maml_jax.types import MetaState


@dataclasses.dataclass(frozen=True)
class Config:
    """What is not given is as it was in the training of the model."""

    models: tyro.conf.Positional[tuple[Path, ...]]
    """Files that training wrote to `best/`."""
    data_dir: Path = Path("data")
    """Where the data set is."""
    ensemble: bool = False
    """Average the predictions of all models, in place of evaluating each."""
    split: Split = "test"
    """Classes to draw tasks from."""
    tasks: int = 600
    """Tasks to evaluate on."""
    seed: int | None = None
    """Of the tasks; with that of the training and 600 tasks of 'test' they are those of its results."""
    shots: int | None = None
    """Support examples per class."""
    queries: int | None = None
    """Query examples per class."""
    steps: int = few_shot.TEST_STEPS
    """Inner steps, of which all from 0 are shown."""
    compare_step: int | None = None
    """Inner step at which models are compared; default: that after which the first was the best, or the last."""
    inner_rate: float | None = None
    """Inner step size for the mean cross-entropy; without effect on learned rates, and refused there."""
    normalisation: Normalisation | None = None
    """What activations are normalised by; only among those whose parameters are the same."""
    seen: Literal["together", "one by one", "both"] = "together"
    """Whether the queries of a task are one batch, or each is a batch of its own."""
    cache_dir: Path | None = None
    """Where resized images are kept; default: maml_jax in the user's cache directory."""
    other_data: bool = False
    """Take another data set than that of the training. Its test classes may be classes that the model has seen."""
    output: Path | None = None
    """Where to write the results as JSON, and beside it a plot as PNG."""


class Model(NamedTuple):
    """A saved model with all that it needs."""

    name: str
    prepared: Prepared
    classifier: Classifier
    state: MetaState
    selected_after: int
    """Inner steps after which training found it the best."""


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
    if config.seed is not None:
        validation.seed("seed", config.seed)
    if config.output is not None:
        command_line.check_output(config.output)
    if config.compare_step is not None and not 0 <= config.compare_step <= config.steps:
        raise ValueError(f"compare_step must be from 0 to steps, {config.steps}, but got {config.compare_step}.")
    prepared: dict[str, Prepared] = {}
    models = [load(path, config, prepared) for path in config.models]
    first = models[0]
    for other in models[1:]:
        if not protocol(config, first).same_tasks(protocol(config, other)):
            raise ValueError(
                f"{other.name} cannot be set beside {first.name}: they are for other tasks. Give --shots, --queries "
                f"and --seed.\n  {protocol(config, first)}\n  {protocol(config, other)}"
            )
    for other in models[1:] if config.ensemble else ():
        if told(config, other) != told(config, first):
            raise ValueError(
                f"ensemble is for models that learn a task in the same way, but {other.name} and {first.name} do not:\n"
                f"  {told(config, first)}\n  {told(config, other)}"
            )
    return config, models


def told(config: Config, model: Model) -> evaluation.Protocol:
    """What an evaluation says of how the model learns."""
    learned = bool(jax.tree.leaves(model.state.inner_params))
    return protocol(config, model)._replace(inner_rate=None if learned else model.prepared.setting.inner_rate)


SAME_PARAMETERS = ("batch", "support", "instance", "layer", "group")
"""Normalisations that one can be put in the place of another."""


def load(path: Path, config: Config, known: dict[str, Prepared]) -> Model:
    """A saved model, prepared as the options say. What models have in common is in `known` and read once."""
    content = model_file.load(path)
    about = content.description
    if about.get("experiment") not in EXPERIMENTS:
        raise ValueError(f"{path} is not a few-shot classifier: it says of itself {about.get('experiment')!r}.")
    if config.inner_rate is not None and jax.tree.leaves(content.inner_params):
        raise ValueError(f"inner_rate cannot be given for {path}: its rates are learned.")
    trained_with = about["config"]["normalisation"]
    wanted = config.normalisation or trained_with
    if wanted != trained_with and not {wanted, trained_with} <= {*SAME_PARAMETERS}:
        raise ValueError(
            f"normalisation cannot be {wanted!r} for {path}, which was trained with {trained_with!r} and has other "
            f"parameters: only {', '.join(SAME_PARAMETERS)} can take each other's place."
        )
    given = {name: getattr(config, name) for name in ("shots", "queries", "normalisation", "inner_rate", "seed")}
    options = few_shot.options_of(about) | {"queries": about["setting"]["queries"]}
    options |= {key: value for key, value in given.items() if value is not None}
    options |= {"data_dir": config.data_dir, "cache_dir": config.cache_dir, "test_tasks": config.tasks}
    experiment = EXPERIMENTS[about["experiment"]]
    key = repr(sorted(options.items(), key=str))
    if key not in known:
        known[key] = experiment.prepare(experiment.Config(**options))
    prepared = known[key]
    if prepared.data.sha256 != about["data_sha256"] and not config.other_data:
        raise ValueError(
            f"{config.data_dir} is not the data set that {path} was trained on, whose classes it may have divided "
            "otherwise. Give that one, or --other-data."
        )
    data = prepared.data
    model = classifier.classifier(prepared.config, prepared.setting, few_shot.image_shape(data), prepared.setting.ways)
    selected_after = about.get("selected_after", few_shot.TEST_STEPS)
    return Model(str(path), prepared, model, classifier.load_trained(content, model), selected_after)


def main(prepared: tuple[Config, list[Model]]) -> dict[str, Any]:
    """Evaluates, prints, and writes what was asked for."""
    config, models = prepared
    made_by = provenance()  # Now: the checkout may have moved on by the end.
    groups = [models] if config.ensemble else [[model] for model in models]
    seen: tuple[QueryMode, ...] = ("together", "one by one") if config.seen == "both" else (config.seen,)
    step = min(config.steps, models[0].selected_after) if config.compare_step is None else config.compare_step
    rows: dict[str, Any] = {}
    first: dict[str, evaluation.Results] = {}
    for group in groups:
        for way in seen:
            found = evaluate(config, group, way)
            label = f"{' + '.join(model.name for model in group)}, queries {way}"
            print(f"{label}\n{found}", end="\n\n")
            rows[label] = found.summary()
            if way not in first:
                first[way] = found
                continue
            difference = evaluation.difference(first[way], found, steps=(step, step))
            rows[label]["first_minus_this"] = {"inner_steps": step, **difference._asdict()}
            print(f"The first minus this after {step} inner steps, paired over the tasks: {difference}", end="\n\n")
    if config.output is not None:
        content = to_jsonable({"made_by": made_by | {"finished": now()}, "test": rows})
        config.output.write_text(json.dumps(content, indent=1))
        plots.inner_steps(config.output.with_suffix(".png"), rows)
    return rows


def protocol(config: Config, model: Model) -> evaluation.Protocol:
    """Of an evaluation without adaptation."""
    return classifier.protocol(model.prepared, config.split, config.tasks, model.prepared.config.seed)


def evaluate(config: Config, models: list[Model], seen: QueryMode) -> evaluation.Results:
    """Of one model, or of the ensemble of several."""
    first = models[0]
    keys = dict(zip(("init", "train", "val", "test"), jax.random.split(jax.random.key(first.prepared.config.seed), 4)))
    data, shape = first.prepared.data.split(config.split), first.prepared.shape
    tasks = classifier.fixed_tasks(keys[config.split], data, config.tasks, shape)
    told = protocol(config, first)
    pairs = [(model.classifier, model.state) for model in models]
    return classifier.evaluate(first.prepared, pairs, tasks, told, steps=config.steps, seen=seen)


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
