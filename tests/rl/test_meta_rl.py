"""Meta-learning of policies as a whole: one meta-iteration, its alternatives, and what goes wrong in it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.rl_cases import ENVIRONMENT, POLICY, collected, compiled, direction_like, perturbed

import maml_jax
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.rl.environment import Step, told
from maml_jax.rl.envs.navigation import navigation
from maml_jax.rl.meta_rl import draw_task_batch, given_trials, maml_rl
from maml_jax.rl.outer import policy_gradient, promp
from maml_jax.rl.policy import gaussian_mlp
from maml_jax.rl.rollout import rollout
from maml_jax.rl.trust_region import trpo

INNER = maml_jax.sgd(0.1, steps=1)


def learner_of(outer, environment=ENVIRONMENT, inner=INNER, **options):
    return maml_rl(environment, POLICY, inner, outer, episodes=6, **options)


@pytest.fixture(scope="module")
def stepped():
    """One compiled meta-iteration of TRPO and what comes of it, from the same start and key."""
    learner = learner_of(trpo(0.01))
    step = compiled(lambda state, key: learner.step(state, draw_task_batch(ENVIRONMENT, key, 4)))
    state = learner.init(perturbed(POLICY))
    return learner, step, state, step(state, jax.random.key(1))


def test_a_meta_iteration_stays_in_its_trust_region_and_is_determined_by_its_key(stepped):
    _, step, state, (after, info) = stepped
    assert 1e-3 < info.aux["kl"][0] <= 0.01 and info.aux["improvement"][0] > 0
    assert set(info.aux) == {"return", "return_before", "length", "broken", "kl", "improvement"}
    again, _ = step(state, jax.random.key(1))
    other, _ = step(state, jax.random.key(2))
    for one, same, different in zip(*map(jax.tree.leaves, (after.params, again.params, other.params))):
        np.testing.assert_array_equal(one, same)
        assert (np.asarray(one) != np.asarray(different)).any()


@pytest.fixture(scope="module")
def adapting():
    """A learner with a rate of its own for each of two inner steps, and what it does to three tasks one by one."""
    with jax.enable_x64(True):
        rates = optax.piecewise_constant_schedule(0.4, {1: 0.25})
        learner = learner_of(policy_gradient(optax.identity()), inner=maml_jax.unrolled(optax.sgd(rates), steps=2))
        state = learner.init(perturbed(POLICY))
        trials = draw_task_batch(ENVIRONMENT, jax.random.key(3), 3)
        adapt = compiled(learner.adapt)
        return learner, state, trials, [adapt(state, jax.tree.map(lambda leaf, i=i: leaf[i], trials)) for i in range(3)]


def test_tasks_together_are_tasks_one_by_one(x64, adapting):
    learner, state, trials, alone = adapting
    together = compiled(learner.evaluate)(state, trials)
    for loss, (_, info) in zip(together.loss, alone):
        np.testing.assert_allclose(loss, info.loss, rtol=1e-9)
    assert np.ptp(together.loss, axis=0).min() > 1e-3 and np.ptp(together.loss, axis=1).min() > 1e-3


def test_each_inner_step_is_gradient_descent_on_its_own_episodes(x64, adapting):
    """The library's inner loop, with a rate of its own for each step, against the update written out."""
    _, state, _, alone = adapting
    adapted, info = alone[0]
    seen = info.aux[1]

    @compiled
    def written_out(params, seen, rate):
        policy = POLICY.apply(params, seen.episodes.observation)

        def loss(params):
            log_prob = seen.log_prob_under(POLICY.apply(params, seen.episodes.observation))
            return -seen.episodes.mean(log_prob * seen.advantage)

        return policy.mean, jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params))

    params = state.params
    for index, rate in enumerate((0.4, 0.1)):
        own = jax.tree.map(lambda leaf, index=index: leaf[index], seen)
        mean, params = written_out(params, own, rate)
        # The step's episodes are of the policy as it then is.
        np.testing.assert_allclose(own.episodes.mask[..., None] * mean, own.episodes.sampled.mean, atol=1e-12)
    for one, two in zip(*map(jax.tree.leaves, (adapted, params))):
        np.testing.assert_allclose(one, two, atol=1e-12)
    drawn = (seen.episodes.action - seen.episodes.sampled.mean) / jnp.exp(seen.episodes.sampled.log_std)
    for one, other in ((0, 1), (0, 2), (1, 2)):  # And they are new ones.
        assert np.isclose(drawn[one], drawn[other], atol=1e-3).mean() < 0.2


def test_promp_lowers_the_loss_in_several_steps():
    learner = learner_of(promp(optax.adam(1e-2), steps=3), inner_loss_name="lvc")
    state = learner.init(perturbed(POLICY))
    after, info = compiled(learner.step)(state, draw_task_batch(ENVIRONMENT, jax.random.key(1), 4))
    assert info.aux["improvement"][0] > 0 and 0 < info.aux["kl"][0] < 1 and info.grad_norm > 0
    assert int(after.step) == 1


def test_promp_gains_nothing_beyond_its_clip(x64):
    params = perturbed(POLICY)
    terms = compiled(collected(INNER, params).terms, static_argnums=1)
    far = optax.tree.add_scale((params, ()), 0.5, direction_like((params, ())))
    assert terms(far, 0.1).loss > terms(far).loss
    np.testing.assert_allclose(terms((params, ()), 0.1).loss, terms((params, ())).loss, atol=1e-12)


def brittle(environment):
    """The environment, broken by the fourth step where a goal's x is above 0, and over after the fifth elsewhere."""

    def reset(key, task):
        return environment.reset(key, task), jnp.zeros([])

    def step(state, action, task):
        position, time = state
        position = jnp.where((time >= 3) & (task[0] > 0), jnp.nan, environment.step(position, action, task).state)
        return Step((position, time + 1), -jnp.ones([]), time >= 4)

    return environment._replace(
        reset=reset, step=step, observe=lambda state, task: environment.observe(state[0], task)
    )  # fmt: skip


def test_a_simulation_that_breaks_ends_its_episode_and_is_counted():
    environment = brittle(ENVIRONMENT)
    tasks = jnp.array([[0.4, 0.4], [-0.4, 0.4]])
    params = perturbed(POLICY)

    @compiled
    def sample(params):
        return jax.vmap(lambda task: rollout(environment, POLICY, params, jax.random.key(0), task, 5))(tasks)

    seen = sample(params)
    np.testing.assert_array_equal(seen.broken, [[1] * 5, [0] * 5])
    for mask, length in zip(seen.mask, (3, 5)):
        np.testing.assert_array_equal(mask, np.tile(np.arange(8) < length, (5, 1)))
    np.testing.assert_array_equal(seen.reward, -seen.mask)
    lost = sample(jax.tree.map(lambda leaf: leaf * jnp.nan, params))  # Actions that are not numbers.
    assert lost.broken.all() and not lost.mask.any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((seen, lost)))

    learner = learner_of(policy_gradient(optax.sgd(0.1)), environment)
    state = learner.init(params)
    after, info = compiled(learner.step)(state, given_trials(environment, jax.random.key(0), tasks))
    np.testing.assert_array_equal(info.aux["broken"], [12, 0])
    np.testing.assert_array_equal(info.aux["length"], [3, 5])
    assert info.aux["kl"][0] > 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.params, info)))


@pytest.mark.parametrize(("where", "length"), [("reset", 0), ("observe", 3)])
def test_what_is_seen_but_not_finite_ends_its_episode_too(where, length):
    """In one of two tasks; the other trains on."""

    def lost(position, task, when):
        return jnp.where((task[0] > 0) & when, jnp.nan, position)

    def reset(key, task):
        return lost(ENVIRONMENT.reset(key, task), task, where == "reset"), jnp.zeros([])

    def observe(state, task):
        position, time = state
        return lost(ENVIRONMENT.observe(position, task), task, (where == "observe") & (time > 2))

    def step(state, action, task):
        position, time = state
        moved = ENVIRONMENT.step(position, action, task)
        return moved._replace(state=(moved.state, time + 1))

    environment = ENVIRONMENT._replace(reset=reset, step=step, observe=observe)
    learner = learner_of(policy_gradient(optax.sgd(0.1)), environment)
    trials = given_trials(environment, jax.random.key(0), jnp.array([[0.4, 0.4], [-0.4, 0.4]]))
    after, info = compiled(learner.step)(learner.init(perturbed(POLICY)), trials)
    np.testing.assert_array_equal(info.aux["broken"], [12, 0])
    np.testing.assert_array_equal(info.aux["length"], [length, 8])
    assert info.grad_norm > 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.params, info)))


def test_a_policy_that_is_lost_ends_every_episode_at_once_and_not_the_run(stepped):
    _, step, state, _ = stepped
    lost = state._replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, state.params))
    _, info = step(lost, jax.random.key(1))
    np.testing.assert_array_equal(info.aux["broken"], [12] * 4)
    np.testing.assert_array_equal(info.aux["length"], 0)
    assert np.isfinite(info.aux["return"]).all() and info.aux["kl"][0] == 0


def test_navigation_walks_ends_and_tells():
    environment = navigation()
    task = jnp.array([0.1, -0.2])
    state = environment.reset(jax.random.key(0), task)
    step = environment.step(state, jnp.array([1.0, -1.0]), task)
    np.testing.assert_allclose(step.state, [0.1, -0.1])
    np.testing.assert_allclose(step.reward, -0.1, rtol=1e-6)
    assert not step.done and environment.step(step.state, jnp.array([0.05, -0.95]), task).done
    assert not environment.step(step.state, jnp.array([0.11, -1.0]), task).done  # .011 away along one axis.
    oracle = told(environment)
    assert oracle.observation_size == 4
    np.testing.assert_allclose(oracle.observe(step.state, task), [0.1, -0.1, 0.1, -0.2])
    goals = environment.sample_tasks(jax.random.key(0), 1000)
    assert goals.min() < -0.49 and goals.max() > 0.49 and jnp.abs(goals).max() <= 0.5


def test_given_tasks_are_of_the_kind_that_is_drawn():
    numbered = ENVIRONMENT._replace(
        sample_tasks=lambda key, count: jax.random.randint(key, (count,), 0, 3), check_tasks=lambda tasks: None
    )
    assert given_trials(numbered, jax.random.key(0), [2, 0]).task.dtype == jnp.int32
    assert given_trials(ENVIRONMENT, jax.random.key(0), [[0.1, 0.2]]).task.dtype == jnp.result_type(float)


def test_what_makes_no_sense_is_told():
    with pytest.raises(ValueError, match="horizon must be an integer of at least 1, but got 0"):
        navigation(horizon=0)
    with pytest.raises(ValueError, match="episodes must be an integer of at least 1, but got 0"):
        maml_rl(ENVIRONMENT, POLICY, INNER, trpo(), episodes=0)
    with pytest.raises(ValueError, match=r"goals \[T, 2\] with coordinates from -0.5 to 0.5, but got \[\[0.1, 0.6\]\]"):
        given_trials(ENVIRONMENT, jax.random.key(0), [[0.1, 0.6]])
    with pytest.raises(ValueError, match="inner_loss must be one of 'logp', 'lvc', 'dice', but got 'reinforce'"):
        learner_of(trpo(), inner_loss_name="reinforce")
    with pytest.raises(ValueError, match=r"discount must be between 0 and 1, but got 1\.5"):
        learner_of(trpo(), discount=1.5)
    with pytest.raises(ValueError, match="'mixflow' has no forward-mode derivatives"):
        learner_of(trpo(), inner=maml_jax.sgd(0.1, steps=1, remat="mixflow"))
    with pytest.raises(TypeError, match="inner must come from"):
        learner_of(trpo(), inner=optax.sgd(0.1))
    with pytest.raises(TypeError, match="outer must come from trpo"):
        learner_of(optax.adam(0.1))
    with pytest.raises(ValueError, match="kl_limit must be positive and finite, but got 0"):
        trpo(0.0)
    with pytest.raises(ValueError, match="backtracking must be between 0 and 1, but got 1"):
        trpo(backtracking=1)
    with pytest.raises(ValueError, match="hidden must be an integer of at least 1, but got 0"):
        gaussian_mlp(2, 2, hidden=(0,))
    alone = learner_of(trpo(), sampling_term=True)
    with pytest.raises(ValueError, match="give 2 tasks or more"):
        alone.step(alone.init(perturbed(POLICY)), draw_task_batch(ENVIRONMENT, jax.random.key(0), 1))


def test_divided_over_devices_it_is_the_same(x64):
    params, outer, found = perturbed(POLICY), policy_gradient(optax.sgd(0.1)), []
    for mesh in (None, task_mesh(4)):
        learner = maml_rl(ENVIRONMENT, POLICY, maml_jax.sgd(0.1, steps=1), outer, episodes=3, mesh=mesh)
        trials = draw_task_batch(ENVIRONMENT, jax.random.key(1), 4)
        state, info = compiled(learner.step)(learner.init(params), trials)
        tested = compiled(learner.evaluate)(learner.init(params), trials)
        found.append((state.params, info.loss, info.grad_norm, tested))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), *found)
    assert len(state.params["log_std"].sharding.device_set) == 2
