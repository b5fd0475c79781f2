"""Sine curves: fine-tuning, the steady recipe, and the whole command."""

import json

import jax
import jax.numpy as jnp
import pytest
from helpers.commands import launch

from experiments import sinusoid
from maml_jax.inner import inner_loop


def test_fine_tuning_uses_the_best_candidate_rate():
    config = sinusoid.Config(test_tasks=20)
    params = sinusoid.net.init(jax.random.key(0), jnp.zeros((1, 1)))["params"]
    for rates, best in (((1e-6, 0.02, 10.0), 0.02), ((1e-6, 10.0), 1e-6)):
        method = sinusoid.methods(config)["pretrained"]._replace(test_rates=rates)
        state = sinusoid.tester(method, rates[0]).init(params)
        assert sinusoid.evaluate(config, method, state, 5, jax.random.key(1))["rate"] == best


def test_options_do_not_change_the_inner_rate_of_the_steady_recipe():
    for config in (sinusoid.Config(), sinusoid.Config(inner_rate=0.1)):
        steady = sinusoid.methods(config)["steady"]
        assert steady.test_rates == (0.01,) and steady.rates["inner"] == 0.01
        after, _ = inner_loop(steady.training, lambda x, _: (x**2 / 2, {}), jnp.array(1.0), (), None, steps=1)
        assert float(after) == pytest.approx(0.99)


def test_sinusoid_end_to_end(tmp_path):
    workdir = tmp_path / "run"
    ended = launch("experiments.sinusoid", "--steps", 1500, "--test-tasks", 50, "--workdir", workdir,
                   "--methods", "maml", "oracle")  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "5 points" in ended.stdout and "the paper" in ended.stdout and "diverged" in ended.stdout
    results = json.loads((workdir / "results.json").read_text())
    errors = {(row["method"], row["shots"]): row["mean"] for row in results["rows"]}
    assert len(errors) == 6 and all(len(mean) == 11 for mean in errors.values())
    assert errors["maml", 10][1] < 0.95 * errors["maml", 10][0]  # One step helps already.
    assert {"errors.png", "fits.png", "params.msgpack", "metrics.jsonl"} <= {p.name for p in workdir.iterdir()}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["method"] == "oracle"] == [1000, 1500]
    other = launch("experiments.sinusoid", "--workdir", workdir, "--methods", "maml", "first_order")
    assert other.returncode == 2 and "test_tasks" not in other.stderr
    assert "methods was ['maml', 'oracle'], is ['maml', 'first_order']" in other.stderr
