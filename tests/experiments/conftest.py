"""Fixtures of the few-shot experiments."""

import pytest
from helpers import few_shot

from experiments import omniglot
from experiments.few_shot import methods


@pytest.fixture(scope="module", autouse=True)
def share_compiled_programs(compiled):
    """All experiments, in this process or in others, share compiled programs."""


@pytest.fixture
def characters(shared_data, omniglot_cache):
    """Omniglot, with made-up hashes."""
    return few_shot.characters(shared_data / "omniglot", omniglot_cache)


@pytest.fixture
def small_net(monkeypatch):
    """Makes the fully connected net small, and the validation tasks few."""
    monkeypatch.setattr(methods, "HIDDEN", (16, 8))
    monkeypatch.setattr(omniglot.Run, "val_tasks", 20)
