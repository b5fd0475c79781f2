"""Episodes from images that stay in host memory, where the device's is too small for them.

Only the chosen pixels of some meta-steps, as uint8, go to the device; `train.train` has them made one call ahead of
it. Which images those are comes from the same function and keys as on the device, so the episodes are the same, bit
for bit.
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
from maml_jax.tasks.episodes import Choice, EpisodeShape, ImageClasses, assemble_episodes, choose, draw_episodes
from maml_jax.types import Task

Place = Literal["auto", "device", "host"]
"""'auto': on the device if they fit there."""
PLACES = ("auto", "device", "host")

SHARE = 0.5
"""Of the device's free memory that images may take: the rest is for training."""


class ChosenPixels(NamedTuple):
    """What the episodes of `M` meta-steps are put together from."""

    first_step: np.ndarray
    """int32 scalar."""
    pixels: np.ndarray
    """uint8 `[M, T, N, K+Q, H, W]` or `[M, T, N, K+Q, H, W, C]`."""
    choice: Choice
    """Which they are, with a leading axis `M`."""


def by_step(
    key: jax.Array,
    classes: ImageClasses,
    tasks: int,
    shape: EpisodeShape,
    place: Place = "auto",
    *,
    mesh: Mesh | None = None,
) -> tuple[Callable[[Any, Any], Task], Any]:
    """`draw` and `data` for `train.train` and for `batches`: at each step `tasks` new episodes.

    Args:
      key: a PRNG key; the number of the step is folded in.
      classes: the classes to draw from, NumPy's arrays.
      tasks: `T`.
      shape: what an episode is.
      place: where the images are held.
      mesh: devices among which the tasks are divided, `task_axis.task_mesh(tasks)`: from host memory each then gets
        the pixels of its own. A mesh of several processes is for a call in all of them, which agree on the place.

    Raises:
      ValueError: if `classes` cannot make such episodes, or for an unknown `place`.
    """
    validation.one_of("place", place, PLACES)
    shape.check(classes)
    fits = place == "device" or (place == "auto" and fits_on_device(classes.images.nbytes))
    if mesh is not None and processes.multiple():
        fits = all(processes.all_gather_text("fits" if fits else ""))  # All processes compile the same program.
    if fits:

        def draw(classes: ImageClasses, step: jax.Array) -> Task:
            return draw_episodes(jax.random.fold_in(key, step), classes, tasks, shape)

        return draw, classes

    def draw_chosen(chosen: ChosenPixels, step: jax.Array) -> Task:
        index = step - chosen.first_step
        return assemble_episodes(chosen.pixels[index], jax.tree.map(lambda leaf: leaf[index], chosen.choice), shape)

    # As the learner has it, whatever the mesh is called.
    return draw_chosen, chooser(key, classes, tasks, shape, task_axis("all", mesh).mesh)


def batches(draw: Callable[[Any, Any], Task], data: Any, count: int) -> Iterator[Task]:
    """The episodes of steps 0 to `count - 1`, for an evaluation that goes batch by batch; see `by_step`."""
    drawn = jax.jit(draw)
    held = None if callable(data) else jax.device_put(data)
    for step in range(count):
        yield drawn(data(step, 1) if callable(data) else held, step)


def chooser(
    key: jax.Array, classes: ImageClasses, tasks: int, shape: EpisodeShape, mesh: Mesh | None = None
) -> Callable[[int, int], ChosenPixels]:
    """`(first step, count) -> ChosenPixels` of `count` meta-steps; arguments as in `by_step`."""
    # On the CPU: behind the call that the device is at, the choice would wait for that to end.
    key = jax.device_put(key, jax.local_devices(backend="cpu")[0])

    @partial(jax.jit, static_argnums=2)
    def chosen(key: jax.Array, first_step: int, count: int) -> Any:
        def one_step(step: jax.Array) -> Any:
            return choose(jax.random.fold_in(key, step), classes.counts, tasks, shape)

        return jax.vmap(one_step)(first_step + jnp.arange(count))

    def pixels_of(first_step: int, count: int) -> ChosenPixels:
        choice = jax.tree.map(np.asarray, chosen(key, first_step, count))
        first = np.asarray(first_step, np.int32)
        if mesh is None:
            return ChosenPixels(first, classes.images[choice.images], choice)

        def divided(shape: tuple[int, ...], values: Callable[[Any], np.ndarray]) -> Any:
            return jax.make_array_from_callback(shape, NamedSharding(mesh, P(None, mesh.axis_names)), values)

        size = (*choice.images.shape, *classes.images.shape[1:])
        pixels = divided(size, lambda index: classes.images[choice.images[index[: choice.images.ndim]]])
        return ChosenPixels(first, pixels, jax.tree.map(lambda leaf: divided(leaf.shape, leaf.__getitem__), choice))

    return pixels_of


def fits_on_device(size: int, device: jax.Device | None = None) -> bool:
    """Whether `size` bytes of images take at most `SHARE` of the free memory of `device`, by default the first.

    True where a device does not tell its memory, as CPUs do not: theirs is the host's.
    """
    memory = (device or jax.local_devices()[0]).memory_stats()
    return memory is None or size <= SHARE * (memory["bytes_limit"] - memory["bytes_in_use"])
