"""A training that was left and went on is the one that never stopped, bit for bit: characters, and walks.

Sine curves are left at more steps, killed and damaged in `test_checkpoint_files`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.rl_cases import ENVIRONMENT, POLICY

import maml_jax
from experiments.few_shot import methods
from maml_jax.nets import models
from maml_jax.rl.meta_rl import draw_task_batch, maml_rl
from maml_jax.rl.outer import promp
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.resumable import resumable_train
from maml_jax.tasks import host_memory, omniglot
from maml_jax.tasks.episodes import EpisodeShape, equal_classes

# Where a run is left, orbax leaves coroutines and an event loop behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS, PER_CALL, SAVE_EVERY = 9, 1, 2


class Case(NamedTuple):
    learner: maml_jax.MetaLearner
    state: maml_jax.MetaState
    draw: Any
    data: Any


def characters(request):
    """MAML++: the derivative's order, the weights of the losses and Adam's rate change along the way."""
    data, cache = request.getfixturevalue("shared_data"), request.getfixturevalue("omniglot_cache")
    images = omniglot.load(data / "omniglot", cache)
    classes = equal_classes(images.images[:50])
    net = models.MLP((16,), 3, "batch")
    training = methods.Training("maml++", 2, 0.4, 2, 1e-3, None, STEPS)
    apply, features = models.apply_params(net), models.apply_params(net, head=False)
    method = methods.build(training, apply, features, ways=3)
    params = net.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    draw, data = host_memory.by_step(jax.random.key(1), classes, 2, EpisodeShape(3, 1, 2, "random"))
    learner = method.learner()
    return Case(learner, learner.init(method.start(params)), draw, data)


def navigation(_):
    """Several steps of Adam on the same walks, by a schedule."""
    outer = promp(optax.adam(optax.cosine_decay_schedule(1e-2, 100)), steps=2)
    learner = maml_rl(ENVIRONMENT, POLICY, maml_jax.sgd(0.1, steps=1), outer, episodes=3, inner_loss_name="lvc")

    def draw(key, step):
        return draw_task_batch(ENVIRONMENT, jax.random.fold_in(key, step), 2)

    return Case(learner, learner.init(POLICY.init(jax.random.key(0))), draw, jax.random.key(1))


def go_on(case, path, until=None):
    """Until that step, or to the end."""
    run = RunDirectory(path, "it", {})
    for state, row in resumable_train(
        *case, steps=STEPS, steps_per_call=PER_CALL, run=run, save_every=SAVE_EVERY, labels={"kind": "a"}
    ):
        if row["step"] == until:
            break
    run.close()
    return state


@pytest.mark.parametrize("make", [characters, navigation])
def test_it_goes_on_to_the_same_bits(make, request, compiled, tmp_path):
    case = make(request)
    whole = go_on(case, tmp_path / "whole")
    for until in (3, 4, None):  # Between two checkpoints, at one, and to the end.
        state = go_on(case, tmp_path / "left", until)
    jax.tree.map(np.testing.assert_array_equal, state, whole)
    assert int(state.step) == STEPS
    moved = jax.tree.map(lambda leaf, start: float(abs(leaf - start).max()), state.params, case.state.params)
    assert all(change > 0 for change in jax.tree.leaves(moved)), moved
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "left")]
    assert rows[0] == rows[1]
