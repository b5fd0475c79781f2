"""Measures the speed of reinforcement learning, and the shares of its parts in a meta-iteration.

    python -m experiments.benchmarks.rl_speed

The command measures three parts for several rounds: the rollouts of a batch of tasks with the policy, a meta-iteration
with a policy gradient in place of TRPO, and the paper's meta-iteration. It prints environment steps and meta-iterations
per second of processor time over all cores, and writes results.json and shares.png.
"""

import dataclasses
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import optax

import maml_jax
from experiments import locomotion, navigation
from experiments.reinforcement import options
from experiments.shared import command_line, plots
from experiments.shared.command_line import DefaultInHelp
from maml_jax import validation
from maml_jax.parallel import backend
from maml_jax.parallel.task_axis import task_axis, task_mesh
from maml_jax.rl.environment import Environment
from maml_jax.rl.meta_rl import TaskBatch, draw_task_batch, maml_rl
from maml_jax.rl.outer import Outer, policy_gradient
from maml_jax.rl.policy import gaussian_mlp
from maml_jax.rl.rollout import rollout
from maml_jax.rl.trust_region import trpo
from maml_jax.runs.directory import RunDirectory

ProblemName = Literal["navigation", locomotion.PresetName]


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the meta-iterations of the paper's problems."""

    problems: tuple[ProblemName, ...] = ("navigation", "half-cheetah-velocity", "ant-velocity")
    """Problems to measure. Half-cheetah and ant need the extra `mujoco`."""
    tasks: DefaultInHelp[int | None] = None
    """Tasks per meta-iteration. Default: the paper's number for each problem."""
    episodes: DefaultInHelp[int | None] = None
    """Episodes of each task before and after the inner step. Default: the paper's number for each problem."""
    curvature_share: float = 1.0
    """Share of the tasks whose curvature TRPO computes."""
    rounds: int = 3
    """Number of measurements of each part."""
    workdir: DefaultInHelp[Path | None] = None
    """Directory of the results. Default: a new directory in runs/."""


class Problem(NamedTuple):
    """An environment with the paper's settings."""

    environment: Environment
    setting: options.Config


def prepare(config: Config) -> tuple[Config, list[Problem]]:
    """Checks the options.

    Raises:
      ValueError: if an option is not allowed, or an engine is missing.
      OSError: if the work directory holds another run, or cannot be written.
    """
    validation.at_least("rounds", config.rounds, 1)
    if not config.problems:
        raise ValueError("problems must have at least one value, but got none.")
    for name in ("tasks", "episodes"):
        if (count := getattr(config, name)) is not None:
            validation.at_least(name, count, 1)
    if not 0 < config.curvature_share <= 1:
        raise ValueError(f"curvature_share must be above 0 and at most 1, but got {config.curvature_share!r}.")
    RunDirectory.check(config.workdir, dataclasses.asdict(config))
    try:
        return config, [paper_problem(name) for name in config.problems]
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error


def paper_problem(name: ProblemName) -> Problem:
    """Returns the environment and the settings of one of the paper's problems."""
    if name == "navigation":
        return Problem(navigation.ENVIRONMENT, navigation.Config())
    return Problem(locomotion.environment(name), locomotion.PRESETS[name])


def parts(config: Config, problem: Problem) -> tuple[dict[str, Callable[[], Any]], int]:
    """Returns the parts to measure, as functions that return when their results are computed.

    Also returns the number of environment steps of a rollout, without time steps after the end of an episode.
    """
    environment, setting = problem
    tasks, episodes = config.tasks or setting.tasks, config.episodes or setting.episodes
    policy = gaussian_mlp(environment.observation_size, environment.action_size)
    inner = maml_jax.sgd(setting.inner_rate, steps=1)
    task_batch = draw_task_batch(environment, jax.random.key(0), tasks)
    mesh = task_mesh(tasks)
    over_tasks = task_axis("all", mesh)

    def iteration(outer: Outer) -> Callable[[], Any]:
        learner = maml_rl(environment, policy, inner, outer, episodes=episodes, mesh=mesh)
        state = learner.init(policy.init(jax.random.key(1)))
        step = jax.jit(learner.step)
        return lambda: jax.block_until_ready(step(state, task_batch))

    @jax.jit
    def sample(params: Any, task_batch: TaskBatch) -> Any:
        def task_episodes(params: Any, one_task: TaskBatch) -> Any:
            return rollout(environment, policy, params, one_task.key, one_task.task, episodes)

        return over_tasks.map(task_episodes, params, task_batch)

    params = over_tasks.replicate(policy.init(jax.random.key(1)))
    curvature_tasks = max(1, round(config.curvature_share * tasks))
    measured = {
        "episodes": lambda: jax.block_until_ready(sample(params, task_batch)),
        "gradient": iteration(policy_gradient(optax.identity())),
        "whole": iteration(trpo(setting.kl_limit, curvature_tasks=curvature_tasks)),
    }
    return measured, int(sample(params, task_batch).mask.sum())


def main(prepared: tuple[Config, list[Problem]]) -> dict[str, Any]:
    """Runs the measurements; returns the content of `results.json`."""
    config, problems = prepared
    run = RunDirectory(config.workdir, "rl-speed", dataclasses.asdict(config))
    rows = []
    for name, problem in zip(config.problems, problems):
        measured, steps = parts(config, problem)
        for function in measured.values():
            function()  # Compile.
        processor: dict[str, list[float]] = {part: [] for part in measured}
        wall: dict[str, list[float]] = {part: [] for part in measured}
        for number in range(config.rounds):
            for part, function in measured.items():
                start = time.process_time(), time.perf_counter()
                function()
                processor[part].append(time.process_time() - start[0])
                wall[part].append(time.perf_counter() - start[1])
            print(f"{name}: round {number + 1} of {config.rounds}", flush=True)
        rows.append(row(name, steps, processor, wall))
    engine = {} if {*config.problems} == {"navigation"} else {"mujoco": metadata.version("mujoco")}
    results = {"config": dataclasses.asdict(config), "cores": backend.cores(), **engine, "rows": rows}
    print(table(rows))
    path = run.write_results(results)
    shares = {row["problem"]: row["shares"] for row in rows}
    plots.shares(run.path / "shares.png", shares, "a meta-iteration's processor time")
    print(f"Wrote {path}, with shares.png in the same folder.")
    return results


def row(
    name: ProblemName, steps: int, processor: dict[str, list[float]], wall: dict[str, list[float]]
) -> dict[str, Any]:
    """Returns speeds and shares from the medians of the times.

    A meta-iteration has two rollouts, before and after the inner step. The other parts are differences of times.
    """
    seconds = {part: float(np.median(times)) for part, times in processor.items()}
    sampling = 2 * seconds["episodes"]
    spent = np.diff([0, sampling, seconds["gradient"], seconds["whole"]]) / seconds["whole"]
    return {
        "problem": name,
        "steps_per_cpu_second": steps / seconds["episodes"],
        "steps_per_second": steps / float(np.median(wall["episodes"])),
        "iterations_per_cpu_second": 1 / seconds["whole"],
        "iterations_per_second": 1 / float(np.median(wall["whole"])),
        "shares": dict(zip(("episodes", "inner steps and meta-gradient", "trust region"), spent.tolist())),
        "cpu_seconds": processor,
        "seconds": wall,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the speeds and the shares of the parts in a meta-iteration."""
    width = max(len(name) for name in get_args(ProblemName) for name in (get_args(name) or (name,)))
    lines = [f"{'':{width}}   steps/CPU-s   iterations/CPU-s   iterations/s   share of the processor time"]
    for row in rows:
        shares = ", ".join(f"{part} {share:.0%}" for part, share in row["shares"].items())
        lines.append(
            f"{row['problem']:{width}} {row['steps_per_cpu_second']:13,.0f} {row['iterations_per_cpu_second']:18.3f} "
            f"{row['iterations_per_second']:14.3f}   {shares}"
        )
    return "\n".join(lines)


def launch() -> None:
    """Runs the command."""
    command_line.run(Config, prepare, main, calls_host=True)


if __name__ == "__main__":
    launch()
