"""Meta-iterations, adaptation and evaluation of policies."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.rl_cases import (
    ENVIRONMENT,
    POLICY,
    compiled,
    perturbed,
    small_learner,
)

import maml_jax
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.rl.meta_rl import draw_task_batch, maml_rl
from maml_jax.rl.outer import policy_gradient
from maml_jax.rl.trust_region import trpo


@pytest.fixture(scope="module")
def stepped():
    """A learner with TRPO, its compiled meta-iteration, a state, and the result of the meta-iteration."""
    learner = small_learner(trpo(0.01))
    step = compiled(lambda state, key: learner.step(state, draw_task_batch(ENVIRONMENT, key, 4)))
    state = learner.init(perturbed(POLICY))
    return learner, step, state, step(state, jax.random.key(1))


def test_a_meta_iteration_stays_in_its_trust_region_and_is_reproducible(stepped):
    _, step, state, (after, info) = stepped
    assert 1e-3 < info.aux["kl"][0] <= 0.01 and info.aux["improvement"][0] > 0
    assert set(info.aux) == {"return", "return_before", "length", "num_nonfinite", "kl", "improvement"}
    again, _ = step(state, jax.random.key(1))
    other, _ = step(state, jax.random.key(2))
    for one, same, different in zip(*map(jax.tree.leaves, (after.params, again.params, other.params))):
        np.testing.assert_array_equal(one, same)
        assert (np.asarray(one) != np.asarray(different)).any()


@pytest.fixture(scope="module")
def adapting():
    """A learner with different rates for its two inner steps, and its adaptation to each of three tasks."""
    with jax.enable_x64(True):
        rates = optax.piecewise_constant_schedule(0.4, {1: 0.25})
        learner = small_learner(policy_gradient(optax.identity()), inner=maml_jax.unrolled(optax.sgd(rates), steps=2))
        state = learner.init(perturbed(POLICY))
        task_batch = draw_task_batch(ENVIRONMENT, jax.random.key(3), 3)
        adapt = compiled(learner.adapt)
        alone = [adapt(state, jax.tree.map(lambda leaf, i=i: leaf[i], task_batch)) for i in range(3)]
        return learner, state, task_batch, alone


def test_evaluate_gives_the_losses_of_adapt_for_each_task(x64, adapting):
    learner, state, task_batch, alone = adapting
    together = compiled(learner.evaluate)(state, task_batch)
    for loss, (_, info) in zip(together.loss, alone):
        np.testing.assert_allclose(loss, info.loss, rtol=1e-9)
    assert np.ptp(together.loss, axis=0).min() > 1e-3 and np.ptp(together.loss, axis=1).min() > 1e-3


def test_the_metrics_of_a_meta_iteration_are_those_of_its_evaluation(x64, adapting):
    """A meta-iteration and an evaluation with the same keys sample the same episodes."""
    learner, state, task_batch, _ = adapting
    evaluation = compiled(learner.evaluate)(state, task_batch)
    _, info = compiled(learner.step)(state, task_batch)
    np.testing.assert_allclose(info.aux["return_before"], -evaluation.loss[:, 0])
    np.testing.assert_allclose(info.aux["return"], -evaluation.loss[:, -1])
    np.testing.assert_allclose(info.aux["length"], evaluation.aux.length[:, -1])
    np.testing.assert_allclose(info.support_loss, evaluation.loss[:, :-1])
    np.testing.assert_allclose(info.loss, evaluation.loss[:, -1].mean())


def test_each_inner_step_is_gradient_descent_on_new_episodes(x64, adapting):
    """The two steps have different rates. The reference is the update, written in plain JAX."""
    _, state, _, alone = adapting
    adapted, info = alone[0]
    sampled = info.aux[1]

    @compiled
    def plain_step(params, sampled, rate):
        policy = POLICY.apply(params, sampled.episodes.observation)

        def loss(params):
            log_prob = sampled.log_prob_under(POLICY.apply(params, sampled.episodes.observation))
            return -sampled.episodes.mean(log_prob * sampled.advantage)

        return policy.mean, jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params))

    params = state.params
    for index, rate in enumerate((0.4, 0.1)):
        step_sample = jax.tree.map(lambda leaf, index=index: leaf[index], sampled)
        mean, params = plain_step(params, step_sample, rate)
        # The episodes of a step are sampled with the parameters before that step.
        np.testing.assert_allclose(
            step_sample.episodes.mask[..., None] * mean, step_sample.episodes.distribution.mean, atol=1e-12
        )
    for one, two in zip(*map(jax.tree.leaves, (adapted, params))):
        np.testing.assert_allclose(one, two, atol=1e-12)
    distribution = sampled.episodes.distribution
    noise = (sampled.episodes.action - distribution.mean) / jnp.exp(distribution.log_std)
    for one, other in ((0, 1), (0, 2), (1, 2)):  # The episodes of each step have new noise.
        assert np.isclose(noise[one], noise[other], atol=1e-3).mean() < 0.2


def test_nan_parameters_end_every_episode_and_raise_nothing(stepped):
    _, step, state, _ = stepped
    nan_state = state._replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, state.params))
    _, info = step(nan_state, jax.random.key(1))
    np.testing.assert_array_equal(info.aux["num_nonfinite"], [12] * 4)
    np.testing.assert_array_equal(info.aux["length"], 0)
    assert np.isfinite(info.aux["return"]).all() and info.aux["kl"][0] == 0


def test_arguments_that_are_not_allowed_raise():
    with pytest.raises(ValueError, match="episodes must be an integer of at least 1, but got 0"):
        small_learner(trpo(), episodes=0)
    with pytest.raises(ValueError, match="inner_loss must be one of 'logp', 'lvc', 'dice', but got 'reinforce'"):
        small_learner(trpo(), inner_loss_name="reinforce")
    with pytest.raises(ValueError, match=r"discount must be between 0 and 1, but got 1\.5"):
        small_learner(trpo(), discount=1.5)
    with pytest.raises(ValueError, match="remat must be 'none' or 'full', but got 'mixflow'"):
        small_learner(trpo(), inner=maml_jax.sgd(0.1, steps=1, remat="mixflow"))
    with pytest.raises(TypeError, match="inner must come from"):
        small_learner(trpo(), inner=optax.sgd(0.1))
    with pytest.raises(TypeError, match="outer must come from trpo"):
        small_learner(optax.adam(0.1))
    learner = small_learner(trpo(), sampling_term=True)
    with pytest.raises(ValueError, match="give 2 tasks or more"):
        learner.step(learner.init(perturbed(POLICY)), draw_task_batch(ENVIRONMENT, jax.random.key(0), 1))


def test_several_devices_give_the_same_numbers(x64):
    params, outer, found = perturbed(POLICY), policy_gradient(optax.sgd(0.1)), []
    for mesh in (None, task_mesh(4)):
        learner = maml_rl(ENVIRONMENT, POLICY, maml_jax.sgd(0.1, steps=1), outer, episodes=3, mesh=mesh)
        task_batch = draw_task_batch(ENVIRONMENT, jax.random.key(1), 4)
        state, info = compiled(learner.step)(learner.init(params), task_batch)
        evaluation = compiled(learner.evaluate)(learner.init(params), task_batch)
        found.append((state.params, info.loss, info.grad_norm, evaluation))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), *found)
    assert len(state.params["log_std"].sharding.device_set) == 2
