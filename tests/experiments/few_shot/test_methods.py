"""Every method learns real characters. Outer rates and tasks of the methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.few_shot import initial, small_run

from experiments import omniglot
from experiments.few_shot import methods, testing
from experiments.few_shot.run import Method
from maml_jax.tasks import host_memory
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
    after, metrics = jax.jit(many_steps(learner, draw))(state, data, run.steps)
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
