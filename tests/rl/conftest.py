"""Fixtures of the reinforcement-learning tests."""

import jax
import pytest
from helpers.rl_cases import POLICY, collected, perturbed

import maml_jax


@pytest.fixture(scope="session")
def objective_of_two_steps():
    """Parameters, and the objective on episodes that they sampled before and after each of two inner steps."""
    with jax.enable_x64(True):
        params = perturbed(POLICY)
        return params, collected(maml_jax.sgd(0.3, steps=2), params)
