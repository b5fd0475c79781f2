"""Model files: parameters of any library are restored, and no code in a file is executed."""

import pickle
from collections import OrderedDict

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
from helpers import model_zoo

import maml_jax
from maml_jax.runs import model_file


def test_a_loaded_model_equals_the_saved_model(tmp_path):
    params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(2, jnp.bfloat16)}
    inner_params = {"a": {"kernel": [jnp.eye(2), jnp.eye(3)]}}
    path = model_file.save(tmp_path / "deep" / "model.msgpack", params, inner_params, {"ways": 5, "list": [1, 2]})
    content = model_file.load(path)
    assert content.description == {"ways": 5, "list": [1, 2]} and content.params["b"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, content.params, params)
    np.testing.assert_array_equal(content.inner_params["a"]["kernel"]["1"], np.eye(3))
    assert model_file.load(model_file.save(path, params)).inner_params == () and list(path.parent.iterdir()) == [path]
    intact, touched = path.read_bytes(), tmp_path / "touched"
    code = pickle.dumps(Touches(touched))
    for damage in (intact[:100], intact + b"0", b"", code, b"{}", msgpack.packb({"format": []})):
        path.write_bytes(damage)
        with pytest.raises(
            ValueError, match=r"model\.msgpack is not a file of maml_jax\.save, or is damaged: its description"
        ):
            model_file.load(path)
    path.write_bytes(msgpack.packb({"format": "maml_jax 1", "description": "{}"}))
    with pytest.raises(
        ValueError, match=r"has the format 'maml_jax 1', but this version of maml_jax reads 'maml_jax 2'"
    ):
        model_file.load(path)
    assert not touched.exists()  # No code was executed.
    pickle.loads(code)
    assert touched.exists()


def test_a_flipped_bit_in_any_byte_is_refused_and_a_damaged_array_is_named(tmp_path):
    params = {"dense": {"kernel": np.arange(20, dtype=np.float32)}, "bias": jnp.ones(3)}
    path = maml_jax.save(tmp_path / "model", params, {"rate": jnp.float32(0.1)}, {"ways": 5})
    intact = path.read_bytes()
    for index in range(len(intact)):
        damaged = bytearray(intact)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model (is not a file|is damaged|has the format)"):
            maml_jax.load(path)
    for array, name in ((params["dense"]["kernel"], "params/dense/kernel"), (np.float32(0.1), "inner_params/rate")):
        content = array.tobytes()
        path.write_bytes(intact.replace(content, bytes([content[0] ^ 1]) + content[1:]))
        with pytest.raises(ValueError, match=f"model is damaged: the array {name} has the wrong checksum"):
            maml_jax.load(path)


def test_types_and_byte_orders_are_kept(tmp_path):
    names = (*"?bBhHiIqQefdFD", "bfloat16", "float8_e4m3fn")
    params = {name: np.arange(6).reshape(2, 3).astype(name) for name in names}
    params |= {f"big {name}": np.arange(6).astype(f">{name}") for name in "hiqefdD"}
    params |= {"transposed": np.arange(6.0).reshape(2, 3).T, "empty": np.zeros((0, 2)), "number": 0.1}
    loaded = maml_jax.load(maml_jax.save(tmp_path / "model", params)).params
    restored = maml_jax.restore(params, loaded)
    for name, array in params.items():
        for found in (loaded[name], restored[name]):
            np.testing.assert_array_equal(np.asarray(found), array, err_msg=name)
            assert found.dtype == np.asarray(array).dtype.newbyteorder("="), name


@pytest.mark.parametrize("library", model_zoo.ZOO)
def test_parameters_of_every_library_are_restored(library, tmp_path):
    loss_fn, params = model_zoo.ZOO[library]()
    inner = maml_jax.sgd(0.1, steps=2, learn_rates="layer_step")
    learner = maml_jax.maml(loss_fn, inner, optax.sgd(0.1))
    state, _ = learner.step(learner.init(params), model_zoo.tasks(2))
    content = maml_jax.load(maml_jax.save(tmp_path / "mine", state.params, state.inner_params))
    restored = state._replace(
        params=maml_jax.restore(params, content.params),
        inner_params=maml_jax.restore(state.inner_params, content.inner_params),
    )
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    losses = [learner.step(start, model_zoo.tasks(2))[1].loss for start in (state, restored)]
    np.testing.assert_array_equal(*losses)


def test_errors_name_the_leaf_and_the_argument(tmp_path):
    params = {"w": jnp.ones((2, 3)), "layers": [jnp.zeros(2)]}
    with pytest.raises(
        TypeError, match=r"inner_params must hold only arrays .* but inner_params\['model'\] is 'mine'\. Give texts in"
    ):
        maml_jax.save(tmp_path / "model", params, {"model": "mine"})
    with pytest.raises(TypeError, match=r"description must hold only JSON-serialisable values: .*set"):
        maml_jax.save(tmp_path / "model", params, (), {"ways": {1, 2}})
    with pytest.raises(TypeError, match="description must be a dict, but got 'mine'"):
        maml_jax.save(tmp_path / "model", params, (), "mine")
    for other in (jnp.zeros(2), {"deep": jnp.zeros(2)}, {"deep": {"er": jnp.zeros(2)}}):
        for pairs in ([(1, jnp.ones(2)), ("1", other)], [("1", other), (1, jnp.ones(2))]):
            with pytest.raises(ValueError, match="two leaves with the same path as text"):
                maml_jax.save(tmp_path / "model", OrderedDict(pairs))
    assert not (tmp_path / "model").exists()
    path = maml_jax.save(tmp_path / "model", params, jnp.ones(3), {"ways": np.int64(5), "rate": jnp.float32(0.5)})
    content = maml_jax.load(path)
    assert content.description == {"ways": 5, "rate": 0.5} and content.inner_params.tolist() == [1, 1, 1]
    assert maml_jax.restore(0.0, maml_jax.load(maml_jax.save(path, jnp.pi)).params) == jnp.float32(jnp.pi)
    for like, message in (
        (params | {"b": 1.0}, r"have no array at \['b'\]"),
        (params | {"layers": []}, r"have an array at \['layers'\]\['0'\], but the model has none"),
        (params | {"w": jnp.ones((3, 2))}, r"At \['w'\] the saved values must have shape \(3, 2\), but have \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            maml_jax.restore(like, content.params)


class Touches:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()
