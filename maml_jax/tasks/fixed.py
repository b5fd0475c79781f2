"""Evaluation tasks that are chosen once, for validation and test."""

from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from maml_jax import validation
from maml_jax.tasks.episodes import EpisodeShape, ImageClasses, assemble_episodes, choose_images
from maml_jax.types import Task

GROUP_ENTRIES = 1 << 23
"""Largest number of pixel values in the images of one group of tasks."""


def fixed_tasks(
    key: jax.Array, data: ImageClasses, count: int, shape: EpisodeShape, *, group_entries: int = GROUP_ENTRIES
) -> Callable[[], Iterable[Task]]:
    """Chooses `count` tasks. Every call of the returned function yields these tasks, in groups.

    All groups have the same number of tasks, so one compiled program evaluates every group. The pixels of a group are
    gathered when the iterator reaches the group.

    Args:
      key: a PRNG key.
      data: the classes to draw from, with images in host memory.
      count: number of tasks.
      shape: ways N, shots K, queries Q, rotations and labels of a task.
      group_entries: largest number of pixel values in a group; a group holds at least one task.

    Returns:
      A function without arguments. Each call returns an iterator of `Task`s with support
      `(images [G, N*K, H, W, C], labels [G, N*K])` and query `(images [G, N*Q, H, W, C], labels [G, N*Q])`. The group
      size `G` divides `count`.

    Raises:
      ValueError: if `data` has too few classes or images (see `EpisodeShape.check`), or if `count` is below 1.

    Example:
      >>> import jax, numpy as np
      >>> from maml_jax.tasks.episodes import EpisodeShape, equal_classes
      >>> from maml_jax.tasks.fixed import fixed_tasks
      >>> data = equal_classes(np.zeros((10, 4, 8, 8), np.uint8))  # 10 classes of 4 images.
      >>> tasks = fixed_tasks(jax.random.key(0), data, 6, EpisodeShape(ways=5, shots=1, queries=2))
      >>> [group.query[0].shape for group in tasks()]
      [(6, 10, 8, 8, 1)]
    """
    validation.at_least("count", count, 1)
    shape.check(data)
    choice = jax.tree.map(np.asarray, choose_images(key, data.counts, count, shape))
    entries = shape.ways * (shape.shots + shape.queries) * int(np.prod(data.images.shape[1:]))
    group = max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * entries <= group_entries))

    def groups() -> Iterator[Task]:
        for first in range(0, count, group):
            chosen = jax.tree.map(lambda leaf, first=first: leaf[first : first + group], choice)
            yield assemble_episodes(data.images[chosen.images], chosen, shape)

    return groups
