"""Every method learns real characters. Outer rates and tasks of the methods."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.few_shot import initial, save, small_run

from experiments import miniimagenet, omniglot
from experiments.few_shot import methods, testing
from experiments.few_shot.names import Method
from maml_jax.runs import model_file
from maml_jax.tasks import host_memory
from maml_jax.tasks.episodes import augment
from maml_jax.tasks.fixed import fixed_tasks
from maml_jax.training import many_steps

METHODS = Method.__args__


@pytest.mark.parametrize(
    "method, order, normalisation",
    [*((method, 2, "batch") for method in METHODS), ("maml", 1, "batch"), ("maml", 2, "running")],
)
def test_every_method_learns_real_characters(method, order, normalisation, characters, tmp_path, monkeypatch):
    """A few meta-steps raise the accuracy of a small net by more than three standard errors."""
    monkeypatch.setattr(methods, "HIDDEN", (64, 32))
    options = {"inner_rate": 0.2 if method == "imaml" else 1.0, "queries": 5, "tasks": 8}
    if method != "reptile":
        options["outer_rate"] = 2e-3 if method == "imaml" else 5e-3
    run = small_run(
        tmp_path,
        method=method,
        order=order,
        normalisation=normalisation,
        steps={"pretrained": 200, "reptile": 200, "anil": 200, "imaml": 150}.get(method, 60),
        **options,
    )
    learner, state = initial(run, len(characters.train.counts) if method == "pretrained" else None)
    tasks = fixed_tasks(jax.random.key(1), characters.test, 200, run.shape)
    train_tasks = fixed_tasks(jax.random.key(3), characters.train, 50, run.shape)

    def accuracy(state):
        finished = testing.finished(run, state, train_tasks, run.inner_steps)
        protocol = testing.protocol(run, characters, "test", 200)
        found = testing.evaluate([(run, finished)], tasks, protocol, steps=run.inner_steps)
        # The accuracy of validation, which evaluates only the last step, is the same.
        last = testing.accuracy(run, finished, tasks(), run.inner_steps)
        assert last == pytest.approx(found.accuracy[:, -1].mean(), abs=1e-3)
        return found.accuracy[:, -1]

    draw, data = methods.draw_tasks(run, characters.train, jax.random.key(2))
    after, metrics, _ = jax.jit(many_steps(learner, draw))(state, data, run.steps, False)
    assert np.isfinite(metrics["loss"])
    assert np.abs(after.params["Norm_0"]["offset"]).max() > 0  # The whole net is meta-learned.
    better = accuracy(after) - accuracy(state)
    assert better.mean() > 3 * better.std() / np.sqrt(200), (better.mean(), better.std())


def test_joint_training_draws_equal_tasks_from_device_and_host_memory(characters, tmp_path, monkeypatch):
    run = small_run(tmp_path, method="pretrained", tasks=2)
    draw, data = methods.draw_tasks(run, characters.train, jax.random.key(3))
    on_device = jax.jit(draw)(data, 7)
    monkeypatch.setattr(host_memory, "fits_on_device", lambda size: False)
    draw, choose = methods.draw_tasks(run, characters.train, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, on_device, jax.jit(draw)(choose(7, 1), 7))
    numbers = np.asarray(on_device.support[1])
    assert numbers.shape == (2, 64) and all(len(set(row)) == 64 for row in numbers) and numbers.max() > 500


@pytest.mark.parametrize(
    "method, anneal, falls", [("maml", False, False), ("maml", True, True), ("maml++", False, True)]
)
def test_the_outer_rate_decays_if_annealed(method, anneal, falls):
    """The rate falls to 1% along a cosine over all meta-steps. Adam's steps under a constant gradient show the rate."""
    steps = 10
    run = omniglot.Run(method=method, anneal=anneal, outer_rate=1e-2, steps=steps).resolved()
    outer = methods.outer_optimizer(run)
    weight, moved = jnp.float32(0), []
    state = outer.init(weight)
    for _ in range(steps + 1):
        update, state = outer.update(jnp.float32(3.0), state, weight)
        moved.append(-float(update))
    cosine = 0.01 + 0.99 * (1 + np.cos(np.pi * np.arange(steps + 1) / steps)) / 2
    np.testing.assert_allclose(moved, 1e-2 * cosine if falls else np.full(steps + 1, 1e-2), rtol=1e-4)


def test_the_outer_rate_of_each_step():
    constant, annealed, reptile = (
        methods.outer_rate(omniglot.Run(steps=100, **options).resolved())
        for options in ({}, {"anneal": True}, {"method": "reptile"})
    )
    assert constant == 1e-3 and annealed(0) == pytest.approx(1e-3) and annealed(100) == pytest.approx(1e-5)
    assert reptile(0) == 0.5 and reptile(50) == 0.25


def test_muon_updates_the_kernels_of_convolutions_alone():
    run = omniglot.Run(optimizer="muon", outer_rate=0.1).resolved()
    random = np.random.default_rng(0)
    shapes = {"Conv_0": {"kernel": (3, 3, 4, 8)}, "head": {"kernel": (8, 5), "bias": (5,)}}
    params = jax.tree.map(
        lambda shape: jnp.asarray(random.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )

    def first_update(outer):
        return outer.update(params, outer.init(params), params)[0]

    muon, nesterov_adam = first_update(methods.outer_optimizer(run)), first_update(optax.nadam(0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), muon["head"], nesterov_adam["head"])
    # A matrix whose singular values are nearly equal, as large as 0.2 times the rate on average over the entries.
    kernel = np.asarray(muon["Conv_0"]["kernel"]).reshape(-1, 8)
    values = np.linalg.svd(kernel, compute_uv=False)
    assert values.max() / values.min() < 2 and np.sqrt(np.square(kernel).mean()) == pytest.approx(0.02, rel=0.3)


def test_one_step_trains_on_tasks_of_other_ways_at_rates_that_fit(characters, tmp_path, small_net):
    """The mean loss of twice as many classes: the same update of each class at twice the rate."""
    options = {"method": "one-step", "train_ways": 10, "train_shots": 2, "train_queries": 4, "tasks": 3}
    run = small_run(tmp_path, inner_rate=0.5, head_rates=(3.0,), **options)
    draw, data = methods.draw_tasks(run, characters.train, jax.random.key(0))
    tasks = jax.jit(draw)(data, 0)
    assert tasks.support[0].shape == (3, 20, 28, 28, 1) and tasks.query[0].shape == (3, 40, 28, 28, 1)
    learner, state = initial(run)
    doubled = small_run(tmp_path, inner_rate=1.0, head_rates=(6.0,), **options, ways=10)
    other, own = initial(doubled)
    (after, info), (expected, same) = jax.jit(learner.step)(state, tasks), jax.jit(other.step)(own, tasks)
    np.testing.assert_allclose(info.loss, same.loss, rtol=1e-6)
    assert state.params["head"]["bias"].shape == (5,) and own.params["head"]["bias"].shape == (10,)
    for layer in ("Dense_0", "Norm_0"):
        jax.tree.map(np.testing.assert_allclose, after.params[layer], expected.params[layer])


def test_images_of_training_are_downscaled_and_flipped(characters, tmp_path):
    plain, other = (
        omniglot.Run(method="one-step", tasks=2, **options).resolved()
        for options in ({}, {"downscale": 2, "flips": True})
    )
    key = jax.random.key(3)
    drawn = []
    for run in (plain, other):
        draw, data = methods.draw_tasks(run, characters.train, key)
        drawn.append([jax.jit(draw)(data, step) for step in (4, 5)])
    flips = []
    for (support, query), (small_support, small_query) in zip(*drawn):
        for images, small in ((support[0], small_support[0]), (query[0], small_query[0])):
            halved = np.asarray(augment(key, images, downscale=2))
            flipped = ~np.isclose(small, halved).all((-3, -2, -1))
            np.testing.assert_allclose(np.where(flipped[..., None, None, None], halved[..., ::-1, :], halved), small)
            flips.append(flipped)
    # Other images are flipped in each set and in each meta-step.
    assert len({each.tobytes() for each in flips}) == 4 and 0.2 < np.mean(flips) < 0.8
    assert drawn[1][0].support[0].shape == (2, 5, 14, 14, 1)
    assert (drawn[1][0].support[1] == drawn[0][0].support[1]).all()


# Start from a saved model


def learned(state):
    """A state whose numbers all differ from the initial ones."""
    return jax.tree.map(lambda leaf: leaf + 0.5 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state)


def saved_model(tmp_path, characters, **options):
    run = small_run(tmp_path, **options)
    state = learned(initial(run)[1])
    return state, model_file.load(save(tmp_path / "model.msgpack", run, characters, state))


HEAD_RATES = {"learn_rates": True, "head_rates": (3.0,)}


def test_a_run_starts_from_a_model_with_as_many_ways(characters, tmp_path, small_net):
    """With its head and its learned rates; those of later inner steps are the run's."""
    model, saved = saved_model(tmp_path, characters, method="one-step", **HEAD_RATES)
    run = small_run(tmp_path, method="zero-head", inner_steps=3, start_from=tmp_path / "model.msgpack", **HEAD_RATES)
    _, state = initial(run)
    params, inner_params = methods.start_from(run, saved, state.meta_params)
    jax.tree.map(np.testing.assert_array_equal, params, model.params)
    assert jax.tree.structure(inner_params) == jax.tree.structure(state.inner_params)
    np.testing.assert_allclose(inner_params["head"]["bias"], np.log(3) + np.array([0.5, 0, 0]), rtol=1e-6)
    methods.check_start(run)


def test_learned_rates_grow_with_the_ways(characters, tmp_path, small_net):
    """In a mean loss over twice as many classes each class has half the weight."""
    _, saved = saved_model(tmp_path, characters, method="one-step", ways=3, **HEAD_RATES)
    run = small_run(tmp_path, method="zero-head", ways=6, start_from=tmp_path / "model.msgpack", **HEAD_RATES)
    params, inner_params = methods.start_from(run, saved, initial(run)[1].meta_params)
    assert params["head"]["bias"].shape == (6,)
    np.testing.assert_allclose(inner_params["head"]["bias"], np.log(3) + 0.5 + np.log(2), rtol=1e-6)


@pytest.mark.parametrize("method", ["maml", "zero-head", "meta-sgd"])
def test_a_run_starts_from_a_model_with_other_ways(method, characters, tmp_path, small_net):
    """With a head of its own. Rates that are not learned in both are its own, too."""
    model, saved = saved_model(tmp_path, characters, method=method, ways=7)
    run = small_run(tmp_path, method="zero-head", start_from=tmp_path / "model.msgpack", **HEAD_RATES)
    _, state = initial(run)
    params, inner_params = methods.start_from(run, saved, state.meta_params)
    for layer in ("Dense_0", "Norm_0"):
        jax.tree.map(np.testing.assert_array_equal, params[layer], model.params[layer])
    jax.tree.map(np.testing.assert_array_equal, params["head"], state.params["head"])
    jax.tree.map(np.testing.assert_array_equal, inner_params, state.inner_params)
    methods.check_start(run)


def test_a_damaged_model_or_another_net_is_no_start(characters, tmp_path, small_net):
    path = tmp_path / "model.msgpack"
    saved_model(tmp_path, characters)
    with pytest.raises(ValueError, match=f"start_from must be a model of the same net, but {path} is not: .*'Conv_0'"):
        methods.check_start(omniglot.Run(start_from=path).resolved())
    model_file.save(path, jnp.ones(3))
    with pytest.raises(ValueError, match="start_from must be a model of the same net"):
        methods.check_start(small_run(tmp_path, start_from=path))
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{path} is not a file of maml_jax.save, or is damaged"):
        methods.check_start(small_run(tmp_path, start_from=path))
    with pytest.raises(OSError, match=r"missing\.msgpack"):
        methods.prepare(miniimagenet.Run(start_from=tmp_path / "missing.msgpack", workdir=tmp_path / "run"))
