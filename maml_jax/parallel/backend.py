"""The one place where the backend and the sizes decide how something is computed; what is computed is the same.

The bounds are from measurements on CPUs with AVX2 and with AVX-512; the choices for accelerators from an H200, and
for TPUs they are not measured.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import jax

LARGE_PARAMS = 1 << 14
"""Parameters beyond which tasks side by side leave a core's caches."""

GROUP_OF_WINDOWS = 1 << 20
"""Entries of a matrix of windows that a core's caches hold, with what is made of it."""

LARGE_GROUP_OF_WINDOWS = 1 << 28
"""The same for an accelerator, whose memory is the bound: a GiB in float32."""

LARGE_OUTPUT = 1 << 19
"""Entries of a convolution that a core's caches no longer hold, with what is made of it."""

FEW_CHANNELS = 16
"""Below this, XLA's convolution on a CPU has too short sums to be fast."""


def task_batch_size(params: Any) -> int | None:
    """How many tasks are computed together: one keeps a CPU's caches warm, an accelerator wants all (None)."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return 1 if jax.default_backend() == "cpu" and size > LARGE_PARAMS else None


def policy_batch_size() -> Literal[1, "all"]:
    """How many policies are differentiated together: the thousands of steps of each fill a CPU's caches alone."""
    return 1 if jax.default_backend() == "cpu" else "all"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def convolution(platform: str, operation: str, channels: int, window: Sequence[int], stride: int) -> str:
    """The implementation of one operation of `maml_jax.nets.convolution`, for the platform that is compiled for."""
    if platform != "cpu":  # Kernels of every task become grouped convolutions, which take a GPU several times as long.
        return "im2col"
    if math.prod(window) * stride == 1:  # A product of matrices as it is.
        return "patches"
    fast_in_xla = operation != "kernel_gradient" and stride == 1 and channels >= FEW_CHANNELS
    return "direct" if fast_in_xla else "patches"


def windows_at_once(platform: str) -> int:
    """Entries of a matrix of windows that are made at once, the rest in a loop after them."""
    return GROUP_OF_WINDOWS if platform == "cpu" else LARGE_GROUP_OF_WINDOWS


def one_image_at_a_time(images: Sequence[int], channels: int, features: int) -> bool:
    """Whether the convolution of images `[B, H, W]` is made image by image, for the caches' sake.

    Where it is the largest array of all, and with so few channels that making it again costs little.
    """
    large = math.prod(images) * features > LARGE_OUTPUT
    return jax.default_backend() == "cpu" and large and channels < FEW_CHANNELS


def normalises_kernel(entries: int, features: int) -> bool:
    """Whether a layer of windows of so many entries normalises its kernel in place of its output.

    On a CPU, where passes over a large output cost more than the products of so few entries.
    """
    return jax.default_backend() == "cpu" and entries <= features
