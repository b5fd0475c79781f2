"""Tests of the meta-gradient against closed forms, definitions and finite differences in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.model_zoo import ZOO, drawn_params, tasks

import maml_jax
from maml_jax import Task, inner, losses, meta
from maml_jax.nets import models
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.tasks import sinusoid

pytestmark = pytest.mark.usefixtures("x64")


def meta_gradient(loss_fn, inner_learner, params, batch, **options):
    """The gradient that `maml` passes to the outer optimizer, which a step of `optax.sgd(1.0)` subtracts."""
    learner = maml_jax.maml(loss_fn, inner_learner, optax.sgd(1.0), **options)
    state = learner.init(params)
    after, info = jax.jit(learner.step)(state, batch)
    return jax.tree.map(jnp.subtract, state.params, after.params), info


class Quadratic:
    """The loss `(p - c)^T A (p - c) / 2`. Matrix powers give the adapted parameters and their derivative."""

    rate, steps = 0.1, 3

    def __init__(self):
        random = np.random.default_rng(0)
        halves = random.standard_normal((2, 4, 5, 5))
        self.a = np.einsum("...ij,...kj->...ik", halves, halves) / 5 + np.eye(5)
        self.c = random.standard_normal((2, 4, 5))
        self.params = random.standard_normal(5)
        self.tasks = Task((self.a[0], self.c[0]), (self.a[1], self.c[1]))

    @staticmethod
    def loss(params, batch):
        a, c = batch
        return 0.5 * (params - c) @ a @ (params - c), {}

    def expected(self, order):
        gradients, values = [], []
        for a, c, a_query, c_query in zip(self.a[0], self.c[0], self.a[1], self.c[1]):
            shrink = np.linalg.matrix_power(np.eye(5) - self.rate * a, self.steps)
            adapted = c + shrink @ (self.params - c)
            at_adapted = a_query @ (adapted - c_query)
            gradients.append(shrink.T @ at_adapted if order == 2 else at_adapted)
            values.append(0.5 * (adapted - c_query) @ at_adapted)
        return np.mean(gradients, 0), np.mean(values)

    def check(self, order):
        learner = maml_jax.sgd(self.rate, steps=self.steps, order=order)
        gradient, info = meta_gradient(self.loss, learner, jnp.asarray(self.params), self.tasks)
        expected, value = self.expected(order)
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)
        np.testing.assert_allclose(info.loss, value, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_closed_form_on_a_quadratic(order):
    Quadratic().check(order)


def dropped_stop_gradient(monkeypatch):
    monkeypatch.setattr(inner.lax, "stop_gradient", lambda tree: tree)
    return 1


def swapped_support_and_query(monkeypatch):
    right = meta.task_loss

    def swap(support_loss, query_loss, inner, meta_params, task, *args, **kw):
        return right(support_loss, query_loss, inner, meta_params, Task(task.query, task.support), *args, **kw)

    monkeypatch.setattr(meta, "task_loss", swap)
    return 2


def detached_inner_step(monkeypatch):
    right = optax.apply_updates
    monkeypatch.setattr(inner.optax, "apply_updates", lambda p, u: right(p, jax.lax.stop_gradient(u)))
    return 2


def one_step_too_few(monkeypatch):
    right = inner.inner_loop
    monkeypatch.setattr(meta, "inner_loop", lambda i, *args, **kw: right(i._replace(steps=i.steps - 1), *args, **kw))
    return 2


@pytest.mark.parametrize(
    "fault", [dropped_stop_gradient, swapped_support_and_query, detached_inner_step, one_step_too_few]
)
def test_closed_form_detects_injected_faults(fault, monkeypatch):
    order = fault(monkeypatch)
    with pytest.raises(AssertionError):
        Quadratic().check(order)


def assert_exact(loss_fn, learner, params, batch):
    """The jitted, vmapped meta-gradient against central differences of the jitted, vmapped meta-loss, to 1e-6."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    loss = jax.jit(lambda p: jax.vmap(lambda t: meta.task_loss(loss_fn, loss_fn, learner, (p, ()), t)[0])(batch).mean())
    gradient, info = meta_gradient(loss_fn, learner, params, batch)
    np.testing.assert_allclose(info.loss, loss(params), rtol=1e-12)
    random = np.random.default_rng(0)
    for _ in range(2):
        direction = jax.tree.map(lambda x: random.standard_normal(x.shape), params)
        slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))

        def moved(by, direction=direction):
            return loss(jax.tree.map(np.add, params, jax.tree.map(partial(np.multiply, by), direction)))

        differences = [(moved(h) - moved(-h)) / (2 * h) for h in (1e-6, 1e-7, 1e-8, 1e-9)]
        np.testing.assert_allclose(min(differences, key=lambda d: abs(d - slope)), slope, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", ZOO)
def test_exact_for_every_library(name, steps):
    loss_fn, params = ZOO[name]()
    assert_exact(loss_fn, maml_jax.sgd(0.3, steps=steps), params, tasks(3))


@pytest.mark.parametrize("name", ZOO)
def test_first_order_is_the_gradient_at_the_adapted_parameters(name):
    loss_fn, params = ZOO[name]()
    batch = jax.tree.map(lambda leaf: leaf[0], tasks(1))
    gradient, _ = meta_gradient(loss_fn, maml_jax.sgd(0.3, steps=3, order=1), params, tasks(1))
    adapted, _ = maml_jax.adapt(loss_fn, params, batch.support, learning_rate=0.3, steps=3)
    at_adapted = jax.grad(lambda p: loss_fn(p, batch.query)[0])(adapted)
    for got, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(at_adapted)):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


def image_tasks(size, channels, ways=3, shots=2, queries=2, count=2):
    random = np.random.default_rng(5)

    def batch(per_class):
        labels = np.tile(np.arange(ways, dtype=np.int32).repeat(per_class), (count, 1))
        return random.random((count, ways * per_class, size, size, channels)), labels

    return jax.tree.map(jnp.asarray, Task(batch(shots), batch(queries)))


SLOW = ("pooled", 1)  # Slow to compile; the case with five steps covers it.
NETS = {
    "sinusoid MLP": (models.MLP((40, 40), 1), 0.01),
    "Omniglot MLP": (models.MLP((32, 16), 3, "batch"), 0.5),
    "strided": (models.ConvNet(3, 8), 0.5),
    "pooled": (models.ConvNet(3, 6, pooled=True), 0.1),
}


@pytest.mark.parametrize(
    ("name", "steps"), [(name, steps) for name in NETS for steps in (1, 5) if (name, steps) != SLOW]
)
def test_directional_differences_on_the_papers_nets(name, steps):
    net, rate = NETS[name]
    if name == "sinusoid MLP":
        batch = sinusoid.draw_tasks(jax.random.key(3), 3, shots=5, queries=5)
        loss_fn = losses.mean_squared_error(models.apply_params(net))
    else:
        batch = image_tasks(28, 3 if "pooled" in name else 1)
        loss_fn = losses.cross_entropy(models.apply_params(net))
    # These weights are larger than the initial weights of the paper, with which the MLP is almost linear.
    params = drawn_params(net, batch.support[0][0])
    learner = maml_jax.sgd(rate, steps=steps, trainable=models.all_but_norms)
    assert_exact(loss_fn, learner, params, batch)


def test_offsets_are_meta_learned_but_not_adapted():
    net = models.ConvNet(3, 4)
    batch = image_tasks(28, 1)
    loss_fn = losses.cross_entropy(models.apply_params(net))
    params = drawn_params(net, batch.support[0][0])
    learner = maml_jax.sgd(0.5, steps=2, trainable=models.all_but_norms)
    adapted, _ = inner.inner_loop(learner, loss_fn, params, (), jax.tree.map(lambda leaf: leaf[0], batch.support))
    assert jnp.array_equal(adapted["Norm_1"]["offset"], params["Norm_1"]["offset"])
    assert not jnp.array_equal(adapted["Conv_1"]["kernel"], params["Conv_1"]["kernel"])
    gradient, _ = meta_gradient(loss_fn, learner, params, batch)
    assert jnp.abs(gradient["Norm_1"]["offset"]).max() > 0


@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_of_learned_rates_in_closed_form(order):
    """Meta-SGD: the derivative in the rates is minus the inner gradient times the query gradient at the adapted
    parameters. The gradient in the parameters is that of `sgd`."""
    loss_fn, params = ZOO["dict"]()
    batch = tasks(2)
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.3, steps=1, order=order, learn_rates="parameter"), optax.sgd(1.0))
    state = learner.init(params)
    after, _ = jax.jit(learner.step)(state, batch)
    got = jax.tree.map(jnp.subtract, state.inner_params, after.inner_params)

    def expected(task):
        grads = jax.grad(lambda p: loss_fn(p, task.support)[0])(params)
        adapted = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
        return jax.tree.map(lambda g, q: -g * q, grads, jax.grad(lambda p: loss_fn(p, task.query)[0])(adapted))

    mean = jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(expected)(batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), got, mean)
    plain, _ = meta_gradient(loss_fn, maml_jax.sgd(0.3, steps=1, order=order), params, batch)
    moved = jax.tree.map(jnp.subtract, state.params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), moved, plain)


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.1, momentum=0.9), optax.adam(0.05, eps_root=1e-8), optax.rmsprop(0.05, eps=1e-4, eps_in_sqrt=True)],
    ids=["momentum", "adam", "rmsprop"],
)
def test_any_inner_optimizer_is_differentiated_through(optimizer):
    loss_fn, params = ZOO["dict"]()
    assert_exact(loss_fn, maml_jax.unrolled(optimizer, steps=3), params, tasks(2))


def test_unrolled_optimizer_equals_a_python_loop():
    loss_fn, params = ZOO["dict"]()
    optimizer = optax.adam(0.05, eps_root=1e-8)
    batch = jax.tree.map(lambda leaf: leaf[0], tasks(1)).support
    adapted, info = inner.inner_loop(maml_jax.unrolled(optimizer, steps=4), loss_fn, params, (), batch)
    state, seen = optimizer.init(params), []
    for _ in range(4):
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        seen.append(loss)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), adapted, params)
    np.testing.assert_allclose(info.loss, seen, rtol=1e-12)


@pytest.mark.parametrize("at_once", [None, "all", 1, 2])
@pytest.mark.parametrize("devices", [1, 2])
def test_the_meta_gradient_does_not_depend_on_groups_and_devices(at_once, devices):
    loss_fn, params = ZOO["dict"]()
    batch = tasks(4)
    mesh = task_mesh(4) if devices == 2 else None
    assert devices == 1 or mesh.size == 2
    learner = maml_jax.sgd(0.3, steps=2)
    expected, expected_info = meta_gradient(loss_fn, learner, params, batch)
    got, info = meta_gradient(loss_fn, learner, params, batch, task_batch_size=at_once, mesh=mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), got, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), info, expected_info)


def test_several_devices_need_one_all_reduce_per_step():
    loss_fn, params = ZOO["dict"]()
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.3, steps=2), optax.adam(1e-3), mesh=task_mesh(4))
    program = jax.jit(learner.step).lower(learner.init(params), tasks(4)).compile().as_text()
    assert program.count(" all-reduce(") + program.count(" all-reduce-start(") == 1
    assert "all-gather" not in program and "all-to-all" not in program


@pytest.mark.parametrize("name", ZOO)
def test_learned_rates_and_a_mask_for_every_library(name):
    """ANIL: the mask is a pytree with the structure of the parameters, and selects one leaf."""
    loss_fn, params = ZOO[name]()
    leaves, structure = jax.tree.flatten(params)
    mask = jax.tree.unflatten(structure, [False] * (len(leaves) - 1) + [True])
    learner = maml_jax.maml(
        loss_fn, maml_jax.sgd(0.3, steps=2, learn_rates="parameter", trainable=mask), optax.sgd(1.0), task_batch_size=1
    )
    state = learner.init(params)
    assert [leaf.shape for leaf in jax.tree.leaves(state.inner_params)] == [leaves[-1].shape]
    after, _ = jax.jit(learner.step)(state, tasks(2))
    assert all(jnp.any(a != b) for a, b in zip(jax.tree.leaves(after.params), leaves))
    adapted, info = learner.adapt(state, jax.tree.map(lambda leaf: leaf[0], tasks(1)).support, 3)
    assert info.loss.shape == (3,)
    changed = [bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(adapted), leaves)]
    assert changed == [False] * (len(leaves) - 1) + [True]


@pytest.mark.parametrize("optimizer", [optax.adamw(0.1, eps_root=1e-8), optax.contrib.schedule_free_sgd(0.1)])
def test_first_order_for_optimizers_that_use_parameters(optimizer):
    loss_fn, params = ZOO["dict"]()
    learner = maml_jax.unrolled(optimizer, steps=3, order=1)
    gradient, _ = meta_gradient(loss_fn, learner, params, tasks(1))
    task = jax.tree.map(lambda leaf: leaf[0], tasks(1))
    adapted, _ = inner.inner_loop(learner, loss_fn, params, (), task.support)
    at_adapted = jax.grad(lambda p: loss_fn(p, task.query)[0])(adapted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), gradient, at_adapted)


def test_no_adaptation_does_not_change_parameters():
    loss_fn, params = ZOO["dict"]()
    learner = maml_jax.maml(loss_fn, maml_jax.no_adaptation(), optax.sgd(1.0))
    evaluation = jax.jit(learner.evaluate, static_argnums=2)(learner.init(params), tasks(2), 3)
    np.testing.assert_array_equal(evaluation.loss, np.repeat(evaluation.loss[:, :1], 4, 1))


@pytest.mark.parametrize("at_once", [1, 64, "all"])
def test_many_tasks_in_low_precision_are_summed_in_float32(at_once):
    """In bfloat16, a sum of 512 numbers of about 16 would stop growing at half of the result."""
    loss_fn = lambda params, batch: ((params * batch).sum(), {})  # noqa: E731
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(1e-3, steps=1), optax.sgd(1.0), task_batch_size=at_once)
    params = jnp.ones(1, jnp.bfloat16)
    batch = jnp.full((512, 1), 15.75, jnp.bfloat16)
    state, info = jax.jit(learner.step)(learner.init(params), maml_jax.Task(batch, batch))
    assert float(state.params[0]) == pytest.approx(1 - 15.75, rel=0.02) and state.params.dtype == jnp.bfloat16
    assert float(info.grad_norm) == pytest.approx(15.75, rel=0.02) and info.loss.dtype == jnp.bfloat16


def test_no_adaptation_is_joint_training():
    loss_fn, params = ZOO["dict"]()
    batch = tasks(3)
    gradient, info = meta_gradient(loss_fn, maml_jax.no_adaptation(), params, batch)
    joint = jax.grad(lambda p: jax.vmap(lambda query: loss_fn(p, query)[0])(batch.query).mean())(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), gradient, joint)
    assert info.support_loss.shape == (3, 0)


@pytest.mark.parametrize("inner_learner", [maml_jax.no_adaptation(), maml_jax.sgd(0.3, steps=1)])
def test_the_gradient_of_shared_parameters_takes_one_product(inner_learner):
    """With all tasks in one `vmap`, neither a kernel before adaptation nor its gradient has a task axis."""
    loss_fn, params = ZOO["dict"]()
    learner = maml_jax.maml(loss_fn, inner_learner, optax.sgd(1.0), task_batch_size="all")
    program = str(jax.make_jaxpr(learner.step)(learner.init(params), tasks(3)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    kernels_per_task = sum(program.count(f"f64[3,{inputs},{outputs}]") for inputs, outputs in shapes)
    assert "f64[3," in program and (kernels_per_task > 0) == bool(inner_learner.steps)
    if inner_learner.steps:  # In a loop, all parameters would have a task axis.
        assert "scan[" not in program


def test_separate_query_loss():
    loss_fn, params = ZOO["dict"]()
    batch = tasks(2)

    def doubled(params, batch):
        loss, aux = loss_fn(params, batch)
        return 2 * loss, aux

    plain, _ = meta_gradient(loss_fn, maml_jax.sgd(0.3, steps=1), params, batch)
    double, _ = meta_gradient(loss_fn, maml_jax.sgd(0.3, steps=1), params, batch, query_loss_fn=doubled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-12), plain, double)


@pytest.mark.parametrize("order", [1, 2])
def test_step_weights_are_a_weighted_sum_of_meta_losses(order):
    """The multi-step loss is linear in its weights. With weight 1 at step i, it is MAML with i inner steps."""
    loss_fn, params = ZOO["dict"]()
    weights, batch = (0.2, 0.5, 0.3), tasks(2)
    inner_learner = maml_jax.sgd(0.3, steps=2, order=order)
    got, info = meta_gradient(loss_fn, inner_learner, params, batch, step_weights=weights)
    parts = [
        meta_gradient(loss_fn, learner, params, batch)
        for learner in (maml_jax.no_adaptation(), maml_jax.sgd(0.3, steps=1, order=order), inner_learner)
    ]
    expected = jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves)), *(g for g, _ in parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14), got, expected)
    np.testing.assert_allclose(info.loss, sum(w * i.loss for w, (_, i) in zip(weights, parts)), rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), info.aux, parts[2][1].aux)
