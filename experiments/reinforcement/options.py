"""The options of the reinforcement-learning experiments."""

import dataclasses
from typing import Any, Literal, get_args

import optax

from experiments.reinforcement.paper import MethodName
from experiments.shared import command_line, option_checks
from experiments.shared.command_line import DefaultInHelp
from maml_jax import validation
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.rl.losses import InnerLossName
from maml_jax.rl.outer import Outer, policy_gradient, promp
from maml_jax.rl.trust_region import trpo
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.resumable import check_steps

OuterName = Literal["trpo", "policy_gradient", "promp"]

TEST_SEEDS = (600, 601)
"""Seeds of the test tasks and of the episodes in figures, the same for all training runs. Training may not use them."""


@dataclasses.dataclass(frozen=True)
class Config(command_line.RunOptions):
    """One run: meta-training of policies and their evaluation. The defaults are the paper's for 2D navigation."""

    methods: tuple[MethodName, ...] = ("maml",)
    """Methods to train and evaluate."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the training runs. All seeds have the same test tasks."""
    steps: int = 100
    """Meta-iterations of each method."""
    tasks: int = 20
    """Tasks per meta-iteration."""
    episodes: int = 20
    """Episodes of each task before each inner step and after the last step."""
    inner_rate: float = 0.1
    """Inner step size in training."""
    inner_steps: int = 1
    """Inner steps in training, each on new episodes."""
    inner_loss: InnerLossName = "logp"
    """Loss of the inner steps. 'logp' is the paper's; 'lvc' and 'dice' have second derivatives that 'logp' lacks."""
    gae_lambda: float = 1.0
    """Lambda of generalised advantage estimation, in training and at test. 1 is the paper's: returns minus baseline."""
    sampling_term: bool = False
    """Add the gradient of the sampling of support episodes to the meta-gradient, as E-MAML does."""
    outer: OuterName = "trpo"
    """The outer step. 'policy_gradient' and 'promp' use Adam."""
    kl_limit: float = 0.01
    """Trust region of 'trpo': the largest mean KL divergence of the adapted policies, in nats."""
    curvature_tasks: DefaultInHelp[int | None] = None
    """Number of tasks whose curvature 'trpo' computes. Default: all tasks."""
    outer_rate: float = 1e-3
    """Learning rate of Adam for 'policy_gradient' and 'promp'."""
    test_rates: DefaultInHelp[tuple[float, float] | None] = None
    """Inner rates at test, of the first and of later gradient steps. Default: the paper's rates of each method."""
    test_tasks: int = 40
    """Number of test tasks."""
    test_episodes: int = 40
    """Episodes of each test task for each gradient step."""

    def run_options(self) -> dict[str, Any]:
        """Returns the arguments of `RunDirectory` that describe the run."""
        return {
            "config": dataclasses.asdict(self),
            "mutable_fields": MUTABLE_FIELDS,
            "appendable_fields": APPENDABLE_FIELDS,
            "wandb": self.wandb,
        }

    def outer_step(self) -> Outer:
        """Returns the outer step."""
        if self.outer == "trpo":
            return trpo(self.kl_limit, curvature_tasks=self.curvature_tasks)
        return {"policy_gradient": policy_gradient, "promp": promp}[self.outer](optax.adam(self.outer_rate))


MUTABLE_FIELDS = ("steps", "test_rates", "test_tasks", "test_episodes", "render", *command_line.RUN_OPTIONS)
"""Options that may change when a run is resumed."""

APPENDABLE_FIELDS = ("methods", "seeds")
"""Options that may get further entries when a run is resumed. Each entry is a separate training run."""

TRAINED: tuple[MethodName, ...] = ("maml", "first_order", "pretrained", "oracle")
"""The methods that are trained."""

TRAINING_OPTIONS = (
    "steps", "tasks", "episodes", "inner_steps", "outer", "kl_limit", "curvature_tasks", "outer_rate", "profile",
)  # fmt: skip
"""Options that have an effect only in training."""

METHODS_OF_OPTION: dict[str, tuple[MethodName, ...]] = {
    **dict.fromkeys(TRAINING_OPTIONS, TRAINED),
    "sampling_term": ("maml", "first_order"),
    "inner_rate": ("maml", "first_order"),
    "inner_loss": ("maml", "first_order", "pretrained", "random"),
    "test_rates": ("maml", "first_order", "pretrained", "random"),
}
"""The methods for which an option has an effect: those that are trained, or that adapt in training or at test."""

OUTERS_OF_OPTION: dict[str, tuple[OuterName, ...]] = {
    "kl_limit": ("trpo",),
    "curvature_tasks": ("trpo",),
    "outer_rate": ("policy_gradient", "promp"),
}
"""The outer steps for which an option has an effect."""


def prepare(config: Config, defaults: Config) -> Config:
    """Checks the options and the work directory.

    Raises:
      ValueError: if an option is not allowed, or differs from its default but has no effect.
      OSError: if the work directory holds another run, or cannot be written.
    """
    check(config, defaults)
    if processes.multiple():
        task_mesh(config.tasks)  # Raises ValueError if the processes cannot share the tasks evenly.
    RunDirectory.check(config.workdir, **config.run_options())
    check_steps(config.workdir, config.steps)
    return config


def check(config: Config, defaults: Config) -> None:
    """Raises ValueError if an option is not allowed, or differs from its default but has no effect."""
    option_checks.meta_steps("steps", config.steps)
    for name in ("tasks", "episodes", "inner_steps", "test_episodes"):
        validation.at_least(name, getattr(config, name), 1)
    validation.at_least("test_tasks", config.test_tasks, 2)
    for name in ("inner_rate", "kl_limit", "outer_rate"):
        validation.positive(name, getattr(config, name))
    for rate in config.test_rates or ():
        validation.positive("test_rates", rate)
    for name in ("methods", "seeds"):
        option_checks.different(name, getattr(config, name))
    for method in config.methods:
        validation.one_of("methods", method, get_args(MethodName))
    for seed in config.seeds:
        option_checks.seed("seeds", seed)
        if seed in TEST_SEEDS:
            named = " or ".join(map(str, TEST_SEEDS))
            raise ValueError(f"seeds must not be {named}, the seeds of the test tasks, but got {seed}.")
    if not 0 <= config.gae_lambda <= 1:
        raise ValueError(f"gae_lambda must be between 0 and 1, but got {config.gae_lambda!r}.")
    validation.one_of("inner_loss", config.inner_loss, get_args(InnerLossName))
    validation.one_of("outer", config.outer, get_args(OuterName))
    if config.curvature_tasks is not None:
        validation.at_least("curvature_tasks", config.curvature_tasks, 1)
        if config.curvature_tasks > config.tasks:
            raise ValueError(
                f"curvature_tasks must be at most tasks, {config.tasks}, but got {config.curvature_tasks}."
            )
    if config.sampling_term and config.tasks < 2:
        raise ValueError(f"tasks must be at least 2 with sampling_term, which compares tasks, but got {config.tasks}.")
    for name, outers in OUTERS_OF_OPTION.items():
        if (given := getattr(config, name)) != getattr(defaults, name) and config.outer not in outers:
            raise ValueError(f"{name} is for --outer {' or '.join(outers)}, but got {given} with {config.outer}.")
    for name, methods in METHODS_OF_OPTION.items():
        if (given := getattr(config, name)) != getattr(defaults, name) and not {*methods} & {*config.methods}:
            raise ValueError(
                f"{name} is for the methods {' '.join(methods)}, but got {given} with --methods "
                f"{' '.join(config.methods)}."
            )
