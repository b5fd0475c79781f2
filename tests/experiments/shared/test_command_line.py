"""The help of the commands, and messages for wrong input."""

import sys
import time

import pytest
import tyro
from helpers.commands import launch

from experiments import adapt, benchmark, evaluate, miniimagenet, omniglot, report, reproduce, sinusoid
from experiments.few_shot import methods
from experiments.shared import command_line

OPTIONS = (
    adapt.Config,
    benchmark.Config,
    evaluate.Config,
    miniimagenet.Run,
    omniglot.Run,
    report.Config,
    reproduce.Config,
    sinusoid.Config,
)


@pytest.mark.parametrize("options_type", OPTIONS, ids=lambda each: each.__module__)
def test_the_help_names_the_command_and_every_default(options_type, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "--help"])
    monkeypatch.setattr(command_line.jax.config, "update", lambda *_: None)  # This process has its devices already.
    with pytest.raises(SystemExit) as end:
        command_line.run(options_type, lambda options: options, lambda prepared: None, several=True)
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m {options_type.__module__} ")
    assert f"    python -m {options_type.__module__}" in text  # An example.
    assert "(default: None)" not in text and "(default: )" not in text


BAD = [
    ("sinusoid", ["--steps", "0"], "steps must be an integer of at least 1, but got 0"),
    ("sinusoid", ["--inner-rate", "nan"], "inner_rate must be positive and finite, but got nan"),
    ("sinusoid", ["--outer-rate", "-1"], "outer_rate must be positive and finite, but got -1"),
    ("sinusoid", ["--methods", "magic"], "methods"),
    ("sinusoid", ["--seeds", "-1"], "seeds must be an integer of at least 0, but got -1"),
    ("sinusoid", ["--shots", "many"], "shots"),
    ("sinusoid", ["--workdir", ""], "expected a path, but got an empty text"),
    ("omniglot", ["--data-dir", ""], "expected a path, but got an empty text"),
    ("omniglot", ["--order", "3"], "order"),
    ("omniglot", ["--ways", "1"], "ways must be an integer of at least 2, but got 1"),
    ("omniglot", ["--ways", "2000"], "ways must be at most the number of classes, 1100, but got 2000"),
    ("omniglot", ["--ways", "150"], "ways must be at most the number of classes, 100, but got 150"),
    ("omniglot", ["--shots", "0"], "shots must be an integer of at least 1, but got 0"),
    ("omniglot", ["--shots", "12", "--queries", "9"], "shots + queries must be at most 20"),
    ("omniglot", ["--inner-rate", "inf"], "inner_rate must be positive and finite, but got inf"),
    ("omniglot", ["--inner-steps", "0"], "inner_steps must be an integer of at least 1, but got 0"),
    ("omniglot", ["--preset", "20w1s", "--ways", "10"], "leave these out, or leave preset out, but got ways 10"),
    ("omniglot", ["--task-batch-size", "5"], "task_batch_size must divide the tasks of one device, 16, but got 5"),
    ("omniglot", ["--preset", "20w5s", "--ways", "5"], "leave these out, or leave preset out, but got ways 5"),
    ("omniglot", ["--rotations", "up"], "rotations"),
    ("omniglot", ["--method", "magic"], "method"),
    ("omniglot", ["--method", "reptile", "--order", "1"], "order 1 is for methods that differentiate the inner loop"),
    ("omniglot", ["--method", "maml++", "--anneal"], "anneal is for methods with a constant outer rate"),
    ("omniglot", ["--recipe", "fast", "--method", "anil"], "recipe 'fast' is for the method zero-head, but got anil"),
    ("omniglot", ["--anneal", "sometimes"], "expected True or False, but got sometimes"),
    ("omniglot", ["--start-from", "nowhere.msgpack"], "nowhere.msgpack"),
    ("omniglot", ["--net", "mlp", "--normalisation", "tasknorm"], "'tasknorm' needs spatial axes"),
    ("omniglot", ["--method", "pretrained", "--normalisation", "running"], "'running' gathers statistics"),
    ("omniglot", ["--method", "pretrained", "--rotations", "classes"], "'classes' makes four classes of each class"),
    ("miniimagenet", ["--data-dir", "nowhere"], "nowhere"),
    ("miniimagenet", ["--outer-rate", "0"], "outer_rate must be positive and finite, but got 0"),
    ("omniglot", ["--data-dir", "nowhere"], "--download"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_wrong_input_ends_a_command_before_training(name, options, message, monkeypatch, capsys, tmp_path, request):
    """Runs commands in this process, which is fast. The next test starts a process."""
    options_type, prepare, main = {
        "sinusoid": (sinusoid.Config, sinusoid.prepare, sinusoid.main),
        "omniglot": (omniglot.Run, methods.prepare, omniglot.main),
        "miniimagenet": (miniimagenet.Run, methods.prepare, omniglot.main),
    }[name]
    if name == "omniglot" and "--data-dir" not in options:
        shared, cache = request.getfixturevalue("shared_data"), request.getfixturevalue("omniglot_cache")
        options = [*options, "--data-dir", str(shared / "omniglot"), "--cache-dir", str(cache)]
    monkeypatch.setattr(sys, "argv", [name, *options])
    monkeypatch.setattr(command_line.jax.config, "update", lambda *_: None)  # This process has its devices already.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        command_line.run(options_type, prepare, main)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err + printed.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments, value",
    [([], None), (["--anneal"], True), (["--anneal", "True"], True), (["--anneal", "False", "--shots", "2"], False)],
)
def test_a_switch_can_be_left_out_given_and_turned_off(arguments, value):
    config = (tyro.conf.FlagCreatePairsOff,)
    assert tyro.cli(omniglot.Run, args=arguments, config=config).anneal is value


def test_wrong_input_ends_a_process_quickly_with_status_2(tmp_path):
    start = time.monotonic()
    ended = launch("experiments.omniglot", "--data-dir", tmp_path, "--cache-dir", tmp_path)
    assert ended.returncode == 2 and time.monotonic() - start < 30
    assert ended.stderr.startswith(f"error: The data directory {tmp_path} holds no Omniglot.")
    assert "Traceback" not in ended.stderr
