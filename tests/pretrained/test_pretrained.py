"""The models of the project: their accuracy, and errors."""

import json
from pathlib import Path

import pytest

import maml_jax
from experiments import evaluate
from experiments.shared import command_line
from maml_jax import pretrained


@pytest.mark.parametrize("name", pretrained.NAMES)
def test_a_model_has_its_accuracy_on_test_tasks(name, shared_data, omniglot_cache):
    data = {"data_dir": shared_data / "omniglot", "cache_dir": omniglot_cache}
    config = evaluate.Config((Path(name),), tasks=50, steps=1, **data)
    (found,) = evaluate.main(evaluate.prepare(config)).values()
    test = pretrained.load(name).description["test"]
    assert abs(found["accuracy"][1] - test["accuracy"]) < 2.0
    root = Path(__file__).parents[2]
    results = json.loads((root / test["results"] / "results.json").read_text())["test"][test["mode"]]
    assert test["accuracy"] == round(results["accuracy"][test["inner_steps"]], 2)
    assert test["half_width"] == round(results["half_width"][test["inner_steps"]], 2)


def test_the_models_are_small_and_listed():
    assert set(pretrained.NAMES) >= {"omniglot-5w1s", "omniglot-5w5s", "omniglot-20w1s", "omniglot-20w5s"}
    assert all(pretrained.path(name).stat().st_size < 1 << 20 for name in pretrained.NAMES)
    lines = pretrained.summary().splitlines()
    assert [line.split(":")[0] for line in lines] == list(maml_jax.pretrained.NAMES)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'omniglot-20w1s'.* but got 'omniglot'"):
        pretrained.load("omniglot")
    with pytest.raises(FileNotFoundError, match="nowhere is neither a file nor the name of a model"):
        command_line.model_path(Path("nowhere"))
