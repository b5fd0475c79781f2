"""Saved models are checked, evaluated with the options of their training, and compared on the same tasks."""

import json

import jax
import jax.numpy as jnp
import pytest
from helpers.few_shot import initial, save, small_run

from experiments import evaluate, omniglot
from maml_jax.runs import model_file
from maml_jax.runs.files import WorkdirError


@pytest.fixture
def saved(characters, tmp_path, small_net, monkeypatch):
    """Saves a state of a run; commands load the characters for it."""
    monkeypatch.setattr(omniglot.Run, "load", lambda run: characters)

    def write(name, scale=1.0, **options):
        run = small_run(tmp_path, **options)
        _, state = initial(run)
        params = jax.tree.map(lambda leaf: leaf * scale, state.params)
        return save(tmp_path / f"{name}.msgpack", run, characters, state._replace(params=params), selected_after=4)

    return write


def test_options_that_do_not_fit_a_model_raise(saved, characters, tmp_path, monkeypatch):
    path = saved("model", method="maml++")
    _, (model,) = evaluate.prepare(evaluate.Config((path,)))
    assert model.selected_after == 4 and model.run.method == "maml++"
    for options, message in (
        ({"inner_rate": 0.1}, "the inner rates of this model are learned"),
        ({"normalisation": "tasknorm"}, "normalisation cannot be 'tasknorm'"),
        ({"normalisation": "running"}, "normalisation cannot be 'running'"),
        ({"shots": 0}, "shots must be an integer of at least 1, but got 0"),
        ({"queries": 200}, "shots \\+ queries must be at most 20"),
        ({"seed": -1}, "seed must be an integer of at least 0, but got -1"),
        ({"output": tmp_path / "nowhere" / "out.json"}, "output must be in a directory that exists"),
        ({"output": tmp_path / "out.png"}, "output must be the path of a JSON file"),
        ({"models": ()}, "at least one model file"),
        ({"models": (tmp_path,)}, "is a folder"),
        ({"models": (path, path)}, "models must be different"),
        ({"compare_step": 11}, "compare_step must be from 0 to steps, 10, but got 11"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.prepare(evaluate.Config(**{"models": (path,), **options}))
    other = characters._replace(sha256=dict.fromkeys(characters.sha256, "1" * 64))
    monkeypatch.setattr(omniglot.Run, "load", lambda run: other)
    with pytest.raises(ValueError, match="is not the data set that"):
        evaluate.prepare(evaluate.Config((path,)))
    evaluate.prepare(evaluate.Config((path,), other_data=True))
    (tmp_path / "no.msgpack").write_text("{}")
    with pytest.raises(ValueError, match=r"no\.msgpack is not a file of maml_jax\.save"):
        evaluate.prepare(evaluate.Config((tmp_path / "no.msgpack",)))


def test_options_replace_those_of_the_training(saved):
    path = saved("model")
    given = {"shots": 3, "queries": 2, "normalisation": "layer", "inner_rate": 0.25, "seed": 7}
    _, (model,) = evaluate.prepare(evaluate.Config((path,), tasks=9, **given))
    protocol = evaluate.protocol(evaluate.Config((path,), tasks=9, **given), model)
    assert (protocol.tasks, protocol.rotations) == (9, "none")
    for name, value in given.items():
        assert getattr(model.run, name) == getattr(protocol, name) == value


def test_a_one_step_model_takes_the_statistics_of_the_support_set_at_test(saved):
    """Only its training cannot: it exchanges the two sets."""
    config = evaluate.Config((saved("model", method="one-step"),), tasks=3, steps=1, normalisation="support")
    (found,) = evaluate.main(evaluate.prepare(config)).values()
    assert found["protocol"]["normalisation"] == "support"


def test_two_models_are_compared_on_the_same_tasks(saved, tmp_path):
    first, second = saved("first", scale=-3.0), saved("second")
    output = tmp_path / "found.json"
    config = evaluate.Config((first, second), tasks=12, steps=2, compare_step=1, evaluation="both", output=output)
    rows = evaluate.main(evaluate.prepare(config))
    modes = ("transductive", "inductive")
    assert [*rows] == [f"{path}, {mode}" for path in (first, second) for mode in modes]
    for mode in modes:
        of_first, of_second = (rows[f"{path}, {mode}"] for path in (first, second))
        assert of_first["protocol"]["query_mode"] == mode
        assert "first_minus_this" not in of_first
        difference = of_second["first_minus_this"]
        assert difference["inner_steps"] == 1 and difference["low"] <= difference["mean"] <= difference["high"]
        assert difference["mean"] == pytest.approx(of_first["accuracy"][1] - of_second["accuracy"][1])
        # Batch normalisation of a single query gives zeros: the two models then have the same accuracy.
        assert (of_first["accuracy"][1] != of_second["accuracy"][1]) == (mode == "transductive")
    made_by = json.loads(output.read_text())["made_by"]
    assert made_by["started"] <= made_by["finished"] and made_by["versions"]["mujoco"]


def test_models_with_different_protocols_cannot_be_an_ensemble(saved):
    paths = tuple(saved(str(order), order=order) for order in (1, 2))
    evaluate.prepare(evaluate.Config(paths))
    with pytest.raises(ValueError, match=r"(?s)learn a task in the same way.*order 1.*order 2"):
        evaluate.prepare(evaluate.Config(paths, ensemble=True))
    rates = tuple(saved(str(rate), inner_rate=rate) for rate in (1.0, 2.0))
    with pytest.raises(ValueError, match="learn a task in the same way"):
        evaluate.prepare(evaluate.Config(rates, ensemble=True))
    with pytest.raises(ValueError, match="their tasks differ"):
        evaluate.prepare(evaluate.Config((saved("a", seed=1), saved("b", seed=2))))


def test_a_damaged_model_and_a_description_of_another_form_are_refused(saved):
    path = saved("model")
    intact = path.read_bytes()
    path.write_bytes(intact[:-5] + bytes([intact[-5] ^ 16]) + intact[-4:])
    with pytest.raises(ValueError, match=r"model.msgpack is damaged: the array params/\S+ has the wrong checksum"):
        evaluate.prepare(evaluate.Config((path,)))
    path.write_bytes(intact)
    content = model_file.load(path)
    for change, message in (
        ({"selected_after": "5"}, "selected_after must be an integer, but is '5'"),
        ({"data_sha256": None}, "data_sha256 must be an object"),
        ({"config": content.description["config"] | {"layers": 5}}, "config.layers is unknown"),
        ({"config": []}, "config must be an object"),
    ):
        model_file.save(path, content.params, content.inner_params, content.description | change)
        with pytest.raises(WorkdirError, match=f"model.msgpack has another form: {message}"):
            evaluate.prepare(evaluate.Config((path,)))
    for wrong in ([], "ways"):
        model_file.save(path, content.params, description={"experiment": wrong})
        with pytest.raises(ValueError, match="must be a few-shot classifier"):
            evaluate.prepare(evaluate.Config((path,)))
    config = content.description["config"] | {"ways": "five"}
    model_file.save(path, content.params, content.inner_params, content.description | {"config": config})
    with pytest.raises(ValueError, match="ways must be an integer of at least 2, but got 'five'"):
        evaluate.prepare(evaluate.Config((path,)))


def test_a_model_of_another_experiment_raises(tmp_path):
    path = model_file.save(tmp_path / "curves.msgpack", {"w": jnp.ones(2)}, (), {"experiment": "sinusoid"})
    with pytest.raises(ValueError, match="must be a few-shot classifier, but is a model of experiment 'sinusoid'"):
        evaluate.prepare(evaluate.Config((path,)))
