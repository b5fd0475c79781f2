"""A training that can be killed at any moment and goes on where it was, to the same numbers bit for bit."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from maml_jax import validation
from maml_jax.meta import MetaLearner
from maml_jax.parallel import processes
from maml_jax.runs import signals
from maml_jax.runs.checkpoint import Checkpoints
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import WorkdirError, note, plain
from maml_jax.runs.profiling import profiled
from maml_jax.training import DrawFn, Metrics, train
from maml_jax.types import MetaState, NotFiniteError

Rate = float | Callable[[int], Any]
"""A rate, or the schedule of one: from the number of steps before to the rate, as in optax."""


class Validate(NamedTuple):
    """How the state is judged along the way; where there are several processes, by process 0 alone."""

    every: int
    """Meta-steps from one validation to the next. The last state is validated too, and each that is is saved."""
    metrics: Callable[[MetaState], Metrics]
    """What the row of a validated state gets beside the metrics of training."""
    score: Callable[[Metrics], float] | None = None
    """Of such a row, larger is better: the checkpoint with the largest is kept, whatever its age."""


def resumable_train(
    learner: MetaLearner,
    state: MetaState,
    draw: DrawFn,
    data: Any = None,
    *,
    steps: int,
    steps_per_call: int,
    run: RunDirectory,
    save_every: int,
    validate: Validate | None = None,
    keep: int = 2,
    labels: Mapping[str, Any] | None = None,
    rates: Mapping[str, Rate] | None = None,
    profile: bool = False,
) -> Iterator[tuple[MetaState, Metrics]]:
    """`train` that logs and saves itself, and begins where the checkpoints of `run` end.

    `for state, row in resumable_train(...)` is the whole training loop. What it hands over is logged, and never more
    than `save_every` meta-steps (or one call, if that is longer) ahead of a checkpoint on disk. If there is a
    checkpoint, the first that it hands over is the state restored and its row: so there is always a first,
    for a training that had ended, too.

    Args:
      learner, state, draw, data, steps, steps_per_call: as for `train`. `state` is where a new run starts,
        and tells the structure of the one restored. Tasks are to be drawn from `data` and the step alone, as
        `train` requires: then no position in the data needs to be kept.
      run: where metrics are logged, and the checkpoints are: in `checkpoints`, or a directory below it named by
        the labels.
      save_every: meta-steps from one checkpoint to the next; saving takes about a tenth of a second, most of it
        while the next call computes.
      validate: how to checker the state along the way, if at all.
      keep: how many of the newest checkpoints are kept.
      labels: what tells this training from others of the same run: entries of each of its rows.
      rates: inner and outer rates or their schedules, by name, to be told when a loss stops being finite.
      profile: whether to trace the second and the third call into the directory `profile` of `run`.

    Yields:
      The state, and its row: the metrics of `train` and `validate`, the latter in process 0 alone.

    Raises:
      ValueError: for an option that is not allowed, at once.
      WorkdirError: if every checkpoint is damaged, or of another model, or beyond `steps`; if nothing can be
        written.
      NotFiniteError: as `train`, with the rates. No checkpoint ever holds what is not finite.
      Interrupted: a SystemExit with status 128 + the signal's number, once all is saved after SIGINT or
        SIGTERM. A second of them ends the process at once.
    """
    intervals = {"steps": steps, "steps_per_call": steps_per_call, "save_every": save_every, "keep": keep}
    for name, value in (intervals | ({"validate.every": validate.every} if validate else {})).items():
        validation.at_least(name, value, 1)
    labels, rates = dict(labels or {}), rates or {}
    label = "-".join(map(str, labels.values()))
    folder = run.path / "checkpoints" / label

    def calls(
        state: MetaState, stop_request: signals.StopRequest, checkpoints: Checkpoints
    ) -> Iterator[tuple[MetaState, Metrics]]:
        # Going on: first the state, which says at what step the run is. Then the metrics are cut to that step, so
        # that none is doubled. Only then are new steps taken.
        restored = checkpoints.restore(state)
        done = saved = int(state.step) if restored is None else restored.step
        if done > steps:
            raise _beyond(folder, done, steps)
        run.drop_rows_after(done, **labels)
        rows = len(run.rows(**labels))
        if restored is not None:
            if processes.is_leader() and rows < restored.about["rows"]:
                note(f"{run.path / 'metrics.jsonl'} has lost {restored.about['rows'] - rows} rows up to step {done}.")
            state = restored.state
            yield state, restored.about["row"]

        taken = train(
            learner,
            state,
            draw,
            data,
            steps=steps,
            steps_per_call=steps_per_call,
            stop=lambda: stop_request.signal is not None,
        )
        for state, row in profiled(taken, run.path / "profile" / label) if profile and processes.is_leader() else taken:
            before, done = done, row["step"]
            judged = validate is not None and (done == steps or _passed(validate.every, before, done))
            if validate is not None and judged and processes.is_leader():
                found = validate.metrics(processes.local(state))
                scored = math.nan if validate.score is None else float(validate.score(row | found))
                row = row | plain(found)
            # Killed between any two of these lines, the run goes back to the newest checkpoint on disk and makes the
            # rows after it again: none is more than one interval ahead, for the save begun last is awaited first.
            checkpoints.wait()
            run.log(**labels, **row)
            rows += 1
            if judged or done == steps or _passed(save_every, before, done):
                score = scored if judged and processes.is_leader() and math.isfinite(scored) else None
                checkpoints.save(done, state, {"row": row, "rows": rows}, score)
                saved = done
            yield state, row
        # The call that is under way when a signal comes is dropped: the state in hand is whole, and is what is saved.
        if (number := signals.of_any_process(stop_request)) is not None:
            if saved < done:
                checkpoints.save(done, state, {"row": row, "rows": rows})
            checkpoints.wait()
            if processes.is_leader():
                note(f"Stopped by {number.name}; step {done} is saved, and the same command goes on from there.")
            raise signals.Interrupted(number)

    def guarded() -> Iterator[tuple[MetaState, Metrics]]:
        with signals.deferred() as stop_request, closing(Checkpoints(folder, keep=keep)) as checkpoints:
            try:
                yield from calls(state, stop_request, checkpoints)
            except NotFiniteError as error:
                checkpoints.wait()
                message = f"{error}{_told(rates, error.step)}{_last(checkpoints)}"
                raise NotFiniteError(message, error.step) from error

    return guarded()


def check_steps(path: str | Path | None, steps: int) -> None:
    """Raises WorkdirError if a training in the run directory `path` has gone beyond `steps`, for a check beforehand."""
    if path is None or not processes.is_leader():
        return
    folders = [folder for depth in ("*", "*/*") for folder in Path(path, "checkpoints").glob(depth)]
    # Of a folder named by a label that is a number, only what is in it counts.
    named = {folder.parent for folder in folders if folder.name.isdecimal()}
    done = {int(folder.name): folder.parent for folder in folders if folder.name.isdecimal() and folder not in named}
    if done and max(done) > steps:
        raise _beyond(done[max(done)], max(done), steps)


def _beyond(folder: Path, done: int, steps: int) -> WorkdirError:
    return WorkdirError(
        f"{folder} has {done} meta-steps behind it, more than the {steps} that are wanted. Give at least {done}, or "
        "another directory."
    )


def _passed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every


def _told(rates: Mapping[str, Rate], step: int) -> str:
    values = {name: rate(step - 1) if callable(rate) else rate for name, rate in rates.items()}
    listed = ", ".join(f"{name} {float(value):g}" for name, value in values.items())
    return f" The rates were: {listed}." if values else ""


def _last(checkpoints: Checkpoints) -> str:
    steps = checkpoints.steps()
    return f" The last checkpoint, {checkpoints.path / str(steps[-1])}, is finite." if steps else ""
