"""Tests of the convolution: all implementations have the same values and the same derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from maml_jax.nets import convolution
from maml_jax.nets.convolution import IMPLEMENTATIONS, conv
from maml_jax.parallel import backend

pytestmark = pytest.mark.usefixtures("x64")

SHAPES = [  # height, width, channels in and out, kernel, stride
    (8, 8, 3, 5, 3, 1),
    (7, 5, 2, 3, 3, 2),
    (8, 6, 1, 4, 3, 2),
    (6, 7, 2, 2, 2, 2),
    (5, 5, 2, 3, 1, 1),
    (9, 4, 3, 2, 5, 3),
    (5, 6, 2, 3, 1, 2),
]


def loop(x, kernel, stride):
    """Convolution by definition: each output pixel is a sum over its window. Pixels outside the image are zero."""
    h, w = kernel.shape[:2]
    rows, columns = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    top = max((rows - 1) * stride + h - x.shape[1], 0) // 2
    left = max((columns - 1) * stride + w - x.shape[2], 0) // 2
    padded = np.pad(x, ((0, 0), (top, h), (left, w), (0, 0)))
    out = np.zeros((x.shape[0], rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = padded[:, i * stride : i * stride + h, j * stride : j * stride + w]
            out[:, i, j] = np.tensordot(window, kernel, 3)
    return out


def drawn(shape, tasks=3):
    height, width, channels, features, size, _ = shape
    random = np.random.default_rng(0)
    x = random.standard_normal((tasks, 2, height, width, channels))
    return x, random.standard_normal((tasks, size, size, channels, features))


def through_jax(x, kernel, stride):
    """The convolution of JAX, with its derivatives in JAX."""
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def derivatives(one, x, kernel):
    """First and second derivatives of a sum of sines over tasks, in forward mode and in reverse mode."""

    def energy(x, kernel):
        return jnp.sum(jnp.sin(jax.vmap(one)(x, kernel)))

    def along(x, kernel):
        return sum((g * t).sum() for g, t in zip(gradient(x, kernel), tangents))

    gradient = jax.grad(energy, (0, 1))
    tangents = (jnp.cos(x), jnp.sin(kernel))
    return jax.jit(lambda: (jax.jvp(gradient, (x, kernel), tangents), jax.grad(along, (0, 1))(x, kernel)))()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_a_convolution_at_any_order_and_under_vmap(shape, implementation):
    x, kernel = drawn(shape)
    stride = shape[-1]
    ours = partial(conv, stride=stride, implementation=implementation)
    expected = np.stack([loop(*pair, stride) for pair in zip(x, kernel)])
    np.testing.assert_allclose(jax.jit(jax.vmap(ours))(x, kernel), expected, rtol=1e-12, atol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11),
        derivatives(ours, x, kernel),
        derivatives(partial(through_jax, stride=stride), x, kernel),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_results_do_not_depend_on_groups_of_images(shape, monkeypatch):
    """The groups have one image, the smallest size."""
    x, kernel = drawn(shape)
    one = partial(conv, stride=shape[-1], implementation="patches")
    whole = derivatives(one, x, kernel)
    monkeypatch.setattr(backend, "WINDOW_ENTRIES", 1)
    program = jax.jit(one).lower(x[0], kernel[0]).as_text()
    images_are_windows = shape[4] == shape[5] == 1
    assert ("stablehlo.while" in program) != images_are_windows
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), derivatives(one, x, kernel), whole
    )


def test_groups_that_do_not_divide_the_images(monkeypatch):
    """Seven images with a limit of four form groups of four and three, not of one."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 4, 4, 2)))
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 3, 2, 3)))
    one = partial(conv, implementation="patches")
    expected = derivatives(partial(through_jax, stride=1), x, kernel)
    monkeypatch.setattr(backend, "WINDOW_ENTRIES", 2 * 3 * 16 * 9 * 3)
    geometry = convolution.Geometry((4, 4), (3, 3), 1, 2, backend.WINDOW_ENTRIES)
    assert [convolution.image_groups(7, geometry, channels) for channels in (2, 3)] == [(4, 2), (3, 3)]
    jax.clear_caches()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), derivatives(one, x, kernel), expected
    )


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 2)], ids=["images", "kernels", "both"])
def test_batch_axes_of_one_operand_and_axes_in_the_middle(axes):
    pairs = [jnp.stack([operand, -2 * operand]) for operand in drawn(SHAPES[1])]  # Two batches of three tasks.
    pairs = [pair[0] if axis is None else jnp.moveaxis(pair, 0, axis) for pair, axis in zip(pairs, axes)]

    def each(one):
        def energy(x, kernel):
            return jnp.sum(jnp.sin(one(x, kernel)))

        def linear(x, kernel):  # Its cotangent has no batch axis.
            y = one(x, kernel)
            return jnp.sum(y * np.arange(y.size).reshape(y.shape))

        return [jax.vmap(jax.vmap(jax.value_and_grad(fn, (0, 1))), axes)(*pairs) for fn in (energy, linear)]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12),
        each(partial(conv, stride=2)),
        each(partial(through_jax, stride=2)),
    )


def primitives(jaxpr):
    found = {equation.primitive.name for equation in jaxpr.eqns}
    return found.union(*(primitives(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params)))


def test_derivatives_are_made_of_the_three_primitives():
    x, kernel = drawn(SHAPES[0])
    found = primitives(jax.make_jaxpr(partial(derivatives, conv))(x, kernel).jaxpr)
    assert {name for name in found if "conv" in name or "gradient" in name} == {
        "maml_jax_conv", "maml_jax_input_gradient", "maml_jax_kernel_gradient",
    }  # fmt: skip
    assert not found & {"dot_general", "scatter-add"}


def test_without_compilation():
    x, kernel = (operand[0] for operand in drawn(SHAPES[0]))
    with jax.disable_jit():
        out = conv(x, kernel)
    np.testing.assert_allclose(out, loop(x, kernel, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keeps_low_precision(implementation):
    x, kernel = jnp.ones((1, 6, 6, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 4), jnp.bfloat16)
    out = conv(x, kernel, implementation=implementation)
    assert out.dtype == jnp.bfloat16 and out[0, 2, 2, 0] == 18


def test_many_groups_keep_low_precision(monkeypatch):
    """The sum over 400 groups accumulates in float32: in bfloat16 a sum of ones stops growing at 256."""
    monkeypatch.setattr(backend, "WINDOW_ENTRIES", 1)
    x, kernel = jnp.ones((400, 2, 2, 1), jnp.bfloat16), jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    gradient = jax.grad(lambda kernel: conv(x, kernel, stride=2).astype(jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.bfloat16 and gradient.item() == 400


def test_an_unknown_implementation_raises_an_error():
    with pytest.raises(ValueError, match="patches, direct, im2col, lax, but got 'fft'"):
        conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), implementation="fft")


@pytest.mark.parametrize("stride", [0, -1, 1.5])
def test_wrong_strides_raise_errors(stride):
    with pytest.raises(ValueError, match=f"stride must be an integer of at least 1, but got {stride}"):
        conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), stride=stride)


def test_shapes_that_do_not_fit_raise_errors():
    with pytest.raises(ValueError, match=r"the same C, but got \(1, 4, 4, 1\) and \(3, 3, 2, 1\)"):
        conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 2, 1)))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_implementation_follows_the_target_platform(platform):
    """Small images use matrix products on all platforms. Only the CPU needs barriers."""
    x, kernel = drawn(SHAPES[0])
    program = jax.jit(partial(derivatives, conv)).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.convolution" not in program
    assert "batching_dims = [0] x [0]" in program
    assert ("optimization_barrier" in program) == (platform == "cpu")


def test_an_accelerator_limits_the_windows_computed_together(monkeypatch):
    x, kernel = (operand[0] for operand in drawn(SHAPES[0]))

    def loops():
        lowered = jax.jit(conv).trace(x, kernel).lower(lowering_platforms=("cuda",))
        return "stablehlo.while" in lowered.as_text()

    assert not loops()
    monkeypatch.setattr(backend, "ACCELERATOR_WINDOW_ENTRIES", 1)
    jax.clear_caches()
    assert loops()
