"""Tests of the training loop: one compilation, results that do not depend on the calls, errors at NaN or infinity."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.model_zoo import plain_dict, tasks
from jax.sharding import NamedSharding, PartitionSpec

import maml_jax
from maml_jax.evaluation import divergence_rate, interval
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.training import train
from maml_jax.types import Task

train_module = sys.modules[train.__module__]


def draw(data, step):
    return jax.tree.map(lambda leaf: leaf + (step % 3 if leaf.dtype == jnp.float32 else 0), data)


def setting(loss_fn=None, rate=0.1):
    zoo_loss, params = plain_dict()
    learner = maml_jax.maml(loss_fn or zoo_loss, maml_jax.sgd(rate, steps=1), optax.adam(1e-2))
    return learner, learner.init(params)


def test_a_whole_run_traces_the_step_once():
    loss_fn, _ = plain_dict()
    traces = []

    def counted(params, batch):
        traces.append(None)
        return loss_fn(params, batch)

    def traced(steps):
        traces.clear()
        learner, state = setting(counted)
        for state, _ in train(learner, state, draw, tasks(4), steps=steps, steps_per_call=5):
            pass
        return len(traces)

    assert traced(5) == traced(23) > 0  # The last call has 3 meta-steps, and is not compiled separately.


@pytest.mark.parametrize("kind", ["NumPy's", "JAX's"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_whole_run_is_compiled_once(devices, kind, caplog):
    loss_fn, params = plain_dict()
    mesh = task_mesh(4) if devices == 2 else None
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), optax.adam(1e-2), mesh=mesh)
    data = jax.tree.map(np.asarray, tasks(4)) if kind == "NumPy's" else tasks(4)
    with jax.log_compiles(True):
        for state, _ in train(learner, learner.init(params), draw, data, steps=23, steps_per_call=5):
            pass
    compiled = [
        record.getMessage() for record in caplog.records if "XLA compilation of jit(run)" in record.getMessage()
    ]
    assert len(compiled) == 1, compiled


def test_data_is_copied_to_the_devices_once():
    loss_fn, params = plain_dict()
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), optax.adam(1e-2), mesh=task_mesh(4))
    calls = train(learner, learner.init(params), draw, tasks(4), steps=3, steps_per_call=1)
    next(calls)
    with jax.transfer_guard_device_to_device("disallow"):
        assert len(list(calls)) == 2


def test_the_next_call_starts_before_a_state_is_yielded(monkeypatch):
    """A call is dispatched before the metrics of the previous call are fetched, and yielded states stay valid."""
    events = []
    jit, asarray = jax.jit, np.asarray

    def watched_jit(fn, **options):
        compiled = jit(fn, **options)
        return lambda *args: events.append("call") or compiled(*args)

    monkeypatch.setattr(train_module.jax, "jit", watched_jit)
    monkeypatch.setattr(
        train_module,
        "np",
        SimpleNamespace(isfinite=np.isfinite, asarray=lambda leaf: events.append("fetch") or asarray(leaf)),
    )
    learner, state = setting()
    states = [state for state, _ in train(learner, state, draw, tasks(4), steps=15, steps_per_call=5)]
    order = [name for name, before in zip(events, [None, *events]) if name != before]
    assert order == ["call", "fetch", "call", "fetch"] and events[:2] == ["call", "call"]
    assert [int(state.step) for state in states] == [5, 10, 15]
    assert len({float(jax.tree.leaves(state.params)[0].sum()) for state in states}) == 3


def test_entries_of_aux_do_not_replace_the_metrics_of_training():
    loss_fn, _ = plain_dict()

    def named(params, batch):
        loss, aux = loss_fn(params, batch)
        return loss * jnp.nan, {**aux, "loss": 7.0, "step": 3.0}

    learner, state = setting(named)
    with pytest.raises(FloatingPointError):
        list(train(learner, state, draw, tasks(4), steps=4, steps_per_call=2))
    learner, state = setting(lambda params, batch: (loss_fn(params, batch)[0], {"loss": 7.0, "step": 3.0}))
    ((_, metrics),) = train(learner, state, draw, tasks(4), steps=2, steps_per_call=2)
    assert metrics["step"] == 2 and metrics["loss"] != 7 and metrics["aux_loss"] == 7 and metrics["aux_step"] == 3


def test_results_do_not_depend_on_the_length_of_calls():
    results = []
    for per_call in (1, 4, 10):
        learner, state = setting()
        rows = []
        for state, metrics in train(learner, state, draw, tasks(4), steps=10, steps_per_call=per_call):
            rows.append(metrics)
        assert [row["step"] for row in rows] == [*range(per_call, 10, per_call), 10]
        results.append((state, rows))
    step, state = jax.jit(setting()[0].step), setting()[1]
    losses = []
    for index in range(10):
        state, info = step(state, draw(tasks(4), index))
        losses.append(float(info.loss))
    for trained, rows in results:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), trained, state)
        assert int(trained.step) == 10
    np.testing.assert_allclose([row["loss"] for row in results[0][1]], losses, rtol=1e-4)
    np.testing.assert_allclose(results[2][1][0]["loss"], np.mean(losses), rtol=1e-4)
    assert 0 <= results[2][1][0]["accuracy"] <= 1


def test_resumes_from_a_state_with_identical_results():
    learner, start = setting()

    def run(state, steps):
        for state, _ in train(learner, state, draw, tasks(4), steps=steps, steps_per_call=5):
            pass
        return state

    whole, half = run(start, 20), run(start, 10)
    jax.tree.map(np.testing.assert_array_equal, whole, run(half, 20))
    jax.tree.map(np.asarray, start)  # The given state is not donated.
    assert list(train(learner, whole, draw, tasks(4), steps=20, steps_per_call=5)) == []


def test_metrics_in_low_precision_are_means_of_long_calls():
    """A sum in bfloat16 would stop growing at 256."""

    def loss_fn(params, batch):
        return jnp.square(params).sum() + 1, {"right": jnp.ones([], jnp.bfloat16)}

    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), optax.sgd(0.0))
    batch = (jnp.zeros((1, 1)),) * 2
    draw = lambda data, step: Task(data, data)  # noqa: E731
    *_, (_, metrics) = train(learner, learner.init(jnp.zeros(2)), draw, batch, steps=600, steps_per_call=600)
    assert metrics["right"] == 1 and metrics["loss"] == pytest.approx(1)


def test_sharded_leaves_of_a_state_stay_sharded():
    """Sharded leaves belong to models that one device cannot hold. Other leaves are copied to all devices."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    halves = NamedSharding(mesh, PartitionSpec("model"))

    def loss_fn(params, batch):
        return jnp.square(batch @ params["w"] + params["b"]).mean(), {}

    params = {"w": jnp.arange(4.0), "b": jnp.ones([])}
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), optax.adam(0.1))
    data = Task(*np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32))
    on_one_device = learner.init(params)
    sharded = jax.tree.map(lambda leaf: jax.device_put(leaf, halves) if leaf.shape == (4,) else leaf, on_one_device)
    in_numpy = jax.tree.map(np.asarray, on_one_device)
    ends = []
    for state in (on_one_device, sharded, in_numpy):
        *_, (state, _) = train(learner, state, lambda data, step: data, data, steps=5, steps_per_call=2)
        ends.append(state)
    assert ends[1].params["w"].sharding.is_equivalent_to(halves, 1)
    assert len(ends[1].params["b"].sharding.device_set) == 2 and len(ends[0].params["w"].sharding.device_set) == 1
    for end in ends[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), end, ends[0])


def test_training_reduces_the_loss():
    learner, state = setting()
    rows = [row for _, row in train(learner, state, lambda data, _: data, tasks(4), steps=300, steps_per_call=100)]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_raises_at_a_loss_or_gradient_that_is_not_finite_and_names_the_step():
    loss_fn, params = plain_dict()

    def explodes(params, batch):
        loss, aux = loss_fn(params, batch)
        return loss * jnp.where(batch[0].mean() > 1.5, jnp.nan, 1.0), aux

    def has_no_derivative(params, batch):
        loss, aux = loss_fn(params, batch)
        return loss + jnp.sqrt(jnp.where(batch[0].mean() > 1.5, 0 * loss, loss)), aux

    for query_loss, hint in ((explodes, "inner or outer rate"), (has_no_derivative, "The loss itself is finite")):
        learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), optax.adam(1e-2), query_loss_fn=query_loss)
        state, seen = learner.init(params), []
        with pytest.raises(FloatingPointError, match=f"At meta-step 3 the meta-loss .*{hint}") as error:
            for state, metrics in train(learner, state, draw, tasks(4), steps=10, steps_per_call=2):
                seen.append(metrics["step"])
        assert seen == [2] and error.value.step == 3


def test_labels_that_are_no_class_are_named_at_the_first_meta_step():
    learner, state = setting()
    support, (inputs, labels) = tasks(4)
    from_one = Task(support, (inputs, labels + 1))
    with pytest.raises(FloatingPointError, match=r"At meta-step 1 .*tasks\.query\[1\] holds integers from 1 to 4\."):
        list(train(learner, state, draw, from_one, steps=4, steps_per_call=2))


@pytest.mark.parametrize("option", ["steps", "steps_per_call"])
def test_wrong_options_raise_errors_before_the_first_call(option):
    learner, state = setting()
    with pytest.raises(ValueError, match=f"{option} must be an integer of at least 1, but got 0"):
        train(learner, state, draw, tasks(4), **{"steps": 10, "steps_per_call": 5, option: 0})


def test_stop_ends_the_training_after_the_current_call():
    def loss_fn(w, batch):
        return ((w - batch) ** 2).mean(), {}

    def draw(data, step):
        return maml_jax.Task(jnp.full((2, 3), 1.0 + step), jnp.ones((2, 3)))

    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), optax.sgd(0.1))
    steps = []
    calls = train(learner, learner.init(jnp.zeros(1)), draw, steps=20, steps_per_call=2, stop=lambda: steps[-1:] == [6])
    for _, row in calls:
        steps.append(row["step"])
    assert steps == [2, 4, 6]


def test_intervals_and_divergence_rates():
    values = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    mean, half_width = interval(values)
    np.testing.assert_allclose(mean, [0.5, 1.0])
    np.testing.assert_allclose(half_width, [1.96 * 0.5 / 2, 0.0])
    losses = np.array([[1.0, 0.5, 2.0], [1.0, np.nan, np.inf], [1.0, 1.0, 0.1], [1.0, 0.9, 0.8]])
    np.testing.assert_allclose(divergence_rate(losses), [0, 0.25, 0.5])


def test_a_draw_that_returns_constant_tasks_raises_an_error():
    """If `draw` reads a Python iterator, every meta-step would train on the tasks that were read during tracing."""
    learner, state = setting()
    batches = iter([draw(tasks(4), step) for step in range(3)])
    with pytest.raises(ValueError, match=r"draw returns the same tasks at every meta-step.*fold_in"):
        next(train(learner, state, lambda data, step: next(batches), steps=8, steps_per_call=4))
