"""The profiler trace of a training."""

import gzip
import json

import jax
from helpers.resumable_run import setting

from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.resumable import resumable_train


def test_the_second_and_third_call_are_traced(tmp_path, capsys):
    learner, state, draw = setting()
    run = RunDirectory(tmp_path, "tiny", {})
    steps = [
        row["step"]
        for _, row in resumable_train(
            learner, state, draw, jax.random.key(1), steps=10, steps_per_call=2, run=run, save_every=10, profile=True
        )
    ]
    assert steps == [2, 4, 6, 8, 10]
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert f"A profile of 2 calls is in {tmp_path / 'profile'}" in capsys.readouterr().err
    assert 0 < names.count("PjitFunction(run)") <= 4  # Each call appears twice.
