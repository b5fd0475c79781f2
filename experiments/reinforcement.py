"""What the reinforcement-learning experiments share: training, the paper's evaluation, and the table.

The paper's evaluation: 40 held-out tasks, the return before and after 1 to 3 gradient steps, each step
taken on new episodes (section 5.3, and the numbers behind its figures in the authors' code).
"""

import dataclasses
import time
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

import maml_jax
from experiments import command_line
from maml_jax import hosts, validation
from maml_jax.record import Progress, RunDirectory
from maml_jax.resumable import resumable_train
from maml_jax.rl.advantage import Summary
from maml_jax.rl.environment import Environment, told
from maml_jax.rl.losses import InnerLossName
from maml_jax.rl.meta_rl import Trials, draw_trials, maml_rl
from maml_jax.rl.outer import Outer, policy_gradient, promp
from maml_jax.rl.policy import Policy, gaussian_mlp
from maml_jax.rl.trust_region import trpo
from maml_jax.statistics import interval
from maml_jax.task_axis import local_mesh, task_axis, task_mesh
from maml_jax.workdir import read_json

TEST_STEPS = 3
TUNING = 8  # Times as many tasks as are tested choose the rates; with fewer, noise does.
TEST_SEED = 600  # Apart from every training seed's keys: the test tasks are the same for all of them.

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
class Config(command_line.Looks):
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
    """'logp': the paper's; 'lvc' and 'dice': with the second derivatives that it lacks."""
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
        if self.sampling_term and setting.tasks < 2:
            raise ValueError("sampling_term compares the tasks of a meta-iteration: it needs --tasks of at least 2.")
        return setting


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


class Trained(NamedTuple):
    """A policy after training."""

    environment: Environment
    policy: Policy
    state: maml_jax.MetaState
    cpu_seconds: float | None = None
    """Of a meta-iteration, over all cores and without this process's first, which compiles; None for fewer than ten,
    as the next is under way before the last has been read."""


HARMLESS = ("steps", "test_rates", "test_tasks", "test_episodes", *command_line.LOOKS)
"""Options that may be others when a run goes on."""

GROWING = ("methods", "seeds")
"""Options that may get further entries: each is a training of its own."""

SAVE_EVERY = 5


def recorded(config: Config, setting: Setting) -> dict[str, Any]:
    """What a run that goes on is compared with."""
    return dataclasses.asdict(config) | setting._asdict() | {"outer_rate": adam_rate(config)}


def run_of(config: Config, setting: Setting) -> dict[str, Any]:
    """What a run directory is to know of the run."""
    return {
        "config": recorded(config, setting),
        "harmless": HARMLESS,
        "growing": GROWING,
        "wandb": config.wandb,
    }


def adam_rate(config: Config) -> float:
    """Of the outer steps that take one."""
    return 1e-3 if config.outer_rate is None else config.outer_rate


def prepare(config: Config, problem: Problem) -> Prepared:
    """Checks the options. Raises ValueError or OSError, saying what is wrong and what to do."""
    setting = config.resolve(problem)
    if hosts.several():
        task_mesh(setting.tasks)  # Raises if they cannot be divided.
    RunDirectory.check(config.workdir, **run_of(config, setting))
    return Prepared(config, problem, setting)


def outer(config: Config, setting: Setting) -> Outer:
    """The outer step that the options name."""
    if config.outer == "trpo":
        return trpo(setting.kl_limit, curvature_tasks=config.curvature_tasks)
    return (policy_gradient if config.outer == "policy_gradient" else promp)(optax.adam(adam_rate(config)))


def meta_train(prepared: Prepared, run: RunDirectory, method: MethodName, seed: int) -> Trained:
    """Trains one policy, from where `run` has come with it."""
    config, problem, setting = prepared
    environment = told(problem.environment) if method == "oracle" else problem.environment
    policy = gaussian_mlp(environment.observation_size, environment.action_size)
    joint = method in ("pretrained", "oracle")
    order: Literal[1, 2] = 1 if method == "first_order" else 2
    learner = maml_rl(
        environment,
        policy,
        maml_jax.no_adaptation() if joint else maml_jax.sgd(setting.inner_rate, steps=config.inner_steps, order=order),
        outer(config, setting),
        episodes=setting.episodes * (config.inner_steps + 1 if joint else 1),
        inner_loss_name=config.inner_loss,
        sampling_term=config.sampling_term,
        mesh=task_mesh(setting.tasks),
    )
    init_key, trial_key = jax.random.split(jax.random.key(seed))
    state = learner.init(policy.init(init_key))
    if method == "random":
        return Trained(environment, policy, hosts.local(state))

    def draw(key: jax.Array, step: jax.Array) -> Any:
        return draw_trials(environment, jax.random.fold_in(key, step), setting.tasks)

    progress = Progress(setting.steps, f"{method} (seed {seed})")
    cpu_seconds, begun = None, None
    for state, row in resumable_train(
        learner,
        state,
        draw,
        trial_key,
        steps=setting.steps,
        steps_per_call=1,
        run=run,
        save_every=SAVE_EVERY,
        labels={"method": method, "seed": seed},
        rates={"inner": setting.inner_rate},
        profile=config.profile,
    ):
        before = {"before": row["return_before"]} if "return_before" in row else {}
        progress.update(row["step"], **before, after=row["return"])
        if begun is None:
            begun = (row["step"], time.process_time())
        elif (taken := row["step"] - begun[0]) >= 9:
            cpu_seconds = (time.process_time() - begun[1]) / taken
    return Trained(environment, policy, hosts.local(state), cpu_seconds)


def tester(trained: Trained, rates: tuple[float, float], episodes: int) -> maml_jax.MetaLearner:
    """For adaptation at test alone, by the rates of the first step and of later ones: the outer step plays no part."""
    first, later = rates
    inner = maml_jax.unrolled(optax.sgd(lambda step: jnp.where(step == 0, first, later)), steps=TEST_STEPS)
    outer = policy_gradient(optax.identity())
    return maml_rl(trained.environment, trained.policy, inner, outer, episodes=episodes, mesh=local_mesh())


def evaluate(prepared: Prepared, method: MethodName, trained: Trained) -> dict[str, Any]:
    """Adapts to the test tasks. Where there is a choice of rates, the best on other tasks is taken."""
    config, problem, setting = prepared
    steps = 0 if method == "oracle" else TEST_STEPS
    test_key, tuning_key = jax.random.split(jax.random.key(TEST_SEED))
    trained_state = task_axis("all", local_mesh()).replicate(trained.state)

    @jax.jit
    def test(state: maml_jax.MetaState, rates: tuple[float, float], key: jax.Array) -> tuple[jax.Array, Summary]:
        """The tasks, and what came of them."""
        trials = draw_trials(trained.environment, key, config.test_tasks)
        return trials.task, tester(trained, rates, setting.test_episodes).evaluate(state, trials, steps).aux

    def tuned(rates: tuple[float, float]) -> float:
        """Mean return over the tuning tasks and the gradient steps; an episode that broke rules the rates out."""
        tested = [test(trained_state, rates, key)[1] for key in jax.random.split(tuning_key, TUNING)]
        broken = any(aux.broken.any() for aux in tested)
        return -np.inf if broken else float(np.mean([aux.total[:, 1:] for aux in tested]))

    own = problem.own_test_rates if config.test_rates is None else {}
    pairs = (own[method],) if method in own else setting.test_rates
    rates = pairs[0] if len(pairs) == 1 or not steps else max(pairs, key=tuned)
    tasks, found = test(trained_state, rates, test_key)
    mean, half_width = interval(np.asarray(found.total))
    return {
        "rates": rates if steps else None,
        "return": mean,
        "half_width": half_width,
        "improved": (np.diff(found.total, axis=1)[:, :1] > 0).mean(0),
        "length": np.asarray(found.length).mean(0),
        "broken": float(found.broken.sum()),
        "cpu_seconds": trained.cpu_seconds,
        **by_task(np.asarray(tasks), np.asarray(found.total)),
    }


def by_task(tasks: np.ndarray, returns: np.ndarray) -> dict[str, Any]:
    """Tasks `[T, ...]` and returns `[T, S + 1]` as lines of text, one for each number of a task and each gradient step.

    Where there are but two kinds of tasks, such as directions, also the mean return of each: one of them may lag.
    """
    kinds = np.unique(tasks, axis=0)
    few = kinds.ndim == 1 and len(kinds) <= 2
    return {
        "tasks": [" ".join(f"{value:.4g}" for value in column) for column in tasks.reshape(len(tasks), -1).T],
        "return_of_task": [" ".join(f"{value:.2f}" for value in column) for column in returns.T],
        "return_of_kind": {f"{kind:g}": returns[tasks == kind].mean(0) for kind in kinds} if few else {},
    }


def show(trained: Trained, rates: tuple[float, float], episodes: int, tasks: Any) -> tuple[np.ndarray, np.ndarray]:
    """Observations `[T, S + 1, E, H, O]` and mask of episodes before and after each step at the test tasks."""
    trials = Trials(jax.random.split(jax.random.key(TEST_SEED + 1), len(tasks)), jnp.asarray(tasks))
    learner = tester(trained, rates, episodes)
    _, info = jax.jit(jax.vmap(lambda trial: learner.adapt(trained.state, trial)))(trials)
    seen = info.aux[1].episodes
    return np.asarray(seen.observation), np.asarray(seen.mask)


def run(
    prepared: Prepared, **about: Any
) -> tuple[RunDirectory, dict[str, Any], list[dict[str, Any]], dict[MethodName, Trained]] | None:
    """Trains and tests what the options name, and writes parameters and results, with what else is given.

    Returns:
      The run's directory, its results, the metrics of every meta-iteration, and the last seed's policies; in process 0,
      which alone tests.
    """
    config, problem, setting = prepared
    directory = RunDirectory(config.workdir, problem.environment.name, **run_of(config, setting))
    former = directory.path / "results.json"
    known = read_json(former)["rows"] if hosts.leads() and former.exists() else []
    costs = {(row["method"], row["seed"]): row["cpu_seconds"] for row in known}
    print(f"{config}\n{setting}\nWriting to {directory.path}", flush=True)
    rows: list[dict[str, Any]] = []
    policies: dict[MethodName, Trained] = {}

    for seed in config.seeds:
        for method in config.methods:
            policies[method] = meta_train(prepared, directory, method, seed)
            if hosts.leads():
                row = {"method": method, "seed": seed, **evaluate(prepared, method, policies[method])}
                if row["cpu_seconds"] is None:  # Nothing was left to be trained.
                    row["cpu_seconds"] = costs.get((method, seed))
                rows.append(row)
    if not hosts.leads():
        return None
    results = {
        "config": dataclasses.asdict(config),
        "setting": setting._asdict(),
        "protocol": (
            f"{problem.environment.name}: mean return over {config.test_tasks} held-out tasks before and after 1 to "
            f"{TEST_STEPS} gradient steps, each on {setting.test_episodes} new episodes of at most "
            f"{problem.environment.horizon} time steps, by the rates shown (of the first and of later gradient steps); "
            "intervals are 95% over the tasks"
        ),
        "paper": problem.paper,
        **about,
        "rows": rows,
    }
    print(table(results))
    directory.write_params({method: trained.state.params for method, trained in policies.items()})
    path = directory.write_results(results)
    print(f"Wrote {path}, and params.msgpack beside it.")
    return directory, results, directory.rows(), policies


def table(results: dict[str, Any]) -> str:
    """Returns of every method and seed, with the mean over seeds and the paper's numbers."""
    title = f"{'':<18}seed       rates" + "".join(f"{f'{step} steps':>18}" for step in range(TEST_STEPS + 1))
    lines = [results["protocol"], "", title + "   better after 1   cpu seconds a meta-iteration"]
    for method in dict.fromkeys(row["method"] for row in results["rows"]):
        mine = [row for row in results["rows"] if row["method"] == method]
        for row in mine:
            cells = "".join(f"{mean:10.2f} +-{half:6.2f}" for mean, half in zip(row["return"], row["half_width"]))
            cells = f"{cells:<{18 * (TEST_STEPS + 1)}}"
            rates, better = "", ""
            if row["rates"]:
                rates, better = "{:g}, {:g}".format(*row["rates"]), f"{row['improved'][0]:.0%}"
            cost = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.2f}"
            name = method.replace("_", " ")
            lines.append(f"{name:<18}{row['seed']:>4} {rates:>11} {cells}{better:>17}{cost:>32}".rstrip())
            for kind, of_kind in row["return_of_kind"].items():
                lines.append(f"{f'  tasks of {kind}':<35}" + "".join(f"{mean:10.2f}        " for mean in of_kind))
            if row["broken"]:
                lines.append(f"  {row['broken']:.0f} of these episodes ended early by something that was not finite")
        if len(mine) > 1:
            means = np.mean([row["return"] for row in mine], 0)
            lines.append(f"{'  mean of seeds':<35}" + "".join(f"{mean:10.2f}        " for mean in means))
        if method in results["paper"]:
            lines.append(f"{'  the paper':<35}" + "".join(f"{v:10.2f}        " for v in results["paper"][method]))
    return "\n".join(lines)
