"""Evaluation of few-shot runs: validation accuracy, and accuracies of the best models on test tasks."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import maml_jax
from experiments.few_shot import methods
from experiments.few_shot.names import WITHOUT_ORDER, Split
from experiments.few_shot.run import TEST_STEPS, DataSet, Run
from maml_jax import evaluation, losses
from maml_jax.algorithms import running_statistics
from maml_jax.algorithms.imaml import with_proximal_term
from maml_jax.algorithms.maml_plus_plus import select_step
from maml_jax.evaluation import Predictor, Protocol, QueryMode, Results
from maml_jax.inner import adapted_part
from maml_jax.nets import models
from maml_jax.parallel.task_axis import local_mesh, task_axis
from maml_jax.runs import model_file
from maml_jax.types import InnerParams, MetaState, Params, Task

FINE_TUNING_FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidates for the fine-tuning rate of a pretrained net, as multiples of the inner rate."""

Groups = Callable[[], Iterable[Task]]
"""Returns the tasks of an evaluation in groups, the same tasks at every call, as `fixed_tasks` does."""


# States


def finished(run: Run, state: MetaState, train_tasks: Groups, steps: int = TEST_STEPS) -> MetaState:
    """Returns the state for evaluation.

    A pretrained net gets a head of zeros with an output for each way of a task. With normalisation 'running', the
    statistics are gathered from `train_tasks` after 0 to `steps` inner steps. Other states of training do not change.
    """
    params = state.params
    if run.method == "pretrained":
        head = {name: jnp.zeros((*leaf.shape[:-1], run.ways), leaf.dtype) for name, leaf in params[models.HEAD].items()}
        params = {**params, models.HEAD: head}
    if run.normalisation == "running":
        gather = _gatherer(run, steps)
        parts = [gather(params, state.inner_params, group) for group in train_tasks()]  # Groups have equal sizes.
        params = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *parts)
    return state._replace(params=params)


@functools.cache  # Compiled once for all validations.
def _gatherer(run: Run, steps: int) -> Callable[[Params, InnerParams, Task], Params]:
    net = methods.network(run, training=True)
    inner, loss_fn = methods.inner_learner(run, net), losses.cross_entropy(models.apply_params(net))
    return jax.jit(functools.partial(running_statistics.gather, net, inner, loss_fn, steps=steps))


def load_state(run: Run, saved: model_file.Saved) -> MetaState:
    """Returns the state of a saved model. The state of the outer optimizer is empty."""
    inner = methods.inner_learner(run, methods.network(run))
    like = jax.eval_shape(lambda params: inner.init_inner_params(adapted_part(inner, params)), saved.params)
    params, inner_params = jax.tree.map(jnp.asarray, saved.params), model_file.restore(like, saved.inner_params)
    return MetaState(jnp.int32(saved.description["step"]), params, inner_params, ())


# Accuracies


@functools.cache  # Compiled once for all validations.
def evaluator(
    run: Run, query_mode: QueryMode = "transductive", only_last: bool = False
) -> Callable[[MetaState, Task, int], maml_jax.Evaluation]:
    """Returns a compiled `(state, tasks, steps) -> Evaluation`. Its `aux` has log probabilities `[T, S + 1, Q, N]`."""
    net = methods.network(run, training=True)
    support_loss, inner = losses.cross_entropy(models.apply_params(net)), methods.inner_learner(run, net)
    if run.method == "imaml":
        inner = with_proximal_term(inner, methods.PROXIMAL_WEIGHT)
    if run.normalisation == "running":  # Each inner step uses the statistics that were gathered for this step.
        inner = inner._replace(params_at_step=select_step(models.norms_only))
    apply = models.apply_params(methods.network(run))
    query_loss = losses.log_probabilities(losses.inductive(apply) if query_mode == "inductive" else apply)
    mesh = local_mesh()
    learner = maml_jax.maml(support_loss, inner, optax.identity(), query_loss_fn=query_loss, mesh=mesh)
    evaluate = jax.jit(functools.partial(learner.evaluate, only_last=only_last), static_argnums=2)
    replicate = task_axis(None, mesh).replicate
    return lambda state, tasks, steps: evaluate(replicate(state), methods.with_context(run, tasks), steps)


def predictor(run: Run, state: MetaState, steps: int, query_mode: QueryMode = "transductive") -> Predictor:
    """Returns the `Predictor` of a finished state, for 0 to `steps` inner steps."""

    def predict(tasks: Task) -> tuple[jax.Array, jax.Array]:
        found = evaluator(run, query_mode)(state, tasks, steps)
        return found.aux, found.support_loss

    return predict


def accuracy(run: Run, state: MetaState, groups: Iterable[Task], steps: int) -> float:
    """Returns the mean transductive accuracy of a finished state after exactly `steps` inner steps, from 0 to 1."""
    evaluate, correct = evaluator(run, only_last=True), []
    for tasks in groups:
        log_probabilities = evaluate(state, tasks, steps).aux[:, 0]
        correct.append(evaluation.predicted(np.exp(log_probabilities)) == np.asarray(tasks.query[1]))
    return float(np.concatenate(correct).mean())


def protocol(run: Run, data: DataSet, split: Split, tasks: int) -> Protocol:
    """Returns the protocol of tasks that are drawn with the seed of the run. `evaluate` adds the inner steps."""
    order = "" if run.method in WITHOUT_ORDER else f", order {run.order}"
    return Protocol(
        method=run.method + order,
        data=data.name,
        split=split,
        classes=len(data.split(split).counts),
        split_sha256=data.sha256[split],
        tasks=tasks,
        seed=run.seed,
        ways=run.ways,
        shots=run.shots,
        queries=run.queries,
        rotations=run.rotations,
        inner_steps=0,
        inner_rate=None,
        normalisation=run.normalisation,
        query_mode="transductive",
    )


def evaluate(
    members: Sequence[tuple[Run, MetaState]],
    groups: Groups,
    protocol: Protocol,
    *,
    steps: int = TEST_STEPS,
    query_mode: QueryMode = "transductive",
) -> Results:
    """Evaluates one model, or the average prediction of several models, after 0 to `steps` inner steps.

    Args:
      members: finished states, each with its run.
      groups: the tasks.
      protocol: protocol of the tasks. This function sets the fields that describe the adaptation.
      steps: inner steps.
      query_mode: 'transductive' if the queries of a task form one batch, 'inductive' if each query is alone.
    """
    run, state = members[0]
    learned = bool(jax.tree.leaves(state.inner_params))
    protocol = protocol._replace(
        inner_steps=steps,
        inner_rate=None if learned else run.inner_rate,
        query_mode=query_mode,
        models=len(members),
    )
    predictors = [predictor(run, state, steps, query_mode) for run, state in members]
    return evaluation.evaluate(predictors, groups, protocol)


def nearest(run: Run, state: MetaState, groups: Groups, protocol: Protocol) -> Results:
    """Evaluates a nearest-neighbour classifier on the features of a finished state."""
    protocol = protocol._replace(method=f"nearest neighbour in the features of {protocol.method}")
    features = models.apply_params(methods.network(run), head=False)
    predict = evaluation.nearest_neighbour(features, state.params, run.ways)
    return evaluation.evaluate([lambda tasks: predict(methods.with_context(run, tasks))], groups, protocol)


def all_accuracies(run: Run, states: Sequence[MetaState], groups: Groups, protocol: Protocol) -> dict[str, Results]:
    """Returns the results of a finished run by label.

    The labels are the query modes of the best state, 'ensemble' for the average prediction of all states if the run has
    this option, and 'nearest neighbour' for a pretrained net.

    Args:
      run: the run.
      states: finished states, the best first.
      groups: the tasks.
      protocol: protocol of the tasks.
    """
    best, found = states[0], dict[str, Results]()
    # With a normalisation other than 'batch' the queries of a task are independent: the two query modes are the same.
    both = run.evaluation == "both" and run.normalisation == "batch"
    modes: tuple[QueryMode, ...] = ("transductive", "inductive") if both else ("transductive",)
    for mode in modes:
        found[mode] = evaluate([(run, best)], groups, protocol, query_mode=mode)
    if run.ensemble:
        found["ensemble"] = evaluate([(run, state) for state in states], groups, protocol)
    if run.method == "pretrained":
        found["nearest neighbour"] = nearest(run, best, groups, protocol)
    return found


def tuned(run: Run, state: MetaState, val_tasks: Groups) -> Run:
    """Returns the run with the fine-tuning rate that is best for the pretrained `state` on validation tasks."""
    runs = [dataclasses.replace(run, inner_rate=run.inner_rate * factor) for factor in FINE_TUNING_FACTORS]
    best = max(runs, key=lambda each: accuracy(each, state, val_tasks(), each.selected_after))
    print(f"Fine-tuning at a rate of {best.inner_rate:g}, the best on validation tasks.")
    return best


def examples(run: Run, state: MetaState, groups: Groups, count: int = 3) -> list[dict[str, Any]]:
    """Returns the input of `plots.adaptation`: one support image and one query of each class, for the first tasks."""
    tasks = next(iter(groups()))
    log_probabilities, _ = predictor(run, state, TEST_STEPS)(tasks)
    support, query, found = (
        np.asarray(values, np.float32)
        for values in (
            tasks.support[0][:, :: run.shots],
            tasks.query[0][:, :: run.queries],
            log_probabilities[:, :, :: run.queries],
        )
    )
    return [
        {"support": support[task], "query": query[task], "probabilities": np.exp(found[task])}
        for task in range(min(count, len(support)))
    ]
