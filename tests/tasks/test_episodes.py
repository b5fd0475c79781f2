"""Tasks are what the paper says, and pure functions of their key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax.tasks import sinusoid
from maml_jax.tasks.episodes import EpisodeShape, ImageClasses, choose, draw_episodes, equal_classes

CLASSES, EXAMPLES = 12, 20


@pytest.fixture
def data():
    """Images that tell their class (one corner), their example (the next) and which way is up (blank corners)."""
    images = np.full((CLASSES, EXAMPLES, 4, 4), 255, np.uint8)
    images[:, :, 0, 0] = np.arange(CLASSES)[:, None]
    images[:, :, 0, 1] = 100 + np.arange(EXAMPLES)
    return equal_classes(images)


def read(images):
    """From drawn images `[..., 4, 4, 1]`: class, example and quarter turns."""
    pixels = np.rint(255 * np.asarray(images)[..., 0]).astype(int)
    turns = np.empty(pixels.shape[:-2], int)
    upright = np.empty_like(pixels)
    for index in np.ndindex(turns.shape):
        ways = [np.rot90(pixels[index], -k) for k in range(4)]
        turns[index] = next(k for k in range(4) if ways[k][0, 1] != 255 and ways[k][0, 0] < 100)
        upright[index] = ways[turns[index]]
    return upright[..., 0, 0], upright[..., 0, 1] - 100, turns


@pytest.mark.parametrize("rotations", ["random", "classes", "none"])
def test_episodes_hold_what_they_should(data, rotations):
    shape = EpisodeShape(ways=5, shots=2, queries=3, rotations=rotations)
    tasks = jax.jit(draw_episodes, static_argnums=(2, 3))(jax.random.key(0), data, 40, shape)
    assert tasks.support[0].shape == (40, 10, 4, 4, 1) and tasks.query[0].shape == (40, 15, 4, 4, 1)
    np.testing.assert_array_equal(tasks.support[1], np.tile(np.arange(5).repeat(2), (40, 1)))
    np.testing.assert_array_equal(tasks.query[1], np.tile(np.arange(5).repeat(3), (40, 1)))
    (s_class, s_example, s_turn), (q_class, q_example, q_turn) = (read(part[0]) for part in tasks)
    for task in range(40):
        seen = set()
        for way in range(5):
            support, query = slice(2 * way, 2 * way + 2), slice(3 * way, 3 * way + 3)
            classes = {*s_class[task, support], *q_class[task, query]}
            turns = {*s_turn[task, support], *q_turn[task, query]}
            assert len(classes) == 1 and len(turns) == 1  # One label, one class, one way up.
            examples = [*s_example[task, support], *q_example[task, query]]
            assert len(set(examples)) == 5  # Support and query share no image.
            seen.add((*classes, *(turns if rotations == "classes" else ())))
        assert len(seen) == 5
    assert set(np.unique(s_class)) == set(range(CLASSES))
    assert set(np.unique(s_turn)) == ({0} if rotations == "none" else {0, 1, 2, 3})
    if rotations == "classes":  # Two turns of one character may meet in an episode, as classes of their own.
        assert any(len(set(s_class[task])) < 5 for task in range(40))


@pytest.mark.parametrize("rotations", ["classes", "none"])
def test_labels_may_number_all_classes(data, rotations):
    shape = EpisodeShape(5, 2, 3, rotations, labels="classes")
    for images, labels in draw_episodes(jax.random.key(0), data, 20, shape):
        np.testing.assert_array_equal(labels, read(images)[0])


def test_episodes_are_a_pure_function_of_the_key(data):
    shape = EpisodeShape(5, 1, 1, "random")

    def draw(step):
        return draw_episodes(jax.random.fold_in(jax.random.key(0), step), data, 3, shape)

    for a, b, c in zip(*map(jax.tree.leaves, (draw(7), draw(7), jax.jit(draw)(7)))):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-7)
    assert not np.array_equal(draw(7).support[0], draw(8).support[0])


def test_every_class_and_example_is_equally_likely(data):
    tasks = draw_episodes(jax.random.key(1), data, 3000, EpisodeShape(4, 1, 1))
    pixels = np.rint(255 * np.asarray(tasks.support[0])[..., 0]).astype(int)
    for values, kinds in ((pixels[..., 0, 0], CLASSES), (pixels[..., 0, 1] - 100, EXAMPLES)):
        counts = np.bincount(values.ravel(), minlength=kinds)
        expected = values.size / kinds
        assert ((counts - expected) ** 2 / expected).sum() < 3 * kinds  # Chi-squared, far in the tail.
    first = np.bincount(pixels[:, 0, 0, 0], minlength=CLASSES)  # Labels carry no order either.
    assert ((first - 250) ** 2 / 250).sum() < 3 * CLASSES


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (EpisodeShape(13, 1, 1), "ways must be at most the number of classes, 12, but got 13"),
        (EpisodeShape(49, 1, 1, "classes"), "ways must be at most the number of classes, 48, but got 49"),
        (EpisodeShape(5, 10, 11), r"shots \+ queries must be at most 20.*10 \+ 11"),
        (EpisodeShape(5, 0, 1), "shots must be an integer of at least 1, but got 0"),
        (EpisodeShape(5, 1, 1, "sideways"), "rotations must be one of .*'sideways'"),
    ],
)
def test_impossible_episodes_are_refused(data, shape, message):
    with pytest.raises(ValueError, match=message):
        draw_episodes(jax.random.key(0), data, 1, shape)


@pytest.mark.parametrize("rotations", ["random", "classes"])
def test_images_that_are_not_square_are_not_turned(rotations):
    data = ImageClasses(np.zeros((6, 3, 5), np.uint8), (3, 3))
    with pytest.raises(ValueError, match=f"rotations '{rotations}' .* must be square for that, but these are 3x5"):
        draw_episodes(jax.random.key(0), data, 1, EpisodeShape(2, 1, 1, rotations))
    assert draw_episodes(jax.random.key(0), data, 1, EpisodeShape(2, 1, 1, "none")).query[0].shape == (1, 2, 3, 5, 1)


class TestClassesOfDifferentSizes:
    COUNTS = (4, 30, 7, 5)

    @pytest.fixture
    def data(self):
        """Images whose pixels are their class and their number within it."""
        numbers = [(label, number) for label, count in enumerate(self.COUNTS) for number in range(count)]
        return ImageClasses(np.array(numbers, np.uint8)[:, None, :], self.COUNTS)

    def test_every_image_of_a_class_is_equally_likely_and_no_other_drawn(self, data):
        tasks = jax.jit(draw_episodes, static_argnums=(2, 3))(jax.random.key(0), data, 2000, EpisodeShape(3, 1, 3))
        pixels = np.concatenate([np.asarray(x[0]).reshape(2000, 3, -1, 2) for x in tasks], 2)
        pixels = np.rint(255 * pixels).astype(int)
        assert (pixels[..., 0] == pixels[..., :1, 0]).all()  # Four images of one class
        assert (np.diff(np.sort(pixels[..., 1]), axis=-1) > 0).all()  # that differ.
        for label, count in enumerate(self.COUNTS):
            drawn = np.bincount(pixels[pixels[..., 0] == label][:, 1])
            assert len(drawn) == count and ((drawn - drawn.mean()) ** 2 / drawn.mean()).sum() < 3 * count

    def test_selected_classes_keep_their_images(self, data):
        picked = data.select([2, 0])
        assert picked.counts == (7, 4) and picked.first.tolist() == [0, 7]
        np.testing.assert_array_equal(picked.images, np.concatenate([data.images[34:41], data.images[:4]]))
        assert data.select([]).images.shape == (0, 1, 2) and data.select([]).counts == ()

    def test_the_class_with_too_few_is_named_also_while_tracing(self, data):
        message = (
            r"shots \+ queries must be at most 4, the images of class {}, but got 4 \+ 2: expected at least 6 images"
        )
        message += " in every class, found 4 in this one, and too few in 1 more"
        shape = EpisodeShape(2, 4, 2)
        with pytest.raises(ValueError, match=message.format("ant")):
            shape.check(data, ["ant", "bee", "cat", "dog"])
        with pytest.raises(ValueError, match=message.format(0)):
            jax.jit(lambda data: draw_episodes(jax.random.key(0), data, 1, shape))(data)


RECORDED = [
    ("random", [189, 99, 69, 200, 100], [3, 0, 1, 3, 1]),
    ("classes", [149, 59, 229, 80, 20], [3, 1, 2, 2, 0]),
    ("none", [189, 99, 69, 200, 100], [0, 0, 0, 0, 0]),
]


def test_the_same_seed_draws_what_it_always_drew():
    """So that results of earlier versions can be repeated: first images and turns of three draws."""
    for rotations, images, turns in RECORDED:
        shape = EpisodeShape(5, 2, 3, rotations)
        choice = jax.jit(choose, static_argnums=(1, 2, 3))(jax.random.key(3), (20,) * 12, 7, shape)
        assert choice.images.shape == (7, 5, 5) and choice.turns.shape == (7, 5)
        assert choice.images[6, :, 3].tolist() == images and choice.turns[6].tolist() == turns


def test_sinusoids_are_the_papers():
    tasks = sinusoid.draw_tasks(jax.random.key(0), 2000, shots=5, queries=3, reveal=True)
    (x, y), (x_query, y_query) = tasks
    assert x.shape == (2000, 5, 3) and y_query.shape == (2000, 3, 1)
    amplitude, phase = x[..., 1:2], x[..., 2:3]
    np.testing.assert_allclose(y, amplitude * np.sin(x[..., :1] - phase), atol=1e-5)
    np.testing.assert_array_equal(x[:, 0, 1:], x_query[:, 0, 1:])
    for values, low, high in ((amplitude, 0.1, 5), (phase, 0, np.pi), (x[..., :1], -5, 5)):
        assert low <= values.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < values.max() <= high
        assert np.isclose(values.mean(), (low + high) / 2, atol=0.05 * (high - low))
    hidden = sinusoid.draw_tasks(jax.random.key(0), 2000, shots=5, queries=3)
    np.testing.assert_array_equal(hidden.support[0], x[..., :1])
    assert jnp.array_equal(hidden.query[1], y_query)
