"""Tests of the task axis: results do not depend on groups and devices, and each device computes different tasks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import maml_jax
from maml_jax import losses
from maml_jax.nets import models
from maml_jax.parallel.task_axis import local_mesh, sum_over_tasks, task_axis, task_mesh
from maml_jax.tasks import episodes
from maml_jax.training import many_steps


@pytest.mark.parametrize("task_batch_size", ["all", 1, 2])
@pytest.mark.parametrize("devices", [1, 2])
def test_map_and_mean_do_not_depend_on_groups_and_devices(task_batch_size, devices):
    axis = task_axis(task_batch_size, task_mesh(4) if devices == 2 else None)
    support, query = np.arange(4.0, dtype=np.float32), np.ones((4, 3), np.float32)

    def loss(weight, task, step):
        return weight**step * task.support, task.query.sum() + task.support

    tasks, gradient = maml_jax.Task(support, query), jax.value_and_grad(sum_over_tasks(loss), has_aux=True)
    (mean, stacked), slope = axis.mean(gradient, jnp.float32(2.0), tasks, 3)
    assert mean == 12.0 and slope == 18.0
    np.testing.assert_array_equal(stacked, 3 + support)
    np.testing.assert_array_equal(axis.map(lambda weight, task: weight * task.support, 2.0, tasks), 2 * support)


def test_map_accepts_any_number_of_tasks():
    axis = task_axis("all", task_mesh(2))
    np.testing.assert_array_equal(axis.map(lambda shared, task: shared + task, 1.0, np.arange(3.0)), [1, 2, 3])


def test_one_all_reduce_per_meta_step_and_every_device_draws_only_its_tasks():
    """The test reads the compiled program of many meta-steps, which also samples the episodes."""
    classes = episodes.equal_classes(np.random.default_rng(0).integers(0, 255, (30, 6, 7, 7), np.uint8))
    shape = episodes.EpisodeShape(ways=3, shots=1, queries=2, rotations="random")
    net = models.MLP((8,), 3)

    def draw(classes, step):
        return episodes.draw_episodes(jax.random.fold_in(jax.random.key(0), step), classes, 4, shape)

    learner = maml_jax.maml(
        losses.cross_entropy(models.apply_params(net)), maml_jax.sgd(0.1, steps=2), optax.adam(1e-3), mesh=task_mesh(4)
    )
    state = learner.init(net.init(jax.random.key(0), jnp.zeros((1, 7, 7, 1)))["params"])
    classes = jax.device_put(classes, state.step.sharding)
    program = jax.jit(many_steps(learner, draw)).lower(state, classes, 5, False).compile().as_text()
    collectives = re.findall(r" = .* (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(", program)
    assert collectives == ["all-reduce"]
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"u8\[([\d,]+)\]", program)}
    pixels = {int(np.prod(dims)) for dims in shapes} - {30 * 6 * 7 * 7}
    assert max(pixels) == 2 * 3 * 3 * 7 * 7  # Pixels of two tasks, not of four.


class TestArguments:
    def test_task_batch_size(self):
        with pytest.raises(ValueError, match="task_batch_size must be an integer of at least 1, but got 0"):
            task_axis(0, None)

    def test_mesh(self):
        with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh, such as .*, but got \["):
            task_axis(None, jax.devices())

    @pytest.mark.parametrize("task_batch_size, devices", [(3, 1), (4, 2)])
    def test_groups_must_divide_the_tasks(self, task_batch_size, devices):
        axis = task_axis(task_batch_size, task_mesh(4) if devices == 2 else None)
        tasks = maml_jax.Task(np.ones(4), np.ones(4))
        with pytest.raises(ValueError, match=rf"4 tasks cannot be divided among {devices} device"):
            axis.mean(lambda params, tasks, step: ((0.0, ()), params), 0.0, tasks, 0)

    def test_number_of_tasks(self, monkeypatch):
        with pytest.raises(ValueError, match="tasks must be an integer of at least 1, but got 0"):
            task_mesh(0)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(ValueError, match="tasks must be a multiple of 2, the number of processes, but got 3"):
            task_mesh(3)

    def test_meshes_have_the_devices_that_share_the_tasks_evenly(self):
        assert task_mesh(3) is None and task_mesh(6).size == 2 == local_mesh().size
