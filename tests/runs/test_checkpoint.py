"""Checkpoints are restored bit for bit, damage is reported, and NaN and infinity are not saved."""

import errno
import os
import shutil
import threading
from contextlib import closing
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import maml_jax
from maml_jax.runs import checkpoint
from maml_jax.runs.checkpoint import Checkpoints
from maml_jax.runs.files import WorkdirError

# When reading or writing fails, orbax leaves coroutines and an event loop behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class State(NamedTuple):
    """A state with every kind of leaf."""

    params: dict
    inner_params: tuple
    key: jax.Array
    empty: optax.EmptyState = optax.EmptyState()


def make_state(seed):
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (30, 20)), "a/b": jnp.full(3, seed, jnp.bfloat16), "a": {"b": jnp.arange(4)}}
    return State(params, (), key)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "checkpoints"
    with closing(Checkpoints(path)) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, make_state(step), {"row": step})
    return path


def restore(path):
    with closing(Checkpoints(path)) as checkpoints:
        return checkpoints.restore(make_state(0))


def assert_same_state(first, second):
    states = [state._replace(key=jax.random.key_data(state.key)) for state in (first, second)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_an_intact_checkpoint_is_restored_bit_for_bit(two_checkpoints):
    restored = restore(two_checkpoints)
    assert restored.step == 20 and restored.about == {"row": 20} and isinstance(restored.state, State)
    assert_same_state(restored.state, make_state(20))
    assert restored.state.params["a/b"].dtype == jnp.bfloat16


def test_the_newest_checkpoints_are_kept(tmp_path):
    with closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.ones(2)})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]


class TestDamage:
    def test_damage_to_any_file_is_reported_or_harmless(self, two_checkpoints, tmp_path, capsys):
        """Damages each file of the newest checkpoint: a flipped bit, a truncated file, a deleted file.

        Either the newest state is restored bit for bit, or the damage is reported and the older state is restored.
        """
        files = [path for path in sorted((two_checkpoints / "20").rglob("*")) if path.is_file()]
        assert len(files) > 8
        notes = {}
        for file in files:
            for damage in ("flipped", "truncated", "deleted"):
                path = tmp_path / f"{len(notes)}"
                shutil.copytree(two_checkpoints, path)
                target, content = path / file.relative_to(two_checkpoints), bytearray(file.read_bytes())
                content[len(content) // 2] ^= 1
                if damage == "deleted":
                    target.unlink()
                else:
                    target.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
                restored = restore(path)
                assert_same_state(restored.state, make_state(restored.step))
                notes[file, damage] = note = capsys.readouterr().err
                if restored.step == 10:
                    assert f"The checkpoint {path / '20'} is damaged: " in note and "from step 10" in note
                    assert sorted(os.listdir(path)) == ["10", "20.damaged"]
                else:
                    assert restored.step == 20 and note == ""
        reported = [note for note in notes.values() if note]
        assert len(reported) >= 12
        # Orbax does not notice wrong arrays; the checksums do.
        assert any("params['w'] has the wrong checksum" in note for note in reported)

    def test_a_changed_description_is_reported(self, two_checkpoints, tmp_path, capsys):
        shutil.copytree(two_checkpoints, tmp_path / "changed")
        description = tmp_path / "changed" / "20" / "about" / "metadata"
        description.write_text(description.read_text().replace('"row": 20', '"row": 21'))
        assert restore(tmp_path / "changed").about == {"row": 10}
        assert "its description has the wrong checksum" in capsys.readouterr().err

    def test_a_checkpoint_under_the_name_of_another_step_is_reported(self, two_checkpoints, tmp_path, capsys):
        path = tmp_path / "renamed"
        shutil.copytree(two_checkpoints, path)
        (path / "20").rename(path / "30")
        assert restore(path).step == 10
        assert f"{path / '30'} is damaged: its description has the wrong checksum" in capsys.readouterr().err

    def test_if_all_checkpoints_are_damaged_restore_raises_every_time(self, two_checkpoints, tmp_path):
        path = tmp_path / "checkpoints"
        shutil.copytree(two_checkpoints, path)
        for step in ("10", "20"):
            (path / step / "about" / "metadata").write_text("{")
        for _ in range(2):  # Also the second time: the run must not start at step 0.
            with pytest.raises(WorkdirError, match=r"Every checkpoint in .* is damaged \(step 20: .*; step 10: .*\)"):
                restore(path)

    def test_another_model_is_not_damage(self, two_checkpoints):
        other = make_state(0)
        other.params["w"] = jnp.zeros((30, 21))
        with closing(Checkpoints(two_checkpoints)) as checkpoints:
            with pytest.raises(WorkdirError, match=r"params\['w'\] was float32\[30, 20\], is float32\[30, 21\]"):
                checkpoints.restore(other)
        assert sorted(os.listdir(two_checkpoints)) == ["10", "20"]


class TestLeftovers:
    def test_unfinished_work_of_a_killed_process_is_removed(self, tmp_path):
        for name in ("30.orbax-checkpoint-tmp", "10.old"):
            (tmp_path / name / "state").mkdir(parents=True)
        assert restore(tmp_path) is None and not list(tmp_path.iterdir())

    def test_leftovers_are_removed_while_a_thread_of_orbax_still_writes(self, tmp_path, monkeypatch):
        """Orbax reports the first thread that fails, while other threads continue to write."""
        leftover = tmp_path / "12.orbax-checkpoint-tmp"
        (leftover / "state").mkdir(parents=True)
        rmdir, late = os.rmdir, iter(["one", "another"])

        def after_a_late_file(path, **options):
            if (name := next(late, None)) is not None:
                (leftover / "state" / name).touch()
            rmdir(path, **options)

        monkeypatch.setattr(os, "rmdir", after_a_late_file)
        with closing(Checkpoints(tmp_path)):
            assert not leftover.exists() and next(late, None) is None

    def test_the_removal_raises_after_the_timeout(self, tmp_path, monkeypatch):
        (tmp_path / "12.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
        monkeypatch.setattr(checkpoint, "REMOVE_TIMEOUT", 0.1)

        def never(path, **options):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

        monkeypatch.setattr(os, "rmdir", never)
        with pytest.raises(WorkdirError, match=r"Cannot write .*12.orbax-checkpoint-tmp: .*not empty"):
            Checkpoints(tmp_path)


def test_no_thread_waits_for_a_directory_that_cannot_be_created(tmp_path, monkeypatch):
    """Threads that wait would keep the process from ending."""
    before, mkdir = threading.enumerate(), os.mkdir

    def out_of_inodes(path, *args, **options):
        if "about" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        mkdir(path, *args, **options)

    with closing(Checkpoints(tmp_path)) as checkpoints:
        monkeypatch.setattr(os, "mkdir", out_of_inodes)
        with pytest.raises(WorkdirError, match=r"Cannot write .*5: No space left on device"):
            checkpoints.save(5, make_state(1))
            checkpoints.wait()
    for thread in threading.enumerate():
        if thread not in before and not thread.daemon:
            thread.join(timeout=5)
            assert not thread.is_alive()


class TestNotFinite:
    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
    def test_a_state_that_is_not_finite_is_not_saved(self, tmp_path, bad):
        state = make_state(1)
        state.params["a/b"] = state.params["a/b"].at[1].set(bad)
        with closing(Checkpoints(tmp_path)) as checkpoints:
            with pytest.raises(FloatingPointError, match=r"After meta-step 3 params\['a/b'\] is not finite"):
                checkpoints.save(3, state)
        assert os.listdir(tmp_path) == []

    def test_an_optimizer_state_may_hold_infinity_but_not_nan(self, tmp_path):
        params = {"w": np.ones(2, np.float32)}
        opt_state = {"smallest loss": np.array(np.inf, np.float32)}
        state = maml_jax.MetaState(np.array(3, np.int32), params, (), opt_state)
        with closing(Checkpoints(tmp_path)) as checkpoints:
            checkpoints.save(3, state)
            checkpoints.wait()
            assert checkpoints.restore(state).state.opt_state["smallest loss"] == np.inf
            for wrong in (
                state._replace(opt_state={"smallest loss": np.array(np.nan, np.float32)}),
                state._replace(params={"w": np.array([1, np.inf], np.float32)}),
            ):
                with pytest.raises(FloatingPointError, match="is not finite"):
                    checkpoints.save(4, wrong)


@pytest.mark.parametrize("name", ["lr=[0.1]", "a*b?", "back\\slash"])
def test_the_directory_may_have_wildcards_in_its_name(tmp_path, name):
    state = make_state(1)
    for step in (1, 2):
        with closing(Checkpoints(tmp_path / name)) as checkpoints:
            checkpoints.save(step, state)
    with closing(Checkpoints(tmp_path / name)) as checkpoints:
        restored = checkpoints.restore(state)
    assert restored.step == 2
    jax.tree.map(np.testing.assert_array_equal, restored.state.params, state.params)


def test_other_names_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "target").mkdir()
    for name in ("before-tuning.old", "007000", "٣", "7.orbax", "x.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "5").write_text("a file")
    (tmp_path / "checkpoints" / "6.old").symlink_to(tmp_path / "target")
    before = sorted((tmp_path / "checkpoints").iterdir())
    with closing(Checkpoints(tmp_path / "checkpoints", keep=1)) as checkpoints:
        for step in (10, 11):
            checkpoints.save(step, make_state(1))
        checkpoints.wait()
        assert checkpoints.steps() == [11]
    assert sorted((tmp_path / "checkpoints").iterdir()) == sorted([*before, tmp_path / "checkpoints" / "11"])
