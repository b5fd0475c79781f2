"""The benchmarks: counted operations, ratios, and their command line."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import launch

import maml_jax
from experiments import benchmark
from experiments.benchmarks import breakdown, flops, measure, plain_jax, workloads
from maml_jax.nets.convolution import conv
from maml_jax.parallel.backend import cores


def counted(fn, *args):
    return flops.count(jax.make_jaxpr(fn)(*args).jaxpr)


def test_products_and_loops_are_counted():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    assert counted(jnp.matmul, a, b) == 2 * 3 * 4 * 5 * 6
    looped = lambda a: jax.lax.scan(lambda x, _: (x @ x, None), a, length=7)[0]  # noqa: E731
    assert counted(looped, jnp.ones((4, 4))) == 7 * 2 * 4**3


@pytest.mark.parametrize("tasks", [1, 3])
def test_a_convolution_and_both_of_its_gradients_count_the_same(tasks):
    x, kernel = jnp.ones((tasks, 2, 8, 6, 3)), jnp.ones((tasks, 3, 3, 3, 5))
    forward = 2 * tasks * 2 * (4 * 3) * 9 * 3 * 5

    def total(x, kernel):
        return jax.vmap(lambda x, kernel: conv(x, kernel, stride=2))(x, kernel).sum()

    assert counted(total, x, kernel) == forward
    assert counted(jax.grad(total, (0, 1)), x, kernel) == 3 * forward
    library = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert counted(library, x[0], kernel[0]) == forward // tasks


def test_combinations_that_compute_the_same_are_measured_once():
    config = benchmark.Config(("sinusoid",), remat=("none", "mixflow"), implementations=("patches", "lax"))
    assert [(v.order, v.remat, v.implementation) for v in config.variants()] == [
        (2, "none", None), (2, "mixflow", None), (1, "none", None),
    ]  # fmt: skip


def test_a_row_is_the_median_of_its_rounds():
    ours = {"tasks": 4, "compile_s": 9.0, "memory_compiled": 1, "memory_measured": 2, "gflop": 2.0, "devices_used": 1}
    rounds = [ours | {"ms": [10.0, 10.0, 99.0], "limit_gflops": 400.0}, ours | {"ms": [8.0], "limit_gflops": 500.0}]
    row = benchmark.summary({"kind": "ours", "rounds": [*rounds, rounds[0]]})
    assert (row["ms"], row["ms_least"], row["ms_most"]) == (10.0, 8.0, 10.0)
    assert (row["share_of_limit"], row["tasks_per_second"], row["limit_gflops"]) == (0.5, 400.0, 400.0)
    peer = benchmark.summary({"kind": "peer", "rounds": [{"ms": [3.0], "version": "2.9", "compile_s": 7.0}]})
    assert (peer["ms"], peer["version"]) == (3.0, "2.9")


def test_the_peers_have_our_settings():
    """The test parses the file: importing it needs PyTorch."""
    tree = ast.parse(Path(workloads.__file__).with_name("torch_peers.py").read_text())
    (table,) = [ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and node.targets[0].id == "IMAGES"]  # fmt: skip
    assert table == {name: tuple(images) for name, images in workloads.IMAGES.items()}


def test_a_failed_measurement_ends_with_status_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "one_round", lambda *_: {"error": "ValueError: no such device"})
    monkeypatch.setattr(benchmark, "where", lambda: ("cpu", "1 x a device"))
    config = benchmark.Config(("sinusoid",), rounds=1, workdir=tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        benchmark.main(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert end.value.code == 1 and "no such device" in capsys.readouterr().out
    assert all(row["error"] for row in results["rows"]) and results["device"] == "1 x a device"
    assert results["made_by"]["hardware"].startswith("1 x a device (")


def test_ratios_compare_the_same_settings():
    ours = {"kind": "ours", "workload": "w", "inner_steps": None, "remat": "none", "task_batch_size": None,
            "implementation": None, "dtype": "float32", "devices": 1}  # fmt: skip
    second = {**ours, "order": 2, "ms": 6.0, "gflop": 4.0, "memory_compiled": 10}
    first = {**ours, "order": 1, "ms": 2.0, "gflop": 2.0, "memory_compiled": 5}
    other = {**first, "dtype": "bfloat16", "ms": 1.0}
    peers = [{"kind": "peer", "peer": peer, "workload": "w", "order": 2, "inner_steps": None, "ms": ms}
             for peer, ms in (("loop", 30.0), ("func", 18.0), ("higher", 40.0))]  # fmt: skip
    low = {**second, "dtype": "bfloat16"}
    of_second, of_first, _, of_low = benchmark.ratios([second, *peers, first, other, low])
    assert "best_peer" not in of_low and of_low["second_over_first"]["time"] == 6.0
    assert of_second["second_over_first"] == {"time": 3.0, "operations": 2.0, "memory": 2.0}
    assert (of_second["best_peer"], of_second["best_peer_over_ours"]) == ("func", 3.0)
    assert "best_peer" not in of_first and "second_over_first" not in of_first


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_every_workload_has_a_finite_loss(name):
    work = workloads.build(name)
    support = jax.tree.map(lambda leaf: leaf[0], work.tasks.support)
    shape = jax.eval_shape(lambda: work.loss_fn(work.init(), support))[0]
    assert shape.shape == () and shape.dtype == jnp.float32
    if name in ("sinusoid", "transformer"):
        assert np.isfinite(work.loss_fn(work.init(), support)[0])


@pytest.mark.parametrize("order", [1, 2])
def test_the_peers_take_the_same_step(order):
    """All peers give the same meta-gradient (if PyTorch is installed)."""
    pytest.importorskip("torch")
    pytest.importorskip("higher")
    given = {"workload": "omniglot-5w1s", "order": order, "gradient": True, "inner_steps": 2}
    sums = []
    for peer in ("loop", "func", "higher", "compiled"):
        done = launch("experiments.benchmarks.torch_peers", json.dumps({**given, "peer": peer}))
        sums.append(json.loads(done.stdout))
    np.testing.assert_allclose(sums[1:], [sums[0]] * 3, rtol=1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_plain_jax_has_our_meta_gradient(order, monkeypatch):
    small = workloads.IMAGES["omniglot-5w1s"]._replace(ways=3, tasks=2, inner_steps=2, size=8, filters=4)
    monkeypatch.setitem(workloads.IMAGES, "omniglot-5w1s", small)
    meta_loss, params, tasks = plain_jax.build("omniglot-5w1s", order)
    found = jax.jit(jax.grad(meta_loss))(params, *tasks)
    work = workloads.build("omniglot-5w1s")
    inner = maml_jax.sgd(work.inner_rate, steps=2, order=order, trainable=work.trainable)
    learner = maml_jax.maml(work.loss_fn, inner, measure.KEEP_GRADIENT)
    ours = {name: {"offset": leaf} if name.startswith("Norm_") else leaf for name, leaf in params.items()}
    gradient = jax.jit(learner.step)(learner.init(ours), tasks)[0].opt_state
    gradient = {name: leaf["offset"] if name.startswith("Norm_") else leaf for name, leaf in gradient.items()}
    chex.assert_trees_all_close(found, gradient, rtol=1e-3, atol=1e-6)


def test_benchmark_end_to_end(tmp_path):
    options = ("--workloads", "sinusoid", "--inner-steps", "2", "--remat", "none", "mixflow")
    done = launch(
        "experiments.benchmark", *options, "--rounds", "1", "--seconds", "0.1", "--workdir", "run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = results["rows"]
    assert len(rows) == 3 and all(row["ms"] > 0 and 0 < row["share_of_limit"] < 1 for row in rows)
    assert [r["second_over_first"]["operations"] > 1 for r in results["ratios"] if r["order"] == 2] == [True] * 2
    assert (tmp_path / "run" / "benchmark.png").stat().st_size > 10_000
    assert "second over first order: time" in done.stdout


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Only Linux reports the peak.")
def test_peak_memory_of_a_large_and_a_small_call():
    """The large call allocates 256 MB, the small call almost nothing."""
    size = 1 << 26
    large = jax.jit(lambda x: x + jnp.arange(size, dtype=jnp.float32)).lower(1.0).compile()
    result, peak = measure.with_peak_memory(lambda: large(1.0))
    assert result[-1] == size and 0.95 * 4 * size < peak < 1.5 * 4 * size
    assert measure.with_peak_memory(lambda: 1)[1] < size


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rounds", "0"], "rounds must be an integer of at least 1, but got 0"),
        (["--inner-steps", "0"], "inner_steps must be an integer of at least 1, but got 0"),
        (["--peer-python", "python"], "add --against func"),
        (["--against", "func", "--peer-python", "nowhere/python"], "has no PyTorch"),
        (["--seconds", "nan"], "seconds must be positive and finite"),
    ],
)
def test_wrong_input_ends_the_command(options, message):
    done = launch("experiments.benchmark", *options)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Only Linux lists the threads of a process.")
def test_small_nets_get_one_thread_of_one_device():
    code = (
        "from pathlib import Path; from experiments.shared import command_line; command_line.use_cores(small={})\n"
        "import jax, jax.numpy as jnp; (jnp.ones((300, 300)) @ jnp.ones((300, 300))).block_until_ready()\n"
        "names = [path.read_text() for path in Path('/proc/self/task').glob('*/comm')]\n"
        "print(jax.device_count(), sum('XLAEigen' in name for name in names))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    found = [
        subprocess.check_output([sys.executable, "-c", code.format(small)], env=environment, text=True).split()
        for small in (True, False)
    ]
    count = str(cores())
    assert found == [["1", "1"], [count, count]]


def test_the_shares_of_a_breakdown_sum_to_1(tmp_path):
    results = breakdown.main(breakdown.prepare(breakdown.Config(("sinusoid",), (2,), tmp_path / "run")))
    (row,) = results["rows"]
    assert row == json.loads((tmp_path / "run" / "results.json").read_text())["rows"][0]
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert 0 < row["shares"][breakdown.PRODUCTS] < 1 and 0 < row["products_of_limit"]
    assert 0 < sum(row["largest_ms"].values()) <= row["ms_in_operations"]
    assert (tmp_path / "run" / "shares.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "name, kind",
    [
        ("dot_general", breakdown.PRODUCTS),
        ("ynn_fusion", breakdown.PRODUCTS),
        ("convolution", breakdown.PRODUCTS),
        ("convert_power_fusion", breakdown.ELEMENTWISE),
        ("concatenate_bitcast_fusion", "windows put together"),
        ("bitcast_dynamic-update-slice_fusion", "stacks over inner steps"),
        ("pad_slice_fusion", "slices, pads and their transposes"),
        ("transpose_copy_fusion", "copies and transposes"),
        ("multiply_reduce_fusion", "sums"),
    ],
)
def test_kinds_of_operations(name, kind):
    assert breakdown.kind(name) == kind


def test_loops_are_not_counted_beside_their_bodies():
    event = lambda **stats: SimpleNamespace(name="kernel", duration_ns=1e6, stats=list(stats.items()))  # noqa: E731
    events = [event(hlo_op=name) for name in ("while.3", "dot.1", "dot.2")]
    line = SimpleNamespace(events=[*events, event(line=3)])
    assert breakdown.durations(SimpleNamespace(planes=[SimpleNamespace(lines=[line])])) == {"dot": 2}


@pytest.fixture
def commands(monkeypatch):
    """Records the commands of processes in place of starting them."""
    started = []

    def run(command, **_):
        started.append(command)
        return SimpleNamespace(returncode=0, stdout='{"ms": [1.0]}')

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    return started


@pytest.mark.parametrize("backend, device", [("cpu", "cpu"), ("gpu", "cuda")])
def test_peers_run_on_our_backend(backend, device, commands):
    row = {"kind": "peer", "peer": "func", "workload": "sinusoid", "order": 2, "inner_steps": None}
    assert benchmark.one_round(benchmark.Config(), row, "unused", backend) == {"ms": [1.0]}
    assert json.loads(commands[0][-1])["device"] == device


def test_against_torch_on_accelerators(commands, monkeypatch):
    config = benchmark.Config(against=("func",))
    for backend, devices in (("cpu", ()), ("gpu", (1,))):
        monkeypatch.setattr(benchmark, "where", lambda backend=backend: (backend, ""))
        assert benchmark.prepare(config).devices == devices
    monkeypatch.setattr(benchmark, "where", lambda: ("tpu", ""))
    with pytest.raises(ValueError, match="on CPUs and GPUs, but the backend is tpu: leave out func"):
        benchmark.prepare(config)
    assert benchmark.prepare(benchmark.Config(against=("jax",))).devices == (1,)
