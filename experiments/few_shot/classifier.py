"""Few-shot classifiers: a net and a method of the family, the tasks that they learn, and how well they do."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import maml_jax
from experiments.few_shot import methods
from experiments.few_shot.methods import Training
from experiments.few_shot.options import Config, Prepared, QueryMode, Setting, Split
from maml_jax import evaluation, losses
from maml_jax.algorithms import running_statistics
from maml_jax.algorithms.maml_plus_plus import select_step
from maml_jax.evaluation import Predictor, Protocol, Results
from maml_jax.inner import adapted_part
from maml_jax.nets import models
from maml_jax.nets.normalisation import NEEDS_CONTEXT, Normalisation
from maml_jax.parallel.task_axis import local_mesh, task_axis, task_mesh
from maml_jax.runs import model_file
from maml_jax.tasks import episodes, host_memory
from maml_jax.tasks.episodes import EpisodeShape, ImageClasses
from maml_jax.types import InnerParams, MetaState, Params, Task


class Classifier(NamedTuple):
    """Net and method of a setting."""

    net: nn.Module
    """As it is at test, with a class for each way."""
    trained: nn.Module
    """As it is in training."""
    method: methods.Method
    query_with_support: bool
    """Whether queries are to see the support set."""
    gathers: bool
    """Whether queries are normalised by statistics that are gathered after training."""
    training: methods.Training
    """What it is trained by."""

    def tasks(self, tasks: Task) -> Task:
        """Tasks in the form that the net needs."""
        return losses.query_with_support(tasks) if self.query_with_support else tasks

    def finished(self, state: MetaState, tasks: Callable[[], Iterable[Task]], steps: int) -> MetaState:
        """From the state of training to that from which tasks are learned.

        Args:
          state: of training.
          tasks: of training classes, of which statistics are gathered.
          steps: inner steps of which they are.
        """
        params = self.method.finish(state.params)
        if self.gathers:
            gather = _gather_of(self, steps)
            parts = [gather(params, state.inner_params, group) for group in tasks()]  # Groups of one size.
            params = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *parts)
        return state._replace(params=params)

    def predictor(self, state: MetaState, steps: int, seen: QueryMode = "together") -> Predictor:
        """What the state predicts after 0 to `steps` inner steps."""
        evaluate = _evaluation_of(self, seen, only_last=False)

        def predict(tasks: Task) -> tuple[jax.Array, jax.Array]:
            found = evaluate(state, self.tasks(tasks), steps)
            return found.aux, found.support_loss

        return predict

    def accuracy(self, state: MetaState, groups: Iterable[Task], steps: int) -> float:
        """Mean accuracy on tasks after `steps` inner steps; nothing is predicted before the last."""
        evaluate, right = _evaluation_of(self, "together", only_last=True), []
        for tasks in groups:
            log_probabilities = evaluate(state, self.tasks(tasks), steps).aux[:, 0]
            right.append(evaluation.predicted(np.exp(log_probabilities)) == np.asarray(tasks.query[1]))
        return float(np.concatenate(right).mean())


@functools.cache  # Compiled once, for all validations.
def _gather_of(model: Classifier, steps: int) -> Callable[[Params, InnerParams, Task], Params]:
    loss_fn = losses.cross_entropy(models.apply_params(model.trained))
    return jax.jit(
        lambda params, inner_params, tasks: running_statistics.gather(
            model.trained, model.method.inner, loss_fn, params, inner_params, tasks, steps=steps
        )
    )


@functools.cache
def _evaluation_of(
    model: Classifier, seen: QueryMode, only_last: bool
) -> Callable[[MetaState, Task, int], maml_jax.Evaluation]:
    apply, inner = models.apply_params(model.net), model.method.inner
    judged = losses.log_probabilities(losses.inductive(apply) if seen == "one by one" else apply)
    if model.gathers:
        apply = models.apply_params(model.trained)
        inner = inner._replace(params_at_step=select_step(models.norms_only))
    mesh = local_mesh()
    learner = maml_jax.maml(losses.cross_entropy(apply), inner, optax.identity(), query_loss_fn=judged, mesh=mesh)
    evaluate = jax.jit(functools.partial(learner.evaluate, only_last=only_last), static_argnums=2)
    return lambda state, tasks, steps: evaluate(task_axis(None, mesh).replicate(state), tasks, steps)


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
        setting.outer_rate,
        setting.clip,
        config.steps,
        config.anneal,
    )
    apply, features = models.apply_params(trained), models.apply_params(trained, head=False)
    method = methods.build(training, apply, features, setting.ways)
    return Classifier(net, trained, method, config.normalisation in NEEDS_CONTEXT, gathers, training)


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
    elif prepared.config.method == "pretrained":
        shape = EpisodeShape(min(JOINT_CLASSES, len(data.counts)), 1, 1, shape.rotations, labels="classes")
    return host_memory.episodes_by_step(key, data, tasks, shape, mesh=task_mesh(tasks))


REPTILE_SHOTS = 10
"""Support images a class in Reptile's training, more than at test (Nichol et al. 2018, appendix A)."""

JOINT_CLASSES = 64
"""Classes in a batch of joint training, an image of each."""


def fixed_tasks(key: jax.Array, data: ImageClasses, count: int, shape: EpisodeShape) -> Callable[[], Iterable[Task]]:
    """The same `count` tasks at every call, in groups that fit into memory."""
    shape.check(data)
    choice = jax.tree.map(np.asarray, episodes.choose_images(key, data.counts, count, shape))
    entries = shape.ways * (shape.shots + shape.queries) * int(np.prod(data.images.shape[1:]))
    group = max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * entries <= GROUP_ENTRIES))

    def groups() -> Iterator[Task]:
        for first in range(0, count, group):
            some = jax.tree.map(lambda leaf, first=first: leaf[first : first + group], choice)
            yield episodes.assemble_episodes(data.images[some.images], some, shape)

    return groups


GROUP_ENTRIES = 1 << 23
"""Numbers in the images of the tasks that are evaluated together."""


# Evaluation


def evaluate(
    prepared: Prepared,
    models: list[tuple[Classifier, MetaState]],
    groups: Callable[[], Iterable[Task]],
    told: Protocol,
    *,
    steps: int,
    seen: QueryMode = "together",
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
    learned = bool(jax.tree.leaves(models[0][1].inner_params))
    told = told._replace(
        inner_steps=steps,
        inner_rate=None if learned else prepared.setting.inner_rate,
        query_mode=seen,
        models=len(models),
    )
    return evaluation.evaluate([model.predictor(state, steps, seen) for model, state in models], groups, told)


def nearest(model: Classifier, state: MetaState, groups: Callable[[], Iterable[Task]], told: Protocol) -> Results:
    """Accuracy of the nearest neighbour in the features of a state."""
    told = told._replace(method=f"nearest neighbour in the features of {told.method}")
    predict = methods.nearest_neighbour(models.apply_params(model.net, head=False), state.params)
    return evaluation.evaluate([lambda tasks: predict(model.tasks(tasks))], groups, told)


def protocol(prepared: Prepared, split: Split, tasks: int, seed: int) -> Protocol:
    """Of an evaluation without adaptation."""
    setting, data = prepared.setting, prepared.data
    rates = "" if prepared.config.method in methods.FIXED_ORDER else f", order {prepared.config.order}"
    return Protocol(
        method=prepared.config.method + rates,
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
        query_mode="together",
    )


def load_state(content: model_file.Saved, like: MetaState) -> MetaState:
    """A saved state; its inner_params in the structure of those of another."""
    params, inner_params = (
        jax.tree.map(jnp.asarray, content.params),
        model_file.restore(like.inner_params, content.inner_params),
    )
    return like._replace(step=jnp.int32(content.description["step"]), params=params, inner_params=inner_params)


def load_trained(content: model_file.Saved, model: Classifier) -> MetaState:
    """A saved state, without one of the same model at hand."""
    inner = model.method.inner
    inner_params = jax.eval_shape(lambda params: inner.init_inner_params(adapted_part(inner, params)), content.params)
    return load_state(content, MetaState(jnp.int32(0), (), inner_params, ()))
