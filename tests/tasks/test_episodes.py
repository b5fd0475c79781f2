"""Episodes have the right classes, examples, labels and rotations, and are pure functions of their key."""

import jax
import numpy as np
import pytest

from maml_jax.tasks.episodes import EpisodeShape, ImageClasses, augment, choose_images, draw_episodes, equal_classes

CLASSES, EXAMPLES = 12, 20


@pytest.fixture
def data():
    """Images with the class in the first corner, the example in the next pixel, and 255 in all other pixels."""
    images = np.full((CLASSES, EXAMPLES, 4, 4), 255, np.uint8)
    images[:, :, 0, 0] = np.arange(CLASSES)[:, None]
    images[:, :, 0, 1] = 100 + np.arange(EXAMPLES)
    return equal_classes(images)


def read(images):
    """Returns class, example and quarter turns of drawn images `[..., 4, 4, 1]`."""
    pixels = np.rint(255 * np.asarray(images)[..., 0]).astype(int)
    turns = np.empty(pixels.shape[:-2], int)
    upright = np.empty_like(pixels)
    for index in np.ndindex(turns.shape):
        rotated = [np.rot90(pixels[index], -k) for k in range(4)]
        turns[index] = next(k for k in range(4) if rotated[k][0, 1] != 255 and rotated[k][0, 0] < 100)
        upright[index] = rotated[turns[index]]
    return upright[..., 0, 0], upright[..., 0, 1] - 100, turns


@pytest.mark.parametrize("rotations", ["random", "classes", "none"])
def test_episodes_have_the_right_classes_examples_labels_and_rotations(data, rotations):
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
            assert len(classes) == 1 and len(turns) == 1  # One class and one rotation for each label.
            examples = [*s_example[task, support], *q_example[task, query]]
            assert len(set(examples)) == 5  # Support and query share no image.
            seen.add((*classes, *(turns if rotations == "classes" else ())))
        assert len(seen) == 5
    assert set(np.unique(s_class)) == set(range(CLASSES))
    assert set(np.unique(s_turn)) == ({0} if rotations == "none" else {0, 1, 2, 3})
    if rotations == "classes":  # Two rotations of one character may be two classes of an episode.
        assert any(len(set(s_class[task])) < 5 for task in range(40))


@pytest.mark.parametrize("rotations", ["random", "none"])
def test_labels_can_be_indices_of_classes(data, rotations):
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
    first = np.bincount(pixels[:, 0, 0, 0], minlength=CLASSES)  # The order of the labels does not depend on the class.
    assert ((first - 250) ** 2 / 250).sum() < 3 * CLASSES


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (EpisodeShape(13, 1, 1), "ways must be at most the number of classes, 12, but got 13"),
        (EpisodeShape(49, 1, 1, "classes"), "ways must be at most the number of classes, 48, but got 49"),
        (EpisodeShape(5, 10, 11), r"shots \+ queries must be at most 20, .* of class 0, but got 10 \+ 11 = 21\."),
        (EpisodeShape(5, 0, 1), "shots must be an integer of at least 1, but got 0"),
        (EpisodeShape(5, 1, 1, "sideways"), "rotations must be one of .*'sideways'"),
        (EpisodeShape(5, 1, 1, "classes", "classes"), "the four rotations of a class one label"),
    ],
)
def test_a_shape_that_the_data_cannot_fill_raises(data, shape, message):
    with pytest.raises(ValueError, match=message):
        draw_episodes(jax.random.key(0), data, 1, shape)


@pytest.mark.parametrize("rotations", ["random", "classes"])
def test_images_that_are_not_square_cannot_be_rotated(rotations):
    data = ImageClasses(np.zeros((6, 3, 5), np.uint8), (3, 3))
    with pytest.raises(ValueError, match=f"rotations '{rotations}' needs square images, but the images are 3x5"):
        draw_episodes(jax.random.key(0), data, 1, EpisodeShape(2, 1, 1, rotations))
    assert draw_episodes(jax.random.key(0), data, 1, EpisodeShape(2, 1, 1, "none")).query[0].shape == (1, 2, 3, 5, 1)


class TestClassesOfDifferentSizes:
    COUNTS = (4, 30, 7, 5)

    @pytest.fixture
    def data(self):
        """Images with two pixels, the class and the index in the class."""
        numbers = [(label, number) for label, count in enumerate(self.COUNTS) for number in range(count)]
        return ImageClasses(np.array(numbers, np.uint8)[:, None, :], self.COUNTS)

    def test_every_image_of_a_class_is_equally_likely_and_no_other_image_is_drawn(self, data):
        tasks = jax.jit(draw_episodes, static_argnums=(2, 3))(jax.random.key(0), data, 2000, EpisodeShape(3, 1, 3))
        pixels = np.concatenate([np.asarray(x[0]).reshape(2000, 3, -1, 2) for x in tasks], 2)
        pixels = np.rint(255 * pixels).astype(int)
        assert (pixels[..., 0] == pixels[..., :1, 0]).all()  # Each episode has four images of each class,
        assert (np.diff(np.sort(pixels[..., 1]), axis=-1) > 0).all()  # and the four images differ.
        for label, count in enumerate(self.COUNTS):
            drawn = np.bincount(pixels[pixels[..., 0] == label][:, 1])
            assert len(drawn) == count and ((drawn - drawn.mean()) ** 2 / drawn.mean()).sum() < 3 * count

    def test_the_error_for_a_class_with_too_few_images_names_the_class(self, data):
        message = r"shots \+ queries must be at most 4, the number of images of class {}, but got 4 \+ 2 = 6\. "
        message += "The number of other classes with too few images is 1"
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


def test_a_seed_gives_the_recorded_episodes():
    """Images and rotations of an episode equal recorded values, so that published results stay reproducible."""
    for rotations, images, turns in RECORDED:
        shape = EpisodeShape(5, 2, 3, rotations)
        choice = jax.jit(choose_images, static_argnums=(1, 2, 3))(jax.random.key(3), (20,) * 12, 7, shape)
        assert choice.images.shape == (7, 5, 5) and choice.quarter_turns.shape == (7, 5)
        assert choice.images[6, :, 3].tolist() == images and choice.quarter_turns[6].tolist() == turns


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_only_uint8_pixels_are_scaled(dtype):
    values = np.arange(12).reshape(2, 3, 1, 2) % 5
    shape = EpisodeShape(2, 1, 2)
    drawn = [
        draw_episodes(jax.random.key(0), equal_classes(values.astype(kind)), 1, shape) for kind in (dtype, np.uint8)
    ]
    np.testing.assert_allclose(drawn[0].query[0] / 255, drawn[1].query[0], rtol=1e-6)
    assert drawn[0].query[0].dtype == dtype and drawn[0].query[0].max() > 1


def test_counts_that_do_not_add_up_raise():
    classes = ImageClasses(np.zeros((24, 8, 8), np.uint8), (5,) * 6)
    with pytest.raises(ValueError, match="must add up to the number of images, 24, but add up to 30"):
        EpisodeShape(3, 1, 2).check(classes)


def test_downscaled_images_are_means_of_squares():
    images = jax.random.uniform(jax.random.key(0), (2, 3, 6, 4, 3))
    small = augment(jax.random.key(1), images, downscale=2)
    assert small.shape == (2, 3, 3, 2, 3)
    for row, column in np.ndindex(3, 2):
        square = images[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2, :]
        np.testing.assert_allclose(small[..., row, column, :], square.mean((-3, -2)), rtol=1e-6)
    np.testing.assert_array_equal(augment(jax.random.key(1), images), images)


def test_half_of_the_images_are_flipped():
    """Each image by itself, left to right."""
    images = jax.random.uniform(jax.random.key(0), (10, 40, 5, 4, 1))
    found = np.asarray(augment(jax.random.key(1), images, flips=True))
    flipped = (found == images[..., ::-1, :]).all((-3, -2, -1))
    assert (flipped | (found == images).all((-3, -2, -1))).all()
    assert 0.4 < flipped.mean() < 0.6 and flipped.std(0).any() and flipped.std(1).any()
    np.testing.assert_array_equal(found, augment(jax.random.key(1), images, flips=True))
    assert (found != augment(jax.random.key(2), images, flips=True)).any()


def test_a_factor_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match="downscale must divide height and width, 4 and 6, but got 3"):
        augment(jax.random.key(0), np.zeros((1, 4, 6, 1)), downscale=3)
