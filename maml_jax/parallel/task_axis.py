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

GroupFn = Callable[[Any, Any], tuple[Any, Any]]
"""`(shared, tasks) -> (sum over the tasks, outputs of each task)` for a group of tasks `[G, ...]`. The outputs of the
tasks are stacked along the leading axis `G`."""


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
        map_local = partial(_map, fn, self._group_size(shared))
        if self.mesh is None:
            return map_local(shared, tasks)
        map_sharded = self._shard(map_local, P(AXIS))
        if num_tasks % self.mesh.size == 0:
            return map_sharded(shared, tasks)
        # Repeat tasks until every device has the same number, and drop the outputs of the repeated tasks.
        padded = np.arange(-(-num_tasks // self.mesh.size) * self.mesh.size) % num_tasks
        outputs = map_sharded(shared, jax.tree.map(lambda leaf: leaf[padded], tasks))
        return jax.tree.map(lambda leaf: leaf[:num_tasks], outputs)

    def mean(self, fn: GroupFn, shared: Any, tasks: Task) -> tuple[Any, Any]:
        """Returns the mean over the tasks of the first output of `fn`, and the second output of every task, `[T, ...]`.

        `sum_over_tasks` converts a function of one task to `fn`. The mean needs one all-reduce over the devices. Memory
        grows with the size of a group, not with the number of groups.

        Raises:
          ValueError: while tracing, if the devices cannot have equal shares of complete groups.
        """
        num_tasks, group_size = validation.num_tasks(tasks), self._group_size(shared)
        devices = 1 if self.mesh is None else self.mesh.size
        if num_tasks % devices or (num_tasks // devices) % (group_size or 1):
            raise ValueError(
                f"A meta-batch of {num_tasks} tasks cannot be divided among {devices} device(s) in groups of "
                f"task_batch_size={self.task_batch_size!r}: use a multiple of devices times task_batch_size tasks."
            )
        if self.mesh is None:
            return _mean_share(fn, group_size, num_tasks, shared, tasks)

        def device_mean(shared: Any, tasks: Task) -> tuple[Any, Any]:
            share, stacked = _mean_share(fn, group_size, num_tasks, shared, tasks)
            return lax.psum(share, AXIS), stacked

        return self._shard(device_mean, (P(), P(AXIS)))(shared, tasks)

    def _group_size(self, shared: Any) -> int | None:
        if self.task_batch_size is None:
            return backend.task_batch_size(shared)
        return None if self.task_batch_size == "all" else self.task_batch_size

    def _shard(self, fn: Callable[[Any, Task], Any], out_specs: Any) -> Callable[[Any, Task], Any]:
        # check_vma=True would add an all-reduce of the gradient of every task.
        return jax.shard_map(fn, mesh=self.mesh, in_specs=(P(), P(AXIS)), out_specs=out_specs, check_vma=False)


def per_task(fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Maps `fn(shared, task)` over a group of tasks and stacks the outputs along a leading axis.

    Example:
      >>> double = per_task(lambda shared, task: 2 * task)
      >>> double(None, jnp.arange(3)).tolist()
      [0, 2, 4]
    """

    def group_fn(shared: Any, tasks: Any) -> Any:
        if len(jax.tree.leaves(tasks)[0]) == 1:  # Products of one task are faster without a batch axis.
            outputs = fn(shared, jax.tree.map(lambda leaf: leaf[0], tasks))
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], outputs)
        return jax.vmap(partial(fn, shared))(tasks)

    return group_fn


def sum_over_tasks(fn: Callable[[Any, Any], tuple[Any, Any]]) -> GroupFn:
    """Converts `fn(shared, task) -> (part, output)`, a function of one task, to a `GroupFn` for `TaskAxis.mean`."""

    def group_fn(shared: Any, tasks: Any) -> tuple[Any, Any]:
        parts, stacked = per_task(fn)(shared, tasks)
        return jax.tree.map(lambda leaf: leaf.sum(0), parts), stacked

    return group_fn


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


def _map(fn: Callable[[Any, Task], Any], group_size: int | None, shared: Any, tasks: Task) -> Any:
    task_fn = partial(fn, shared)
    if group_size is None:
        return jax.vmap(task_fn)(tasks)
    return lax.map(task_fn, tasks, batch_size=None if group_size == 1 else group_size)


def _mean_share(fn: GroupFn, group_size: int | None, num_tasks: int, shared: Any, tasks: Task) -> Any:
    """Returns the sum over the tasks of one device, divided by `num_tasks`, and the stacked outputs of these tasks."""
    size = len(jax.tree.leaves(tasks)[0])
    if group_size is None or group_size == size:
        total, stacked = fn(shared, tasks)
        return jax.tree.map(lambda leaf: leaf / num_tasks, total), stacked

    def add_group(total: Any, tasks: Task) -> tuple[Any, Any]:
        part, stacked = fn(shared, tasks)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), total, part), stacked

    # Split the task axis into groups.
    groups = jax.tree.map(lambda leaf: leaf.reshape(-1, group_size, *leaf.shape[1:]), tasks)
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), groups)
    shapes = jax.eval_shape(fn, shared, first)[0]
    # Sum in float32 or wider: a sum of many bfloat16 numbers stops growing.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shapes)
    total, stacked = lax.scan(add_group, zeros, groups)
    # Divide, and merge the groups.
    share = jax.tree.map(lambda leaf, shape: (leaf / num_tasks).astype(shape.dtype), total, shapes)
    return share, jax.tree.map(lambda leaf: leaf.reshape(size, *leaf.shape[2:]), stacked)
