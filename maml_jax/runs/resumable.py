"""Training with checkpoints. A training that is killed at any moment resumes with bit-equal results."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from maml_jax import validation
from maml_jax.meta import MetaLearner
from maml_jax.parallel import processes
from maml_jax.runs import signals
from maml_jax.runs.agreement import check_agreement
from maml_jax.runs.checkpoint import Checkpoints, fingerprints
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import WorkdirError, folder_name, print_note, to_jsonable
from maml_jax.runs.profiling import profile_calls
from maml_jax.training import DrawFn, Metrics, train
from maml_jax.types import MetaState, NotFiniteError

Rate = float | Callable[[int], Any]
"""A learning rate, or a schedule from the number of previous steps to the rate, as in optax."""


class Validate(NamedTuple):
    """Validation during training. With several processes, only process 0 validates."""

    every: int
    """Meta-steps between validations. The last state is validated too. Every validated state is saved."""
    metrics: Callable[[MetaState], Metrics]
    """Computes the metrics of a state. They are added to the row of the training."""


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
    """Meta-trains like `train`, logs the metrics, saves checkpoints, and resumes from the last checkpoint of `run`.

    `for state, row in resumable_train(...)` is the whole training loop. Each yielded row is logged. The newest
    checkpoint on disk is at most `save_every` meta-steps older than the yielded state, or one call older if a call
    takes more meta-steps.

    A resumed training first yields the restored state with its row. A finished training yields only this pair.

    Args:
      learner, draw, data, steps, steps_per_call: as for `train`. Tasks must depend only on `data` and the step, so a
        checkpoint needs no position in the data.
      state: the initial state of a new run, with the structure of the restored state.
      run: the run directory, for metrics and checkpoints. Checkpoints are in `checkpoints`, or with `labels` in a
        subdirectory of `checkpoints`.
      save_every: meta-steps between checkpoints. A checkpoint takes about 0.1 s, mostly parallel to the next call.
      validate: the validation during training; None for no validation.
      keep: the number of checkpoints to keep.
      labels: entries to add to each row, such as `{"seed": 0}`. Labels identify a training in `run`.
      rates: inner and outer learning rates or their schedules, by name, for the message of NotFiniteError.
      profile: whether to trace the second and the third call into the directory `profile` of `run`.

    Yields:
      The state, and its row: the metrics of `train`, and in process 0 also those of `validate`.

    Raises:
      ValueError: at once, for an option that is not allowed.
      WorkdirError: if all checkpoints are damaged, if the newest intact checkpoint belongs to another model or has more
        than `steps` meta-steps, or if a file cannot be written.
      DisagreementError: if the processes have other steps, intervals, labels, states or data.
      NotFiniteError: as `train`. The message also gives the rates. A checkpoint never holds NaN or infinity, except
        for infinity in the state of the optimizer.
      Interrupted: after SIGINT or SIGTERM, when the state is saved. This error is a SystemExit with status 128 + the
        number of the signal. A second signal ends the process at once.

    Example:
      >>> import tempfile
      >>> import jax, jax.numpy as jnp, optax
      >>> import maml_jax
      >>> from maml_jax.tasks import sinusoid
      >>> def loss_fn(params, batch):
      ...     x, y = batch
      ...     return jnp.mean((jnp.sin(x) * params - y) ** 2), {}
      >>> def draw(key, step):
      ...     return sinusoid.draw_tasks(jax.random.fold_in(key, step), 2, shots=5, queries=5)
      >>> learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), optax.adam(0.01))
      >>> folder = tempfile.mkdtemp()
      >>> for steps in (4, 8):  # The second run resumes at step 4.
      ...     run = RunDirectory(folder, "sine", {"steps": steps}, mutable_fields={"steps"})
      ...     state = learner.init(jnp.ones([]))
      ...     for state, row in resumable_train(
      ...         learner, state, draw, jax.random.key(0), steps=steps, steps_per_call=2, run=run, save_every=4
      ...     ):
      ...         print(row["step"])
      ...     run.close()
      2
      4
      4
      6
      8
    """
    intervals = {"steps": steps, "steps_per_call": steps_per_call, "save_every": save_every, "keep": keep}
    intervals |= {"validate.every": validate.every} if validate else {}
    for name, value in intervals.items():
        validation.at_least(name, value, 1)
    labels, rates = dict(labels or {}), rates or {}
    label = folder_name(labels.values())
    folder = run.path / "checkpoints" / label

    def calls(state: MetaState) -> Iterator[tuple[MetaState, Metrics]]:
        """Yields the state and the row of each call."""
        check_agreement(lambda: intervals | labels | fingerprints("state", state) | fingerprints("data", data))
        with (
            signals.deferred() as stop_request,
            closing(Checkpoints(folder, keep=keep)) as checkpoints,
            _explain_not_finite(rates, checkpoints),
        ):
            # Resume: restore the state, then remove the rows after its step, then take new steps.
            restored = checkpoints.restore(state)
            done = saved = int(state.step) if restored is None else restored.step
            if done > steps:
                raise _too_many_steps(folder, done, steps)
            run.drop_rows_after(done, **labels)
            num_rows = len(run.rows(**labels))
            if restored is not None:
                if processes.is_leader() and num_rows < (expected := restored.about["rows"]):
                    print_note(f"{run.path / 'metrics.jsonl'} has lost {expected - num_rows} rows up to step {done}.")
                state = restored.state
                yield state, restored.about["row"]

            trained = train(
                learner,
                state,
                draw,
                data,
                steps=steps,
                steps_per_call=steps_per_call,
                stop=lambda: stop_request.signal is not None,
            )
            if profile and processes.is_leader():
                trained = profile_calls(trained, run.path / "profile" / label)
            for state, row in trained:
                before, done = done, row["step"]
                # Validate.
                validated = validate is not None and (done == steps or _is_due(validate.every, before, done))
                if validate is not None and validated and processes.is_leader():
                    row = row | to_jsonable(validate.metrics(processes.local(state)))
                # Log, after the previous checkpoint is on disk. A process that is killed between any two of these lines
                # resumes from the newest checkpoint on disk and computes the later rows again.
                checkpoints.wait()
                run.log(**labels, **row)
                num_rows += 1
                # Save.
                if validated or done == steps or _is_due(save_every, before, done):
                    checkpoints.save(done, state, {"row": row, "rows": num_rows})
                    saved = done
                yield state, row
            # After a signal, drop the call that is being computed and save the last complete state.
            if (number := signals.signal_of_any_process(stop_request)) is not None:
                if saved < done:
                    checkpoints.save(done, state, {"row": row, "rows": num_rows})
                checkpoints.wait()
                if processes.is_leader():
                    print_note(
                        f"Stopped by {number.name}: step {done} is saved. The same command resumes from this step."
                    )
                raise signals.Interrupted(number)
        if stop_request.signal is not None:  # The signal arrived after the last step, while files were closed.
            raise signals.Interrupted(stop_request.signal)

    return calls(state)


@contextmanager
def _explain_not_finite(rates: Mapping[str, Rate], checkpoints: Checkpoints) -> Iterator[None]:
    """Adds the learning rates and the last checkpoint to the message of a NotFiniteError."""
    try:
        yield
    except NotFiniteError as error:
        checkpoints.wait()
        message = f"{error}{_describe_rates(rates, error.step)}{_describe_last(checkpoints)}"
        raise NotFiniteError(message, error.step) from error


def check_steps(path: str | Path | None, steps: int) -> None:
    """Checks, before data are read, that no training in a run directory has taken more than `steps` meta-steps.

    Args:
      path: the run directory; None for a new one.
      steps: the meta-steps to train for.

    Raises:
      WorkdirError: if a training has a checkpoint after more steps.
    """
    if path is None or not processes.is_leader():
        return
    folders = [folder for depth in ("*", "*/*") for folder in Path(path, "checkpoints").glob(depth)]
    # A folder with a number as its name is a checkpoint, unless it holds checkpoints: then the number is a label.
    labelled = {folder.parent for folder in folders if folder.name.isdecimal()}
    done = {int(folder.name): folder.parent for folder in folders if folder.name.isdecimal() and folder not in labelled}
    if done and max(done) > steps:
        raise _too_many_steps(done[max(done)], max(done), steps)


def _too_many_steps(folder: Path, done: int, steps: int) -> WorkdirError:
    return WorkdirError(
        f"The training in {folder} has taken {done} meta-steps, but steps is {steps}. Give steps of at least {done}, "
        "or another --workdir."
    )


def _is_due(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every


def _describe_rates(rates: Mapping[str, Rate], step: int) -> str:
    values = {name: rate(step - 1) if callable(rate) else rate for name, rate in rates.items()}
    listed = ", ".join(f"{name} {float(value):g}" for name, value in values.items())
    return f" The rates were: {listed}." if values else ""


def _describe_last(checkpoints: Checkpoints) -> str:
    steps = checkpoints.steps()
    return f" The last checkpoint, {checkpoints.path / str(steps[-1])}, is finite." if steps else ""
