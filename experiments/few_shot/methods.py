"""Builds the parts of a few-shot run from its options: net, inner learner, outer optimizer, algorithm and tasks.

References:
  Nichol et al. 2018, arXiv:1803.02999 (Reptile). Rajeswaran et al. 2019, arXiv:1909.04630 (iMAML). Liu et al. 2025,
  arXiv:2502.16982 (Muon).
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import Mesh

import maml_jax
from experiments.few_shot.names import WITH_HEAD_RATES
from experiments.few_shot.run import DataSet, Run
from experiments.shared import command_line
from maml_jax import losses
from maml_jax.algorithms import heads
from maml_jax.algorithms.imaml import imaml
from maml_jax.algorithms.maml_plus_plus import maml_plus_plus, per_step_sgd
from maml_jax.algorithms.meta_curvature import meta_curvature
from maml_jax.algorithms.one_step import one_step_maml
from maml_jax.algorithms.reptile import one_of_each_class, reptile
from maml_jax.inner import adapted_part
from maml_jax.meta import MetaLearner
from maml_jax.nets import models
from maml_jax.nets.normalisation import NEEDS_CONTEXT
from maml_jax.runs import model_file
from maml_jax.tasks import host_memory
from maml_jax.tasks.episodes import EpisodeShape, ImageClasses, augment
from maml_jax.tasks.fixed import fixed_tasks
from maml_jax.types import LossFn, MetaParams, Task

PROXIMAL_WEIGHT = 0.5
"""Proximal weight of iMAML. The value is ours, not the paper's."""
CG_STEPS = 5
"""Iterations of conjugate gradients of iMAML, as in Rajeswaran et al. 2019."""
REPTILE_SHOTS = 10
"""Support images per class in Reptile's training, more than at test (Nichol et al. 2018, appendix A)."""
JOINT_CLASSES = 64
"""Classes in a batch of joint training, with one image each."""


HIDDEN = (256, 128, 64, 64)
"""Widths of the hidden layers of the fully connected net (paper, section 5.2)."""


def network(run: Run, *, outputs: int | None = None, training: bool = False) -> nn.Module:
    """Returns the net of the paper's section 5.2, with strides for small images and pooling for large images.

    Args:
      run: the run.
      outputs: the number of outputs; None for the ways of a task.
      training: whether the net is for meta-training. There, batch statistics replace running statistics.
    """
    outputs = run.ways if outputs is None else outputs
    normalisation = "batch" if training and run.normalisation == "running" else run.normalisation
    if run.net == "mlp":
        return models.MLP(HIDDEN, outputs, normalisation)
    large = run.image_shape[0] > 32
    return models.ConvNet(outputs, filters=32 if large else 64, pooled=large, normalisation=normalisation)


def inner_learner(run: Run, net: nn.Module, *, scale: float = 1.0) -> maml_jax.InnerLearner:
    """Returns the inner learner of the run, for training and test.

    Args:
      run: the run.
      net: the net.
      scale: a factor of all rates, for the methods zero-head and one-step.
    """
    rate = run.inner_rate
    options: dict[str, Any] = {"steps": run.inner_steps, "order": run.order, "trainable": models.all_but_norms}
    match run.method:
        case "anil":
            return maml_jax.sgd(rate, **options | {"trainable": models.head_only})
        case "boil":
            return maml_jax.sgd(rate, **options | {"trainable": models.body_only})
        case "reptile":  # Reptile meta-learns only the parameters that the inner loop adapts.
            return maml_jax.sgd(rate, **options | {"trainable": None})
        case "meta-sgd":
            return maml_jax.sgd(rate, learn_rates="parameter", **options)
        case "meta-curvature":
            return meta_curvature(rate, **options)
        case "shared-head":
            return maml_jax.sgd(rate, start=heads.shared(), **options)
        case "zero-head" | "one-step":
            options |= {"scale": scale, "learn_rates": run.learn_rates, "start": heads.zero()}
            return heads.sgd_with_head_rates(rate, run.head_rates or (rate,), **options)
        case "prototypes":
            return maml_jax.sgd(rate, start=heads.prototypes(models.apply_params(net, head=False)), **options)
        case "maml++":
            return per_step_sgd(rate, per_step=models.norms_only, **options)
    return maml_jax.sgd(rate, **options)


def outer_rate(run: Run) -> float | Callable[[Any], Any]:
    """Returns the outer rate, or its schedule over the meta-steps."""
    if run.method == "reptile":
        return optax.linear_schedule(run.outer_rate, 0.0, run.steps)  # Nichol et al. 2018, section 6.1.
    if run.outer_rate_falls:
        return optax.cosine_decay_schedule(run.outer_rate, run.steps, alpha=0.01)
    return run.outer_rate


def outer_optimizer(run: Run) -> optax.GradientTransformation:
    """Returns Adam or Muon, or SGD for Reptile.

    SGD moves the parameters part of the way to the adapted parameters.
    """
    rate, clip = outer_rate(run), optax.identity() if run.clip is None else optax.clip(run.clip)
    if run.method == "reptile":
        optimizer = optax.sgd(rate)
    elif run.optimizer == "muon":
        # Adam updates the other parameters. The factor 0.2 gives the updates of Muon the size of Adam's.
        optimizer = optax.contrib.muon(
            rate, consistent_rms=0.2, adam_learning_rate=rate, muon_weight_dimension_numbers=_convolution_kernels
        )
    else:
        optimizer = optax.adam(rate)
    return optax.chain(clip, optimizer)


def _convolution_kernels(params: Any) -> Any:
    """Selects the kernels `[height, width, inputs, outputs]` for Muon, as matrices from inputs to outputs."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    return jax.tree.map(lambda leaf: matrix if jnp.ndim(leaf) == 4 else None, params)


def learner(run: Run, net: nn.Module, loss_fn: LossFn, *, mesh: Mesh | None = None) -> MetaLearner:
    """Returns the meta-learner of the run.

    Args:
      run: the run.
      net: the net in training.
      loss_fn: the loss of the net.
      mesh: devices among which the tasks are divided.
    """
    inner, outer = inner_learner(run, net), outer_optimizer(run)
    options: dict[str, Any] = {"task_batch_size": run.task_batch_size, "mesh": mesh}
    match run.method:
        case "reptile":
            return reptile(loss_fn, inner, outer, batches=one_of_each_class(run.ways), **options)
        case "one-step":
            # In a mean loss over more classes each class has less weight. Larger rates keep the size of the updates.
            inner = inner_learner(run, net, scale=run.train_ways / run.ways)
            features = models.apply_params(net, head=False)
            return one_step_maml(loss_fn, features, inner, outer, ways=run.train_ways, **options)
        case "imaml":
            return imaml(loss_fn, inner, outer, proximal_weight=PROXIMAL_WEIGHT, cg_steps=CG_STEPS, **options)
        case "pretrained":
            return maml_jax.maml(loss_fn, maml_jax.no_adaptation(), outer, **options)
        case "maml++":
            return maml_plus_plus(
                loss_fn,
                learning_rate=run.inner_rate,
                steps=run.inner_steps,
                meta_steps=run.steps,
                outer=outer,
                order=run.order,
                trainable=models.all_but_norms,
                per_step=models.norms_only,
                **options,
            )
    return maml_jax.maml(loss_fn, inner, outer, **options)


def draw_tasks(
    run: Run, classes: ImageClasses, key: jax.Array, mesh: Mesh | None = None
) -> tuple[Callable[[Any, Any], Task], Any]:
    """Returns `draw` and `data` for `maml_jax.train`: `draw(data, step)` gives the tasks of a meta-step."""
    shape = run.train_shape
    if run.method == "reptile":  # More shots than at test, if all classes have enough images.
        most = min(classes.counts) - shape.queries
        shape = shape._replace(shots=max(shape.shots, min(REPTILE_SHOTS, most)))
    elif run.method == "pretrained":  # One image of each of many classes.
        shape = EpisodeShape(min(JOINT_CLASSES, len(classes.counts)), 1, 1, shape.rotations, labels="classes")
    draw, data = host_memory.episodes_by_step(key, classes, run.tasks, shape, mesh=mesh)

    def draw_augmented(data: Any, step: Any) -> Task:
        tasks = draw(data, step)
        if run.downscale > 1 or run.flips:
            keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, step), 1))
            support, query = (
                (augment(key, images, downscale=run.downscale, flips=run.flips), labels)
                for key, (images, labels) in zip(keys, tasks)
            )
            tasks = Task(support, query)
        return with_context(run, tasks)

    return draw_augmented, data


def statistics_tasks(run: Run, data: DataSet) -> Callable[[], Iterable[Task]]:
    """Returns the training tasks whose statistics the normalisation 'running' gathers; see `fixed_tasks`."""
    _, _, val_key, _ = jax.random.split(jax.random.key(run.seed), 4)
    return fixed_tasks(jax.random.fold_in(val_key, 1), data.train, run.val_tasks, run.shape)


def with_context(run: Run, tasks: Task) -> Task:
    """Adds the support set to the queries of each task if the normalisation needs statistics of the support set."""
    return losses.query_with_support(tasks) if run.normalisation in NEEDS_CONTEXT else tasks


# Start from a saved model


def start_from(run: Run, saved: model_file.Saved, initial: MetaParams) -> MetaParams:
    """Returns the parameters of a saved model, and its learned inner rates if the run learns inner rates too.

    Args:
      run: the run.
      saved: the model.
      initial: initial values of the run. The head comes from them if the model has another number of classes, and so do
        the rates of inner steps that the model does not have.

    Raises:
      ValueError: for a model of another net. The message names an array that differs.
    """
    params, inner_params = initial
    values = saved.params
    if isinstance(values, dict) and models.HEAD in values:
        if jax.tree.map(jnp.shape, values[models.HEAD]) != jax.tree.map(jnp.shape, params[models.HEAD]):
            values = {**values, models.HEAD: params[models.HEAD]}
    try:
        params = model_file.restore(params, values)
    except ValueError as error:
        raise ValueError(f"start_from must be a model of the same net, but {run.start_from} is not: {error}") from error

    trained = saved.description.get("config", {})

    def with_saved(own: jax.Array, learned: jax.Array) -> jax.Array:
        # Saved rates for the inner steps of the model, and the run's initial rates for further steps. Rates are
        # logarithms. In a mean loss over more classes each class has less weight, so rates grow with the ways.
        learned = learned + jnp.log(jnp.asarray(run.ways / trained["ways"], learned.dtype))
        return jnp.concatenate([learned, own[len(learned) :]])[: len(own)]

    if run.learn_rates and trained.get("learn_rates") and trained.get("method") in WITH_HEAD_RATES:
        inner_params = {
            layer: jax.tree.map(with_saved, rates, saved.inner_params[layer]) if jax.tree.leaves(rates) else rates
            for layer, rates in inner_params.items()
        }
    return MetaParams(params, inner_params)


def check_start(run: Run) -> None:
    """Raises ValueError or OSError if the file of `start_from` is damaged, missing, or a model of another net."""
    if run.start_from is None:
        return
    saved, net = model_file.load(command_line.model_path(run.start_from)), network(run, training=True)

    def start() -> MetaParams:
        params = net.init(jax.random.key(0), jnp.zeros((1, *run.image_shape)))["params"]
        inner = inner_learner(run, net)
        return start_from(run, saved, MetaParams(params, inner.init_inner_params(adapted_part(inner, params))))

    jax.eval_shape(start)


def prepare(options: Run) -> tuple[Run, DataSet]:
    """Resolves and checks the options, then reads the data.

    Raises:
      ValueError: if an option is not allowed, the data have too few classes or images, or the model of `start_from` is
        damaged or has another net.
      DataError: if the data are damaged.
      OSError: if a file cannot be read, or the work directory holds another run.
    """
    run = options.resolved()
    run.check_workdir()
    check_start(run)
    data = run.load()
    run.check_data(data)
    return run, data
