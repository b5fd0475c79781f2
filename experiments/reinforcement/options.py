"""What the reinforcement-learning experiments have in common: their options, and the recipe resolved."""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

from experiments.shared import command_line
from maml_jax import validation
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.rl.environment import Environment
from maml_jax.rl.losses import InnerLossName
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.resumable import check_steps

MethodName = Literal["maml", "first_order", "pretrained", "random", "oracle"]
OuterName = Literal["trpo", "policy_gradient", "promp"]


class Problem(NamedTuple):
    """One of the paper's problems, with the numbers of its recipe."""

    environment: Environment
    steps: int
    """Meta-iterations."""
    tasks: int
    episodes: int
    inner_rate: float
    kl_limit: float
    test_rates: tuple[tuple[float, float], ...]
    """Inner rates at test, of the first step and of later ones: the best pair on other tasks is taken."""
    own_test_rates: dict[MethodName, tuple[float, float]]
    """Of methods that the authors' code tests with other rates than these."""
    test_episodes: int
    paper: dict[MethodName, tuple[float, ...]]
    """Returns after 0 to 3 gradient steps; one number for the oracle, which takes none."""


@dataclasses.dataclass(frozen=True)
class Config(command_line.RunOptions):
    """MAML for policies. What is not given follows the problem's recipe."""

    methods: tuple[MethodName, ...] = ("maml",)
    """What to train. 'pretrained' and 'oracle' learn all tasks jointly, from as many episodes a meta-iteration as
    'maml'; the oracle is told the task. 'random' is not trained."""
    seeds: tuple[int, ...] = (0,)
    """One whole run for each; the test tasks are the same."""
    steps: int | None = None
    """Meta-iterations of each method."""
    tasks: int | None = None
    """Tasks per meta-iteration."""
    episodes: int | None = None
    """Episodes of each task before each inner step and after the last."""
    inner_rate: float | None = None
    """Inner step size in training."""
    inner_steps: int = 1
    """Inner steps in training, each on new episodes."""
    inner_loss: InnerLossName = "logp"
    """Of the gradient steps, at test too. 'logp': the paper's; 'lvc' and 'dice': with the second derivatives that it
    lacks."""
    sampling_term: bool = False
    """Also credit the choice of the episodes that were adapted to (E-MAML)."""
    outer: OuterName = "trpo"
    """The outer step. 'policy_gradient' and 'promp' use Adam."""
    kl_limit: float | None = None
    """Trust region of 'trpo': largest mean KL divergence of the adapted policies."""
    curvature_tasks: int | None = None
    """Tasks of which 'trpo' takes the curvature; default: all."""
    outer_rate: float | None = None
    """Adam's rate for 'policy_gradient' and 'promp'; default: .001."""
    test_rates: tuple[float, float] | None = None
    """Sizes of the first gradient step at test and of later ones, for all methods. Default: the recipe's for each, or
    the best of its pairs on other tasks."""
    test_tasks: int = 40
    """Tasks to evaluate on."""
    test_episodes: int | None = None
    """Episodes of each test task for each gradient step."""

    def resolve(self, problem: Problem) -> "Setting":
        """Fills in the recipe, and checks everything.

        Raises:
          ValueError: naming the option, what was given and what is allowed.
        """
        names = ("steps", "tasks", "episodes", "inner_rate", "kl_limit", "test_episodes")
        chosen = {name: getattr(problem, name) if (own := getattr(self, name)) is None else own for name in names}
        pairs = problem.test_rates if self.test_rates is None else (self.test_rates,)
        setting = Setting(**chosen, test_rates=pairs)
        validation.meta_steps("steps", setting.steps)
        for name in ("tasks", "episodes", "test_episodes"):
            validation.at_least(name, chosen[name], 1)
        validation.at_least("test_tasks", self.test_tasks, 2)
        validation.at_least("inner_steps", self.inner_steps, 1)
        for name in ("inner_rate", "kl_limit"):
            validation.positive(name, chosen[name])
        for name, given in (("methods", self.methods), ("seeds", self.seeds)):
            validation.different(name, given)
        for rate in (rate for pair in setting.test_rates for rate in pair):
            validation.positive("test_rates", rate)
        for method in self.methods:
            validation.one_of("methods", method, get_args(MethodName))
        for seed in self.seeds:
            validation.seed("seeds", seed)
        validation.one_of("inner_loss", self.inner_loss, get_args(InnerLossName))
        validation.one_of("outer", self.outer, get_args(OuterName))
        if self.outer_rate is not None:
            validation.positive("outer_rate", self.outer_rate)
        for name, wanted in (("outer_rate", ("policy_gradient", "promp")), ("kl_limit", ("trpo",))):
            if (given := getattr(self, name)) is not None and self.outer not in wanted:
                raise ValueError(f"{name} is for --outer {' or '.join(wanted)}, but got {given} with {self.outer}.")
        if self.curvature_tasks is not None:
            validation.at_least("curvature_tasks", self.curvature_tasks, 1)
            if self.outer != "trpo" or self.curvature_tasks > setting.tasks:
                raise ValueError(
                    f"curvature_tasks is for --outer trpo, and at most tasks, {setting.tasks}, but got "
                    f"{self.curvature_tasks} with --outer {self.outer}."
                )
        for name, methods in TAKEN_BY.items():
            given = getattr(self, name)
            if given != getattr(Config, name) and not {*methods} & {*self.methods}:
                raise ValueError(
                    f"{name} is for the methods {' '.join(methods)}, but got {given} with --methods "
                    f"{' '.join(self.methods)}."
                )
        if self.sampling_term and setting.tasks < 2:
            raise ValueError("sampling_term compares the tasks of a meta-iteration: it needs --tasks of at least 2.")
        return setting


TAKEN_BY: dict[str, tuple[MethodName, ...]] = {
    "sampling_term": ("maml", "first_order"),
    "inner_rate": ("maml", "first_order"),
    "inner_loss": ("maml", "first_order", "pretrained", "random"),
    "test_rates": ("maml", "first_order", "pretrained", "random"),
}
"""Methods that an option makes a difference to: those that adapt in training, or at test."""


class Setting(NamedTuple):
    """The options that depend on the problem, resolved. Fields as in `Config`."""

    steps: int
    tasks: int
    episodes: int
    inner_rate: float
    kl_limit: float
    test_rates: tuple[tuple[float, float], ...]
    test_episodes: int


class Prepared(NamedTuple):
    """All that an experiment needs, checked."""

    config: Config
    problem: Problem
    setting: Setting


MUTABLE_FIELDS = ("steps", "test_rates", "test_tasks", "test_episodes", "render", *command_line.RUN_OPTIONS)
"""Options that may be others when a run goes on."""

APPENDABLE_FIELDS = ("methods", "seeds")
"""Options that may get further entries: each is a training of its own."""


def recorded(config: Config, setting: Setting) -> dict[str, Any]:
    """What a run that goes on is compared with."""
    return dataclasses.asdict(config) | setting._asdict() | {"outer_rate": adam_rate(config)}


def run_of(config: Config, setting: Setting) -> dict[str, Any]:
    """What a run directory is to know of the run."""
    return {
        "config": recorded(config, setting),
        "mutable_fields": MUTABLE_FIELDS,
        "appendable_fields": APPENDABLE_FIELDS,
        "wandb": config.wandb,
    }


def adam_rate(config: Config) -> float:
    """Of the outer steps that take one."""
    return 1e-3 if config.outer_rate is None else config.outer_rate


def prepare(config: Config, problem: Problem) -> Prepared:
    """Checks the options. Raises ValueError or OSError, saying what is wrong and what to do."""
    setting = config.resolve(problem)
    if processes.multiple():
        task_mesh(setting.tasks)  # Raises if they cannot be divided.
    RunDirectory.check(config.workdir, **run_of(config, setting))
    check_steps(config.workdir, setting.steps)
    return Prepared(config, problem, setting)
