"""Fixtures of the reinforcement-learning tests."""

import jax
import pytest
from helpers.rl_cases import POLICY, collected, perturbed

import maml_jax


@pytest.fixture(scope="session")
def objective_of_two_steps():
    """Returns parameters, and the objective of a learner with two inner steps on episodes of these parameters."""
    with jax.enable_x64(True):
        params = perturbed(POLICY)
        return params, collected(maml_jax.sgd(0.3, steps=2), params)
