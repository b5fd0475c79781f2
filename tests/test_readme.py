"""The code in the README runs as it stands, and its recipes give losses that can be meta-trained."""

import re
from pathlib import Path

import jax
import optax

import maml_jax
from maml_jax.tasks import sinusoid

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


def test_the_first_look_learns_and_the_check_passes(capsys):
    scope = {}
    exec(BLOCKS[0], scope)
    assert scope["info"].loss.shape == (4,) and scope["info"].loss[-1] < scope["info"].loss[0]
    exec(BLOCKS[1], scope)
    assert "The meta-gradient is exact." in capsys.readouterr().out


def test_every_recipe_can_be_meta_trained():
    scope = {"jax": jax, "jnp": jax.numpy}
    recipes = {name: next(block for block in BLOCKS if name in block) for name in ("linen", "nnx", "equinox")}
    for name, recipe in recipes.items():
        assert len(recipe.strip().splitlines()) <= 6, name
        exec(recipe, scope)
        learner = maml_jax.maml(scope["loss_fn"], maml_jax.sgd(0.01, steps=1), optax.adam(1e-2))
        state, step, losses = learner.init(scope["params"]), jax.jit(learner.step), []
        for index in range(150):
            state, info = step(state, sinusoid.draw_tasks(jax.random.key(index), 25, shots=10, queries=10))
            losses.append(float(info.loss))
        assert sum(losses[-20:]) < 0.9 * sum(losses[:20]), name
