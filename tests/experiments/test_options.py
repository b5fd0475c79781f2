"""Hypothesis searches for a wrong option that is accepted, and for a right option that raises.

This file defines the allowed values independently of the code that checks them.
"""

import collections
import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import locomotion, miniimagenet, navigation, omniglot, sinusoid
from experiments.reinforcement import options as reinforcement

MOST_STEPS, MOST_SEED = 2**31 - 1, 2**32 - 1
JUNK = ["", "many", "1.5.2", "None!", "0x", "-"]


def whole(least, most=math.inf):
    def allowed(text):
        try:
            return least <= int(text) <= most
        except ValueError:
            return False

    numbers = st.integers(min_value=-3, max_value=40) | st.integers()
    edges = [least - 1, least, *([most, most + 1] if most < math.inf else [])]
    return SimpleNamespace(values=(numbers | st.sampled_from(edges)).map(str), allowed=allowed)


def rate():
    def allowed(text):
        try:
            return 0 < float(text) < math.inf
        except ValueError:
            return False

    return SimpleNamespace(values=st.floats().map(repr) | st.sampled_from(["0", "-0.0", "1e-400"]), allowed=allowed)


def fraction():
    def allowed(text):
        try:
            return 0 <= float(text) <= 1
        except ValueError:
            return False

    return SimpleNamespace(values=st.floats(-0.5, 1.5).map(repr) | st.sampled_from(["0", "1", "nan"]), allowed=allowed)


def seed_except(*test_seeds):
    """Seeds of a training, which must differ from the seeds of the test tasks."""
    seed, excluded = whole(0, MOST_SEED), st.sampled_from([*map(str, test_seeds)])
    return SimpleNamespace(
        values=seed.values | excluded, allowed=lambda text: seed.allowed(text) and int(text) not in test_seeds
    )


def choice(*names):
    others = st.sampled_from([name.upper() + "x" for name in names])
    return SimpleNamespace(values=st.sampled_from(names) | others, allowed=lambda text: text in names)


def optional(field):
    return SimpleNamespace(values=field.values, allowed=lambda text: text == "None" or field.allowed(text))


COUNT, RATE = whole(1), rate()
FEW_SHOT = {
    "ways": optional(whole(2)), "shots": optional(COUNT), "net": optional(choice("conv", "mlp")),
    "recipe": choice("paper", "fast", "one-step"), "optimizer": optional(choice("adam", "muon")),
    "method": optional(choice("maml", "anil", "boil", "meta-sgd", "meta-curvature", "maml++", "shared-head",
                              "zero-head", "one-step", "prototypes", "reptile", "imaml", "pretrained")),
    "order": choice("1", "2"),
    "normalisation": choice("batch", "support", "instance", "tasknorm", "layer", "group", "running"),
    "steps": optional(whole(1, MOST_STEPS)), "tasks": optional(COUNT), "queries": optional(COUNT),
    "train_ways": optional(whole(2)), "train_shots": optional(COUNT), "train_queries": optional(COUNT),
    "head_rates": optional(RATE), "downscale": optional(COUNT),
    "first_steps": optional(whole(1, MOST_STEPS)),
    "inner_rate": optional(RATE), "inner_steps": optional(COUNT), "outer_rate": optional(RATE),
    "clip": optional(RATE), "task_batch_size": optional(COUNT), "test_tasks": COUNT, "seed": whole(0, MOST_SEED),
}  # fmt: skip
RL = {
    "steps": whole(1, MOST_STEPS), "tasks": COUNT, "episodes": COUNT,
    "inner_rate": RATE, "inner_steps": COUNT, "inner_loss": choice("logp", "lvc", "dice"),
    "outer": choice("trpo", "policy_gradient", "promp"), "kl_limit": RATE,
    "curvature_tasks": optional(COUNT), "outer_rate": RATE, "test_tasks": whole(2),
    "test_episodes": COUNT, "seeds": seed_except(600, 601), "gae_lambda": fraction(),
    "methods": choice("maml", "first_order", "pretrained", "random", "oracle"),
}  # fmt: skip
TRAINING_OPTIONS = {
    "steps", "tasks", "episodes", "inner_steps", "outer", "kl_limit", "curvature_tasks", "outer_rate"
}  # fmt: skip
"""Options that have no effect on the untrained policy."""
FIELDS = {
    "sinusoid": {
        "steps": whole(1, MOST_STEPS), "tasks": COUNT, "shots": COUNT, "queries": COUNT, "inner_rate": RATE,
        "inner_steps": COUNT, "outer_rate": RATE, "test_tasks": whole(2), "seeds": seed_except(600),
        "methods": choice("maml", "first_order", "pretrained", "oracle", "steady"),
    },
    "omniglot": FEW_SHOT | {
        "preset": optional(choice("5w1s", "5w5s", "20w1s", "20w5s", "5w1s-mlp", "5w5s-mlp")),
        "split": choice("paper", "vinyals"), "rotations": choice("random", "classes", "none"),
    },
    "miniimagenet": FEW_SHOT | {
        "expect": optional(choice("miniimagenet", "cifar-fs", "fc100")), "size": COUNT,
        "division": choice("random", "none"),
    },
    "navigation": RL,
    "locomotion": RL | {"preset": choice("half-cheetah-velocity", "half-cheetah-direction", "ant-velocity",
                                         "ant-direction")},
}  # fmt: skip


def contradicts(name, given):
    """Whether options contradict each other, each of which is allowed."""
    if name == "sinusoid":
        own = {"tasks", "shots", "queries", "inner_rate", "inner_steps", "outer_rate"} & given.keys()
        changed = {field for field in own if float(given[field]) != getattr(sinusoid.Config, field)}
        return given.get("methods") == "steady" and bool(changed)
    if name in ("navigation", "locomotion"):
        outer = given.get("outer", "trpo")
        tasks = int(given.get("tasks", 20 if name == "navigation" else 40))
        curvature = given.get("curvature_tasks", "None")
        method = given.get("methods", "maml")
        defaults = locomotion.PRESETS[given.get("preset", locomotion.Config.preset)]
        changed = {field for field in given if given[field] != str(getattr(defaults, field))}
        return (
            ("inner_rate" in changed and method not in ("maml", "first_order"))
            or (method == "random" and bool(changed & TRAINING_OPTIONS))
            or ("inner_loss" in changed and method == "oracle")
            or ("kl_limit" in changed and outer != "trpo")
            or ("outer_rate" in changed and outer == "trpo")
            or (curvature != "None" and (outer != "trpo" or int(curvature) > tasks))
        )
    get = {field: None if given.get(field, "None") == "None" else given[field] for field in FIELDS[name]}
    preset = get.get("preset")
    if preset and any(get[field] is not None for field in ("ways", "shots", "net")):
        return True
    ways, shots = (int(get[field] or default) for field, default in (("ways", 5), ("shots", 1)))
    net = get["net"] or "conv"
    if preset:
        ways, shots = int(preset.split("w")[0]), int(preset.split("w")[1][0])
        net = "mlp" if preset.endswith("mlp") else "conv"
    recipe = get["recipe"] or "paper"
    one_step = recipe == "one-step"
    of_recipe = {"paper": "maml", "fast": "zero-head", "one-step": "one-step"}[recipe]
    method, normalisation = get["method"] or of_recipe, get["normalisation"] or "batch"
    if (recipe != "paper" and method != of_recipe) or (recipe != "fast" and get["first_steps"] is not None):
        return True
    recipe_queries, recipe_tasks = (shots, 16 if ways >= 20 else 32) if name == "omniglot" else (15, 4)
    if recipe == "fast":
        recipe_tasks = 2 if name == "miniimagenet" or ways * shots > 25 else 8 if ways * shots <= 5 else 4
    recipe_tasks = {"omniglot": 2, "miniimagenet": 1}[name] if one_step else recipe_tasks
    queries, tasks = int(get["queries"] or recipe_queries), int(get["tasks"] or recipe_tasks)
    in_training = {"omniglot": (40, 1, 1), "miniimagenet": (20, 1, 3)}[name] if one_step else (ways, shots, queries)
    if recipe == "fast" and name == "miniimagenet":
        in_training = (ways, shots, 3)
    train_ways, train_shots, train_queries = (
        int(get[f"train_{field}"] or value) for field, value in zip(("ways", "shots", "queries"), in_training)
    )
    downscale = int(get["downscale"] or (2 if one_step and name == "miniimagenet" else 1))
    if method == "one-step":
        size = int(get.get("size") or 84) if name == "miniimagenet" else 28
        if int(get["inner_steps"] or 1) != 1 or normalisation in ("support", "tasknorm"):
            return True
        if train_queries % train_shots or size % downscale or (downscale > 1 and net == "mlp"):
            return True
    elif train_ways != ways or downscale > 1:
        return True
    if recipe == "fast":  # The options of the first phase.
        if normalisation in ("support", "tasknorm"):
            return True
        if name == "miniimagenet" and (int(get["size"] or 84) % 2 or net == "mlp"):
            return True
    if method in ("pretrained", "reptile") and (get["train_shots"] is not None or get["train_queries"] is not None):
        return True
    share = tasks // (2 if tasks % 2 == 0 else 1)  # Tests have two devices.
    return (
        (net == "mlp" and normalisation in ("instance", "tasknorm"))
        or (method in ("pretrained", "reptile") and normalisation == "running")
        or (get["head_rates"] is not None and method not in ("zero-head", "one-step"))
        or (get["optimizer"] == "muon" and method == "reptile")
        or (get["order"] == "1" and method in ("reptile", "imaml", "pretrained"))
        or (get["inner_steps"] is not None and method == "pretrained")
        or (get["task_batch_size"] is not None and share % int(get["task_batch_size"]) != 0)
        or (name == "omniglot" and max(shots + queries, train_shots + train_queries) > 20)
    )


def check_options(name, config):
    """Runs the checks that an experiment makes before it reads data."""
    if name == "sinusoid":
        config.check()
    elif name == "navigation":
        reinforcement.check(config, navigation.Config())
    elif name == "locomotion":
        reinforcement.check(config, locomotion.PRESETS[config.preset])
    else:
        config.resolved()


CONFIGS = {
    "sinusoid": sinusoid.Config, "omniglot": omniglot.Run, "miniimagenet": miniimagenet.Run,
    "navigation": navigation.Config, "locomotion": locomotion.Config,
}  # fmt: skip


@st.composite
def options(draw, name):
    """One to three options, most of them right."""
    fields = FIELDS[name]
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True))
    return {field: draw(fields[field].values | st.sampled_from(JUNK)) for field in chosen}


def check_outcome(name, chosen, capsys):
    """Gives options to an experiment and checks its message. Returns 'wrong', 'contradicting' or 'right'."""
    arguments = [part for field, text in chosen.items() for part in (f"--{field.replace('_', '-')}", text)]
    wrong = [field for field, text in chosen.items() if not FIELDS[name][field].allowed(text)]
    kind = "wrong" if wrong else "contradicting" if contradicts(name, chosen) else "right"
    message = None
    try:
        default = locomotion.PRESETS[locomotion.preset_of(arguments)] if name == "locomotion" else CONFIGS[name]()
        config = tyro.cli(CONFIGS[name], args=arguments, default=default, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as end:
        assert end.code == 2
        message = "".join(capsys.readouterr())
    else:
        try:
            check_options(name, config)
        except ValueError as error:
            message = str(error)
    capsys.readouterr()
    if kind == "right":
        assert message is None, (chosen, message)
        return kind
    assert message is not None, f"{chosen} did not raise"
    # The message names an option and its value. It may name any of several wrong or contradicting options.
    named = [field for field in chosen if field in message or field.replace("_", "-") in message]
    assert any(_shown(chosen[field], message) for field in named), (chosen, message)
    return kind


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_wrong_options_raise_and_right_options_pass(name, capsys):
    found = collections.Counter()

    @settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(options(name))
    def check(chosen):
        found[check_outcome(name, chosen, capsys)] += 1

    check()
    assert found["wrong"] > 20 and found["right"] > 20, found


PAIRS = [
    ("sinusoid", {"methods": "steady", "inner_rate": "0.1"}),
    ("navigation", {"outer": "promp", "kl_limit": "0.02"}),
    ("navigation", {"outer": "trpo", "outer_rate": "0.02"}),
    ("navigation", {"outer": "promp", "curvature_tasks": "2"}),
    ("locomotion", {"tasks": "2", "curvature_tasks": "3"}),
    ("navigation", {"methods": "random", "inner_rate": "0.2"}),
    ("locomotion", {"methods": "random", "episodes": "3"}),
    ("locomotion", {"methods": "oracle", "inner_loss": "lvc"}),
    ("omniglot", {"preset": "5w1s", "net": "conv"}),
    ("omniglot", {"shots": "10", "queries": "11"}),
    ("omniglot", {"tasks": "6", "task_batch_size": "2"}),
    ("miniimagenet", {"net": "mlp", "normalisation": "instance"}),
    ("miniimagenet", {"method": "pretrained", "normalisation": "running"}),
    ("miniimagenet", {"method": "imaml", "order": "1"}),
    ("miniimagenet", {"recipe": "one-step", "size": "83"}),
    ("miniimagenet", {"recipe": "fast", "size": "83"}),
    ("miniimagenet", {"recipe": "one-step", "net": "mlp"}),
    ("omniglot", {"recipe": "fast", "method": "anil"}),
    ("omniglot", {"recipe": "fast", "normalisation": "support"}),
    ("omniglot", {"recipe": "one-step", "train_shots": "2"}),
    ("omniglot", {"method": "one-step", "normalisation": "support"}),
    ("omniglot", {"method": "reptile", "optimizer": "muon"}),
    ("omniglot", {"method": "pretrained", "train_queries": "2"}),
    ("omniglot", {"method": "reptile", "normalisation": "running"}),
    ("miniimagenet", {"method": "pretrained", "inner_steps": "3"}),
]


@pytest.mark.parametrize("name, chosen", PAIRS)
def test_each_contradicting_pair_raises(name, chosen, capsys):
    assert check_outcome(name, chosen, capsys) == "contradicting"
    for field, text in chosen.items():  # Each option alone is right, up to two that contradict a default.
        assert check_outcome(name, {field: text}, capsys) == "right" or field in ("outer_rate", "curvature_tasks")


def test_fewer_steps_than_done_raise_before_anything_is_written(tmp_path):
    done = tmp_path / "checkpoints" / "maml-0" / "7"
    done.mkdir(parents=True)
    options = {"steps": 5, "workdir": tmp_path}
    for prepare in (
        lambda: sinusoid.prepare(sinusoid.Config(**options)),
        lambda: reinforcement.prepare(navigation.Config(**options), navigation.Config()),
        lambda: omniglot.Run(**options).resolved().check_workdir(),
    ):
        with pytest.raises(OSError, match="maml-0 has taken 7 meta-steps, but steps is 5"):
            prepare()
    assert not (tmp_path / "run.json").exists() and [*done.parent.iterdir()] == [done]


def _shown(text, message):
    """Whether the message shows the given value, as it was typed or as a number."""
    if text.strip() in message:
        return True
    try:
        return f"{float(text):g}" in message
    except ValueError:
        return False


def test_fields_has_every_numeric_option():
    """A new option must be added to `FIELDS`."""
    for name, config in CONFIGS.items():
        numbers = {field.name for field in dataclasses.fields(config) if re.search(r"\b(int|float)\b", str(field.type))}
        assert numbers - {"test_rates"} <= FIELDS[name].keys(), name
