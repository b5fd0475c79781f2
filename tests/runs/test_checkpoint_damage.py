"""Checkpoints that are damaged, of another model, or of what is not finite, for real."""

import os
import shutil
from contextlib import closing
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import maml_jax
from maml_jax.runs.checkpoint import Checkpoints
from maml_jax.runs.files import WorkdirError

# Where orbax fails in the midst of reading or writing, it leaves coroutines and an event loop behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


class State(NamedTuple):
    """A state with a leaf of each kind that there may be."""

    params: dict
    inner_params: tuple
    key: jax.Array
    empty: optax.EmptyState = optax.EmptyState()


def state_of(seed):
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (30, 20)), "a/b": jnp.full(3, seed, jnp.bfloat16), "a": {"b": jnp.arange(4)}}
    return State(params, (), key)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "checkpoints"
    with closing(Checkpoints(path)) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state_of(step), {"row": step})
    return path


def restored(path):
    with closing(Checkpoints(path)) as checkpoints:
        return checkpoints.restore(state_of(0))


def same_keys(first, second):
    plain = [
        jax.tree.map(lambda leaf: leaf, state)._replace(key=jax.random.key_data(state.key)) for state in (first, second)
    ]
    assert_equal(*plain)


class TestDamage:
    def test_whole_ones_come_back_bit_for_bit(self, two_checkpoints):
        found = restored(two_checkpoints)
        assert found.step == 20 and found.about == {"row": 20} and isinstance(found.state, State)
        same_keys(found.state, state_of(20))
        assert found.state.params["a/b"].dtype == jnp.bfloat16

    def test_of_every_file_it_is_named_or_of_no_matter(self, two_checkpoints, tmp_path, capsys):
        """Each file of the newest checkpoint flipped, cut and deleted: that state bit for bit, or a named step back."""
        files = [path for path in sorted((two_checkpoints / "20").rglob("*")) if path.is_file()]
        assert len(files) > 8
        told = {}
        for file in files:
            for damage in ("flipped", "cut", "deleted"):
                path = tmp_path / f"{len(told)}"
                shutil.copytree(two_checkpoints, path)
                target, content = path / file.relative_to(two_checkpoints), bytearray(file.read_bytes())
                content[len(content) // 2] ^= 1
                if damage == "deleted":
                    target.unlink()
                else:
                    target.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
                found = restored(path)
                same_keys(found.state, state_of(found.step))
                told[file, damage] = message = capsys.readouterr().err
                if found.step == 10:
                    assert f"The checkpoint {path / '20'} is damaged: " in message and "from step 10" in message
                    assert sorted(os.listdir(path)) == ["10", "20.damaged"]
                else:
                    assert found.step == 20 and message == ""
        damaged = [message for message in told.values() if message]
        assert len(damaged) >= 12
        # orbax alone would have handed these over.
        assert any("params['w'] is not what was saved: the checksum differs" in message for message in damaged)

    def test_a_description_that_can_be_read_is_proven_too(self, two_checkpoints, tmp_path, capsys):
        shutil.copytree(two_checkpoints, tmp_path / "changed")
        description = tmp_path / "changed" / "20" / "about" / "metadata"
        description.write_text(description.read_text().replace('"row": 20', '"row": 21'))
        assert restored(tmp_path / "changed").about == {"row": 10}
        assert "its description is not what was saved: the checksum differs" in capsys.readouterr().err

    def test_none_whole_is_an_error_and_changes_nothing(self, two_checkpoints, tmp_path):
        path = tmp_path / "checkpoints"
        shutil.copytree(two_checkpoints, path)
        for step in ("10", "20"):
            (path / step / "about" / "metadata").write_text("{")
        for _ in range(2):  # The second time too: it must not begin at step 0 because all were put aside.
            with pytest.raises(WorkdirError, match=r"Every checkpoint in .* is damaged \(step 20: .*; step 10: .*\)"):
                restored(path)

    def test_another_model_is_no_damage(self, two_checkpoints):
        other = state_of(0)
        other.params["w"] = jnp.zeros((30, 21))
        with closing(Checkpoints(two_checkpoints)) as checkpoints:
            with pytest.raises(WorkdirError, match=r"params\['w'\] was float32\[30, 20\], is float32\[30, 21\]"):
                checkpoints.restore(other)
        assert sorted(os.listdir(two_checkpoints)) == ["10", "20"]

    def test_what_a_killed_process_left_is_no_checkpoint(self, tmp_path):
        for name in ("30.orbax-checkpoint-tmp", "10.old"):
            (tmp_path / name / "state").mkdir(parents=True)
        assert restored(tmp_path) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, bad):
    state = state_of(1)
    state.params["a/b"] = state.params["a/b"].at[1].set(bad)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(FloatingPointError, match=r"After meta-step 3 params\['a/b'\] is not finite"):
            checkpoints.save(3, state)
    assert os.listdir(tmp_path) == []


def test_an_optimizer_may_hold_infinity_but_nothing_may_hold_what_is_no_number(tmp_path):
    params = {"w": np.ones(2, np.float32)}
    state = maml_jax.MetaState(np.array(3, np.int32), params, (), {"least loss": np.array(np.inf, np.float32)})
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(3, state)
        checkpoints.wait()
        assert checkpoints.restore(state).state.opt_state["least loss"] == np.inf
        for wrong in (
            state._replace(opt_state={"least loss": np.array(np.nan, np.float32)}),
            state._replace(params={"w": np.array([1, np.inf], np.float32)}),
        ):
            with pytest.raises(FloatingPointError, match="is not finite"):
                checkpoints.save(4, wrong)
