"""Few-shot classification episodes, drawn from images that are held on the device or in host memory.

A batch of episodes is a pure function of (seed, split, step): there is no iterator to keep, and drawing can
be part of the jitted meta-step. It has two parts: `choose` says which images and which way up, `assemble_episodes`
makes episodes of their pixels. Where the pixels are gathered in between is all that differs between images
on the device (`draw_episodes`) and on the host (`host`).
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
"""'random': each class of an episode is turned by a random multiple of 90 degrees, as in the paper's
code. 'classes': each of the four turns of a class is a class of its own, four times as many
(Santoro et al. 2016). 'none': as they are."""
ROTATIONS = ("random", "classes", "none")

Labels = Literal["ways", "classes"]
"""'ways': 0 to N-1 in every episode. 'classes': the number of the class among all of the data's, for joint training."""
LABELS = ("ways", "classes")


@partial(jax.tree_util.register_dataclass, data_fields=["images"], meta_fields=["counts"])
@dataclasses.dataclass(frozen=True, eq=False)
class ImageClasses:
    """Images of the classes of one split, which may differ in size. Pass it to jitted functions as an argument:
    closed over, XLA would fold megabytes of constants.

    The counts are known while tracing, so that impossible episodes are refused there; only the images are traced.
    """

    images: Any
    """uint8 `[n, H, W]` or `[n, H, W, C]`, NumPy's or JAX's: class after class. Episodes give them over 255."""
    counts: tuple[int, ...]
    """Images of each class, which stand together; they sum to `n`."""

    @property
    def first(self) -> np.ndarray:
        """int32 `[classes]`: where in `images` each class begins."""
        return _first(self.counts)

    def select(self, classes: Sequence[int] | np.ndarray) -> "ImageClasses":
        """The classes with these indices, in this order; their images are copied."""
        first = self.first
        rows = [np.arange(first[index], first[index] + self.counts[index]) for index in classes]
        counts = tuple(self.counts[index] for index in classes)
        return ImageClasses(self.images[np.concatenate([np.array([], np.int32), *rows])], counts)


def equal_classes(images: Any) -> ImageClasses:
    """`ImageClasses` from uint8 `[classes, examples, H, W]` or `[classes, examples, H, W, C]`."""
    classes, examples = images.shape[:2]
    return ImageClasses(images.reshape(classes * examples, *images.shape[2:]), (examples,) * classes)


class EpisodeShape(NamedTuple):
    """What an episode consists of."""

    ways: int
    """Classes, N."""
    shots: int
    """Support examples per class, K."""
    queries: int
    """Query examples per class."""
    rotations: Rotations = "none"
    labels: Labels = "ways"

    def check(self, data: ImageClasses, names: Sequence[str] | None = None) -> None:
        """Raises ValueError if `data` does not have the classes or the images for such episodes.

        With the `names` of the classes, the class that has too few images is told by its name.
        """
        for name in ("ways", "shots", "queries"):
            validation.at_least(name, getattr(self, name), 1)
        validation.one_of("rotations", self.rotations, ROTATIONS)
        validation.one_of("labels", self.labels, LABELS)
        if self.rotations != "none" and data.images.shape[1] != data.images.shape[2]:
            raise ValueError(
                f"rotations {self.rotations!r} turn images by 90 degrees, which must be square for that, but these are "
                f"{data.images.shape[1]}x{data.images.shape[2]}: give 'none'."
            )
        classes = len(data.counts) * (4 if self.rotations == "classes" else 1)
        if self.ways > classes:
            raise ValueError(f"ways must be at most the number of classes, {classes}, but got {self.ways}.")
        least, needed = min(data.counts), self.shots + self.queries  # At least one class: ways is at least 1.
        if needed > least:
            smallest = data.counts.index(least)
            more = sum(count < needed for count in data.counts) - 1
            raise ValueError(
                f"shots + queries must be at most {least}, the images of class "
                f"{smallest if names is None else names[smallest]}, but got {self.shots} + {self.queries}: expected at "
                f"least {needed} images in every class, found {least} in this one"
                + (f", and too few in {more} more." if more else ".")
            )


class Choice(NamedTuple):
    """Which images make a batch of episodes, which way up, and of which classes they are."""

    images: jax.Array
    """int32 `[T, N, K+Q]`: indices into the images, support first."""
    turns: jax.Array
    """int32 `[T, N]`: quarter turns of each class; all 0 where `rotations` is 'none'."""
    classes: jax.Array
    """int32 `[T, N]`: their numbers in the data."""


def draw_episodes(key: jax.Array, data: ImageClasses, tasks: int, shape: EpisodeShape) -> Task:
    """Draws a batch of episodes.

    Args:
      key: a PRNG key; fold the split and the step into the seed's to draw anew for each.
      data: the classes to draw from.
      tasks: `T`.
      shape: ways N, shots K, queries Q and rotations.

    Returns:
      Tasks of `(images [T, N*K, H, W, C] in [0, 1], labels [T, N*K])` and the same with N*Q. Examples of a
      class stand together.

    Raises:
      ValueError: while tracing, if the data does not have that many classes or examples.
    """
    shape.check(data)
    choice = choose(key, data.counts, tasks, shape)
    return assemble_episodes(jnp.asarray(data.images)[choice.images], choice, shape)


def choose(key: jax.Array, counts: tuple[int, ...], tasks: int, shape: EpisodeShape) -> Choice:
    """Chooses the images of `tasks` episodes from classes of these `counts`; see `draw_episodes`."""
    return jax.vmap(lambda key: _choose(key, counts, shape))(jax.random.split(key, tasks))


def assemble_episodes(pixels: jax.Array, choice: Choice, shape: EpisodeShape) -> Task:
    """Episodes of chosen pixels, uint8 `[T, N, K+Q, H, W]` or `[T, N, K+Q, H, W, C]`; see `draw_episodes`."""
    ways, shots, queries, rotations, labels = shape
    pixels = jnp.asarray(pixels)[..., None] if pixels.ndim == 5 else jnp.asarray(pixels)
    pixels = pixels if rotations == "none" else jax.vmap(jax.vmap(_turn))(pixels, choice.turns)
    pixels = pixels.astype(jnp.float32) / 255
    tasks, size = pixels.shape[0], pixels.shape[3:]
    numbers = jnp.broadcast_to(jnp.arange(ways, dtype=jnp.int32), (tasks, ways)) if labels == "ways" else choice.classes

    def part(of: slice, per_class: int) -> tuple[jax.Array, jax.Array]:
        repeated = jnp.repeat(jnp.asarray(numbers), per_class, axis=1)
        return pixels[:, :, of].reshape(tasks, ways * per_class, *size), repeated

    return Task(part(slice(shots), shots), part(slice(shots, None), queries))


def _choose(key: jax.Array, counts: tuple[int, ...], shape: EpisodeShape) -> Choice:
    ways, shots, queries, rotations, _ = shape
    class_key, example_key, turn_key = jax.random.split(key, 3)
    if rotations == "classes":
        chosen = _distinct(class_key, 4 * len(counts), ways)
        chosen, turns = chosen // 4, chosen % 4
    else:
        chosen = _distinct(class_key, len(counts), ways)
        turns = jax.random.randint(turn_key, (ways,), 0, 4) if rotations == "random" else jnp.zeros(ways, jnp.int32)
    first = jnp.asarray(_first(counts))[chosen]
    drawn = jax.vmap(lambda key, count: _distinct(key, max(counts), shots + queries, count))(
        jax.random.split(example_key, ways), jnp.asarray(counts, jnp.int32)[chosen]
    )
    return Choice(first[:, None] + drawn, turns, chosen)


def _first(counts: tuple[int, ...]) -> np.ndarray:
    return np.cumsum([0, *counts], dtype=np.int32)[:-1]


def _distinct(key: jax.Array, population: int, count: int, below: jax.Array | None = None) -> jax.Array:
    """`count` different indices below `population` in random order: where the largest of random numbers stand.

    With `below`, all are below that as well: the others lose to every random number.
    """
    places = jnp.arange(population, dtype=jnp.int32)
    scores = jax.random.uniform(key, (population,))
    if below is not None:
        scores = jnp.where(places < below, scores, -1)

    def largest(scores: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        place = jnp.where(scores == scores.max(), places, population).min()
        return jnp.where(places == place, -2, scores), place

    # As `lax.top_k`, which XLA cannot divide over devices: each would draw the tasks of all.
    return lax.scan(largest, scores, length=count)[1]


def _turn(images: jax.Array, quarters: jax.Array) -> jax.Array:
    """Turns `[B, H, W, C]` by `quarters` times 90 degrees."""
    turned = [lambda x, k=k: jnp.rot90(x, k, axes=(1, 2)) for k in range(4)]
    return jax.lax.switch(quarters, turned, images)
