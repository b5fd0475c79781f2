"""A convolution made of three operations that are each other's derivatives.

A convolution is linear in the images and linear in the kernel. It sums over triples of an image pixel, a kernel entry
and an output pixel, and so do its two derivatives:

    conv(x, kernel) -> y                sums over image pixels
    input_gradient(y, kernel) -> x      sums over output pixels
    kernel_gradient(x, y) -> kernel     sums over image and output pixels

Every derivative of these operations, of any order and in forward or reverse mode, consists of the same three
operations. In this module each operation is a JAX primitive with several implementations. In meta-learning the
gradients are most of the work, and every task has different kernels. The derivatives of XLA's convolution can then take
a hundred times longer than their arithmetic requires.

Dimensions: `B` images of `H x W` with `C` channels, kernels of `h x w`, outputs of `H' x W'` with `D` features. The
operands of the primitives have a leading axis `G`, one entry per kernel. `vmap` over tasks extends this axis.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from maml_jax import validation
from maml_jax.parallel import backend

ImplementationName = Literal["patches", "direct", "im2col", "lax"]


def conv(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, implementation: ImplementationName | None = None
) -> jax.Array:
    """Two-dimensional convolution with 'SAME' padding and no bias, differentiable at any order.

    Inside `jax.shard_map`, this function needs `check_vma=False`. `maml` sets this option if it has a mesh.

    Example:
      >>> import jax.numpy as jnp
      >>> images, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
      >>> print(conv(images, kernel, stride=2)[0, :, :, 0])
      [[9. 6.]
       [6. 4.]]

    Args:
      x: images `[B, H, W, C]`.
      kernel: `[h, w, C, D]`.
      stride: distance between windows, in both directions. 'SAME' pads as in TensorFlow and XLA: the output has
        `ceil(H / stride)` rows, and odd padding is larger at the end.
      implementation: a name in `IMPLEMENTATIONS`; None chooses by backend and shapes.

    Returns:
      `[B, ceil(H / stride), ceil(W / stride), D]`.

    Raises:
      ValueError: for an unknown implementation, a stride below 1, and shapes that do not fit.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, but got {implementation!r}.")
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"conv takes images [B, H, W, C] and a kernel [h, w, C, D] with the same C, but got {x.shape} and "
            f"{kernel.shape}."
        )
    validation.at_least("stride", stride, 1)
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    geometry = Geometry((x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1]), stride)
    # Add the axis G with one kernel. vmap extends this axis.
    x, kernel = x.astype(dtype)[None], kernel.astype(dtype)[None]
    return conv_p.bind(x, kernel, geometry=geometry, implementation=implementation)[0]


def windows(x: jax.Array, window: tuple[int, ...], stride: int = 1) -> jax.Array:
    """Extracts the window of each output pixel of a convolution.

    Args:
      x: images `[B, H, W, C]`.
      window: rows and columns of the kernel, `(h, w)`.
      stride: as for `conv`.

    Returns:
      `[B, H', W', h * w * C]`. Pixels outside the image are zero.
    """
    return _windows(x, Geometry((x.shape[1], x.shape[2]), (window[0], window[1]), stride))


class Geometry(NamedTuple):
    """Sizes that the three operations share."""

    image: tuple[int, int]
    """Rows and columns of `x`."""
    window: tuple[int, int]
    """Rows and columns of the kernel."""
    stride: int
    """Distance between windows, in both directions."""
    kernels: int = 1
    """Size of the axis `G`, over which an implementation is mapped."""
    window_batch_size: int = 0
    """Largest number of window entries to compute at once, over all kernels. A group has at least one image."""

    @property
    def output(self) -> tuple[int, int]:
        """Rows and columns of `y`."""
        return -(-self.image[0] // self.stride), -(-self.image[1] // self.stride)

    @property
    def pads(self) -> list[tuple[int, int]]:
        """Padding before and after the rows and the columns of `x`."""
        return lax.padtype_to_pads(self.image, self.window, (self.stride, self.stride), "SAME")


class Implementation(NamedTuple):
    """The three operations for one kernel: `x [B, H, W, C]`, `kernel [h, w, C, D]`, `y [B, H', W', D]`."""

    conv: Callable[[jax.Array, jax.Array, Geometry], jax.Array]
    input_gradient: Callable[[jax.Array, jax.Array, Geometry], jax.Array]
    kernel_gradient: Callable[[jax.Array, jax.Array, Geometry], jax.Array]


# --- Implementation with matrix products. The rows of one operand are the windows of the images. A loop runs over
# groups of images whose windows fit into the caches of a CPU core, or into the memory of an accelerator.


def _in_groups(fn: Callable[..., jax.Array], geometry: Geometry, channels: int, x: jax.Array) -> jax.Array:
    """Applies `fn` to groups of images and concatenates the results."""
    count, groups = image_groups(len(x), geometry, channels)
    if groups == 1:
        return fn(x)
    out = lax.map(fn, _split_into_groups(x, count, groups))
    return out.reshape(-1, *out.shape[2:])[: len(x)]


def image_groups(images: int, geometry: Geometry, channels: int) -> tuple[int, int]:
    """Images in a group, and the number of groups; the last group may have fewer images."""
    if math.prod(geometry.window) * geometry.stride == 1:  # The images are their own windows.
        return images, 1
    entries = math.prod((*geometry.output, *geometry.window, channels))
    largest = max(1, min(images, geometry.window_batch_size // (entries * geometry.kernels)))
    count = max(n for n in range(1, largest + 1) if images % n == 0)
    if 2 * count < largest:  # Equal groups would be much smaller than allowed.
        count = largest
    return count, -(-images // count)


def _split_into_groups(x: jax.Array, count: int, groups: int) -> jax.Array:
    """`[B, ...] -> [groups, count, ...]`, padded with zeros. All three operations map zeros to zeros."""
    padded = jnp.pad(x, ((0, count * groups - len(x)), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(groups, count, *x.shape[1:])


def _windows(x: jax.Array, geometry: Geometry) -> jax.Array:
    """`[B, H, W, C] -> [B, H', W', h * w * C]`."""
    (height, width), (rows, columns), stride = geometry.window, geometry.output, geometry.stride
    x = jnp.pad(x, ((0, 0), *geometry.pads, (0, 0)))
    shifted = [
        lax.slice(
            x,
            (0, i, j, 0),
            (x.shape[0], i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, x.shape[3]),
            (1, stride, stride, 1),
        )
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(shifted, -1)


def _patches_conv(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    rows = kernel.reshape(-1, kernel.shape[3])
    return _in_groups(lambda x: _windows(x, geometry) @ rows, geometry, x.shape[3], x)


def _from_windows(windows: jax.Array, geometry: Geometry) -> jax.Array:
    """The transpose of `_windows`: sums the window entries of each pixel, `[B, H', W', h * w * C] -> [B, H, W, C]`.

    Pixels with the same position modulo the stride form a smaller image without gaps. The entries are summed for each
    smaller image, and the smaller images are interlaced.
    """
    (height, width), (rows, columns), stride = geometry.window, geometry.output, geometry.stride
    windows = windows.reshape(*windows.shape[:3], height, width, -1)
    more_rows, more_columns = (height - 1) // stride, (width - 1) // stride

    def summed(row: int, column: int) -> jax.Array:
        entries = [(i, j) for i in range(row, height, stride) for j in range(column, width, stride)]
        shifted = []
        for i, j in entries:
            down, right = i // stride, j // stride
            pads = ((0, 0), (down, more_rows - down), (right, more_columns - right), (0, 0))
            shifted.append(jnp.pad(windows[:, :, :, i, j], pads))
        if not entries:  # A stride larger than the window skips pixels.
            shape = (len(windows), rows + more_rows, columns + more_columns, windows.shape[5])
            return jnp.zeros(shape, windows.dtype)
        return functools.reduce(jnp.add, shifted)

    x = jnp.stack([jnp.stack([summed(i, j) for j in range(stride)], 3) for i in range(stride)], 2)
    x = x.reshape(len(x), x.shape[1] * stride, x.shape[3] * stride, -1)
    cuts = [
        (-before, before + size - have) for (before, _), size, have in zip(geometry.pads, geometry.image, x.shape[1:3])
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*cut, 0) for cut in cuts), (0, 0, 0)))


def _patches_input_gradient(y: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    columns = kernel.reshape(-1, kernel.shape[3]).T
    return _in_groups(lambda y: _from_windows(y @ columns, geometry), geometry, kernel.shape[2], y)


def _patches_kernel_gradient(x: jax.Array, y: jax.Array, geometry: Geometry, transpose: bool = True) -> jax.Array:
    count, groups = image_groups(len(x), geometry, x.shape[3])
    if groups == 1:
        rows = _product_with_windows(x, y, geometry, transpose)
    else:

        def add_group(total: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            x, y = group
            return total + _product_with_windows(x, y, geometry, transpose), None

        wide = jnp.promote_types(x.dtype, jnp.float32)  # A sum of many groups in bfloat16 would stop growing.
        zeros = jnp.zeros((y.shape[3], math.prod(geometry.window) * x.shape[3]), wide)
        parts = tuple(_split_into_groups(operand, count, groups) for operand in (x, y))
        rows = lax.scan(add_group, zeros, parts)[0].astype(x.dtype)
    return rows.T.reshape(*geometry.window, x.shape[3], y.shape[3])


def _product_with_windows(x: jax.Array, y: jax.Array, geometry: Geometry, transpose: bool) -> jax.Array:
    """The gradient of the kernel as `[D, h * w * C]`."""
    windows = _windows(x, geometry)
    windows, y = windows.reshape(-1, windows.shape[3]), y.reshape(-1, y.shape[3])
    # XLA's CPU backend is slow for a product that sums over the rows of both operands. Transpose one operand, with a
    # barrier so that XLA does not undo the transpose. With few channels the transpose costs more than it saves.
    if not transpose or windows.shape[1] < y.shape[1]:
        return (windows.T @ y).T
    if geometry.kernels > 1:
        return (lax.optimization_barrier(windows.T) @ y).T
    # One kernel: transpose y, the smaller operand. The product is already transposed; a second barrier keeps it so. For
    # several kernels, XLA's CPU compiler would choose a layout that it does not implement, and abort the process.
    return lax.optimization_barrier(lax.optimization_barrier(y.T) @ windows)


# --- Implementation with XLA's convolution, and its derivatives in JAX.


def _lax_conv(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    strides = (geometry.stride, geometry.stride)
    return lax.conv_general_dilated(x, kernel, strides, geometry.pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _lax_input_gradient(y: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    x = jax.ShapeDtypeStruct((len(y), *geometry.image, kernel.shape[2]), y.dtype)
    return jax.linear_transpose(lambda x: _lax_conv(x, kernel, geometry), x)(y)[0]


def _lax_kernel_gradient(x: jax.Array, y: jax.Array, geometry: Geometry) -> jax.Array:
    kernel = jax.ShapeDtypeStruct((*geometry.window, x.shape[3], y.shape[3]), y.dtype)
    return jax.linear_transpose(lambda kernel: _lax_conv(x, kernel, geometry), kernel)(y)[0]


# --- The input gradient as a forward convolution of XLA, which is fast on a CPU for stride 1 and enough channels.


def _direct_input_gradient(y: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    # The barrier keeps XLA from merging the flip into the convolution: XLA has no fast code for the merged form.
    flipped = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    # Pad the dilated y so that the result has the size of the image.
    pads = []
    for size, rows, window, (before, _) in zip(geometry.image, geometry.output, geometry.window, geometry.pads):
        before = window - 1 - before
        pads.append((before, size + window - 1 - before - ((rows - 1) * geometry.stride + 1)))
    return lax.conv_general_dilated(
        y,
        flipped,
        (1, 1),
        pads,
        lhs_dilation=(geometry.stride, geometry.stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


IMPLEMENTATIONS: dict[str, Implementation] = {
    "patches": Implementation(_patches_conv, _patches_input_gradient, _patches_kernel_gradient),
    "direct": Implementation(_lax_conv, _direct_input_gradient, _patches_kernel_gradient),
    "im2col": Implementation(
        _patches_conv, _patches_input_gradient, partial(_patches_kernel_gradient, transpose=False)
    ),
    "lax": Implementation(_lax_conv, _lax_input_gradient, _lax_kernel_gradient),
}


# --- The primitives.


class _Merge(NamedTuple):
    """Axes of the operand and of the result that a batch axis is merged into, if only this operand has a batch axis."""

    operand: int
    result: int


def _primitive(name: str, first: _Merge, second: _Merge) -> Primitive:
    """A primitive on operands with a leading axis `G`, with parameters `geometry` and `implementation`.

    Args:
      name: a field of `Implementation`.
      first, second: the axes to merge a batch axis into, if only the first or only the second operand has one.
    """
    primitive = Primitive(f"maml_jax_{name}")

    def compute(
        a: jax.Array, b: jax.Array, *, geometry: Geometry, implementation: ImplementationName | None, platform: str
    ) -> jax.Array:
        channels = b.shape[3] if name == "input_gradient" else a.shape[4]
        chosen = implementation or backend.convolution(platform, name, channels, geometry.window, geometry.stride)
        geometry = geometry._replace(kernels=len(a), window_batch_size=backend.window_batch_size(platform))
        one = partial(getattr(IMPLEMENTATIONS[chosen], name), geometry=geometry)
        # No vmap for one kernel: products of plain matrices run faster.
        return one(a[0], b[0])[None] if len(a) == 1 else jax.vmap(one)(a, b)

    def shape(a: Any, b: Any, *, geometry: Geometry, implementation: ImplementationName | None) -> Any:
        one = partial(getattr(IMPLEMENTATIONS["lax"], name), geometry=geometry)
        out = jax.eval_shape(jax.vmap(one), *(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in (a, b)))
        return a.update(shape=out.shape, dtype=out.dtype, weak_type=False)

    def batch(operands: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
        if None not in axes:  # Both operands are batched: more kernels, along G.
            operands = [jnp.moveaxis(operand, axis, 0) for operand, axis in zip(operands, axes)]
            count = len(operands[0])
            out = primitive.bind(*(operand.reshape(-1, *operand.shape[2:]) for operand in operands), **params)
            return out.reshape(count, -1, *out.shape[1:]), 0
        # One operand is batched: merge the batch axis into an axis of this operand, and split an axis of the result.
        batched = axes.index(None) ^ 1
        merge = (first, second)[batched]
        operand = jnp.moveaxis(operands[batched], axes[batched], merge.operand)
        before, (count, _, *after) = operand.shape[: merge.operand], operand.shape[merge.operand :]
        operand = operand.reshape(*before, -1, *after)
        out = primitive.bind(*((operand, operands[1]) if batched == 0 else (operands[0], operand)), **params)
        before, (_, *after) = out.shape[: merge.result], out.shape[merge.result :]
        return out.reshape(*before, count, -1, *after), merge.result

    compiled = jax.jit(compute, static_argnames=("geometry", "implementation", "platform"))
    primitive.def_impl(lambda a, b, **params: compiled(a, b, platform=jax.default_backend(), **params))
    primitive.def_abstract_eval(shape)
    batching.primitive_batchers[primitive] = batch
    for platform in ("cpu", None):
        lowered = mlir.lower_fun(partial(compute, platform=platform or "accelerator"), multiple_results=False)
        mlir.register_lowering(primitive, lowered, platform=platform)
    return primitive


# Axes: x [G, B, H, W, C], kernel [G, h, w, C, D], y [G, B, H', W', D]. If only images are batched, the batch axis is
# merged into B. If only kernels are batched, the batch axis is merged into C or D.
conv_p = _primitive("conv", first=_Merge(1, 1), second=_Merge(4, 4))
input_gradient_p = _primitive("input_gradient", first=_Merge(1, 1), second=_Merge(3, 4))
kernel_gradient_p = _primitive("kernel_gradient", first=_Merge(4, 3), second=_Merge(4, 4))


# The derivatives: the transposes of each operation with respect to its first and its second operand.
ad.defbilinear(
    conv_p,
    lambda y, x, kernel, **params: input_gradient_p.bind(y, kernel, **params),
    lambda y, x, kernel, **params: kernel_gradient_p.bind(x, y, **params),
)
ad.defbilinear(
    input_gradient_p,
    lambda x, y, kernel, **params: conv_p.bind(x, kernel, **params),
    lambda x, y, kernel, **params: kernel_gradient_p.bind(x, y, **params),
)
ad.defbilinear(
    kernel_gradient_p,
    lambda kernel, x, y, **params: input_gradient_p.bind(y, kernel, **params),
    lambda kernel, x, y, **params: conv_p.bind(x, kernel, **params),
)
