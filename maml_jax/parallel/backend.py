"""Choices of implementation by backend and sizes. They change the speed of a computation, but not the result.

The limits come from measurements on CPUs with AVX2 and AVX-512, and on an H200 for accelerators. TPUs are not measured.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import jax

CACHED_PARAMS = 1 << 14
"""Largest number of parameters with which all tasks of a meta-batch fit into the caches of a CPU core."""

WINDOW_ENTRIES = 1 << 20
"""Largest number of entries of a matrix of windows that fits into the caches of a CPU core with its product."""

ACCELERATOR_WINDOW_ENTRIES = 1 << 28
"""Largest number of entries of a matrix of windows on an accelerator: 1 GiB of its memory in float32."""

CACHED_OUTPUT = 1 << 19
"""Largest number of entries of the output of a convolution that fits into the caches of a CPU core."""

FEW_CHANNELS = 16
"""Number of channels below which XLA's convolution is slow on a CPU, because it sums over few entries."""


def task_batch_size(params: Any) -> int | None:
    """Number of tasks to compute together: 1 for large models on a CPU, to keep a task in cache; None means all."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return 1 if jax.default_backend() == "cpu" and size > CACHED_PARAMS else None


def policy_batch_size() -> Literal[1, "all"]:
    """Number of policies to differentiate together: 1 on a CPU, because the samples of one policy fill its caches."""
    return 1 if jax.default_backend() == "cpu" else "all"


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def convolution(platform: str, operation: str, channels: int, window: Sequence[int], stride: int) -> str:
    """The implementation of an operation of `maml_jax.nets.convolution`.

    Args:
      platform: target platform of the program; any name but 'cpu' is an accelerator.
      operation: 'conv', 'input_gradient' or 'kernel_gradient'.
      channels: channels of the operand that is convolved.
      window: rows and columns of the kernel.
      stride: stride of the convolution.
    """
    if platform != "cpu":  # XLA's grouped convolution, with one kernel per task, is several times slower on a GPU.
        return "im2col"
    if math.prod(window) * stride == 1:  # A matrix product.
        return "patches"
    fast_in_xla = operation != "kernel_gradient" and stride == 1 and channels >= FEW_CHANNELS
    return "direct" if fast_in_xla else "patches"


def window_batch_size(platform: str) -> int:
    """Largest number of entries of a matrix of windows to compute at once. A loop computes larger matrices."""
    return WINDOW_ENTRIES if platform == "cpu" else ACCELERATOR_WINDOW_ENTRIES


def maps_over_images(images: Sequence[int], channels: int, features: int) -> bool:
    """Whether to compute a convolution one image at a time, which keeps the output in the caches of a CPU core.

    True on a CPU if the output is large and the images have few channels, which makes the output cheap to recompute.

    Args:
      images: shape `[B, H, W]` of the images.
      channels: channels C of the images.
      features: features D of the output.
    """
    large = math.prod(images) * features > CACHED_OUTPUT
    return jax.default_backend() == "cpu" and large and channels < FEW_CHANNELS


def normalises_kernel(entries: int, features: int) -> bool:
    """Whether a convolution normalises its kernel in place of its output.

    True on a CPU if a window has few entries: passes over the output then take longer than the matrix products that
    compute the moments.

    Args:
      entries: number of entries of a window, `h * w * C`.
      features: features D of the output.
    """
    return jax.default_backend() == "cpu" and entries <= features
