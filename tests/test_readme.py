"""The code in the README runs as it stands, and its recipes give losses that can be meta-trained."""

import re
from pathlib import Path

import jax
import optax

import maml_jax
from maml_jax import losses
from maml_jax.tasks import sinusoid

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


def test_the_first_look_learns_and_the_check_passes(capsys):
    scope = {}
    exec(BLOCKS[0], scope)
    assert scope["info"].loss.shape == (4,) and scope["info"].loss[-1] < scope["info"].loss[0]
    exec(BLOCKS[1], scope)
    assert "The meta-gradient is exact." in capsys.readouterr().out


def test_a_lost_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    loss_fn = losses.mean_squared_error(lambda params, x: params["slope"] * x)
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.01, steps=1), optax.adam(1e-3))
    scope = {"jax": jax, "sinusoid": sinusoid, "learner": learner, "params": {"slope": jax.numpy.ones(())}}
    block = next(block for block in BLOCKS if "resumable_train" in block)
    for steps in (range(500, 3001, 500), [3000]):
        exec(block, scope)
        assert [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()] == list(steps)


def test_every_recipe_can_be_meta_trained():
    scope = {"jax": jax, "jnp": jax.numpy}
    recipes = {name: next(block for block in BLOCKS if name in block) for name in ("linen", "nnx", "equinox")}
    for name, recipe in recipes.items():
        assert len(recipe.strip().splitlines()) <= 6, name
        exec(recipe, scope)
        learner = maml_jax.maml(scope["loss_fn"], maml_jax.sgd(0.01, steps=1), optax.adam(1e-2))
        state, step, curve = learner.init(scope["params"]), jax.jit(learner.step), []
        for index in range(150):
            state, info = step(state, sinusoid.draw_tasks(jax.random.key(index), 25, shots=10, queries=10))
            curve.append(float(info.loss))
        assert sum(curve[-20:]) < 0.9 * sum(curve[:20]), name


def test_what_is_padded_plays_no_part():
    scope = {"jnp": jax.numpy, "apply": lambda slope, x: slope * x}
    exec(next(block for block in BLOCKS if "def weighted" in block), scope)
    x, y = jax.random.normal(jax.random.key(0), (2, 4, 1))
    padded, weights = jax.numpy.full((6, 1), 7.0), jax.numpy.array([1.0, 1, 1, 1, 0, 0])
    loss = losses.mean_squared_error(scope["apply"])(0.5, (x, y))[0]
    batch = (padded.at[:4].set(x), padded.at[:4].set(y) + 3 * (weights == 0)[:, None], weights)
    assert jax.numpy.allclose(scope["weighted"](0.5, batch)[0], loss)
