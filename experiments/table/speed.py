"""Tables of speed and memory for README.md and docs/."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.table.page import table
from maml_jax.runs.files import read_json

WORKLOADS = {
    "sinusoid": "Sinusoid",
    "omniglot-5w1s": "Omniglot 5-way 1-shot",
    "omniglot-20w1s": "Omniglot 20-way 1-shot",
    "miniimagenet-5w1s": "MiniImagenet shape, 5-way 1-shot",
    "transformer": "Transformer",
}
PROBLEMS = {"navigation": "2D navigation", "half-cheetah-velocity": "Half-cheetah", "ant-velocity": "Ant"}


def _fastest(rows: list[dict[str, Any]], workload: str, order: int, kind: str) -> dict[str, Any]:
    """Returns the fastest row of this library ('ours') or of PyTorch ('peer')."""
    found = [row for row in rows if (row["workload"], row["order"], row["kind"]) == (workload, order, kind)]
    return min((row for row in found if row.get("peer") != "jax"), key=lambda row: row["ms"])


def _against_pytorch(results: Path) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yields the name and the title of each workload that was measured beside PyTorch, and the rows of its run."""
    for folder, workloads in (
        ("benchmark-sinusoid", ["sinusoid"]),
        ("benchmark-against-torch", ["omniglot-5w1s", "omniglot-20w1s", "miniimagenet-5w1s"]),
    ):
        measured = read_json(results / folder / "results.json")["rows"]
        for workload in workloads:
            yield workload, WORKLOADS[workload], measured


def speed(results: Path) -> str:
    """Time of a meta-step beside PyTorch."""
    rows = []
    for workload, title, measured in _against_pytorch(results):
        cells = [title]
        ours = {order: _fastest(measured, workload, order, "ours") for order in (2, 1)}
        for order in (2, 1):
            peer = _fastest(measured, workload, order, "peer")
            cells += [_milliseconds(ours[order]["ms"]), f"{peer['ms'] / ours[order]['ms']:.1f}x"]
        cells.append(f"{ours[2]['ms'] / ours[1]['ms']:.1f}x")
        rows.append(cells)
    head = ("meta-step", "second order", "faster than PyTorch", "first order", "faster than PyTorch",
            "second over first")  # fmt: skip
    return table(head, rows)


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


PEERS = {"jax": "plain JAX", "func": "torch.func", "compiled": "torch.compile"}


def peers(results: Path) -> str:
    """Second order beside plain JAX, eager PyTorch and compiled PyTorch: times of a step, and of compilation."""
    rows = []
    for folder in ("sinusoid", "omniglot", "large"):
        measured = read_json(results / f"benchmark-peers-{folder}" / "results.json")["rows"]
        measured = [row for row in measured if row["order"] == 2 and "ms" in row]
        for ours in (row for row in measured if row["kind"] == "ours"):
            others = {row["peer"]: row for row in measured if row.get("peer") and row["workload"] == ours["workload"]}
            best = min(others.values(), key=lambda row: row["ms"])
            rows.append([
                WORKLOADS[ours["workload"]],
                _milliseconds(ours["ms"]),
                *(_milliseconds(others[peer]["ms"]) if peer in others else "" for peer in PEERS),
                f"{best['ms'] / ours['ms']:.1f}x",
                f"{ours['compile_s']:.0f} s",
                *(_compilation(others.get(peer)) for peer in ("jax", "compiled")),
            ])  # fmt: skip
    head = ("meta-step", "ours", *PEERS.values(), "faster than the best", "compilation: ours", "plain JAX",
            "torch.compile")  # fmt: skip
    return table(head, rows)


def _compilation(row: dict[str, Any] | None) -> str:
    return "" if row is None or row["compile_s"] is None else f"{row['compile_s']:.0f} s"


def limits(results: Path) -> str:
    """Operations of both orders, and the share of the machine's limit."""
    rows = []
    for workload, title, measured in _against_pytorch(results):
        second, first = (_fastest(measured, workload, order, "ours") for order in (2, 1))
        rows.append([
            title,
            f"{second['ms'] / first['ms']:.1f}",
            f"{second['gflop'] / first['gflop']:.1f}",
            f"{second['share_of_limit']:.0%}",
        ])  # fmt: skip
    return table(("meta-step", "time, second over first", "operations, second over first", "of the limit"), rows)


def gpu(results: Path) -> str:
    """Second order on one GPU."""
    found = read_json(results / "benchmark-h200" / "results.json")["rows"]
    rows = []
    for row in (row for row in found if "ratio" in row):
        name, peer = WORKLOADS[row["workload"]], row["torch.func_ms"]
        rows.append([name, f"{row['ms']:.2f} ms", f"{peer:.1f} ms", f"{row['ratio']:.0f}x"])
    return table(("meta-step", "ours", "torch.func", "faster"), rows)


def breakdown(results: Path) -> str:
    """Shares of the time of a meta-step on one core."""
    rows = []
    for row in read_json(results / "breakdown" / "results.json")["rows"]:
        shares = row["shares"]
        rows.append([
            f"{WORKLOADS[row['workload']]}, {'second' if row['order'] == 2 else 'first'}",
            f"{shares['products and convolutions']:.0%}",
            f"{row['products_of_limit']:.0%}",
            f"{shares.get('windows put together', 0) + shares.get('slices, pads and their transposes', 0):.0%}",
            f"{shares.get('copies and transposes', 0):.0%}",
            f"{shares.get('each entry alone', 0) + shares.get('sums', 0):.0%}",
            f"{shares.get('stacks over inner steps', 0):.0%}",
        ])  # fmt: skip
    head = ("meta-step, order", "products", "of the limit in them", "images to rows", "copies", "elementwise, sums",
            "residuals of inner steps")  # fmt: skip
    return table(head, rows)


def memory(results: Path) -> str:
    """Time and memory by order and remat."""
    measured = [
        row
        for folder in ("benchmark-checkpoints", "benchmark-checkpoints-32")
        for row in read_json(results / folder / "results.json")["rows"]
    ]
    by_key = {(row["workload"], row["inner_steps"], row["order"], row["remat"]): row for row in measured}
    names = ("transformer", "omniglot-20w1s", "miniimagenet-5w1s")
    rows = []
    for steps in (16, 32):
        for order, remat in ((1, "none"), (2, "none"), (2, "full"), (2, "mixflow")):
            cells = []
            for name in names:
                row = by_key.get((name, steps, order, remat))
                cells += ["", ""] if row is None else [f"{row['ms']:.0f} ms", f"{row['memory_compiled'] / 1e6:.0f} MB"]
            if any(cells):
                rows.append([str(steps), "first" if order == 1 else f'second, `remat="{remat}"`', *cells])
    head = ("inner steps", "order", *(cell for name in names for cell in (f"{WORKLOADS[name]}: time", "memory")))
    return table(head, rows)


def reinforcement(results: Path) -> str:
    """Environment steps and shares of a meta-iteration."""
    rows = []
    parts = ("episodes", "inner steps and meta-gradient", "trust region")
    for folder, curvature in (("rl-speed", "half"), ("rl-speed-navigation", "all")):
        for row in read_json(results / folder / "results.json")["rows"]:
            rows.append([
                PROBLEMS[row["problem"]],
                curvature,
                f"{row['steps_per_cpu_second']:,.0f}",
                f"{row['iterations_per_cpu_second']:.2f}",
                *(f"{row['shares'][name]:.0%}" for name in parts),
            ])  # fmt: skip
    return table(("environment", "tasks in the curvature", "environment steps", "meta-iterations", *parts), rows)
