"""Advantages and losses of masked episodes equal those of loops over time steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from helpers.rl_cases import POLICY, compiled, perturbed

from maml_jax.rl.advantage import discounted_sums, experience, summary
from maml_jax.rl.baseline import RIDGE, features, linear_baseline
from maml_jax.rl.losses import inner_loss
from maml_jax.rl.policy import Gaussian
from maml_jax.rl.rollout import Episodes


def test_padding_changes_neither_advantages_nor_losses(x64):
    rng = np.random.default_rng(0)
    lengths, horizon, discount, smoothing = (3, 7, 1, 5), 7, 0.9, 0.8
    params = perturbed(POLICY)
    mask = (np.arange(horizon) < np.array(lengths)[:, None]).astype(float)
    observation, action = rng.normal(size=(2, 4, horizon, 2))
    reward = mask * rng.normal(size=(4, horizon))

    @partial(compiled, static_argnums=2)
    def loss_and_gradient(observation, action, name):
        distribution = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, action.shape), POLICY.apply(params, observation)
        )
        ends = {"nonfinite": jnp.zeros(4), "terminated": jnp.zeros(4), "last_observation": jnp.zeros((4, 2))}
        episodes = Episodes(observation, action, distribution, jnp.asarray(reward), jnp.asarray(mask), **ends)
        sampled = experience(episodes, discount, smoothing)
        return jax.value_and_grad(lambda p: inner_loss(POLICY, name)(p, sampled), has_aux=True)(params), sampled

    ((loss, _), gradient), sampled = loss_and_gradient(observation, action, "logp")
    # One episode after the other, without padding.
    design = np.asarray(features(jnp.asarray(observation), jnp.arange(horizon)))
    design = np.concatenate([design[i, :n] for i, n in enumerate(lengths)])
    summed = [sum(discount ** (k - t) * reward[i, k] for k in range(t, n)) for i, n in enumerate(lengths)
              for t in range(n)]  # fmt: skip
    unit = design / np.linalg.norm(design, axis=0)
    values = unit @ np.linalg.solve(unit.T @ unit + RIDGE * np.eye(unit.shape[1]), unit.T @ np.array(summed))
    advantages, start = [], 0
    for i, n in enumerate(lengths):
        value = np.append(values[start : start + n], 0)
        deltas = reward[i, :n] + discount * value[1:] - value[:-1]
        advantages += [sum((discount * smoothing) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        start += n
    deviation = np.std(advantages) + 1e-8
    unit_of_time = np.concatenate([discount ** np.arange(n) / deviation for n in lengths])
    np.testing.assert_allclose(np.asarray(sampled.reward)[mask > 0], unit_of_time * reward[mask > 0], atol=1e-9)
    np.testing.assert_allclose(np.asarray(sampled.baseline)[mask > 0], unit_of_time * values, atol=1e-9)
    advantages = (advantages - np.mean(advantages)) / deviation
    np.testing.assert_allclose(np.asarray(sampled.advantage)[mask > 0], advantages, atol=1e-9)

    def loss_without_padding(params):
        parts = [POLICY.apply(params, observation[i, :n]).log_prob(action[i, :n]) for i, n in enumerate(lengths)]
        return -(jnp.concatenate(parts) * advantages).mean()

    np.testing.assert_allclose(loss, loss_without_padding(params), rtol=1e-9)
    for masked, expected in zip(*map(jax.tree.leaves, (gradient, compiled(jax.grad(loss_without_padding))(params)))):
        np.testing.assert_allclose(masked, expected, atol=1e-9)
    # Entries after the end of an episode change nothing.
    other = mask[..., None] * observation + (1 - mask[..., None]) * 7.0, action - (1 - mask[..., None]) * 3.0
    for name in ("logp", "dice"):
        (first, _), (second, _) = (loss_and_gradient(*inputs, name) for inputs in ((observation, action), other))
        for one, two in zip(*map(jax.tree.leaves, (first, second))):
            np.testing.assert_allclose(one, two, atol=1e-12)


def test_only_truncated_episodes_end_with_the_value_of_the_last_observation(x64):
    """The first episode ends in a terminal state, the second is truncated, the third is at the horizon, and the fourth
    has a value that is not finite."""
    rng = np.random.default_rng(0)
    lengths, horizon, discount = np.array([3, 4, 6, 2]), 6, 0.9
    mask = (np.arange(horizon) < lengths[:, None]).astype(float)
    observation, last, reward = (rng.normal(size=shape) for shape in ((4, horizon, 2), (4, 2), (4, horizon)))
    distribution = Gaussian(jnp.zeros((4, horizon, 2)), jnp.zeros((4, horizon, 2)))
    ends = {"nonfinite": jnp.eye(4)[3], "terminated": jnp.eye(4)[0], "last_observation": jnp.asarray(last)}
    arrays = observation, np.zeros((4, horizon, 2)), distribution, mask * reward, mask
    episodes = Episodes(*jax.tree.map(jnp.asarray, arrays), **ends)

    @compiled
    def values_and_advantages(episodes):
        returns = discounted_sums(episodes.reward, discount)
        value, weights = linear_baseline(episodes.observation, returns, episodes.mask)
        after = features(episodes.last_observation[:, None], jnp.asarray(lengths)[:, None])[:, 0] @ weights
        return value, after, experience(episodes, discount, 0.8, bootstrap=True).advantage

    value, after, found = map(np.asarray, values_and_advantages(episodes))
    assert abs(after).min() > 0.1
    expected = (mask * reward).sum() / 4, lengths.mean(), 1, 0.25
    np.testing.assert_allclose(summary(episodes), expected)
    expected = np.zeros((4, horizon))
    for episode, length in enumerate(lengths):
        values = np.append(value[episode, :length], after[episode] if episode in (1, 2) else 0)
        deltas = reward[episode, :length] + discount * values[1:] - values[:-1]
        for time in range(length):
            expected[episode, time] = (deltas[time:] * (discount * 0.8) ** np.arange(length - time)).sum()
    valid = mask > 0
    expected = (expected[valid] - expected[valid].mean()) / expected[valid].std()
    np.testing.assert_allclose(found[valid], expected, atol=1e-6)
    assert (found[~valid] == 0).all()
