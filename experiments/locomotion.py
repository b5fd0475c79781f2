"""Half-cheetah and ant that learn to run at an untold velocity, or in an untold direction (paper, section 5.3).

    python -m experiments.locomotion --preset half-cheetah-velocity --methods maml pretrained random oracle

Needs the extra `mujoco`. Trains by the paper's recipe, adapts to 40 held-out tasks, and prints the returns beside
the paper's. `--steps` shortens a run; the recipes take hours.
"""

import dataclasses
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments.reinforcement import options as reinforcement
from experiments.reinforcement import plots, testing, training
from experiments.shared import command_line
from maml_jax import validation
from maml_jax.rl.envs.locomotion import Physics, ant, half_cheetah, positions
from maml_jax.rl.envs.mujoco import MODELS, Engine

FRAMES = 8
PresetName = Literal["half-cheetah-velocity", "half-cheetah-direction", "ant-velocity", "ant-direction"]


@dataclasses.dataclass(frozen=True)
class Config(reinforcement.Config):
    """MAML for running bodies. What is not given follows the preset's recipe, the paper's."""

    preset: PresetName = "half-cheetah-velocity"
    """The body, and what is asked of it."""
    physics: Physics = "mujoco"
    """The engine: MuJoCo's own, on the host, or MJX (extra `mjx`), which is for accelerators and slow on a CPU."""
    render: bool = False
    """Also draw an episode before and after each gradient step, in rows, for a task at either end of the range."""


def problem(preset: PresetName, physics: Physics = "mujoco") -> reinforcement.Problem:
    """The paper's recipes (appendix A.2, and the authors' code), with the iterations that its figures used."""
    if preset == "half-cheetah-velocity":
        return reinforcement.Problem(
            environment=half_cheetah("velocity", physics=physics),
            steps=475,
            tasks=40,
            episodes=20,
            inner_rate=0.1,
            kl_limit=0.01,
            test_rates=((0.1, 0.05),),
            own_test_rates={"pretrained": (0.02, 0.01)},
            test_episodes=20,
            paper={
                "maml": (-129.5, -78.6, -66.6, -60.8),
                "pretrained": (-158.0, -135.4, -128.5, -133.6),
                "random": (-254.8, -254.3, -246.8, -230.8),
                "oracle": (-54.5,),
            },
        )
    if preset == "half-cheetah-direction":
        return reinforcement.Problem(
            environment=half_cheetah("direction", physics=physics),
            steps=100,
            tasks=40,
            episodes=20,
            inner_rate=0.1,
            kl_limit=0.02,
            test_rates=((0.1, 0.05),),
            own_test_rates={"pretrained": (0.2, 0.1), "random": (0.5, 0.25)},
            test_episodes=20,
            paper={
                "maml": (-50.7, 293.0, 313.0, 316.0),
                "pretrained": (-43.0, -24.8, -12.9, 19.6),
                "random": (-35.7, 21.8, 62.3, 86.2),
                "oracle": (443.0,),
            },
        )
    if preset == "ant-velocity":
        return reinforcement.Problem(
            environment=ant("velocity", physics=physics),
            steps=375,
            tasks=40,
            episodes=20,
            inner_rate=0.1,
            kl_limit=0.01,
            test_rates=((0.1, 0.05),),
            own_test_rates={"pretrained": (0.2, 0.1), "random": (1.0, 0.5)},
            test_episodes=20,
            paper={
                "maml": (30.6, 96.7, 100.0, 101.0),
                "pretrained": (-1.8, 6.1, 8.5, 9.5),
                "random": (-78.6, -62.8, -48.6, -35.6),
                "oracle": (108.0,),
            },
        )
    return reinforcement.Problem(
        environment=ant("direction", physics=physics),
        steps=575,
        tasks=40,
        episodes=40,
        inner_rate=0.1,
        kl_limit=0.01,
        test_rates=((0.1, 0.001),),
        own_test_rates={"pretrained": (0.2, 0.002), "random": (1.0, 0.01)},
        test_episodes=40,
        paper={
            "maml": (8.7, 499.0, 501.0, 499.0),
            "pretrained": (3.2, 1.3, 6.5, 6.9),
            "random": (3.1, 9.3, 16.0, 26.1),
            "oracle": (525.0,),
        },
    )


def prepare(config: Config) -> reinforcement.Prepared:
    """Checks the options. Raises ValueError or OSError, saying what is wrong and what to do."""
    validation.one_of("preset", config.preset, get_args(PresetName))
    validation.one_of("physics", config.physics, get_args(Physics))
    try:
        prepared = reinforcement.prepare(config, problem(config.preset, config.physics))
        if config.render:
            body(config).pictures(body(config).start[None])
    except (ModuleNotFoundError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    return prepared


def body(config: Config) -> Engine:
    """The preset's model."""
    return Engine(MODELS / ("ant.xml" if config.preset.startswith("ant") else "half_cheetah.xml"))


def main(prepared: reinforcement.Prepared) -> dict:
    """Runs the experiment; returns what it writes to `results.json`."""
    config = prepared.config
    assert isinstance(config, Config)
    packages = ("mujoco", "mujoco-mjx") if config.physics == "mjx" else ("mujoco",)
    done = training.run(prepared, **{name: metadata.version(name) for name in packages})
    if done is None:
        return {}
    directory, results, history, policies = done
    plots.returns(directory.path / "returns.png", history, results["rows"], results["paper"])
    tested: dict[str, Any] = {name: [row for row in results["rows"] if row["method"] == name] for name in policies}
    oracle = tested.pop("oracle", ())
    testing.draw_tasks(directory.path / "tasks.png", tested, oracle)
    if config.render:
        for method, trained in policies.items():
            if method != "oracle":
                rates = next(row["rates"] for row in reversed(results["rows"]) if row["method"] == method)
                draw(directory.path / f"{method}.png", config, trained, rates, prepared.setting.test_episodes)
    return results


def draw(path: Path, config: Config, trained: testing.Trained, rates: tuple[float, float], episodes: int) -> None:
    """One episode of each of two tasks before and after each gradient step: a row each, time from left to right."""
    engine = body(config)
    ends = (-1.0, 1.0) if config.preset.endswith("direction") else (0.5, 2.0)
    seen, mask = testing.show(trained, rates, episodes, ends)
    seen, mask = (array[:, :, 0].reshape(-1, *array.shape[3:]) for array in (seen, mask))
    rows = []
    for observations, happened in zip(seen, mask):
        times = np.linspace(0, max(0, happened.sum() - 1), FRAMES).astype(int)
        poses = jax.vmap(partial(positions, engine))(jnp.asarray(observations[times]))
        rows.append(np.concatenate(engine.pictures(np.asarray(poses)), 1))
    Image.fromarray(np.concatenate(rows)).save(path)


def launch() -> None:
    """The command line."""
    command_line.run(Config, prepare, main, several=True, calls_host=True)


if __name__ == "__main__":
    launch()
