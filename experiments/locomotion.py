"""Half-cheetah and ant: policies learn goal velocities or directions that they do not observe (paper, section 5.3).

    python -m experiments.locomotion --preset half-cheetah-velocity --methods maml pretrained random oracle

The command needs the extra `mujoco`. It trains with the paper's settings, adapts the policies to 40 held-out tasks, and
prints the returns beside the paper's. Training takes hours; --steps shortens it. The training loop is in
`experiments.navigation`.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments import navigation
from experiments.reinforcement import evaluation, options, paper, plots
from experiments.shared import command_line
from maml_jax import validation
from maml_jax.rl.environment import Environment
from maml_jax.rl.envs.locomotion import Physics, ant, half_cheetah, positions
from maml_jax.rl.envs.mujoco import MODELS, Engine

FRAMES = 8
"""Number of time steps of an episode that are rendered."""
PresetName = Literal["half-cheetah-velocity", "half-cheetah-direction", "ant-velocity", "ant-direction"]


@dataclasses.dataclass(frozen=True)
class Config(options.Config):
    """MAML on locomotion. --preset sets the defaults to the paper's settings (appendix A.2 and the authors' code).

    The methods 'pretrained' and 'oracle' train on all tasks jointly, with as many episodes in a meta-iteration as
    'maml'. The oracle observes the task. The method 'random' is the untrained policy.
    """

    preset: PresetName = "half-cheetah-velocity"
    """The body and the kind of goal. The preset sets the defaults of the other options."""
    physics: Physics = "mujoco"
    """Physics engine: MuJoCo on the host, or MJX (extra `mjx`) for accelerators. MJX is slow on a CPU."""
    render: bool = False
    """Also render episodes before and after each gradient step, for the smallest and the largest goal."""
    steps: int = 475
    tasks: int = 40
    test_episodes: int = 20


PRESETS: dict[PresetName, Config] = {
    preset.preset: preset
    for preset in (
        Config(),
        Config(preset="half-cheetah-direction", steps=100, kl_limit=0.02),
        Config(preset="ant-velocity", steps=375),
        Config(preset="ant-direction", steps=575, episodes=40, test_episodes=40),
    )
}
"""The paper's settings. `steps` is the number of meta-iterations in the paper's figures."""


@cache
def environment(preset: PresetName, physics: Physics = "mujoco") -> Environment:
    """Returns the environment of a preset.

    Raises:
      ModuleNotFoundError, RuntimeError: if the physics engine is not installed.
    """
    make = ant if preset.startswith("ant") else half_cheetah
    return make("direction" if preset.endswith("direction") else "velocity", physics=physics)


@cache
def engine(preset: PresetName) -> Engine:
    """Returns the MuJoCo engine of a preset, for rendering."""
    return Engine(MODELS / ("ant.xml" if preset.startswith("ant") else "half_cheetah.xml"))


def prepare(config: Config) -> Config:
    """Checks the options, the engine and the work directory.

    Raises:
      ValueError: if an option is not allowed, or the engine or a renderer is missing.
      OSError: if the work directory holds another run, or cannot be written.
    """
    validation.one_of("preset", config.preset, get_args(PresetName))
    validation.one_of("physics", config.physics, get_args(Physics))
    if config.render and {*config.methods} == {"oracle"}:
        raise ValueError("render is for the methods maml first_order pretrained random, but got --methods oracle.")
    options.prepare(config, PRESETS[config.preset])
    try:
        environment(config.preset, config.physics)
        if config.render:
            engine(config.preset).pictures(engine(config.preset).start[None])
    except (ModuleNotFoundError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    return config


def main(config: Config) -> dict[str, Any]:
    """Trains and evaluates every method and seed; returns the content of `results.json`."""
    packages = ("mujoco", "mujoco-mjx") if config.physics == "mjx" else ("mujoco",)
    versions = {name: metadata.version(name) for name in packages}
    return navigation.main(config, environment(config.preset, config.physics), draw, **versions)


def draw(
    folder: Path,
    config: Config,
    trained: dict[paper.MethodName, evaluation.Trained],
    rows: Sequence[dict[str, Any]],
) -> None:
    """Plots returns over tasks. With `config.render`, also renders episodes of each method that adapts."""
    by_method: dict[str, Any] = {name: [row for row in rows if row["method"] == name] for name in trained}
    oracle = by_method.pop("oracle", ())
    plots.returns_over_tasks(folder / "tasks.png", by_method, oracle)
    if config.render:
        for method, policy in trained.items():
            if method != "oracle":
                render(folder / f"{method}.png", config, policy, evaluation.last_rates(rows, method))


def render(path: Path, config: Config, trained: evaluation.Trained, rates: paper.Rates) -> None:
    """Renders episodes of two tasks before and after each gradient step. Each row is an episode from left to right."""
    ends = (-1.0, 1.0) if config.preset.endswith("direction") else (0.5, 2.0)
    observations, mask = evaluation.sample_episodes(trained, rates, config.test_episodes, ends)
    # The first episode of each task and gradient step.
    observations, mask = (array[:, :, 0].reshape(-1, *array.shape[3:]) for array in (observations, mask))
    strips = []
    for episode, valid in zip(observations, mask):
        times = np.linspace(0, max(0, valid.sum() - 1), FRAMES).astype(int)
        poses = jax.vmap(partial(positions, engine(config.preset)))(jnp.asarray(episode[times]))
        strips.append(np.concatenate(engine(config.preset).pictures(np.asarray(poses)), 1))
    Image.fromarray(np.concatenate(strips)).save(path)


def preset_of(arguments: Sequence[str] | None = None) -> PresetName:
    """Returns the preset of the command line. The preset sets the defaults of the other options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=get_args(PresetName), default=Config.preset)
    return parser.parse_known_args(arguments)[0].preset


def launch() -> None:
    """Runs the command."""
    command_line.run(Config, prepare, main, default=PRESETS[preset_of()], several=True, calls_host=True)


if __name__ == "__main__":
    launch()
