"""Walking to an unseen goal in the plane (paper, section 5.3, figure 4).

    python -m experiments.navigation --methods maml pretrained random oracle

Trains by the paper's recipe in a few minutes a method on two cores, adapts to 40 new goals, and prints the
returns beside the paper's. Writes metrics, results, parameters and pictures to the work directory.
"""

from functools import partial

from experiments.reinforcement import options as reinforcement
from experiments.reinforcement import plots, testing, training
from experiments.shared import command_line
from maml_jax.rl.envs.navigation import navigation

SHOWN_GOALS = ((0.4, 0.3), (-0.3, 0.4), (0.1, -0.45), (-0.45, -0.1))
SHOWN_EPISODES = 5


def problem() -> reinforcement.Problem:
    """The paper's recipe (appendix A.2), with 20 tasks a meta-iteration as the released policies were trained."""
    return reinforcement.Problem(
        environment=navigation(),
        steps=100,
        tasks=20,
        episodes=20,
        inner_rate=0.1,
        kl_limit=0.01,
        test_rates=((0.1, 0.05), (0.1, 0.04), (0.12, 0.05), (0.2, 0.1), (0.5, 0.25)),
        own_test_rates={},
        test_episodes=40,
        paper={
            "maml": (-40.4, -11.7, -3.3, -3.2),
            "pretrained": (-40.8, -19.7, -11.7, -8.5),
            "random": (-82.7, -58.0, -53.8, -46.8),
            "oracle": (-2.3,),
        },
    )


def main(prepared: reinforcement.Prepared) -> dict:
    """Runs the experiment; returns what it writes to `results.json`."""
    done = training.run(prepared)
    if done is None:
        return {}
    directory, results, history, policies = done
    plots.returns(directory.path / "returns.png", history, results["rows"], results["paper"])
    for method, trained in policies.items():
        if method != "oracle":
            (row, *_) = (row for row in reversed(results["rows"]) if row["method"] == method)
            walks, mask = testing.show(trained, row["rates"], prepared.setting.test_episodes, SHOWN_GOALS)
            plots.navigation_paths(
                directory.path / f"paths-{method}.png", SHOWN_GOALS, walks[:, :, :SHOWN_EPISODES], mask
            )
    return results


def launch() -> None:
    """The command line."""
    command_line.run(reinforcement.Config, partial(reinforcement.prepare, problem=problem()), main, several=True)


if __name__ == "__main__":
    launch()
