"""The family of algorithms by name, each a value built from the parts of the library."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

import maml_jax
from maml_jax import losses
from maml_jax.algorithms import heads
from maml_jax.algorithms.imaml import imaml, with_proximal_term
from maml_jax.algorithms.maml_plus_plus import maml_plus_plus, per_step_sgd
from maml_jax.algorithms.meta_curvature import meta_curvature
from maml_jax.algorithms.reptile import one_of_each_class, reptile
from maml_jax.evaluation import Predictor
from maml_jax.inner import InnerLearner
from maml_jax.losses import Apply
from maml_jax.nets import models
from maml_jax.types import Params, Task

MethodName = Literal[
    "maml",
    "anil",
    "boil",
    "meta-sgd",
    "meta-curvature",
    "maml++",
    "shared-head",
    "prototypes",
    "reptile",
    "imaml",
    "pretrained",
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
FIXED_ORDER = ("reptile", "imaml", "pretrained")
"""Those in which nothing is differentiated through the inner steps, whatever the order."""

ANNEALED = ("maml++", "reptile")
"""Those with an outer rate that falls over all meta-steps, whatever is asked for."""

PROXIMAL_WEIGHT, CG_STEPS = 0.5, 5  # Of iMAML. The iterations are the paper's, the proximal_weight is chosen here.


class Training(NamedTuple):
    """What a method needs to know of the training that it is for."""

    method: MethodName
    order: Literal[1, 2]
    inner_rate: float
    inner_steps: int
    outer_rate: float
    clip: float | None
    """Bound of each entry of the meta-gradient."""
    steps: int
    """Meta-steps in all, over which what is annealed is annealed."""
    anneal: bool = False
    """Whether the outer rate falls also where the method itself does not say so."""


class Method(NamedTuple):
    """An algorithm for few-shot classification."""

    inner: InnerLearner
    """How a task is learned, in training and at test."""
    learner: Callable[..., maml_jax.MetaLearner]
    """`(loss_fn, **options of maml) -> MetaLearner`."""
    finish: Callable[[Params], Params] = lambda params: params
    """From trained parameters to those that tasks are learned from."""


def inner_steps_of(method: MethodName, recipe: int) -> int:
    """Inner steps in training where none are given: the paper's recipe, unless the method cannot do with so few."""
    least = {"maml++": 5, "reptile": 5, "imaml": 16}
    return max(recipe, least.get(method, 1))


def inner_rate_of(method: MethodName, recipe: float) -> float:
    """The inner step size where none is given: the paper's recipe, unless the method cannot do with so large a one."""
    # Beside the loss iMAML minimises a parabola of curvature `PROXIMAL_WEIGHT`, in many steps: large ones run away.
    return min(recipe, 0.2) if method == "imaml" else recipe


def outer_rate_of(method: MethodName) -> float:
    """The outer rate where none is given: Adam's in the paper, or the fraction of the way that Reptile begins with."""
    return 0.5 if method == "reptile" else 1e-3


def build(training: Training, net_apply: Apply, features: Apply, ways: int) -> Method:
    """The method of that name.

    Args:
      training: the method and its numbers.
      net_apply: `(params, inputs, ...) -> logits`, the net that is trained.
      features: the same up to the last layer.
      ways: classes of a task.
    """
    name, rate, steps, order = training.method, training.inner_rate, training.inner_steps, training.order
    outer = _outer(training)
    loss_fn = losses.cross_entropy(net_apply)
    options: dict[str, Any] = {"steps": steps, "order": order, "trainable": models.all_but_norms}

    def by_maml(inner: InnerLearner, **extra: Any) -> Method:
        def learner(**others: Any) -> maml_jax.MetaLearner:
            return maml_jax.maml(loss_fn, inner, outer, **extra, **others)

        return Method(inner, learner)

    if name == "anil":
        return by_maml(maml_jax.sgd(rate, **options | {"trainable": models.head_only}))
    if name == "boil":
        return by_maml(maml_jax.sgd(rate, **options | {"trainable": models.body_only}))
    if name == "meta-sgd":
        return by_maml(maml_jax.sgd(rate, learn_rates="parameter", **options))
    if name == "meta-curvature":
        return by_maml(meta_curvature(rate, **options))
    if name == "shared-head":
        return by_maml(maml_jax.sgd(rate, start=heads.shared(), **options))
    if name == "prototypes":
        return by_maml(maml_jax.sgd(rate, start=heads.prototypes(features), **options))
    if name == "maml++":
        options |= {"per_step": models.norms_only}

        def plus_plus(**others: Any) -> maml_jax.MetaLearner:
            return maml_plus_plus(
                loss_fn, learning_rate=rate, outer=outer, meta_steps=training.steps, **options, **others
            )

        return Method(per_step_sgd(rate, **options), plus_plus)
    if name == "reptile":
        # Of everything: what the inner loop leaves as it is, Reptile does not learn.
        inner = maml_jax.sgd(rate, **options | {"trainable": None})
        batches = one_of_each_class(ways)
        return Method(inner, lambda **others: reptile(loss_fn, inner, outer, batches=batches, **others))
    if name == "imaml":
        inner = maml_jax.sgd(rate, **options)

        def implicit(**others: Any) -> maml_jax.MetaLearner:
            return imaml(loss_fn, inner, outer, proximal_weight=PROXIMAL_WEIGHT, cg_steps=CG_STEPS, **others)

        return Method(with_proximal_term(inner, PROXIMAL_WEIGHT), implicit)
    if name == "pretrained":

        def joint(**others: Any) -> maml_jax.MetaLearner:
            return maml_jax.maml(loss_fn, maml_jax.no_adaptation(), outer, **others)

        return Method(maml_jax.sgd(rate, **options), joint, finish=lambda params: _other_head(params, ways))
    return by_maml(maml_jax.sgd(rate, **options))


def outer_rate(training: Training) -> float | Callable[[Any], Any]:
    """The outer rate, or its schedule by meta-steps taken."""
    if training.method == "reptile":
        # A part of the way to the adapted parameters, ever less (Nichol et al. 2018, section 6.1).
        return optax.linear_schedule(training.outer_rate, 0.0, training.steps)
    if training.anneal or training.method in ANNEALED:
        return optax.cosine_decay_schedule(training.outer_rate, training.steps, alpha=0.01)
    return training.outer_rate


def _outer(training: Training) -> optax.GradientTransformation:
    rate = outer_rate(training)
    if training.method == "reptile":
        return optax.sgd(rate)
    return optax.chain(optax.identity() if training.clip is None else optax.clip(training.clip), optax.adam(rate))


def _other_head(params: Params, ways: int) -> Params:
    """The body of a net that knows other classes, and a head of zeros."""
    head = {name: jnp.zeros((*leaf.shape[:-1], ways), leaf.dtype) for name, leaf in params[models.HEAD].items()}
    return {**params, models.HEAD: head}


def nearest_neighbour(features: Apply, params: Params) -> Predictor:
    """The baseline that learns nothing of a task: each query has the class of the support image whose features
    are nearest, in Euclidean distance."""

    def one(task: Task) -> tuple[jax.Array, jax.Array]:
        inputs, labels = task.support
        support = features(params, inputs)
        query = features(params, *task.query[:1], *task.query[2:])
        distances = jnp.square(query[:, None] - support).sum(-1)
        predicted = labels[distances.argmin(-1)]
        ways = jnp.arange(len(params[models.HEAD]["bias"]))
        return jnp.log(predicted[:, None] == ways)[None], jnp.zeros(1)

    return jax.jit(jax.vmap(one))
