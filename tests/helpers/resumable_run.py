"""A training of a second, to be killed: `python tests/helpers/resumable_run.py WORKDIR STEPS [hang]`.

Prints each step that it was handed over. With `PORT PROCESSES PROCESS` it is one of several processes, which train in
float32 and then in float64.
"""

import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import maml_jax
from maml_jax import losses
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.resumable import Validate, resumable_train
from maml_jax.tasks import sinusoid

PER_CALL, SAVE_EVERY = 2, 6


def setting(tasks=3, mesh=None, dtype=np.float32):
    """Learner, first state and draw: Adam after clipping, by a schedule, on parameters and learned rates."""
    params = {"in": np.linspace(-2, 2, 8, dtype=dtype), "out": np.linspace(1, -1, 8, dtype=dtype)}
    learner = maml_jax.maml(
        losses.mean_squared_error(lambda params, x: jnp.tanh(x * params["in"]) @ params["out"][:, None]),
        maml_jax.sgd(0.01, steps=2, learn_rates="parameter"),
        optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(0.03, 1000))),
        mesh=mesh,
    )

    def draw(key, step):
        return sinusoid.draw_tasks(jax.random.fold_in(key, step), tasks, shots=4, queries=4)

    return learner, learner.init(params), draw


def hang(_):
    """Keeps the main thread out of Python for minutes."""
    print("hanging", flush=True)
    return {"forever": float(jax.jit(lambda x: jax.lax.while_loop(lambda y: y < 2.0, jnp.sin, x))(1.0))}


def shared(run, steps, tasks, mesh, told=lambda dtype, row: None):
    """The same training in float32 and in float64, with its tasks divided over `mesh`; its rows and parameters."""
    found = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            learner, state, draw = setting(tasks, mesh, dtype)
            for state, row in resumable_train(
                learner, state, draw, jax.random.key(1), steps=steps, steps_per_call=PER_CALL, run=run,
                save_every=SAVE_EVERY, labels={"dtype": dtype},
            ):  # fmt: skip
                told(dtype, row)
            found[dtype] = jax.tree.map(np.asarray, state.params)
    return found


def one_of_several(workdir, steps, port, processes, process):
    """Process 0 writes the parameters; each tells its steps."""
    processes.connect(f"127.0.0.1:{port}", processes, process)
    run = RunDirectory(workdir, "shared", {"steps": steps})
    params = shared(run, steps, TASKS, task_mesh(TASKS), lambda dtype, row: print(dtype, row["step"], flush=True))
    if processes.is_leader():
        np.savez(run.path / "params", **{f"{name} {dtype}": leaf for dtype in params for name, leaf in params[dtype].items()})  # fmt: skip # noqa: E501


TASKS = 4


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Which a shell's background jobs do without.
    workdir, steps = sys.argv[1], int(sys.argv[2])
    if len(sys.argv) > 4:
        one_of_several(workdir, steps, *map(int, sys.argv[3:]))
        sys.exit()
    learner, state, draw = setting()
    run = RunDirectory(workdir, "tiny", {"steps": steps}, mutable_fields={"steps"})
    validate = Validate(SAVE_EVERY, hang) if "hang" in sys.argv else None
    for state, row in resumable_train(
        learner, state, draw, jax.random.key(1), steps=steps, steps_per_call=PER_CALL, run=run,
        save_every=SAVE_EVERY, validate=validate,
    ):  # fmt: skip
        print(row["step"], flush=True)
