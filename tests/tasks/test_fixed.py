"""Fixed tasks are the same at every call, in groups of equal size."""

import jax
import numpy as np
import pytest

from maml_jax.tasks.episodes import EpisodeShape, draw_episodes, equal_classes
from maml_jax.tasks.fixed import fixed_tasks

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 5, 4, 4), np.uint8)
SHAPE = EpisodeShape(3, 1, 2)


def test_tasks_do_not_depend_on_the_size_of_a_group():
    data, key = equal_classes(IMAGES), jax.random.key(1)
    whole = draw_episodes(key, data, 6, SHAPE)
    entries = 3 * 3 * 16  # Pixel values of a task.
    for limit, sizes in ((1 << 23, [6]), (5 * entries, [3, 3]), (1, [1] * 6)):
        tasks = fixed_tasks(key, data, 6, SHAPE, group_entries=limit)
        for _ in range(2):
            groups = list(tasks())
            assert [len(group.query[1]) for group in groups] == sizes
            together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *groups)
            jax.tree.map(np.testing.assert_array_equal, together, whole)


def test_a_shape_that_the_data_cannot_fill_raises_at_once():
    data = equal_classes(IMAGES)
    with pytest.raises(ValueError, match="ways must be at most the number of classes, 12, but got 13"):
        fixed_tasks(jax.random.key(0), data, 6, SHAPE._replace(ways=13))
    with pytest.raises(ValueError, match="count must be an integer of at least 1"):
        fixed_tasks(jax.random.key(0), data, 0, SHAPE)
