"""The models with the highest scores are kept, also after a restart."""

import jax.numpy as jnp
import pytest

from maml_jax.runs import model_file
from maml_jax.runs.best import Best
from maml_jax.runs.files import WorkdirError
from maml_jax.types import MetaState


def state(step):
    return MetaState(jnp.int32(step), {"w": jnp.full(2, step, jnp.float32)}, (), ())


def test_the_best_models_are_kept(tmp_path):
    scores = [0.1, 0.5, 0.3, 0.5, 0.2, 0.4, 0.05, 0.6]
    best = Best(tmp_path / "best", {"about": "a"})
    for step, score in enumerate(scores[:5], 1):
        best.add(state(step), score)
    best = Best(tmp_path / "best", {"about": "a"})  # A restarted run repeats step 5.
    for step, score in enumerate(scores[4:], 5):
        best.add(state(step), score)
    assert [int(path.stem[5:]) for path in best.paths()] == [8, 4, 2, 6, 3]
    assert sorted(best.paths()) == sorted((tmp_path / "best").iterdir())
    models = best.models()
    assert [model.description for model in models[:2]] == [
        {"about": "a", "step": 8, "score": 0.6},
        {"about": "a", "step": 4, "score": 0.5},
    ]
    assert [model.params["w"].tolist() for model in models[:2]] == [[8, 8], [4, 4]]


def test_the_description_of_all_models_can_be_replaced(tmp_path):
    best = Best(tmp_path, keep=2)
    for step, score in enumerate((3.0, 1.0, 2.0), 1):
        best.add(state(step), score)
    best.describe({"rate": 0.1})
    assert [model.description for model in best.models()] == [
        {"rate": 0.1, "step": 1, "score": 3.0},
        {"rate": 0.1, "step": 3, "score": 2.0},
    ]
    best.add(state(4), 4.0)
    assert best.models()[0].description == {"rate": 0.1, "step": 4, "score": 4.0}


def test_a_wrong_keep_and_a_damaged_file_raise(tmp_path):
    with pytest.raises(ValueError, match="keep must be an integer of at least 1, but got 0"):
        Best(tmp_path, keep=0)
    (tmp_path / "step-0000001.msgpack").write_text("no model")
    with pytest.raises(ValueError, match="step-0000001"):
        Best(tmp_path)
    best = Best(tmp_path / "flipped")
    best.add(state(1), 0.5)
    (path,) = best.paths()
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"score": 0.5', b'"score": 0.7'))
    for read in (lambda: Best(path.parent), best.models, lambda: best.describe({})):
        with pytest.raises(ValueError, match="its description has a wrong checksum"):
            read()
    model_file.save(tmp_path / "step-0000001.msgpack", {"w": jnp.ones(1)}, description={"step": 1, "score": "high"})
    with pytest.raises(WorkdirError, match=r"step-0000001\.msgpack has another form: score must be a number or null"):
        Best(tmp_path)


def test_a_score_that_is_not_a_number_is_the_lowest(tmp_path):
    best = Best(tmp_path, keep=2)
    for step, score in enumerate((0.5, float("nan"), 0.7), 1):
        best.add(state(step), score)
    assert [path.stem for path in best.paths()] == ["step-0000003", "step-0000001"]
    best.keep = 3
    best.add(state(4), float("nan"))
    assert [path.stem for path in Best(tmp_path).paths()] == ["step-0000003", "step-0000001", "step-0000004"]
