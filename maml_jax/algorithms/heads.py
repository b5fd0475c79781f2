"""Initial heads for few-shot classifiers, independent of the numbering of the classes.

A learned head has one column for each label, but each task assigns labels to classes at random. The accuracy of a
classifier therefore varies with the numbering (Ye and Chao 2022). `shared`, `zero` and `prototypes` return a function
for the option `start` of an inner learner. `sgd_with_head_rates` is an inner learner with separate step sizes for the
head.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from maml_jax import validation
from maml_jax.inner import InnerLearner, InnerOptions, Start, inner_learner
from maml_jax.types import Batch, InnerParams, Params


def shared(name: str = "head") -> Start:
    """Initialises the columns of all classes to one vector, the mean of the learned columns (UNICORN-MAML).

    Example:
      >>> import jax.numpy as jnp, maml_jax
      >>> params = {"head": {"kernel": jnp.array([[1.0, 3.0]]), "bias": jnp.array([0.0, 2.0])}}
      >>> start = maml_jax.heads.shared()(params, None)
      >>> start["head"]["kernel"].tolist(), start["head"]["bias"].tolist()
      ([[2.0, 2.0]], [1.0, 1.0])

    Args:
      name: key of the head in the parameters, a mapping with `kernel` `[features, N]` and `bias` `[N]`.

    Returns:
      A function `(params, support) -> params`, for `start=` of `sgd`.

    Raises (when called):
      ValueError: for parameters without a head of that name.

    References:
      Ye and Chao 2022, How to train your MAML to excel in few-shot classification, arXiv:2106.16245.
    """

    def start(params: Params, support: Batch) -> Params:
        mean_of_columns = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf.mean(-1, keepdims=True), leaf.shape), find_head(params, name)
        )
        return {**params, name: mean_of_columns}

    return start


def zero(name: str = "head") -> Start:
    """Initialises the head to zero for all classes.

    The softmax does not change if the same vector is added to the columns of all classes. The predictions are therefore
    those of `shared`. With one inner step, `one_step_maml` has the same meta-gradient at less cost.

    Example:
      >>> import jax.numpy as jnp, maml_jax
      >>> params = {"head": {"kernel": jnp.array([[1.0, 3.0]]), "bias": jnp.array([0.0, 2.0])}}
      >>> start = maml_jax.heads.zero()(params, None)
      >>> start["head"]["kernel"].tolist(), start["head"]["bias"].tolist()
      ([[0.0, 0.0]], [0.0, 0.0])

    Args:
      name: as for `shared`.

    Returns:
      A function `(params, support) -> params`, for `start=` of `sgd`.

    Raises (when called):
      ValueError: for parameters without a head of that name.

    References:
      Ye and Chao 2022, How to train your MAML to excel in few-shot classification, arXiv:2106.16245.
    """

    def start(params: Params, support: Batch) -> Params:
        return {**params, name: jax.tree.map(jnp.zeros_like, find_head(params, name))}

    return start


def prototypes(features: Callable[..., jax.Array], name: str = "head") -> Start:
    """Initialises the column of each class from its prototype, the mean of its support features (Proto-MAML).

    Before the first inner step the predictions are those of a prototypical network: the logits are the negative
    squared distances to the prototypes, up to a constant. The prototype of a class without support examples is zero.

    Example:
      >>> import jax.numpy as jnp, maml_jax
      >>> params = {"head": {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}}
      >>> support = (jnp.array([[1.0], [3.0], [5.0]]), jnp.array([0, 0, 1]))  # Prototypes 2 and 5.
      >>> start = maml_jax.heads.prototypes(lambda params, inputs: inputs)(params, support)
      >>> start["head"]["kernel"].tolist(), start["head"]["bias"].tolist()
      ([[4.0, 10.0]], [-4.0, -25.0])

    Args:
      features: `(params, inputs [B, ...]) -> [B, features]`, the inputs of the head.
      name: as for `shared`.

    Returns:
      A function `(params, support) -> params`, for `start=` of `sgd`. The support set is `(inputs [B, ...],
      labels [B])`, or `(inputs, labels, weights [B])` for prototypes that are weighted means.

    Raises (when called):
      ValueError: for parameters without a head of that name, and for a head without a bias.

    References:
      Triantafillou et al. 2020, Meta-Dataset, section 3.1, arXiv:1903.03096.
    """

    def start(params: Params, support: Batch) -> Params:
        inputs, labels, *weights = support
        head = find_head(params, name)
        if "bias" not in head:
            raise ValueError(
                f"The head {name!r} has no bias, only {', '.join(map(repr, head))}, but the logits of prototypes need "
                "one: use a last layer with a bias."
            )
        x = features(params, inputs)
        ways = head["bias"].shape[-1]
        one_hot = jax.nn.one_hot(labels, ways, dtype=x.dtype)
        if weights:
            weight = jnp.asarray(weights[0], x.dtype)[:, None]
            one_hot, x = one_hot * weight, jnp.where(weight == 0, 0, x)  # NaN of weight 0 does not count either.
        count = one_hot.sum(0)
        prototypes = one_hot.T @ x / jnp.where(count == 0, 1, count)[:, None]
        # -|x - p|^2 = 2 x'p - |p|^2 - |x|^2, and the last term is the same for all classes.
        return {**params, name: {"kernel": 2 * prototypes.T, "bias": -jnp.square(prototypes).sum(-1)}}

    return start


def sgd_with_head_rates(
    learning_rate: float,
    head_rates: Sequence[float],
    *,
    steps: int,
    learn_rates: bool = False,
    scale: float = 1.0,
    name: str = "head",
    **options: Unpack[InnerOptions],
) -> InnerLearner:
    """Gradient descent with separate step sizes for the head, for example 25 times those of the other layers.

    With `learn_rates`, the meta-parameters are the logarithms of the rates. The outer optimizer then changes small and
    large rates by the same factor, and no rate becomes negative.

    Example:
      >>> import jax.numpy as jnp, maml_jax
      >>> inner = maml_jax.heads.sgd_with_head_rates(0.4, [10.0], steps=2, learn_rates=True)
      >>> rates = inner.init_inner_params({"body": jnp.zeros(3), "head": jnp.zeros(2)})
      >>> for name, rate in rates.items():
      ...     print(name, jnp.exp(rate).round(3))  # One for each inner step.
      body [0.4 0.4]
      head [10. 10.]

    Args:
      learning_rate: the inner step size of all layers but the head, for the loss that `maml` is given.
      head_rates: the step size of the head in each inner step. The last rate is for all later steps.
      steps: inner steps in meta-training, at least 1.
      learn_rates: meta-learns one rate for every array of parameters and inner step, from these initial values. Inner
        steps beyond those of training take the last step's rates.
      scale: a fixed factor of all rates. In a mean loss over r times as many classes, each class has 1 / r of the
        weight. `scale=r` then keeps the size of the updates.
      name: key of the head in the parameters, a mapping from the names of layers.
      **options: `order`, `trainable`, `remat`, `start` and `params_at_step`, see `InnerOptions`.

    Returns:
      An `InnerLearner`. Its learned parameters are the logarithms of the rates, `[steps]` for every adapted array, or
      `()` without `learn_rates`.

    Raises:
      ValueError: as `sgd`; if `head_rates` is empty or has more rates than steps; if a rate or `scale` is not positive
        and finite; when the learner is used, for parameters without a head of that name.

    References:
      Antoniou et al. 2019, arXiv:1810.09502, section 4 (a learned rate for every layer and inner step).
    """
    validation.positive("learning_rate", learning_rate)
    validation.at_least("steps", steps, 1)
    validation.positive("scale", scale)
    if not 1 <= len(head_rates) <= steps:
        raise ValueError(f"head_rates must be 1 to {steps} rates, one for each inner step, but got {len(head_rates)}.")
    for rate in head_rates:
        validation.positive("head_rates", rate)
    rates_of_head = [*head_rates, *[head_rates[-1]] * (steps - len(head_rates))]

    def log_rates(adapted: Params) -> InnerParams:
        find_head(adapted, name)

        def log_rates_of_layer(layer: str, leaves: Any) -> Any:
            rates = rates_of_head if layer == name else [learning_rate] * steps
            return jax.tree.map(lambda leaf: jnp.log(jnp.array(rates, leaf.dtype)), leaves)

        return {layer: log_rates_of_layer(layer, leaves) for layer, leaves in adapted.items()}

    def optimizer(learned: InnerParams) -> optax.GradientTransformation:
        def update(grads: Any, step: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
            current = learned if learn_rates else log_rates(grads)
            index = jnp.minimum(step, steps - 1)
            return jax.tree.map(lambda g, rate: -scale * jnp.exp(rate[index]) * g, grads, current), step + 1

        return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)

    return inner_learner(optimizer, log_rates if learn_rates else lambda _: (), steps=steps, **options)


def find_head(params: Params, name: str) -> Params:
    """The parameters of the layer `name`.

    Raises:
      ValueError: for parameters without such a layer.
    """
    if not isinstance(params, Mapping):
        raise ValueError(
            f"The parameters must be a mapping with the head at {name!r}, but they are a {type(params).__name__}."
        )
    if name not in params:
        raise ValueError(
            f"The parameters have no head {name!r}, only {', '.join(map(repr, params))}. Pass the name of the last "
            "layer as name."
        )
    return params[name]
