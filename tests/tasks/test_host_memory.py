"""Episodes of images in host memory: equal to those of images on the device, and loaded one call ahead."""

import threading
import time
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import maml_jax
from maml_jax.meta import MetaLearner
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.tasks import host_memory
from maml_jax.tasks.episodes import EpisodeShape, ImageClasses
from maml_jax.training import train
from maml_jax.types import MetaInfo, MetaState

COUNTS = (5, 9, 4, 6)
SHAPE = EpisodeShape(3, 1, 2, "random")


@pytest.fixture
def classes():
    return ImageClasses(np.random.default_rng(0).integers(0, 256, (sum(COUNTS), 4, 4, 3), np.uint8), COUNTS)


def summing_learner():
    """A learner on two devices that compiles fast. Its parameters depend on every pixel and the order of the steps."""

    def step(state, tasks):
        pixels = jnp.concatenate([tasks.support[0], tasks.query[0]], 1)
        params = 0.9 * state.params + jnp.sin(pixels).mean((0, 1)) + tasks.query[1].mean()
        loss = params.mean()
        return state._replace(step=state.step + 1, params=params), MetaInfo(loss, {}, loss, loss)

    state = MetaState(jnp.zeros([], jnp.int32), jnp.zeros((4, 4, 3)), (), ())
    return MetaLearner(None, step, None, None), jax.device_put(state, NamedSharding(task_mesh(4), PartitionSpec()))


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data of the next call")]


def test_devices_get_only_the_pixels_of_their_tasks(classes):
    _, load_sharded = host_memory.episodes_by_step(jax.random.key(1), classes, 4, SHAPE, "host", mesh=task_mesh(4))
    _, load = host_memory.episodes_by_step(jax.random.key(1), classes, 4, SHAPE, "host")
    all_leaves = [jax.tree.leaves((chosen.pixels, chosen.choice)) for chosen in (load_sharded(7, 3), load(7, 3))]
    for device, tasks in ((0, slice(2)), (1, slice(2, 4))):
        for sharded, values in zip(*all_leaves):
            np.testing.assert_array_equal(sharded.addressable_data(device), values[:, tasks])


def test_the_axis_of_a_mesh_can_have_any_name(classes):
    mesh = jax.make_mesh((2,), ("mine",))
    draw, data = host_memory.episodes_by_step(jax.random.key(1), classes, 4, SHAPE, "host", mesh=mesh)
    loss_fn = lambda params, batch: (jnp.square(params * batch[0].mean()), {})  # noqa: E731
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), optax.sgd(0.1), mesh=mesh)
    *_, (state, _) = train(learner, learner.init(jnp.ones([])), draw, data, steps=4, steps_per_call=2)
    assert 0 < state.params < 1


@pytest.mark.parametrize("labels", ["ways", "classes"])
@pytest.mark.parametrize("rotations", ["random", "none"])
def test_episodes_equal_those_of_images_on_the_device(classes, rotations, labels):
    shape = SHAPE._replace(rotations=rotations, labels=labels)
    draw, data = host_memory.episodes_by_step(jax.random.key(1), classes, 4, shape, "device")
    draw_chosen, load = host_memory.episodes_by_step(jax.random.key(1), classes, 4, shape, "host")
    assert data is classes and callable(load)
    chosen = load(7, 3)
    assert chosen.pixels.shape == (3, 4, 3, 3, 4, 4, 3) and chosen.pixels.dtype == np.uint8
    drawn, drawn_chosen = (list(host_memory.batches(*pair, 10)) for pair in ((draw, data), (draw_chosen, load)))
    jax.tree.map(np.testing.assert_array_equal, drawn, drawn_chosen)
    for step in (7, 8, 9):
        jax.tree.map(np.testing.assert_array_equal, drawn[step], jax.jit(draw_chosen)(chosen, step))


def test_training_depends_neither_on_place_nor_devices_nor_calls(classes, caplog):
    """Trainings with images in two places, on two devices, and resumed at step 5, in calls of 5, 5 and 3 steps."""
    results = []
    for place, mesh in (("device", None), ("host", None), ("host", task_mesh(4))):
        learner, state = summing_learner()
        draw, data = host_memory.episodes_by_step(jax.random.key(1), classes, 4, SHAPE, place, mesh=mesh)
        with jax.log_compiles(True):
            *_, (state, metrics) = train(learner, state, draw, data, steps=13, steps_per_call=5)
        results.append((state, metrics))
    assert sum("XLA compilation of jit(run)" in record.getMessage() for record in caplog.records) == 3
    learner, state = summing_learner()
    for end in (5, 13):
        *_, (state, _) = train(learner, state, draw, data, steps=end, steps_per_call=5)
    on_device, on_host, sharded = (state for state, _ in results)
    jax.tree.map(np.testing.assert_array_equal, on_host, on_device)
    jax.tree.map(np.testing.assert_array_equal, state, sharded)
    # The sharded program rounds differently.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), sharded, on_device)
    assert results[0][1] == results[1][1] and not threads()
    assert state.params.sum() > 0 and len(state.params.sharding.device_set) == 2


def test_data_are_prepared_one_call_ahead(classes):
    learner, state = summing_learner()
    draw, load = host_memory.episodes_by_step(jax.random.key(1), classes, 4, SHAPE, "host")
    calls_of_data = []

    def data(first_step, count):
        calls_of_data.append((first_step, count, threading.current_thread() is threading.main_thread()))
        return load(first_step, count)

    calls = train(learner, state, draw, data, steps=11, steps_per_call=3)
    assert calls_of_data == []
    next(calls)
    deadline = time.monotonic() + 10
    while len(calls_of_data) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    # The first call is done, the second is being computed, and the data of the third are ready.
    assert calls_of_data == [(0, 3, False), (3, 3, False), (6, 3, False)] and len(threads()) == 1
    calls.close()  # The caller leaves the loop.
    assert not threads() and len(calls_of_data) == 3


def test_an_error_in_the_thread_is_raised_in_the_caller(classes):
    learner, state = summing_learner()
    draw, load = host_memory.episodes_by_step(jax.random.key(1), classes, 4, SHAPE, "host")

    def data(first_step, count):
        if first_step == 6:
            raise OSError("the disk is gone")
        return load(first_step, count)

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for state, metrics in train(learner, state, draw, data, steps=12, steps_per_call=3):
            seen.append(metrics["step"])
    assert seen == [3] and not threads()

    with pytest.raises(KeyboardInterrupt):
        for state, metrics in train(learner, summing_learner()[1], draw, load, steps=12, steps_per_call=3):
            raise KeyboardInterrupt
    del state, metrics


def test_images_that_do_not_fit_on_the_device_stay_in_host_memory(classes, monkeypatch):
    assert host_memory.fits_on_device(10**15, SimpleNamespace(memory_stats=lambda: None))
    small = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000, "bytes_in_use": 200})
    assert host_memory.fits_on_device(400, small) and not host_memory.fits_on_device(401, small)
    monkeypatch.setattr(host_memory, "fits_on_device", lambda size: size < classes.images.nbytes)
    assert callable(host_memory.episodes_by_step(jax.random.key(1), classes, 4, SHAPE)[1])
    assert host_memory.episodes_by_step(jax.random.key(1), classes, 4, SHAPE, "device")[1] is classes
    monkeypatch.setattr(host_memory, "fits_on_device", lambda size: size <= classes.images.nbytes)
    assert host_memory.episodes_by_step(jax.random.key(1), classes, 4, SHAPE)[1] is classes
    with pytest.raises(ValueError, match="place must be one of"):
        host_memory.episodes_by_step(jax.random.key(1), classes, 4, SHAPE, "cloud")
    with pytest.raises(ValueError, match=r"shots \+ queries must be at most 4, the number of images of class 2"):
        host_memory.episodes_by_step(jax.random.key(1), classes, 4, SHAPE._replace(queries=4), "host")
