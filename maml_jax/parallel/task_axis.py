"""The task axis of a meta-batch: a loop over groups of tasks, on one device or on several devices.

Group size and devices change time and memory. Results are equal up to rounding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maml_jax import validation
from maml_jax.parallel import backend, processes
from maml_jax.types import Task

AXIS = "tasks"

TaskBatchSize = int | Literal["all"] | None
"""The number of tasks that a device computes together; None chooses by backend and number of shared parameters."""

GroupGradient = Callable[[Any, Any, jax.Array], tuple[tuple[jax.Array, Any], Any]]
"""`(params, tasks, step) -> ((loss, outputs), gradient)` for a group of tasks `[G, ...]`, the form of
`jax.value_and_grad` with `has_aux=True`. Loss and gradient are sums over the group. The outputs of the tasks are
stacked along the leading axis `G`. `step` is the number of previous meta-steps."""


class TaskAxis(NamedTuple):
    """Maps functions over the tasks of a meta-batch. Create it with `task_axis`, which checks the fields."""

    task_batch_size: TaskBatchSize = None
    """Group size: number of tasks that a device computes together with `vmap`. A loop runs over the groups. None
    chooses by backend and number of shared parameters."""
    mesh: Mesh | None = None
    """Devices that share the tasks evenly; see `task_mesh`."""

    def replicate(self, tree: Any) -> Any:
        """Copies every leaf to every device of the mesh."""
        return tree if self.mesh is None else processes.put(tree, NamedSharding(self.mesh, P()))

    def map(self, fn: Callable[[Any, Any], Any], shared: Any, tasks: Any) -> Any:
        """Returns `fn(shared, task)` for every task, stacked along a leading axis `T`."""
        num_tasks = validation.leading_axis_size(tasks)
        if self.mesh is None:
            task_fn, group_size = partial(fn, shared), self._group_size(shared)
            if group_size is None:
                return jax.vmap(task_fn)(tasks)
            return lax.map(task_fn, tasks, batch_size=None if group_size == 1 else group_size)
        map_sharded = self._shard(partial(self._replace(mesh=None).map, fn), (P(), P(AXIS)), P(AXIS))
        if num_tasks % self.mesh.size == 0:
            return map_sharded(shared, tasks)
        # Repeat tasks until every device has the same number, and drop the outputs of the repeated tasks.
        padded = np.arange(-(-num_tasks // self.mesh.size) * self.mesh.size) % num_tasks
        outputs = map_sharded(shared, jax.tree.map(lambda leaf: leaf[padded], tasks))
        return jax.tree.map(lambda leaf: leaf[:num_tasks], outputs)

    def mean(
        self, gradient: GroupGradient, params: Any, tasks: Task, step: Any, num_tasks: int | None = None
    ) -> tuple[tuple[jax.Array, Any], Any]:
        """Returns `((loss, outputs), gradient)`: means over the tasks, and the outputs of each task, `[T, ...]`.

        The means need one all-reduce over the devices. Memory grows with the size of a group, not with the number of
        groups. `num_tasks` is the divisor of the means, None for `T`; a device that computes a share of the tasks
        divides by the number of all tasks.

        Raises:
          ValueError: while tracing, if the devices cannot have equal shares of complete groups.
        """
        size, group_size = validation.num_tasks(tasks), self._group_size(params)
        devices = 1 if self.mesh is None else self.mesh.size
        if size % devices or (size // devices) % (group_size or 1):
            raise ValueError(
                f"A meta-batch of {size} tasks cannot be divided among {devices} device(s) in groups of "
                f"task_batch_size={self.task_batch_size!r}: use a multiple of devices times task_batch_size tasks."
            )
        num_tasks = num_tasks or size

        # Several devices: each computes its share of the means.
        if self.mesh is not None:

            def sum_over_devices(params: Any, tasks: Task, step: Any) -> Any:
                (loss, outputs), grads = self._replace(mesh=None).mean(gradient, params, tasks, step, num_tasks)
                loss, grads = lax.psum((loss, grads), AXIS)
                return (loss, outputs), grads

            sharded = self._shard(sum_over_devices, (P(), P(AXIS), P()), ((P(), P(AXIS)), P()))
            return sharded(params, tasks, step)

        # One group.
        if group_size is None or group_size == size:
            (loss, outputs), grads = gradient(params, tasks, step)
            loss, grads = jax.tree.map(lambda leaf: leaf / num_tasks, (loss, grads))
            return (loss, outputs), grads

        # Several groups, one after the other.
        def add_group(total: Any, group: Task) -> tuple[Any, Any]:
            (loss, outputs), grads = gradient(params, group, step)
            return jax.tree.map(lambda total, part: total + part.astype(total.dtype), total, (loss, grads)), outputs

        groups = jax.tree.map(lambda leaf: leaf.reshape(-1, group_size, *leaf.shape[1:]), tasks)
        first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), groups)
        (loss, _), grads = jax.eval_shape(gradient, params, first, step)
        # Sum in float32 or wider: a sum of many bfloat16 numbers stops growing.
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), (loss, grads)
        )
        total, outputs = lax.scan(add_group, zeros, groups)
        loss, grads = jax.tree.map(lambda leaf, shape: (leaf / num_tasks).astype(shape.dtype), total, (loss, grads))
        return (loss, jax.tree.map(lambda leaf: leaf.reshape(size, *leaf.shape[2:]), outputs)), grads

    def _group_size(self, shared: Any) -> int | None:
        if self.task_batch_size is None:
            return backend.task_batch_size(shared)
        return None if self.task_batch_size == "all" else self.task_batch_size

    def _shard(self, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        # check_vma=True would add an all-reduce of the gradient of every task.
        return jax.shard_map(fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_over_tasks(fn: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Converts `fn(params, task, step) -> (part, output)`, a function of one task, to a function of a group of tasks.

    Returns:
      A function `(params, tasks, step) -> (sum of the parts, outputs)` that stacks the outputs along a leading axis.

    Example:
      >>> total = sum_over_tasks(lambda weight, task, step: (weight * task, task + 1))
      >>> total(2, jnp.arange(3), 0)
      (Array(6, dtype=int32), Array([1, 2, 3], dtype=int32))
    """

    def total(params: Any, tasks: Any, step: Any) -> tuple[Any, Any]:
        if len(jax.tree.leaves(tasks)[0]) == 1:  # Products of one task are faster without a batch axis.
            part, output = fn(params, jax.tree.map(lambda leaf: leaf[0], tasks), step)
            return part, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], output)
        parts, outputs = jax.vmap(fn, in_axes=(None, 0, None))(params, tasks, step)
        return jax.tree.map(lambda leaf: leaf.sum(0), parts), outputs

    return total


def task_axis(task_batch_size: TaskBatchSize, mesh: Mesh | None) -> TaskAxis:
    """Returns a `TaskAxis` over all devices of `mesh`; the axes of `mesh` may have any names.

    Raises:
      ValueError: if `task_batch_size` is not a positive integer, 'all' or None.
      TypeError: if `mesh` is not a mesh or None.
    """
    if not isinstance(mesh, Mesh | None):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, such as maml_jax.task_mesh(T), but got {mesh!r}.")
    if task_batch_size not in (None, "all"):
        validation.at_least("task_batch_size", task_batch_size, 1)
    return TaskAxis(task_batch_size, mesh and Mesh(mesh.devices.reshape(-1), (AXIS,)))


def task_mesh(num_tasks: int) -> Mesh | None:
    """Returns a mesh of as many devices as can share `num_tasks` tasks evenly, or None if only one device can.

    With several processes the mesh has the same number of devices of each process.

    Raises:
      ValueError: if `num_tasks` is not a positive integer, or not a multiple of the number of processes.

    Example:
      >>> task_mesh(1) is None  # One task cannot be shared.
      True
    """
    validation.at_least("the number of tasks", num_tasks, 1)
    count = jax.process_count()
    if num_tasks % count:
        raise ValueError(
            f"The number of tasks must be a multiple of {count}, the number of processes, but got {num_tasks}."
        )
    local = max(n for n in range(1, jax.local_device_count() + 1) if num_tasks % (n * count) == 0)
    return _mesh([device for process in range(count) for device in jax.local_devices(process)[:local]])


def local_mesh() -> Mesh | None:
    """Returns a mesh of all devices of this process, or None if there is only one."""
    return _mesh(jax.local_devices())


def _mesh(devices: list[jax.Device]) -> Mesh | None:
    return None if len(devices) == 1 else Mesh(np.array(devices), (AXIS,))
