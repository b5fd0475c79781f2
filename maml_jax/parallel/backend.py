"""Choices of implementation by backend and sizes: they change the speed of a computation, never its result.

The limits come from measurements on CPUs with AVX2 and AVX-512, and on an H200 for accelerators. TPUs are not measured.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import jax

CACHED_PARAMS = 1 << 14
"""Parameters up to which the tasks of a meta-batch stay in the caches of a CPU core together."""

WINDOW_ENTRIES = 1 << 20
"""Entries of a matrix of windows that stay in the caches of a CPU core, together with the product."""

ACCELERATOR_WINDOW_ENTRIES = 1 << 28
"""The same for an accelerator, limited by its memory: 1 GiB in float32."""

CACHED_OUTPUT = 1 << 19
"""Entries of the output of a convolution up to which it stays in the caches of a CPU core."""

FEW_CHANNELS = 16
"""Channels below which XLA's convolution on a CPU is slow, because its sums are short."""


def task_batch_size(params: Any) -> int | None:
    """Tasks computed together: 1 on a CPU for large models, which keeps its caches warm; None, all, otherwise."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return 1 if jax.default_backend() == "cpu" and size > CACHED_PARAMS else None


def policy_batch_size() -> Literal[1, "all"]:
    """Policies differentiated together: 1 on a CPU, as the thousands of samples of one policy fill its caches."""
    return 1 if jax.default_backend() == "cpu" else "all"


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def convolution(platform: str, operation: str, channels: int, window: Sequence[int], stride: int) -> str:
    """The implementation of an operation of `maml_jax.nets.convolution`.

    Args:
      platform: that the program is compiled for; any name but 'cpu' is an accelerator.
      operation: 'conv', 'input_gradient' or 'kernel_gradient'.
      channels: of the operand that is convolved.
      window: rows and columns of the kernel.
      stride: of the convolution.
    """
    if platform != "cpu":  # One kernel for each task makes a grouped convolution, several times slower on a GPU.
        return "im2col"
    if math.prod(window) * stride == 1:  # A matrix product.
        return "patches"
    fast_in_xla = operation != "kernel_gradient" and stride == 1 and channels >= FEW_CHANNELS
    return "direct" if fast_in_xla else "patches"


def window_batch_size(platform: str) -> int:
    """Entries of a matrix of windows that are computed together; more are computed in a loop."""
    return WINDOW_ENTRIES if platform == "cpu" else ACCELERATOR_WINDOW_ENTRIES


def maps_over_images(images: Sequence[int], channels: int, features: int) -> bool:
    """Whether to compute a convolution one image at a time, which keeps the output in the caches of a CPU core.

    True if the output is large, and few channels make it cheap to recompute.

    Args:
      images: shape `[B, H, W]` of the images.
      channels: C of the images.
      features: of the output.
    """
    large = math.prod(images) * features > CACHED_OUTPUT
    return jax.default_backend() == "cpu" and large and channels < FEW_CHANNELS


def normalises_kernel(entries: int, features: int) -> bool:
    """Whether a convolution normalises its kernel in place of its output.

    True on a CPU if a window has few entries: passes over a large output cost more there than the products that the
    moments take.

    Args:
      entries: of a window, `h * w * C`.
      features: of the output.
    """
    return jax.default_backend() == "cpu" and entries <= features
