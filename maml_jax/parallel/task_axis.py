"""How the tasks of a meta-batch are gone through: together, in groups, and over which devices.

The result is the same up to rounding; time and memory are not.
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

GroupFn = Callable[[Any, Any], tuple[Any, Any]]
"""`(shared, tasks) -> (sum over the tasks, what is told of each)`, of a group of tasks `[G, ...]`."""


class TaskAxis(NamedTuple):
    """A policy for the task axis."""

    at_once: TaskBatchSize = None
    """Tasks computed together on a device, by `vmap`; the others follow in a loop. None: what suits the
    backend and the size of what is shared."""
    mesh: Mesh | None = None
    """Devices among which the tasks are divided evenly; see `task_mesh`."""

    def replicate(self, tree: Any) -> Any:
        """Puts a copy of every leaf on every device of the mesh."""
        return tree if self.mesh is None else processes.put(tree, NamedSharding(self.mesh, P()))

    def map(self, fn: Callable[[Any, Any], Any], shared: Any, tasks: Any) -> Any:
        """`fn(shared, task)` of every task, whatever pytree that is, stacked along a leading axis `T`."""
        size = validation.leading_axis(tasks)
        local = partial(_map, fn, self._group(shared))
        if self.mesh is None:
            return local(shared, tasks)
        sharded = self._sharded(local, P(AXIS))
        if size % self.mesh.size == 0:
            return sharded(shared, tasks)
        # Filled up with tasks that are there already, so that every device gets as many.
        filled = np.arange(-(-size // self.mesh.size) * self.mesh.size) % size
        out = sharded(shared, jax.tree.map(lambda leaf: leaf[filled], tasks))
        return jax.tree.map(lambda leaf: leaf[:size], out)

    def mean(self, fn: GroupFn, shared: Any, tasks: Task) -> tuple[Any, Any]:
        """`fn(shared, tasks) -> (summed, stacked)`, of a group: the mean of the first, the second of each task.

        The mean takes one all-reduce over the devices, and within one no more memory than one group's. What
        tells of each task alone becomes such a function by `summed`.
        """
        size, at_once = validation.task_axis(tasks), self._group(shared)
        devices = 1 if self.mesh is None else self.mesh.size
        if size % devices or (size // devices) % (at_once or 1):
            raise ValueError(
                f"A meta-batch of {size} tasks cannot be divided among {devices} device(s) in groups of "
                f"task_batch_size={self.at_once!r}: the devices' shares must be equal, and made of whole groups."
            )
        if self.mesh is None:
            return _share(fn, at_once, size, shared, tasks)

        def local(shared: Any, tasks: Task) -> tuple[Any, Any]:
            share, stacked = _share(fn, at_once, size, shared, tasks)
            return lax.psum(share, AXIS), stacked

        return self._sharded(local, (P(), P(AXIS)))(shared, tasks)

    def _group(self, shared: Any) -> int | None:
        if self.at_once is None:
            return backend.task_batch_size(shared)
        return None if self.at_once == "all" else self.at_once

    def _sharded(self, fn: Callable[[Any, Task], Any], out_specs: Any) -> Callable[[Any, Task], Any]:
        # Without the check of what varies over devices: it would sum every task's gradient over them.
        return jax.shard_map(fn, mesh=self.mesh, in_specs=(P(), P(AXIS)), out_specs=out_specs, check_vma=False)


def each(fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`fn(shared, task)` for every task of a group, stacked along a leading axis."""

    def of_group(shared: Any, tasks: Any) -> Any:
        if len(jax.tree.leaves(tasks)[0]) == 1:  # Spared the batching: products of one task run faster without it.
            out = fn(shared, jax.tree.map(lambda leaf: leaf[0], tasks))
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], out)
        return jax.vmap(partial(fn, shared))(tasks)

    return of_group


def summed(fn: Callable[[Any, Any], tuple[Any, Any]]) -> GroupFn:
    """`fn(shared, task) -> (summed, stacked)` of one task as the function of a group that `TaskAxis.mean` takes."""

    def of_group(shared: Any, tasks: Any) -> tuple[Any, Any]:
        parts, stacked = each(fn)(shared, tasks)
        return jax.tree.map(lambda leaf: leaf.sum(0), parts), stacked

    return of_group


def task_axis(task_batch_size: TaskBatchSize, mesh: Mesh | None) -> TaskAxis:
    """A `TaskAxis` over all devices of `mesh`, whatever its axes are called.

    Raises:
      ValueError: if `task_batch_size` is neither a positive integer nor 'all'.
      TypeError: if `mesh` is no mesh.
    """
    if not isinstance(mesh, Mesh | None):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, such as task_axis.task_mesh(T), but got {mesh!r}.")
    if task_batch_size not in (None, "all"):
        validation.at_least("task_batch_size", task_batch_size, 1)
    return TaskAxis(task_batch_size, mesh and Mesh(mesh.devices.reshape(-1), (AXIS,)))


def task_mesh(tasks: int) -> Mesh | None:
    """The most devices, as many of each process, that can share `tasks` tasks evenly; None if that is only one.

    Raises:
      ValueError: if there is no task, or the processes cannot have equal shares.
    """
    validation.at_least("tasks", tasks, 1)
    processes = jax.process_count()
    if tasks % processes:
        raise ValueError(f"tasks must be a multiple of {processes}, the number of processes, but got {tasks}.")
    count = max(n for n in range(1, jax.local_device_count() + 1) if tasks % (n * processes) == 0)
    return _mesh([device for number in range(processes) for device in jax.local_devices(number)[:count]])


def local_mesh() -> Mesh | None:
    """All devices of this process; None if that is only one."""
    return _mesh(jax.local_devices())


def _mesh(devices: list[jax.Device]) -> Mesh | None:
    return None if len(devices) == 1 else Mesh(np.array(devices), (AXIS,))


def _map(fn: Callable[[Any, Task], Any], at_once: int | None, shared: Any, tasks: Task) -> Any:
    one = partial(fn, shared)
    if at_once is None:
        return jax.vmap(one)(tasks)
    return lax.map(one, tasks, batch_size=None if at_once == 1 else at_once)


def _share(fn: GroupFn, at_once: int | None, count: int, shared: Any, tasks: Task) -> Any:
    """What these of `count` tasks add to the mean of the first output, and the second stacked, group by group."""
    size = len(jax.tree.leaves(tasks)[0])
    if at_once is None or at_once == size:
        total, stacked = fn(shared, tasks)
        return jax.tree.map(lambda leaf: leaf / count, total), stacked

    def add_group(total: Any, tasks: Task) -> tuple[Any, Any]:
        part, stacked = fn(shared, tasks)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), total, part), stacked

    groups = jax.tree.map(lambda leaf: leaf.reshape(-1, at_once, *leaf.shape[1:]), tasks)
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), groups)
    shapes = jax.eval_shape(fn, shared, first)[0]
    # In float32 at least: a sum of many bfloat16 numbers stops growing.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shapes)
    total, stacked = lax.scan(add_group, zeros, groups)
    share = jax.tree.map(lambda leaf, shape: (leaf / count).astype(shape.dtype), total, shapes)
    return share, jax.tree.map(lambda leaf: leaf.reshape(size, *leaf.shape[2:]), stacked)
