"""Few-shot classification episodes, drawn from images on the device or in host memory.

A batch of episodes is a pure function of a PRNG key. A checkpoint therefore needs no position in the data, and episodes
can be drawn inside the compiled meta-step.

Drawing has three steps. `choose_images` chooses images and rotations. Then the pixels of these images are gathered.
`assemble_episodes` builds the episodes. Only the second step differs between images on the device (`draw_episodes`) and
images in host memory (`host_memory`).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maml_jax import validation
from maml_jax.types import Task

Rotations = Literal["random", "classes", "none"]
"""'random': each class of an episode is rotated by a random multiple of 90 degrees, as in the code of Finn et al.
'classes': each of the four rotations of a class counts as a separate class (Santoro et al. 2016).
'none': images are not rotated."""
ROTATIONS = ("random", "classes", "none")

Labels = Literal["ways", "classes"]
"""'ways': labels are 0 to N - 1 in every episode. 'classes': a label is the index of the class in the data, for joint
training on all classes."""
LABELS = ("ways", "classes")


@partial(jax.tree_util.register_dataclass, data_fields=["images"], meta_fields=["counts"])
@dataclasses.dataclass(frozen=True, eq=False)
class ImageClasses:
    """The images of one split, grouped by class. Classes may differ in size.

    Pass the object to a jitted function as an argument. Arrays that the function closes over would become constants of
    the compiled program. The counts are static, so functions that draw episodes raise ValueError during tracing if the
    classes are too few or too small.
    """

    images: Any
    """`[n, H, W]` or `[n, H, W, C]`, of NumPy or JAX. Images of a class are adjacent. uint8 values, 0 to 255, become
    float32 in [0, 1] in the episodes; values of other types stay as they are."""
    counts: tuple[int, ...]
    """The number of images of each class; the sum is `n`."""

    @property
    def first(self) -> np.ndarray:
        """int32 `[classes]`: the index of the first image of each class."""
        return _first_images(self.counts)


def equal_classes(images: Any) -> ImageClasses:
    """Groups the images of classes of equal size.

    Args:
      images: `[classes, examples, H, W]` or `[classes, examples, H, W, C]`, see `ImageClasses`.

    Example:
      >>> equal_classes(np.zeros((3, 20, 28, 28), np.uint8)).counts
      (20, 20, 20)
    """
    classes, examples = images.shape[:2]
    return ImageClasses(images.reshape(classes * examples, *images.shape[2:]), (examples,) * classes)


class EpisodeShape(NamedTuple):
    """The shape of an episode.

    Example:
      >>> shape = EpisodeShape(ways=5, shots=1, queries=15)
      >>> shape.check(equal_classes(np.zeros((3, 20, 28, 28), np.uint8)))
      Traceback (most recent call last):
      ValueError: ways must be at most the number of classes, 3, but got 5.
    """

    ways: int
    """Classes, `N`."""
    shots: int
    """Support examples per class, `K`."""
    queries: int
    """Query examples per class, `Q`."""
    rotations: Rotations = "none"
    labels: Labels = "ways"

    def check(self, data: ImageClasses, names: Sequence[str] | None = None) -> None:
        """Checks that `data` has enough classes and images for episodes of this shape.

        Args:
          data: the classes.
          names: the names of the classes, for the error message. With None the message gives the index of a class.

        Raises:
          ValueError: if the value of a field is not allowed, if the counts do not add up to the number of images, if
            there are too few classes, if a class has too few images, if images are not square although episodes
            rotate them, or if the rotations of a class are classes without labels of their own.
        """
        for name in ("ways", "shots", "queries"):
            validation.at_least(name, getattr(self, name), 1)
        if sum(data.counts) != len(data.images):
            raise ValueError(
                f"The counts of the classes must add up to the number of images, {len(data.images)}, but add up to "
                f"{sum(data.counts)}."
            )
        validation.one_of("rotations", self.rotations, ROTATIONS)
        validation.one_of("labels", self.labels, LABELS)
        if self.rotations == self.labels == "classes":
            raise ValueError(
                "labels 'classes' would give the four rotations of a class one label, although rotations 'classes' "
                "makes four classes of them: set rotations to 'random' or 'none'."
            )
        if self.rotations != "none" and data.images.shape[1] != data.images.shape[2]:
            raise ValueError(
                f"rotations {self.rotations!r} needs square images, but the images are "
                f"{data.images.shape[1]}x{data.images.shape[2]}: set rotations to 'none'."
            )
        classes = len(data.counts) * (4 if self.rotations == "classes" else 1)
        if self.ways > classes:
            raise ValueError(f"ways must be at most the number of classes, {classes}, but got {self.ways}.")
        fewest, needed = min(data.counts), self.shots + self.queries
        if needed > fewest:
            smallest = data.counts.index(fewest)
            others = sum(count < needed for count in data.counts) - 1
            raise ValueError(
                f"shots + queries must be at most {fewest}, the number of images of class "
                f"{smallest if names is None else names[smallest]}, but got {self.shots} + {self.queries} = {needed}"
                + (f". The number of other classes with too few images is {others}." if others else ".")
            )


class Choice(NamedTuple):
    """The chosen images, rotations and classes of a batch of episodes."""

    images: jax.Array
    """int32 `[T, N, K + Q]`: indices of images in the data. The first K are the support examples."""
    quarter_turns: jax.Array
    """int32 `[T, N]`: the rotation of each class in multiples of 90 degrees; 0 where `rotations` is 'none'."""
    classes: jax.Array
    """int32 `[T, N]`: indices of the classes in the data."""


def draw_episodes(key: jax.Array, data: ImageClasses, num_tasks: int, shape: EpisodeShape) -> Task:
    """Draws a batch of episodes. Each episode has N distinct classes and K + Q distinct images of each class.

    Args:
      key: a PRNG key. `jax.random.fold_in(key, step)` gives new episodes at each meta-step.
      data: the classes to draw from.
      num_tasks: episodes in the batch, `T`.
      shape: ways N, shots K, queries Q, rotations and labels.

    Returns:
      Tasks with support `(images [T, N*K, H, W, C], labels [T, N*K])` and query
      `(images [T, N*Q, H, W, C], labels [T, N*Q])`. uint8 images become float32 in [0, 1], labels are int32. The
      examples of a class are adjacent.

    Raises:
      ValueError: while tracing, if `data` has too few classes or images; see `EpisodeShape.check`.

    Example:
      >>> data = equal_classes(np.zeros((10, 20, 28, 28), np.uint8))
      >>> draw = jax.jit(draw_episodes, static_argnames=("num_tasks", "shape"))
      >>> tasks = draw(jax.random.key(0), data, num_tasks=4, shape=EpisodeShape(ways=5, shots=1, queries=3))
      >>> tasks.support[0].shape, tasks.query[0].shape
      ((4, 5, 28, 28, 1), (4, 15, 28, 28, 1))
      >>> tasks.query[1][0].tolist()
      [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]

    References:
      Vinyals et al. (2016), Matching Networks for One Shot Learning, arXiv:1606.04080 (episodes).
      Santoro et al. (2016), One-shot Learning with Memory-Augmented Neural Networks, arXiv:1605.06065
      (rotations).
    """
    shape.check(data)
    choice = choose_images(key, data.counts, num_tasks, shape)
    return assemble_episodes(jnp.asarray(data.images)[choice.images], choice, shape)


def choose_images(key: jax.Array, counts: tuple[int, ...], num_tasks: int, shape: EpisodeShape) -> Choice:
    """Chooses the images of a batch of episodes; see `draw_episodes`.

    Args:
      key: a PRNG key.
      counts: the number of images of each class, `ImageClasses.counts`.
      num_tasks: episodes in the batch, `T`.
      shape: ways N, shots K, queries Q, rotations and labels.

    Returns:
      Indices of images and classes, and rotations.
    """
    return jax.vmap(lambda key: _choose_images(key, counts, shape))(jax.random.split(key, num_tasks))


def assemble_episodes(pixels: jax.Array, choice: Choice, shape: EpisodeShape) -> Task:
    """Builds episodes from the pixels of chosen images; see `draw_episodes`.

    Args:
      pixels: `[T, N, K + Q, H, W]` or `[T, N, K + Q, H, W, C]`.
      choice: the result of `choose_images`.
      shape: the shape that was given to `choose_images`.

    Returns:
      Tasks as from `draw_episodes`.
    """
    ways, shots, queries, rotations, labels = shape
    # Rotate the images, and scale uint8 pixels to [0, 1].
    pixels = jnp.asarray(pixels)[..., None] if pixels.ndim == 5 else jnp.asarray(pixels)
    pixels = pixels if rotations == "none" else jax.vmap(jax.vmap(_rotate))(pixels, choice.quarter_turns)
    pixels = pixels.astype(jnp.float32) / 255 if pixels.dtype == jnp.uint8 else pixels
    num_tasks, image_shape = pixels.shape[0], pixels.shape[3:]
    # Label the classes.
    if labels == "ways":
        class_labels = jnp.broadcast_to(jnp.arange(ways, dtype=jnp.int32), (num_tasks, ways))
    else:
        class_labels = jnp.asarray(choice.classes)

    # Divide the images of each class into support and query examples.
    def examples(which: slice, per_class: int) -> tuple[jax.Array, jax.Array]:
        repeated = jnp.repeat(class_labels, per_class, axis=1)
        return pixels[:, :, which].reshape(num_tasks, ways * per_class, *image_shape), repeated

    return Task(examples(slice(shots), shots), examples(slice(shots, None), queries))


def augment(key: jax.Array, images: jax.Array, *, downscale: int = 1, flips: bool = False) -> jax.Array:
    """Makes images smaller, and flips them left to right at random.

    Args:
      key: a PRNG key.
      images: `[..., H, W, C]`.
      downscale: the factor by which height and width become smaller. A pixel is the mean of a square of pixels.
      flips: whether every image is flipped with probability 0.5.

    Returns:
      Images `[..., H / downscale, W / downscale, C]`.

    Raises:
      ValueError: if `downscale` does not divide height and width.

    Example:

    >>> images = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> augment(jax.random.key(0), images, downscale=2)[0, :, :, 0].tolist()
    [[2.5, 4.5], [10.5, 12.5]]
    """
    validation.at_least("downscale", downscale, 1)
    *leading, height, width, channels = images.shape
    if height % downscale or width % downscale:
        raise ValueError(f"downscale must divide height and width, {height} and {width}, but got {downscale}.")
    squares = images.reshape(*leading, height // downscale, downscale, width // downscale, downscale, channels)
    images = squares.mean((-4, -2))
    if not flips:
        return images
    flipped = jax.random.bernoulli(key, 0.5, (*leading, 1, 1, 1))
    return jnp.where(flipped, images[..., ::-1, :], images)


def _choose_images(key: jax.Array, counts: tuple[int, ...], shape: EpisodeShape) -> Choice:
    """Chooses the images of one episode; the fields of the result have no axis `T`."""
    ways, shots, queries, rotations, _ = shape
    class_key, example_key, turn_key = jax.random.split(key, 3)
    # Choose the classes and their rotations.
    if rotations == "classes":
        rotated_classes = _draw_distinct(class_key, 4 * len(counts), ways)
        classes, turns = rotated_classes // 4, rotated_classes % 4
    else:
        classes = _draw_distinct(class_key, len(counts), ways)
        turns = jax.random.randint(turn_key, (ways,), 0, 4) if rotations == "random" else jnp.zeros(ways, jnp.int32)
    # Choose the images of each class.
    first = jnp.asarray(_first_images(counts))[classes]
    examples = jax.vmap(lambda key, count: _draw_distinct(key, max(counts), shots + queries, count))(
        jax.random.split(example_key, ways), jnp.asarray(counts, jnp.int32)[classes]
    )
    return Choice(first[:, None] + examples, turns, classes)


def _first_images(counts: tuple[int, ...]) -> np.ndarray:
    return np.cumsum([0, *counts], dtype=np.int32)[:-1]


def _draw_distinct(key: jax.Array, population: int, count: int, limit: jax.Array | None = None) -> jax.Array:
    """Draws `count` distinct indices below `population`, and below `limit` if given, in random order.

    Every index gets a random score; the indices with the largest scores are drawn. Indices that are not below `limit`
    get a score that is smaller than all random scores.
    """
    indices = jnp.arange(population, dtype=jnp.int32)
    scores = jax.random.uniform(key, (population,))
    if limit is not None:
        scores = jnp.where(indices < limit, scores, -1)

    def take_largest(scores: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        index = jnp.where(scores == scores.max(), indices, population).min()
        return jnp.where(indices == index, -2, scores), index

    # XLA cannot partition `lax.top_k` over devices: with `top_k`, each device would draw the tasks of all devices.
    return lax.scan(take_largest, scores, length=count)[1]


def _rotate(images: jax.Array, quarter_turns: jax.Array) -> jax.Array:
    """Rotates `[B, H, W, C]` by `quarter_turns` times 90 degrees."""
    rotations = [lambda x, k=k: jnp.rot90(x, k, axes=(1, 2)) for k in range(4)]
    return jax.lax.switch(quarter_turns, rotations, images)
