"""Each member of the family has the property that defines it, and its exact meta-gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.model_zoo import INPUTS, WAYS, ZOO, drawn_params, tasks

import maml_jax
from maml_jax import losses, meta
from maml_jax.algorithms import heads
from maml_jax.algorithms.imaml import imaml, with_proximal_term
from maml_jax.algorithms.maml_plus_plus import (
    maml_plus_plus,
    multi_step_weights,
    per_step_sgd,
    replicate_per_step,
    select_step,
    switch_learner,
)
from maml_jax.algorithms.meta_curvature import meta_curvature
from maml_jax.algorithms.reptile import one_of_each_class, reptile
from maml_jax.nets import models

pytestmark = pytest.mark.usefixtures("x64")

NET = models.MLP((8, 6), WAYS, "layer")
LOSS = losses.cross_entropy(models.apply_params(NET))
STEPS = 3


def start_params():
    params = drawn_params(NET, jnp.zeros((1, INPUTS)))
    return jax.tree.map(lambda leaf: leaf.astype(float), params)


def assert_close(got, expected, rtol=1e-10, atol=1e-13):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def moved_by(learner, state, batch):
    """What a step of `optax.sgd(1.0)` subtracts from parameters and inner_params: the meta-gradient."""
    after, _ = jax.jit(learner.step)(state, batch)
    return jax.tree.map(jnp.subtract, (state.params, state.inner_params), (after.params, after.inner_params))


def features(params, inputs):
    return NET.apply({"params": params}, inputs, head=False)


FAMILY = {
    "rates by layer": lambda order: maml_jax.sgd(0.3, steps=STEPS, order=order, learn_rates="layer"),
    "rates by layer and step": lambda order: maml_jax.sgd(0.3, steps=STEPS, order=order, learn_rates="layer_step"),
    "meta-curvature": lambda order: meta_curvature(0.3, steps=STEPS, order=order),
    "shared head": lambda order: maml_jax.sgd(0.3, steps=STEPS, order=order, start=heads.shared()),
    "prototypes": lambda order: maml_jax.sgd(0.3, steps=STEPS, order=order, start=heads.prototypes(features)),
    "norms per step": lambda order: maml_jax.sgd(
        0.3, steps=STEPS, order=order, params_at_step=select_step(models.norms_only)
    ),
}


@pytest.mark.parametrize("name", FAMILY)
def test_exact_meta_gradient(name):
    """Jitted, in parameters and inner_params, against central differences of the meta-loss; first order is another."""
    inner, batch = FAMILY[name](2), tasks(2)
    weights = (0.1, 0.2, 0.3, 0.4) if "step" in name else None
    params = start_params()
    if name == "norms per step":
        params = replicate_per_step(params, models.norms_only, STEPS)
    learner = maml_jax.maml(LOSS, inner, optax.sgd(1.0), step_weights=weights)
    state = learner.init(params)
    random = np.random.default_rng(0)

    def drawn(tree, size):
        return jax.tree.map(lambda leaf: jnp.asarray(size * random.standard_normal(leaf.shape)), tree)

    # Away from where everything starts, with its equal copies, equal rates and identities.
    begun = (state.params, state.inner_params)
    begun = jax.tree.map(jnp.add, begun, drawn(begun, 0.05))
    state = state._replace(params=begun[0], inner_params=begun[1])
    direction = drawn(begun, 1.0)

    @jax.jit
    def loss(by):
        at = jax.tree.map(lambda leaf, d: leaf + by * d, begun, direction)
        one = partial(meta.task_loss, LOSS, LOSS, inner, at, step_weights=weights)
        return jax.vmap(lambda task: one(task)[0])(batch).mean()

    def slope(gradient):
        return sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))

    expected = (8 * (loss(1e-5) - loss(-1e-5)) - (loss(2e-5) - loss(-2e-5))) / 12e-5
    np.testing.assert_allclose(slope(moved_by(learner, state, batch)), expected, rtol=1e-7)
    first_order = maml_jax.maml(LOSS, FAMILY[name](1), optax.sgd(1.0), step_weights=weights)
    assert abs(slope(moved_by(first_order, state, batch)) / expected - 1) > 1e-3


def test_rates_of_each_layer_and_step_are_taken_at_that_step():
    """On the loss |p - c|^2 / 2 a step of rate r takes the distance times 1 - r; beyond the last step, its rate."""
    inner = maml_jax.sgd(0.5, steps=2, learn_rates="layer_step")

    def loss_fn(params, batch):
        return sum(jnp.sum((params[name] - batch[name]) ** 2) for name in params) / 2, {}

    learner = maml_jax.maml(loss_fn, inner, optax.sgd(1.0))
    state = learner.init({"a": jnp.ones(2), "b": jnp.ones(3)})
    assert_close(state.inner_params, {"a": jnp.full(2, 0.5), "b": jnp.full(2, 0.5)})
    state = state._replace(inner_params={"a": jnp.array([0.1, 0.2]), "b": jnp.array([0.3, 0.4])})
    adapted, _ = learner.adapt(state, {"a": jnp.zeros(2), "b": jnp.zeros(3)}, 3)
    assert_close(adapted, {"a": jnp.full(2, 0.9 * 0.8 * 0.8), "b": jnp.full(3, 0.7 * 0.6 * 0.6)})


def test_masks_of_anil_and_boil():
    batch = jax.tree.map(lambda leaf: leaf[0], tasks(1))
    params = start_params()
    for mask, adapts in ((models.head_only, {"head"}), (models.body_only, {"Dense_0", "Dense_1"})):
        learner = maml_jax.maml(LOSS, maml_jax.sgd(0.3, steps=2, trainable=mask), optax.sgd(1.0))
        adapted, _ = learner.adapt(learner.init(params), batch.support)
        changed = {
            layer
            for layer, leaves in params.items()
            if any(not np.array_equal(leaf, adapted[layer][name]) for name, leaf in leaves.items())
        }
        assert changed == adapts


def test_reptile_moves_towards_the_adapted_parameters():
    params, batch = start_params(), tasks(3)
    inner = maml_jax.sgd(0.3, steps=4)
    learner = reptile(LOSS, inner, optax.sgd(0.25))
    after, info = jax.jit(learner.step)(learner.init(params), batch)
    adapted = [
        maml_jax.adapt(LOSS, params, jax.tree.map(lambda leaf, i=i: leaf[i], batch.support), learning_rate=0.3, steps=4)
        for i in range(3)
    ]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *(each for each, _ in adapted))
    assert_close(after.params, jax.tree.map(lambda p, m: p + 0.25 * (m - p), params, mean))
    assert info.support_loss.shape == (3, 4)
    # Each step on an example of every class: with four classes, two examples of each, the third step has the first.
    of_steps = reptile(LOSS, inner, optax.sgd(1.0), batches=one_of_each_class(4))
    task = jax.tree.map(lambda leaf: leaf[:1], tasks(1, shots=8))
    after, _ = jax.jit(of_steps.step)(of_steps.init(params), task)
    adapted = params
    for rows in ([0, 2, 4, 6], [1, 3, 5, 7], [0, 2, 4, 6], [1, 3, 5, 7]):
        batch = jax.tree.map(lambda leaf, rows=rows: leaf[0, jnp.array(rows)], task.support)
        adapted, _ = maml_jax.adapt(LOSS, adapted, batch, learning_rate=0.3, steps=1)
    assert_close(after.params, adapted)
    rated = maml_jax.sgd(0.3, steps=2, learn_rates="layer")
    for learner in (
        reptile(LOSS, rated, optax.sgd(1.0)),
        imaml(LOSS, rated, optax.sgd(1.0), proximal_weight=1.0, cg_steps=2),
    ):
        with pytest.raises(ValueError, match="no gradient for learned rates"):
            learner.init(params)


def test_implicit_gradient_of_a_quadratic_in_closed_form():
    """Support loss p'Ap/2 - b'p, query loss |p - c|^2 / 2: the minimum and its derivative are linear algebra."""
    random = np.random.default_rng(3)
    half = random.standard_normal((4, 4))
    hessian, linear, aim, at = half @ half.T, *random.standard_normal((3, 4))
    proximal_weight = 2.0

    def support(params, batch):
        return params["p"] @ hessian @ params["p"] / 2 - batch[0] @ params["p"], {}

    def query(params, batch):
        return jnp.sum((params["p"] - batch[0]) ** 2) / 2, {}

    inner = maml_jax.sgd(0.05, steps=3000)
    learner = imaml(support, inner, optax.sgd(1.0), proximal_weight=proximal_weight, cg_steps=4, query_loss_fn=query)
    task = maml_jax.Task((jnp.asarray(linear)[None],), (jnp.asarray(aim)[None],))
    gradient, _ = moved_by(learner, learner.init({"p": jnp.asarray(at)}), task)
    system = hessian + proximal_weight * np.eye(4)
    minimum = np.linalg.solve(system, linear + proximal_weight * at)
    assert_close(gradient["p"], proximal_weight * np.linalg.solve(system, minimum - aim), rtol=1e-8)


def test_implicit_gradient_is_that_of_the_long_unrolled_inner_loop():
    """On a small net without kinks, with parameters that the inner loop leaves as they are."""
    (loss_fn, params), batch = ZOO["dict"](), tasks(2)
    inner = maml_jax.sgd(0.1, steps=300, trainable={"w1": True, "b1": True, "w2": True, "b2": False})
    implicit = imaml(loss_fn, inner, optax.sgd(1.0), proximal_weight=6.0, cg_steps=60)
    unrolled = maml_jax.maml(loss_fn, with_proximal_term(inner, 6.0), optax.sgd(1.0))
    expected = moved_by(unrolled, unrolled.init(params), batch)
    assert_close(moved_by(implicit, implicit.init(params), batch), expected, rtol=1e-6, atol=1e-9)
    few = imaml(loss_fn, inner, optax.sgd(1.0), proximal_weight=6.0, cg_steps=1)
    gradient, _ = moved_by(few, few.init(params), batch)
    assert np.abs(gradient["w1"] - expected[0]["w1"]).max() > 1e-5


def test_meta_curvature_starts_as_gradient_descent_and_multiplies_every_axis():
    params = {"conv": jnp.ones((3, 2, 4, 5)), "dense": jnp.ones((4, 5)), "bias": jnp.ones(5)}

    def loss_fn(params, batch):
        return sum(jnp.vdot(leaf, of) for leaf, of in zip(jax.tree.leaves(params), jax.tree.leaves(batch))), {}

    random = np.random.default_rng(4)
    gradient = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape)), params)
    learner = maml_jax.maml(loss_fn, meta_curvature(0.1, steps=1), optax.sgd(1.0))
    state = learner.init(params)
    adapted, _ = learner.adapt(state, gradient)
    assert_close(adapted, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))
    inner_params = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape)), state.inner_params)
    adapted, _ = learner.adapt(state._replace(inner_params=inner_params), gradient)
    places, inputs, outputs = inner_params["conv"]
    expected = np.einsum("ap,bi,co,pio->abc", places, inputs, outputs, gradient["conv"].reshape(6, 4, 5))
    assert_close(adapted["conv"], params["conv"] - 0.1 * expected.reshape(3, 2, 4, 5))
    assert_close(
        adapted["dense"],
        params["dense"] - 0.1 * inner_params["dense"][0] @ gradient["dense"] @ inner_params["dense"][1].T,
    )
    assert_close(adapted["bias"], params["bias"] - 0.1 * inner_params["bias"][0] @ gradient["bias"])


@pytest.mark.parametrize("name", ["shared head", "prototypes"])
def test_the_numbering_of_the_classes_says_nothing(name):
    params, (support, query) = start_params(), jax.tree.map(lambda leaf: leaf[0], tasks(1, shots=2 * WAYS, queries=9))
    support = (support[0], jnp.tile(jnp.arange(WAYS), 2))
    renumbered = jnp.array([2, 0, 3, 1])

    def loss_after(inner, of):
        learner = maml_jax.maml(LOSS, inner, optax.sgd(1.0))
        adapted, _ = learner.adapt(learner.init(params), (support[0], of[support[1]]))
        return LOSS(adapted, (query[0], of[query[1]]))[0]

    same = jnp.arange(WAYS)
    np.testing.assert_allclose(loss_after(FAMILY[name](2), renumbered), loss_after(FAMILY[name](2), same), rtol=1e-12)
    plain = maml_jax.sgd(0.3, steps=STEPS)
    assert abs(loss_after(plain, renumbered) / loss_after(plain, same) - 1) > 1e-3


def test_prototypes_start_as_a_prototypical_network():
    params, task = start_params(), jax.tree.map(lambda leaf: leaf[0], tasks(1))
    support = (task.support[0], jnp.array([0, 1, 2, 3, 0, 1]))
    begun = heads.prototypes(features)(params, support)
    of_support, of_query = features(params, support[0]), features(params, task.query[0])
    means = jnp.stack([of_support[support[1] == way].mean(0) for way in range(WAYS)])
    distances = jnp.square(of_query[:, None] - means).sum(-1)
    logits = NET.apply({"params": begun}, task.query[0])
    assert_close(jax.nn.log_softmax(logits), jax.nn.log_softmax(-distances))


def test_each_inner_step_has_its_own_copies():
    """And the query set is judged with those of the last step."""
    copied = {"w": False, "of_step": True}
    inner = maml_jax.sgd(
        0.5,
        steps=2,
        trainable={"w": True, "of_step": False},
        params_at_step=select_step(copied),
    )

    def loss_fn(params, batch):
        return params["w"] * params["of_step"] * batch, {"of_step": params["of_step"]}

    learner = maml_jax.maml(loss_fn, inner, optax.sgd(1.0))
    made = replicate_per_step({"w": jnp.array(1.0), "of_step": jnp.array(7.0)}, copied, 2)
    assert_close(made, {"w": jnp.array(1.0), "of_step": jnp.full(3, 7.0)})
    state = learner.init({"w": jnp.array(1.0), "of_step": jnp.array([1.0, 10.0, 100.0])})
    task = maml_jax.Task(jnp.array([1.0]), jnp.array([1.0]))
    assert_close(learner.evaluate(state, task, 3).aux["of_step"], jnp.array([[1.0, 10.0, 100.0, 100.0]]))
    _, info = learner.step(state, task)
    assert info.aux["of_step"] == 100.0


def test_multi_step_weights_go_over_to_the_last_step():
    """In the precision of JAX's default type: float64 here, float32 without x64."""
    weights = multi_step_weights(4, until=100)
    assert_close(weights(jnp.int32(0)), jnp.array([0, 0.25, 0.25, 0.25, 0.25]))
    assert_close(weights(jnp.int32(60)), jnp.array([0, 0.1, 0.1, 0.1, 0.7]))
    assert_close(weights(jnp.int32(1000)), jnp.array([0, 0, 0, 0, 1.0]))
    assert weights(jnp.int32(1)).dtype == jnp.float64
    with jax.enable_x64(False):
        assert weights(jnp.int32(1)).dtype == jnp.float32
    loss_fn, params = ZOO["dict"]()
    inner, batch = maml_jax.sgd(0.3, steps=4), tasks(2)
    scheduled = maml_jax.maml(loss_fn, inner, optax.sgd(1.0), step_weights=weights)
    state = scheduled.init(params)._replace(step=jnp.int32(60))
    fixed = maml_jax.maml(loss_fn, inner, optax.sgd(1.0), step_weights=(0, 0.1, 0.1, 0.1, 0.7))
    assert_close(moved_by(scheduled, state, batch), moved_by(fixed, state, batch))


def test_switch_learner_takes_first_order_first():
    loss_fn, params = ZOO["dict"]()
    first, second = (maml_jax.maml(loss_fn, maml_jax.sgd(0.3, steps=2, order=o), optax.adam(0.1)) for o in (1, 2))
    both = switch_learner(first, second, after=2)
    state = both.init(params)
    step = jax.jit(both.step)
    for number in range(4):
        expected, _ = jax.jit((first if number < 2 else second).step)(state, tasks(2, seed=number))
        state, _ = step(state, tasks(2, seed=number))
        assert_close(state.params, expected.params)


def test_maml_plus_plus_is_its_parts():
    """The first of two meta-steps has first order, and the weights of the multi-step loss are annealed over two."""
    options = {"trainable": models.all_but_norms, "per_step": models.norms_only}
    learner = maml_plus_plus(LOSS, learning_rate=0.3, steps=2, meta_steps=2, multi_step_until=2, **options)
    outer = optax.adam(optax.cosine_decay_schedule(1e-3, 2, alpha=0.01))
    weights = multi_step_weights(2, until=2)
    params = start_params()
    state, step = learner.init(params), jax.jit(learner.step)
    assert state.params["Norm_0"]["offset"].shape == (3, 8) and state.inner_params["head"]["bias"].shape == (2,)
    expected = state
    for order in (1, 2):
        part = maml_jax.maml(LOSS, per_step_sgd(0.3, steps=2, order=order, **options), outer, step_weights=weights)
        assert_close(part.init(replicate_per_step(params, models.norms_only, 2)), learner.init(params))
        state, _ = step(state, tasks(2, seed=order))
        expected, _ = jax.jit(part.step)(expected, tasks(2, seed=order))
        assert_close(state, expected)
    for wrong in ("meta_steps", "multi_step_until", "first_order_until"):
        given = {"meta_steps": 4, wrong: 0}
        with pytest.raises(ValueError, match="must be an integer of at least 1, but got 0"):
            maml_plus_plus(LOSS, learning_rate=0.3, steps=2, **given)
    with pytest.raises(ValueError, match="per_step must be a pytree of bools"):
        maml_plus_plus(LOSS, learning_rate=0.3, steps=2, meta_steps=4, per_step={"other": True}).init(params)


def test_wrong_values_are_refused():
    loss_fn, params = ZOO["dict"]()
    with pytest.raises(ValueError, match="learn_rates must be one of 'parameter', 'layer', 'layer_step', but got True"):
        maml_jax.sgd(0.3, steps=1, learn_rates=True)
    with pytest.raises(ValueError, match="start must return parameters of the same structure"):
        inner = maml_jax.sgd(0.3, steps=1, start=lambda params, support: {})
        learner = maml_jax.maml(loss_fn, inner, optax.sgd(1.0))
        learner.step(learner.init(params), tasks(1))
    with pytest.raises(ValueError, match="without start and params_at_step"):
        imaml(LOSS, FAMILY["shared head"](2), optax.sgd(1.0), proximal_weight=1.0, cg_steps=5)
    for inner in (
        FAMILY["shared head"](2),
        maml_jax.sgd(0.3, steps=2, params_at_step=select_step(models.norms_only)),
    ):
        with pytest.raises(ValueError, match="reptile takes an inner learner without start and params_at_step"):
            reptile(LOSS, inner, optax.sgd(1.0))
    with pytest.raises(ValueError, match="proximal_weight must be positive"):
        imaml(LOSS, maml_jax.sgd(0.3, steps=1), optax.sgd(1.0), proximal_weight=0.0, cg_steps=5)


def test_optimizers_that_ask_for_the_loss_are_given_it():
    """Polyak's step size is the loss over the square of its gradient; in the inner loop it is derived as well."""
    squares = lambda p, batch: (jnp.square(batch @ p - 1).mean(), {})  # noqa: E731
    params, batch = jnp.ones(3), maml_jax.Task(*np.random.default_rng(0).standard_normal((2, 3, 4, 3)))
    learner = maml_jax.maml(squares, maml_jax.sgd(0.3, steps=1), optax.polyak_sgd(max_learning_rate=1e3))
    by_descent = maml_jax.maml(squares, maml_jax.sgd(0.3, steps=1), optax.sgd(1.0))
    after, _ = jax.jit(learner.step)(learner.init(params), batch)
    descended, info = jax.jit(by_descent.step)(by_descent.init(params), batch)
    rate = info.loss / info.grad_norm**2
    assert_close(after.params, params + rate * (descended.params - params))
    inner = maml_jax.unrolled(optax.polyak_sgd(max_learning_rate=1e3), steps=2)
    assert maml_jax.check_meta_gradient(squares, params, batch, inner).exact
    # First order: the gradient at the adapted parameters, without that of the step size.
    first = maml_jax.maml(squares, inner._replace(order=1), optax.sgd(1.0))
    moved, _ = moved_by(first, first.init(params), batch)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(3)]
    adapt = jax.jit(lambda support: first.adapt(first.init(params), support)[0])
    grads = [jax.grad(lambda p, b: squares(p, b)[0])(adapt(task.support), task.query) for task in each]
    assert_close(moved, sum(grads) / 3)
    # What takes neither goes as before; and beside Reptile's way, which is no gradient, no loss is set.
    sharp = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), sync_period=2)
    learner = maml_jax.maml(squares, maml_jax.sgd(0.3, steps=1), sharp)
    assert np.isfinite(jax.jit(learner.step)(learner.init(params), batch)[1].grad_norm)
    with pytest.raises(TypeError, match="value"):
        learner = reptile(squares, maml_jax.sgd(0.3, steps=2), optax.polyak_sgd())
        learner.step(learner.init(params), batch)
