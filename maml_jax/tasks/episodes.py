"""Few-shot classification episodes, drawn on the device from images that are held there.

A batch of episodes is a pure function of (seed, split, step): there is no iterator to keep, the host
does nothing, and drawing can be part of the jitted meta-step.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from maml_jax import validation
from maml_jax.types import Task

Rotations = Literal["random", "classes", "none"]
"""'random': each class of an episode is turned by a random multiple of 90 degrees, as in the paper's
code. 'classes': each of the four turns of a class is a class of its own, four times as many
(Santoro et al. 2016). 'none': as they are."""
ROTATIONS = ("random", "classes", "none")


class ImageClasses(NamedTuple):
    """Images of the classes of one split. Pass it to jitted functions as an argument: closed over, XLA
    would fold 25 MB of constants."""

    images: jax.Array
    """uint8 `[classes, examples, H, W]` or `[classes, examples, H, W, C]`."""


class EpisodeShape(NamedTuple):
    """What an episode consists of."""

    ways: int
    """Classes, N."""
    shots: int
    """Support examples per class, K."""
    queries: int
    """Query examples per class."""
    rotations: Rotations = "none"

    def check(self, data: ImageClasses) -> None:
        """Raises ValueError if `data` does not have the classes or the examples for such episodes."""
        for name in ("ways", "shots", "queries"):
            validation.at_least(name, getattr(self, name), 1)
        validation.one_of("rotations", self.rotations, ROTATIONS)
        classes, examples = data.images.shape[:2]
        classes *= 4 if self.rotations == "classes" else 1
        if self.ways > classes:
            raise ValueError(f"ways must be at most the number of classes, {classes}, but got {self.ways}.")
        if self.shots + self.queries > examples:
            raise ValueError(
                f"shots + queries must be at most {examples}, the number of examples of a class, but got "
                f"{self.shots} + {self.queries}."
            )


def draw_episodes(key: jax.Array, data: ImageClasses, tasks: int, shape: EpisodeShape) -> Task:
    """Draws a batch of episodes.

    Args:
      key: a PRNG key; fold the split and the step into the seed's to draw anew for each.
      data: the classes to draw from.
      tasks: `T`.
      shape: ways N, shots K, queries Q and rotations.

    Returns:
      Tasks of `(images [T, N*K, H, W, C] in [0, 1], labels [T, N*K])` and the same with N*Q. Paper is
      0 and ink is 1 (the bytes are inverted). Examples of a class stand together, labels 0 to N-1.

    Raises:
      ValueError: while tracing, if the data does not have that many classes or examples.
    """
    shape.check(data)
    images = jnp.asarray(data.images)
    return jax.vmap(lambda key: _draw_episode(key, images, shape))(jax.random.split(key, tasks))


def _draw_episode(key: jax.Array, images: jax.Array, shape: EpisodeShape) -> Task:
    ways, shots, queries, rotations = shape
    class_key, example_key, turn_key = jax.random.split(key, 3)
    classes, examples = images.shape[:2]
    if rotations == "classes":
        chosen = _distinct(class_key, 4 * classes, ways)
        chosen, turns = chosen // 4, chosen % 4
    else:
        chosen = _distinct(class_key, classes, ways)
        turns = jax.random.randint(turn_key, (ways,), 0, 4)
    drawn = jax.vmap(lambda key: _distinct(key, examples, shots + queries))(jax.random.split(example_key, ways))
    picked = images[chosen[:, None], drawn]
    picked = picked if images.ndim == 5 else picked[..., None]
    picked = picked if rotations == "none" else jax.vmap(_turn)(picked, turns)
    pixels = 1 - picked.astype(jnp.float32) / 255
    labels = jnp.arange(ways, dtype=jnp.int32)

    def part(of: slice, per_class: int):
        return pixels[:, of].reshape(-1, *pixels.shape[2:]), jnp.repeat(labels, per_class)

    return Task(part(slice(shots), shots), part(slice(shots, None), queries))


def _distinct(key: jax.Array, population: int, count: int) -> jax.Array:
    """`count` different indices below `population` in random order: where the largest of random numbers stand."""
    return jax.lax.top_k(jax.random.uniform(key, (population,)), count)[1]


def _turn(images: jax.Array, quarters: jax.Array) -> jax.Array:
    """Turns `[B, H, W, C]` by `quarters` times 90 degrees."""
    turned = [lambda x, k=k: jnp.rot90(x, k, axes=(1, 2)) for k in range(4)]
    return jax.lax.switch(quarters, turned, images)
