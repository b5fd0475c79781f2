"""What is saved comes back, of any library's parameters, and nothing of a file is executed."""

import pickle
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import model_zoo

import maml_jax
from maml_jax.runs import model_file


def test_saved_and_loaded_is_the_same(tmp_path):
    params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(2, jnp.bfloat16)}
    inner_params = {"a": {"kernel": [jnp.eye(2), jnp.eye(3)]}}
    path = model_file.save(tmp_path / "deep" / "model.msgpack", params, inner_params, {"way": 5, "list": [1, 2]})
    content = model_file.load(path)
    assert content.description == {"way": 5, "list": [1, 2]} and content.params["b"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, content.params, params)
    np.testing.assert_array_equal(content.inner_params["a"]["kernel"]["1"], np.eye(3))
    assert model_file.load(model_file.save(path, params)).inner_params == () and list(path.parent.iterdir()) == [path]
    whole, touched = path.read_bytes(), tmp_path / "touched"
    code = pickle.dumps(Touches(touched))
    for damage in (whole[:100], whole.replace(b"maml_jax 1", b"maml_jax 9"), b"", code, b"{}"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"model\.msgpack is not a file of maml_jax\.save, or damaged"):
            model_file.load(path)
    assert not touched.exists()  # No code was run.
    pickle.loads(code)
    assert touched.exists()


@pytest.mark.parametrize("library", model_zoo.ZOO)
def test_parameters_of_every_library_come_back(library, tmp_path):
    loss_fn, params = model_zoo.ZOO[library]()
    inner = maml_jax.sgd(0.1, steps=2, learn_rates="layer_step")
    learner = maml_jax.maml(loss_fn, inner, optax.sgd(0.1))
    state, _ = learner.step(learner.init(params), model_zoo.tasks(2))
    content = maml_jax.load(maml_jax.save(tmp_path / "mine", state.params, state.inner_params))
    back = state._replace(
        params=maml_jax.restore(params, content.params),
        inner_params=maml_jax.restore(state.inner_params, content.inner_params),
    )
    jax.tree.map(np.testing.assert_array_equal, back, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    np.testing.assert_array_equal(*(learner.step(each, model_zoo.tasks(2))[1].loss for each in (state, back)))


def test_what_cannot_be_saved_or_restored_is_told(tmp_path):
    params = {"w": jnp.ones((2, 3)), "layers": [jnp.zeros(2)]}
    with pytest.raises(
        TypeError, match=r"inner_params must hold arrays .* but inner_params\['model'\] is 'mine'\. A description"
    ):
        maml_jax.save(tmp_path / "model", params, {"model": "mine"})
    with pytest.raises(TypeError, match=r"description must hold only what JSON takes, but .*set"):
        maml_jax.save(tmp_path / "model", params, (), {"ways": {1, 2}})
    with pytest.raises(TypeError, match="description must be a dict, but got 'mine'"):
        maml_jax.save(tmp_path / "model", params, (), "mine")
    for other in (jnp.zeros(2), {"deep": jnp.zeros(2)}, {"deep": {"er": jnp.zeros(2)}}):
        for pairs in ([(1, jnp.ones(2)), ("1", other)], [("1", other), (1, jnp.ones(2))]):
            with pytest.raises(ValueError, match="two leaves that are both called"):
                maml_jax.save(tmp_path / "model", OrderedDict(pairs))
    assert not (tmp_path / "model").exists()
    path = maml_jax.save(tmp_path / "model", params, jnp.ones(3), {"ways": np.int64(5), "rate": jnp.float32(0.5)})
    content = maml_jax.load(path)
    assert content.description == {"ways": 5, "rate": 0.5} and content.inner_params.tolist() == [1, 1, 1]
    assert maml_jax.restore(0.0, maml_jax.load(maml_jax.save(path, jnp.pi)).params) == jnp.float32(jnp.pi)
    for like, told in (
        (params | {"b": 1.0}, r"have nothing at \['b'\]"),
        (params | {"layers": []}, r"have \['layers'\]\['0'\], for which there is no place"),
        (params | {"w": jnp.ones((3, 2))}, r"At \['w'\] the saved values have shape \(2, 3\) in place of \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=told):
            maml_jax.restore(like, content.params)


class Touches:
    """Touches a file when it is read from a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()
