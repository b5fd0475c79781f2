"""Every implementation of the convolution is the same function, with the same derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from maml_jax.nets import convolution, layers, normalisation
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
    """The definition: for each output pixel the sum over its window, zero outside the image."""
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
    """JAX's own convolution, with the derivatives that JAX derives for it."""
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def derivatives(one, x, kernel):
    """First derivatives of a sum of sines over tasks, and second ones in both directions."""

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
def test_in_groups_of_images(shape, monkeypatch):
    """As few windows at a time as there can be: image by image, the result is the same."""
    x, kernel = drawn(shape)
    one = partial(conv, stride=shape[-1], implementation="patches")
    whole = derivatives(one, x, kernel)
    monkeypatch.setattr(backend, "GROUP_OF_WINDOWS", 1)
    program = jax.jit(one).lower(x[0], kernel[0]).as_text()
    images_are_windows = shape[4] == shape[5] == 1
    assert ("stablehlo.while" in program) != images_are_windows
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), derivatives(one, x, kernel), whole
    )


def test_groups_that_do_not_divide_the_images(monkeypatch):
    """Seven images, at most four at a time: four and three, and not one by one."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 4, 4, 2)))
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 3, 2, 3)))
    one = partial(conv, implementation="patches")
    expected = derivatives(partial(through_jax, stride=1), x, kernel)
    monkeypatch.setattr(backend, "GROUP_OF_WINDOWS", 2 * 3 * 16 * 9 * 3)
    geometry = convolution.Geometry((4, 4), (3, 3), 1, 2, backend.GROUP_OF_WINDOWS)
    assert [convolution._groups(7, geometry, channels) for channels in (2, 3)] == [(4, 2), (3, 3)]
    jax.clear_caches()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), derivatives(one, x, kernel), expected
    )


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 2)], ids=["images", "kernels", "both"])
def test_an_axis_of_one_operand_alone_and_axes_that_are_not_in_front(axes):
    pairs = [jnp.stack([operand, -2 * operand]) for operand in drawn(SHAPES[1])]  # Two times three tasks.
    pairs = [pair[0] if axis is None else jnp.moveaxis(pair, 0, axis) for pair, axis in zip(pairs, axes)]

    def each(one):
        def energy(x, kernel):
            return jnp.sum(jnp.sin(one(x, kernel)))

        def linear(x, kernel):  # With a cotangent that has none of the axes.
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


def test_derivatives_stay_in_the_family():
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
    """A sum over 400 groups of bfloat16 that adds up in float32: 400 parts of 1 do not stop growing at 256."""
    monkeypatch.setattr(backend, "GROUP_OF_WINDOWS", 1)
    x, kernel = jnp.ones((400, 2, 2, 1), jnp.bfloat16), jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    gradient = jax.grad(lambda kernel: conv(x, kernel, stride=2).astype(jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.bfloat16 and gradient.item() == 400


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="patches, direct, im2col, lax, but got 'fft'"):
        conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), implementation="fft")


@pytest.mark.parametrize("stride", [0, -1, 1.5])
def test_bad_strides_are_refused(stride):
    with pytest.raises(ValueError, match=f"stride must be an integer of at least 1, but got {stride}"):
        conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), stride=stride)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"the same C, but got \(1, 4, 4, 1\) and \(3, 3, 2, 1\)"):
        conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 2, 1)))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_platform_that_a_program_is_for_decides(platform):
    """Small images: matrix products everywhere; on accelerators a batch of them, with nothing that only a CPU needs."""
    x, kernel = drawn(SHAPES[0])
    program = jax.jit(partial(derivatives, conv)).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.convolution" not in program
    assert "batching_dims = [0] x [0]" in program
    assert ("optimization_barrier" in program) == (platform == "cpu")


def test_an_accelerator_makes_only_so_many_windows_at_once(monkeypatch):
    x, kernel = (operand[0] for operand in drawn(SHAPES[0]))

    def loops():
        lowered = jax.jit(conv).trace(x, kernel).lower(lowering_platforms=("cuda",))
        return "stablehlo.while" in lowered.as_text()

    assert not loops()
    monkeypatch.setattr(backend, "LARGE_GROUP_OF_WINDOWS", 1)
    jax.clear_caches()
    assert loops()


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)])
def test_dense_is_flax_dense(shape):
    import flax.linen as nn

    x = np.random.default_rng(0).standard_normal(shape)
    params = nn.Dense(5).init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, layers.Dense(5).init(jax.random.key(0), x)["params"]
    )

    def second(layer):
        energy = lambda p: jnp.sum(jnp.sin(layer.apply({"params": p}, x)))  # noqa: E731
        along = lambda p: sum(jnp.sum(g * p[name]) for name, g in jax.grad(energy)(p).items())  # noqa: E731
        return layer.apply({"params": params}, x), jax.grad(energy)(params), jax.grad(along)(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
        second(layers.Dense(5)),
        second(nn.Dense(5)),
    )
    without = layers.Dense(5, use_bias=False).init(jax.random.key(0), x)["params"]
    assert list(without) == ["kernel"]


@pytest.mark.parametrize("size", [6, 7])
def test_max_pool_is_reduce_window_with_its_derivative(size):
    import flax.linen as nn

    x = np.random.default_rng(0).standard_normal((2, size, size, 3))
    ours = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(layers.max_pool(x))))(x)
    flax = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(nn.max_pool(x, (2, 2), (2, 2)))))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), ours, flax)


@pytest.mark.parametrize("place", range(4))
def test_max_pool_shows_what_is_not_a_number(place):
    x = np.arange(4.0).reshape(1, 2, 2, 1)
    x.ravel()[place] = np.nan
    assert np.isnan(layers.max_pool(x)).all()


def test_max_pool_takes_one_of_equals():
    gradient = jax.grad(lambda x: layers.max_pool(x).sum())(jnp.ones((1, 4, 4, 1)))
    assert gradient.sum() == 4 and set(np.unique(gradient)) == {0, 1}


@pytest.mark.parametrize(("size", "kind", "features"), [(6, "batch", 4), (7, "instance", 4), (6, "batch", 18)])
def test_pooled_convolution_image_by_image_is_the_same(size, kind, features, monkeypatch):
    """Pooled and normalised images, and second derivatives, in a loop over images and at once."""
    random = np.random.default_rng(0)
    x, params = random.standard_normal((3, size, size, 2)), {"kernel": random.standard_normal((3, 3, 2, features))}
    layer = layers.PooledConv(features)
    norm = normalisation.Norm(kind).bind({"params": {"offset": random.standard_normal(features)}})

    def value_and_derivatives(at_a_time):
        monkeypatch.setattr(backend, "one_image_at_a_time", lambda images, channels, features: at_a_time)

        def apply(params):
            return layer.apply({"params": params}, x, norm)

        def loss(params):
            return jnp.sum(jnp.sin(apply(params)))

        def along(params):
            return (jax.grad(loss)(params)["kernel"] * jnp.cos(params["kernel"])).sum()

        return jax.jit(lambda p: (apply(p), jax.grad(loss)(p), jax.grad(along)(p)))(params)

    whole, looped = value_and_derivatives(False), value_and_derivatives(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), looped, whole)
    # Normalised before the pooling, which is the same.
    expected = layers.max_pool(norm(conv(x, params["kernel"])))
    np.testing.assert_allclose(whole[0], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("size", "stride", "channels", "one_by_one"), [(8, 1, 1, True), (7, 2, 1, False), (8, 2, 3, True)]
)
def test_moments_of_a_convolution_from_its_input(size, stride, channels, one_by_one, x64, monkeypatch):
    """They are those of the output, at any order of derivatives in kernel and images, vmapped over kernels."""
    random = np.random.default_rng(1)
    monkeypatch.setattr(backend, "one_image_at_a_time", lambda images, channels, features: one_by_one)
    x, kernels = random.random((3, size, size, channels)) + 5, random.standard_normal((2, 3, 3, channels, 30))

    def derivatives(moments):
        def scalar(kernel, x):
            mean, variance = moments(kernel, x)
            return jnp.sum(jnp.cos(mean) * jnp.sqrt(variance))

        def along(kernel, x):
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.grad(scalar, (0, 1))(kernel, x))

        return jax.jit(jax.vmap(lambda kernel: (moments(kernel, x), jax.grad(along, (0, 1))(kernel, x))))(kernels)

    got = derivatives(lambda kernel, x: layers.output_moments(x, kernel, stride))
    expected = derivatives(lambda kernel, x: normalisation.of_all(conv(x, kernel, stride=stride)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), got, expected)


def test_moments_lose_nothing_to_a_bright_background():
    """In float32, of images whose mean is far from zero for their variance."""
    random = np.random.default_rng(2)
    x = (random.standard_normal((4, 12, 12, 3)) * 0.001 + 1).astype(np.float32)
    kernel = random.standard_normal((1, 1, 3, 32)).astype(np.float32)
    exact = x.astype(np.float64) @ kernel[0, 0].astype(np.float64)
    got = layers.output_moments(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(got.variance, exact.var((0, 1, 2)), rtol=1e-3)


def test_moments_of_colours_that_a_kernel_hardly_sees():
    """In float32, of grey images with a little colour, by kernels that do not see grey."""
    random = np.random.default_rng(4)
    grey, colour = random.random((4, 12, 12, 1)), random.standard_normal((4, 12, 12, 3))
    x = (grey + 0.02 * colour).astype(np.float32)
    kernel = random.standard_normal((3, 3, 3, 32)).astype(np.float32)
    kernel -= kernel.mean(2, keepdims=True)
    exact = normalisation.of_all(conv(x.astype(np.float64), kernel.astype(np.float64)))
    np.testing.assert_allclose(layers.output_moments(x, kernel).variance, exact.variance, rtol=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_kernel_is_normalised_in_place_of_its_output(stride, x64):
    """A layer given its normalisation is the layer followed by it, for many channels and for few."""
    random = np.random.default_rng(3)
    norm = normalisation.Norm("batch").bind({"params": {"offset": random.standard_normal(32)}})
    for channels in (3, 4):
        x, kernel = random.random((4, 9, 9, channels)), random.standard_normal((3, 3, channels, 32))
        got = layers.Conv(32, stride=stride).apply({"params": {"kernel": kernel}}, x, norm)
        np.testing.assert_allclose(got, norm(conv(x, kernel, stride=stride)), rtol=1e-9, atol=1e-11)
    products = jax.make_jaxpr(lambda x: layers.Conv(32).apply({"params": {"kernel": kernel[:, :, :3]}}, x, norm))
    assert "square" not in str(products(x[..., :3]))  # Which the moments of the output would need.


def test_large_images_are_convolved_one_at_a_time_on_a_cpu_alone(monkeypatch):
    assert backend.one_image_at_a_time((75, 84, 84), 3, 32) and not backend.one_image_at_a_time((20, 28, 28), 3, 16)
    assert backend.normalises_kernel(27, 32) and not backend.normalises_kernel(36, 32)
    assert not backend.one_image_at_a_time((75, 84, 84), 32, 32)  # To make it again would cost more.
    monkeypatch.setattr(backend.jax, "default_backend", lambda: "gpu")
    assert not backend.one_image_at_a_time((75, 84, 84), 3, 32) and not backend.normalises_kernel(27, 32)
