"""Evaluation of runs: saved states and fine-tuning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.few_shot import initial, save, small_run

from experiments.few_shot import methods, testing
from maml_jax.inner import inner_loop
from maml_jax.runs import model_file
from maml_jax.tasks.fixed import fixed_tasks


@pytest.mark.parametrize("method", ["maml++", "meta-curvature"])
def test_a_saved_state_is_restored(method, characters, tmp_path, small_net):
    """Also the learned inner parameters, in the tree structure of the state."""
    run = small_run(tmp_path, method=method)
    _, state = initial(run)
    state = jax.tree.map(lambda leaf: leaf + 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state)
    path = save(tmp_path / "model.msgpack", run, characters, state, step=7)
    loaded = testing.load_state(run, model_file.load(path))
    assert loaded.step == 7
    jax.tree.map(np.testing.assert_array_equal, loaded[1:3], state[1:3])


def test_fine_tuning_uses_the_best_rate_on_validation_tasks(characters, tmp_path, small_net, monkeypatch):
    run = small_run(tmp_path, method="pretrained")
    _, state = initial(run, 10)
    state = testing.finished(run, state, lambda: ())
    assert state.params["head"]["kernel"].shape == (8, 5) and not state.params["head"]["kernel"].any()
    tasks = fixed_tasks(jax.random.key(0), characters.val, 20, run.shape)
    rates = []

    def accuracy(each, state, groups, steps):
        assert len(list(groups)) == len(list(tasks())) and steps == run.selected_after
        # One step on x ** 2 / 2 from x = 1 shows the rate of the inner learner.
        inner = methods.inner_learner(each, methods.network(each))
        adapted, _ = inner_loop(inner, quadratic, {"x": jnp.array(1.0)}, (), None, steps=1)
        rates.append(1 - float(adapted["x"]))
        return -abs(rates[-1] - 0.2)

    def quadratic(params, batch):
        return params["x"] ** 2 / 2, {}

    monkeypatch.setattr(testing, "accuracy", accuracy)
    best = testing.tuned(run, state, tasks)
    np.testing.assert_allclose(rates, np.multiply(testing.FINE_TUNING_FACTORS, run.inner_rate), rtol=1e-5)
    assert best.inner_rate == pytest.approx(0.2)
