"""The meta-steps of the benchmark in PyTorch, written as users of PyTorch write them.

    python experiments/benchmarks/torch_peers.py '{"workload": "omniglot-5w1s", "peer": "loop"}'

The peers are a loop over tasks, `torch.func` with `vmap` over tasks, the package `higher`, and two forms in one
`torch.compile` each, with the meta-gradient and Adam in one graph: `vmap` over tasks, and a loop over tasks.

The module needs PyTorch, and the package `higher` for the implementation of that name (`pip install -e '.[torch]'`). It
imports no other module of this project, so that a Python without JAX can run it. The nets are those of
`maml_jax.nets.models`: convolutions have no bias, and normalisation has no scale and an offset that the inner loop does
not adapt. The module prints a line of JSON.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

# ways, shots, queries, tasks, inner steps, inner rate, size, channels, filters, pooled: as in workloads.py.
IMAGES = {
    "omniglot-5w1s": (5, 1, 1, 32, 1, 2.0, 28, 1, 64, False),
    "omniglot-5w5s": (5, 5, 5, 32, 1, 2.0, 28, 1, 64, False),
    "omniglot-20w1s": (20, 1, 1, 16, 5, 2.0, 28, 1, 64, False),
    "omniglot-20w5s": (20, 5, 5, 16, 5, 2.0, 28, 1, 64, False),
    "miniimagenet-5w1s": (5, 1, 15, 4, 5, 0.05, 84, 3, 32, True),
    "miniimagenet-5w5s": (5, 5, 15, 4, 5, 0.05, 84, 3, 32, True),
}


class Normalised(nn.Module):
    """Batch normalisation with the statistics of the batch, an offset and no scale."""

    def __init__(self, channels):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return F.batch_norm(x, None, None, None, self.offset, training=True, eps=1e-3)


def conv_net(ways, size, channels, filters, pooled):
    layers: list[nn.Module] = []
    for inputs in (channels, filters, filters, filters):
        layers.append(nn.Conv2d(inputs, filters, 3, stride=1 if pooled else 2, padding=1, bias=False))
        layers += [Normalised(filters), nn.ReLU()] + ([nn.MaxPool2d(2)] if pooled else [])
    if pooled:
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * (size // 16) ** 2, ways))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, ways))


def workload(name):
    """Returns net, loss, inner steps, inner rate, and inputs and targets of the support sets and of the queries."""
    if name == "sinusoid":
        net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
        points = [torch.rand(25, 10, 1) * 10 - 5, torch.randn(25, 10, 1)]
        return net, F.mse_loss, 1, 0.01, [*points, *(part.clone() for part in points)]
    ways, shots, queries, tasks, steps, rate, size, channels, filters, pooled = IMAGES[name]
    data = []
    for per_class in (shots, queries):
        data.append(torch.rand(tasks, ways * per_class, channels, size, size))
        data.append(torch.arange(ways).repeat_interleave(per_class).repeat(tasks, 1))
    return conv_net(ways, size, channels, filters, pooled), F.cross_entropy, steps, rate, data


def meta_step(peer, order, steps, net, loss, rate, data):
    """Returns a function that takes one meta-step, including the update of Adam, and returns the meta-gradient."""
    if peer.startswith("compiled"):
        return compiled_meta_step(peer, order, steps, net, loss, rate, data)
    outer = torch.optim.Adam(net.parameters(), 1e-3)
    params = dict(net.named_parameters())
    fixed = {name: value for name, value in params.items() if name.endswith("offset")}
    start = {name: value for name, value in params.items() if name not in fixed}
    count, second = len(data[0]), order == 2

    def adapted_loss(adapted, fixed, x, y):
        return loss(functional_call(net, {**adapted, **fixed}, (x,)), y)

    def loop():
        for x, y, x_query, y_query in zip(*data):
            adapted = start
            for _ in range(steps):
                value = adapted_loss(adapted, fixed, x, y)
                grads = torch.autograd.grad(value, list(adapted.values()), create_graph=second)
                adapted = {name: p - rate * g for (name, p), g in zip(adapted.items(), grads)}
            (adapted_loss(adapted, fixed, x_query, y_query) / count).backward()

    def func():
        def task_loss(adapted, fixed, x, y, x_query, y_query):
            for _ in range(steps):
                with torch.set_grad_enabled(second):
                    grads = grad(adapted_loss)(adapted, fixed, x, y)
                adapted = {name: p - rate * grads[name] for name, p in adapted.items()}
            return adapted_loss(adapted, fixed, x_query, y_query)

        vmap(task_loss, (None, None, 0, 0, 0, 0))(start, fixed, *data).mean().backward()

    def higher():
        import higher as library

        inner = torch.optim.SGD(start.values(), rate)
        for x, y, x_query, y_query in zip(*data):
            context = library.innerloop_ctx(net, inner, copy_initial_weights=False, track_higher_grads=second)
            with context as (model, optimizer):
                for _ in range(steps):
                    optimizer.step(loss(model(x), y))
                value = loss(model(x_query), y_query) / count
                if second:
                    value.backward()
                    continue
                # First order: the gradient at the adapted parameters is that of the initial parameters.
                for p, g in zip(net.parameters(), torch.autograd.grad(value, list(model.parameters()))):
                    p.grad = g if p.grad is None else p.grad + g

    body = {"loop": loop, "func": func, "higher": higher}[peer]

    def step():
        outer.zero_grad()
        body()
        outer.step()
        return [p.grad for p in net.parameters()]

    return step


def compiled_meta_step(peer, order, steps, net, loss, rate, data):
    """As `meta_step`, with the meta-gradient and Adam in one compiled graph of static shapes."""
    params = {name: value.detach() for name, value in net.named_parameters()}
    norms = [name for name in params if name.endswith("offset")]

    def loss_of(params, x, y):
        return loss(functional_call(net, params, (x,)), y)

    def task_loss(params, x, y, x_query, y_query):
        adapted = params
        for _ in range(steps):
            grads = grad(loss_of)(adapted, x, y)
            grads = grads if order == 2 else {name: g.detach() for name, g in grads.items()}
            adapted = {name: p if name in norms else p - rate * grads[name] for name, p in adapted.items()}
        return loss_of(adapted, x_query, y_query)

    def mean_loss(params):
        if peer == "compiled":
            return vmap(task_loss, (None, 0, 0, 0, 0))(params, *data).mean()
        return torch.stack([task_loss(params, *task) for task in zip(*data)]).mean()

    @torch.compile(fullgraph=True, dynamic=False)
    def update(params, first, second, count):
        grads, count = grad(mean_loss)(params), count + 1
        first = {name: 0.9 * first[name] + 0.1 * g for name, g in grads.items()}
        second = {name: 0.999 * second[name] + 0.001 * g**2 for name, g in grads.items()}
        new = {}
        for name, p in params.items():
            size = torch.sqrt(second[name] / (1 - 0.999**count)) + 1e-8
            new[name] = p - 1e-3 * first[name] / (1 - 0.9**count) / size
        return new, first, second, count, grads

    state = [params, *({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))]
    state.append(torch.zeros((), device=data[0].device))

    def step():
        *state[:], grads = update(*state)
        return list(grads.values())

    return step


def main():
    given: dict = {"order": 2, "seconds": 3.0, "threads": 2, "device": "cpu", "inner_steps": None, "precision": None}
    given |= json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    # As JAX does by default on a GPU: float32 products and convolutions with reduced precision.
    reduced = given["device"] != "cpu" and given["precision"] != "float32"
    torch.set_float32_matmul_precision("high" if reduced else "highest")
    torch.backends.cudnn.allow_tf32 = reduced
    torch.manual_seed(0)
    net, loss, steps, rate, data = workload(given["workload"])
    net, data = net.to(given["device"]), [part.to(given["device"]) for part in data]
    step = meta_step(given["peer"], given["order"], given["inner_steps"] or steps, net, loss, rate, data)
    start = time.perf_counter()
    grads = step()
    if given["device"] != "cpu":
        torch.cuda.synchronize()
    first_step_s = time.perf_counter() - start  # With compilation, if the peer compiles.
    if given.get("gradient"):  # The gradient of the first step, for comparison.
        print(json.dumps([float(g.abs().sum()) for g in grads]))
        return
    if given.get("wait"):  # Other processes compile at the same time. Measure when standard input says so.
        print("ready", flush=True)
        if not sys.stdin.readline():
            sys.exit("The parent process has ended.")

    def milliseconds(count):
        start = time.perf_counter()
        for _ in range(count):
            step()
        if given["device"] != "cpu":
            torch.cuda.synchronize()  # A GPU runs asynchronously.
        return 1e3 * (time.perf_counter() - start) / count

    milliseconds(2)
    per_time = max(1, int(300 / milliseconds(1)))
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < given["seconds"]:
        times.append(milliseconds(per_time))
    print(json.dumps({"ms": times, "compile_s": first_step_s, "version": torch.__version__}))


if __name__ == "__main__":
    main()
