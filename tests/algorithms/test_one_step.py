"""One-step MAML has the meta-gradient of MAML from a head that is equal for all classes, averaged over exchanges."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.algorithm_cases import assert_close

import maml_jax
from maml_jax.algorithms import heads
from maml_jax.losses import cross_entropy
from maml_jax.nets import models
from maml_jax.types import Task

pytestmark = pytest.mark.usefixtures("x64")

WAYS, SHOTS = 3, 2
NET = models.MLP((6, 5), WAYS, "batch")  # Batch statistics: a set must be a batch of its own.
LOSS, FEATURES = cross_entropy(models.apply_params(NET)), models.apply_params(NET, head=False)
INNERS = {
    "zero": maml_jax.sgd(2.0, steps=1, start=heads.zero(), trainable=models.all_but_norms),
    "shared": maml_jax.sgd(2.0, steps=1, start=heads.shared()),
    "first order": maml_jax.sgd(2.0, steps=1, start=heads.zero(), order=1),
    "learned rates": maml_jax.sgd(2.0, steps=1, start=heads.zero(), learn_rates="layer"),
    "head rates": heads.sgd_with_head_rates(
        0.5, [3.0], steps=1, learn_rates=True, start=heads.zero(), trainable=models.all_but_norms
    ),
}


def start_params(net=NET):
    params = net.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    keys = iter(jax.random.split(jax.random.key(1), 20))
    return jax.tree.map(lambda leaf: 0.5 + 0.5 * jax.random.normal(next(keys), leaf.shape, float), params)


def image_sets(count, tasks=2):
    """`[count, T, N * K, 4]`: the examples of a class are adjacent."""
    return jax.random.normal(jax.random.key(2), (count, tasks, WAYS * SHOTS, 4))


def labelled(images):
    """Images `[T, N * S, 4]` with their labels."""
    labels = jnp.repeat(jnp.arange(WAYS), images.shape[1] // WAYS)
    return images, jnp.tile(labels, (len(images), 1))


def one_task(sets):
    """The first set as support, all others as queries."""
    by_class = sets[1:].reshape(len(sets) - 1, sets.shape[1], WAYS, SHOTS, -1)
    query = jnp.moveaxis(by_class, 0, 2).reshape(sets.shape[1], -1, sets.shape[-1])
    return Task(labelled(sets[0]), labelled(query))


def gradient_and_info(learner, state, tasks):
    """What a step of `optax.sgd(1.0)` subtracts from parameters and inner parameters, and the metrics of the step."""
    after, info = jax.jit(learner.step)(state, tasks)
    return jax.tree.map(jnp.subtract, state.meta_params, after.meta_params), info


@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize("count", [2, 3])
def test_meta_gradient_is_the_average_over_all_exchanges(name, count):
    inner, params, sets = INNERS[name], start_params(), image_sets(count)
    learner = maml_jax.one_step_maml(LOSS, FEATURES, inner, optax.sgd(1.0), ways=WAYS)
    state = learner.init(params)
    found, info = gradient_and_info(learner, state, one_task(sets))
    pairs = list(itertools.permutations(range(count), 2))
    support, query = (labelled(jnp.concatenate([sets[pair[part]] for pair in pairs])) for part in (0, 1))
    maml = maml_jax.maml(LOSS, inner, optax.sgd(1.0))
    gradient, expected = gradient_and_info(maml, state, Task(support, query))
    assert_close(found, gradient, rtol=1e-9, atol=1e-12)
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(found[0])) > 1e-2
    assert_close(info.loss, expected.loss)
    assert info.support_loss.shape == (2, 1)
    assert_close(info.support_loss.mean(), expected.support_loss.mean())
    assert_close(info.aux["accuracy"].mean(), expected.aux["accuracy"].mean())


def test_evaluation_takes_the_whole_inner_loop():
    """Also with another number of classes than in training."""
    inner, sets = INNERS["zero"], image_sets(2)
    learner = maml_jax.one_step_maml(LOSS, FEATURES, inner, optax.sgd(1.0), ways=2)
    maml = maml_jax.maml(LOSS, inner, optax.sgd(1.0))
    state = learner.init(start_params())
    after, _ = jax.jit(learner.step)(state, Task(labelled(sets[0, :, :4]), labelled(sets[1, :, :4])))
    assert jnp.abs(after.params["Dense_0"]["kernel"] - state.params["Dense_0"]["kernel"]).max() > 1e-3
    found, expected = (each.evaluate(after, one_task(sets), 3) for each in (learner, maml))
    assert_close(found, expected)


def test_fewer_features_are_scaled_up():
    """Two images of half the pixels are one image: the logits have the same size."""
    head = {"kernel": jnp.zeros((4, WAYS)), "bias": jnp.zeros(WAYS)}
    params = {"gain": jnp.ones(()), "head": head}
    loss = cross_entropy(lambda params, x: params["gain"] * x @ params["head"]["kernel"] + params["head"]["bias"])
    learner = maml_jax.one_step_maml(
        loss, lambda params, x: params["gain"] * x, INNERS["shared"], optax.sgd(1.0), ways=WAYS
    )
    half = image_sets(2)[..., :2]
    state = learner.init(params)
    both = (half, jnp.concatenate([half, half], -1))
    small, large = (gradient_and_info(learner, state, one_task(sets))[0] for sets in both)
    assert_close(small, large)


def test_other_inner_learners_are_refused():
    def make(inner, ways=WAYS):
        return maml_jax.one_step_maml(LOSS, FEATURES, inner, optax.sgd(1.0), ways=ways)

    with pytest.raises(ValueError, match="one step, but got 2"):
        make(maml_jax.sgd(1.0, steps=2, start=heads.zero()))
    with pytest.raises(ValueError, match="with a start that makes all columns of the head equal"):
        make(maml_jax.sgd(1.0, steps=1))
    with pytest.raises(ValueError, match="ways must be an integer of at least 2"):
        make(INNERS["zero"], ways=1)
    body_only = make(maml_jax.sgd(1.0, steps=1, start=heads.zero(), trainable=models.body_only))
    with pytest.raises(ValueError, match="adapts the head 'head'"):
        body_only.step(body_only.init(start_params()), one_task(image_sets(2)))


@pytest.mark.parametrize("support, query, ways", [(6, 6, 4), (6, 9, 3)])
def test_sets_of_unequal_size_are_refused(support, query, ways):
    learner = maml_jax.one_step_maml(LOSS, FEATURES, INNERS["zero"], optax.sgd(1.0), ways=ways)
    task = Task(*((jnp.zeros((1, count, 4)), jnp.zeros((1, count), int)) for count in (support, query)))
    with pytest.raises(ValueError, match=f"got {support} support examples and {query} queries"):
        learner.step(learner.init(start_params()), task)
