"""Episodes from images that stay in host memory, for data sets that do not fit into the memory of the device.

Only the pixels of the next meta-steps are copied to the device, as uint8. `maml_jax.train` loads these pixels one call
ahead. The function and the keys that choose images are those of `draw_episodes`, so the episodes are bit-equal to
episodes of images on the device.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maml_jax import validation
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_axis
from maml_jax.tasks.episodes import Choice, EpisodeShape, ImageClasses, assemble_episodes, choose_images, draw_episodes
from maml_jax.types import Task

Place = Literal["auto", "device", "host"]
"""Where images are kept. 'device': on the device. 'host': in host memory. 'auto': on the device if the images fit."""
PLACES = ("auto", "device", "host")

MEMORY_SHARE = 0.5
"""The largest share of the free memory of a device that images may take. Training needs the remaining memory."""


class ChosenPixels(NamedTuple):
    """The pixels of the episodes of `M` meta-steps."""

    first_step: np.ndarray
    """int32 scalar: the index of the first of the `M` meta-steps."""
    pixels: np.ndarray
    """uint8 `[M, T, N, K + Q, H, W]` or `[M, T, N, K + Q, H, W, C]`."""
    choice: Choice
    """The chosen images; every field has a leading axis `M`."""


def episodes_by_step(
    key: jax.Array,
    classes: ImageClasses,
    num_tasks: int,
    shape: EpisodeShape,
    place: Place = "auto",
    *,
    mesh: Mesh | None = None,
) -> tuple[Callable[[Any, Any], Task], Any]:
    """Returns `draw` and `data` for `maml_jax.train`, for `num_tasks` new episodes at each meta-step.

    Args:
      key: a PRNG key; the index of the step is folded in.
      classes: the classes to draw from, with images as a NumPy array.
      num_tasks: episodes per meta-step, `T`.
      shape: ways N, shots K, queries Q, rotations and labels of an episode.
      place: where the images are kept, 'auto', 'device' or 'host'.
      mesh: devices that share the tasks, such as `maml_jax.task_mesh(num_tasks)`. Each device then receives only the
        pixels of its tasks. With several processes, all processes must call this function.

    Returns:
      `(draw, data)`: `draw(data, step)` returns the tasks of one step. `data` is `classes` for images on the device,
      and a function `(first_step, count) -> ChosenPixels` for images in host memory.

    Raises:
      ValueError: if `classes` has too few classes or images, or for an unknown `place`.

    Example:
      >>> from maml_jax.tasks.episodes import equal_classes
      >>> classes = equal_classes(np.zeros((10, 20, 28, 28), np.uint8))
      >>> draw, data = episodes_by_step(jax.random.key(0), classes, 4, EpisodeShape(ways=5, shots=1, queries=3))
      >>> jax.jit(draw)(data, 7).support[0].shape
      (4, 5, 28, 28, 1)
    """
    validation.one_of("place", place, PLACES)
    shape.check(classes)
    on_device = place == "device" or (place == "auto" and fits_on_device(classes.images.nbytes))
    if mesh is not None and processes.multiple():
        # All processes must compile the same program: keep the images on the devices only if they fit everywhere.
        on_device = all(processes.all_gather_text("fits" if on_device else ""))
    if on_device:

        def draw(classes: ImageClasses, step: jax.Array) -> Task:
            return draw_episodes(jax.random.fold_in(key, step), classes, num_tasks, shape)

        return draw, classes

    def draw_chosen(chosen: ChosenPixels, step: jax.Array) -> Task:
        index = step - chosen.first_step
        return assemble_episodes(chosen.pixels[index], jax.tree.map(lambda leaf: leaf[index], chosen.choice), shape)

    # `task_axis` renames the axis of the mesh, as the learner does.
    return draw_chosen, pixel_loader(key, classes, num_tasks, shape, task_axis("all", mesh).mesh)


def batches(draw: Callable[[Any, Any], Task], data: Any, count: int) -> Iterator[Task]:
    """Yields the episodes of steps 0 to `count - 1`, for an evaluation in batches.

    Args:
      draw, data: the result of `episodes_by_step`.
      count: the number of batches.

    Yields:
      The tasks of one step, `[T, ...]`.
    """
    jitted_draw = jax.jit(draw)
    device_data = None if callable(data) else jax.device_put(data)
    for step in range(count):
        yield jitted_draw(data(step, 1) if callable(data) else device_data, step)


def pixel_loader(
    key: jax.Array, classes: ImageClasses, num_tasks: int, shape: EpisodeShape, mesh: Mesh | None = None
) -> Callable[[int, int], ChosenPixels]:
    """Returns a function `(first_step, count) -> ChosenPixels` that loads the pixels of `count` meta-steps.

    The arguments are those of `episodes_by_step`.
    """
    # Choose images on the CPU. On the device, the choice would wait for the end of the running call.
    key = jax.device_put(key, jax.local_devices(backend="cpu")[0])

    @partial(jax.jit, static_argnums=2)
    def choose(key: jax.Array, first_step: int, count: int) -> Any:
        def one_step(step: jax.Array) -> Any:
            return choose_images(jax.random.fold_in(key, step), classes.counts, num_tasks, shape)

        return jax.vmap(one_step)(first_step + jnp.arange(count))

    def load(first_step: int, count: int) -> ChosenPixels:
        choice = jax.tree.map(np.asarray, choose(key, first_step, count))
        first = np.asarray(first_step, np.int32)
        if mesh is None:
            return ChosenPixels(first, classes.images[choice.images], choice)

        def shard(shape: tuple[int, ...], values: Callable[[Any], np.ndarray]) -> Any:
            """Returns an array whose second axis, the tasks, is sharded over the mesh."""
            return jax.make_array_from_callback(shape, NamedSharding(mesh, P(None, mesh.axis_names)), values)

        pixels_shape = (*choice.images.shape, *classes.images.shape[1:])
        pixels = shard(pixels_shape, lambda index: classes.images[choice.images[index[: choice.images.ndim]]])
        return ChosenPixels(first, pixels, jax.tree.map(lambda leaf: shard(leaf.shape, leaf.__getitem__), choice))

    return load


def fits_on_device(size: int, device: jax.Device | None = None) -> bool:
    """Whether images fit into the memory of a device.

    Args:
      size: bytes of the images.
      device: the device; None selects the first device of this process.

    Returns:
      True if `size` is at most `MEMORY_SHARE` of the free memory of the device. Also True if the device does not report
      its memory, as for CPUs, whose memory is host memory.
    """
    memory = (device or jax.local_devices()[0]).memory_stats()
    return memory is None or size <= MEMORY_SHARE * (memory["bytes_limit"] - memory["bytes_in_use"])
