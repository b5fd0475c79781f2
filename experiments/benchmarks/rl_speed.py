"""How fast reinforcement learning is on this machine, and where the time of a meta-iteration goes.

    python -m experiments.benchmarks.rl_speed

Measures in turn, several times over: the episodes of a batch of tasks with the policy inside; a meta-iteration with
a policy gradient in place of the trust region; and the whole meta-iteration of the paper. Prints environment steps and
meta-iterations for each second of processor time, over all cores, and writes results.json and shares.png.
"""

import dataclasses
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
import optax

import maml_jax
from experiments import locomotion, navigation
from experiments.reinforcement import options as reinforcement
from experiments.shared import command_line, plots
from maml_jax import validation
from maml_jax.parallel import backend
from maml_jax.parallel.task_axis import task_axis, task_mesh
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
    """Those of locomotion need the extra `mujoco`."""
    tasks: int | None = None
    """Tasks per meta-iteration; default: the recipe's."""
    episodes: int | None = None
    """Episodes of each task before the inner step and after it; default: the recipe's."""
    curvature_share: float = 1.0
    """Share of the tasks of which the trust region takes the curvature."""
    rounds: int = 3
    """How often everything is measured."""
    workdir: Path | None = None
    """Where the results go; default: a new directory below runs/."""


def prepare(config: Config) -> tuple[Config, list[reinforcement.Problem]]:
    """Checks the options. Raises ValueError or OSError, saying what is wrong and what to do."""
    validation.at_least("rounds", config.rounds, 1)
    if not config.problems:
        raise ValueError("problems must name at least one, but got none.")
    for name in ("tasks", "episodes"):
        if (count := getattr(config, name)) is not None:
            validation.at_least(name, count, 1)
    if not 0 < config.curvature_share <= 1:
        raise ValueError(f"curvature_share must be above 0 and at most 1, but got {config.curvature_share!r}.")
    RunDirectory.check(config.workdir, dataclasses.asdict(config))
    try:
        return config, [problem(name) for name in config.problems]
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error


def problem(name: ProblemName) -> reinforcement.Problem:
    """The recipe of one of the paper's problems."""
    return navigation.problem() if name == "navigation" else locomotion.problem(name)


def parts(config: Config, recipe: reinforcement.Problem) -> tuple[dict[str, Callable[[], Any]], int]:
    """What is measured, as functions that end when their work has, and the environment steps of the episodes.

    A step after the end of an episode is none.
    """
    environment = recipe.environment
    tasks, episodes = config.tasks or recipe.tasks, config.episodes or recipe.episodes
    policy = gaussian_mlp(environment.observation_size, environment.action_size)
    inner = maml_jax.sgd(recipe.inner_rate, steps=1)
    trials = draw_task_batch(environment, jax.random.key(0), tasks)
    mesh = task_mesh(tasks)
    over_tasks = task_axis("all", mesh)

    def iteration(outer: Outer) -> Callable[[], Any]:
        learner = maml_rl(environment, policy, inner, outer, episodes=episodes, mesh=mesh)
        state = learner.init(policy.init(jax.random.key(1)))
        step = jax.jit(learner.step)
        return lambda: jax.block_until_ready(step(state, trials))

    @jax.jit
    def sample(params: Any, trials: TaskBatch) -> Any:
        def of_task(params: Any, trial: TaskBatch) -> Any:
            return rollout(environment, policy, params, trial.key, trial.task, episodes)

        return over_tasks.map(of_task, params, trials)

    params = over_tasks.replicate(policy.init(jax.random.key(1)))
    curvature_tasks = max(1, round(config.curvature_share * tasks))
    measured = {
        "episodes": lambda: jax.block_until_ready(sample(params, trials)),
        "gradient": iteration(policy_gradient(optax.identity())),
        "whole": iteration(trpo(recipe.kl_limit, curvature_tasks=curvature_tasks)),
    }
    return measured, int(sample(params, trials).mask.sum())


def main(prepared: tuple[Config, list[reinforcement.Problem]]) -> dict[str, Any]:
    """Runs the measurements; returns what it writes to `results.json`."""
    config, recipes = prepared
    run = RunDirectory(config.workdir, "rl-speed", dataclasses.asdict(config))
    rows = []
    for name, recipe in zip(config.problems, recipes):
        measured, steps = parts(config, recipe)
        for function in measured.values():
            function()  # Compiles.
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
    print(f"Wrote {path}, and shares.png beside it.")
    return results


def row(
    name: ProblemName, steps: int, processor: dict[str, list[float]], wall: dict[str, list[float]]
) -> dict[str, Any]:
    """Speeds from the medians of seconds; a meta-iteration samples its episodes before and after the inner step."""
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
    """Speeds, and shares of a meta-iteration."""
    width = max(len(name) for name in get_args(ProblemName) for name in (get_args(name) or (name,)))
    lines = [f"{'':{width}}   steps/cpu-s   iterations/cpu-s   iterations/s   where the time goes"]
    for row in rows:
        shares = ", ".join(f"{part} {share:.0%}" for part, share in row["shares"].items())
        lines.append(
            f"{row['problem']:{width}} {row['steps_per_cpu_second']:13,.0f} {row['iterations_per_cpu_second']:18.3f} "
            f"{row['iterations_per_second']:14.3f}   {shares}"
        )
    return "\n".join(lines)


def launch() -> None:
    """The command line."""
    command_line.run(Config, prepare, main, calls_host=True)


if __name__ == "__main__":
    launch()
