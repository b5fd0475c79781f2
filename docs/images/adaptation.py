"""Draws adaptation.png: one sine curve from five points, before and after adaptation.

    python docs/images/adaptation.py

Trains the model of the quickstart for 20,000 meta-steps, about a minute on a CPU.
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import optax

import maml_jax
from maml_jax.tasks import sinusoid

matplotlib.use("Agg")

net = nn.Sequential([nn.Dense(40), nn.tanh, nn.Dense(40), nn.tanh, nn.Dense(1)])
params = net.init(jax.random.key(0), jnp.zeros((1, 1)))["params"]


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((net.apply({"params": params}, x) - y) ** 2), {}


def draw(key, step):
    return sinusoid.draw_tasks(jax.random.fold_in(key, step), 25, shots=5, queries=10)


outer = optax.adam(optax.cosine_decay_schedule(5e-3, 20_000))
learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.02, steps=5), outer)
for state, metrics in maml_jax.train(
    learner, learner.init(params), draw, jax.random.key(1), steps=20_000, steps_per_call=2_000
):
    print(metrics["step"], metrics["loss"], flush=True)

curve = sinusoid.Curves(jnp.array([3.2]), jnp.array([1.1]))
x = jnp.linspace(*sinusoid.INPUTS, 200)[:, None]
points = jnp.array([-4.3, -2.2, -0.4, 1.7, 3.9])[:, None]
support = (points, curve(points)[0])

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
axes.plot(x, curve(x)[0], "k", lw=1.5, label="new curve")
axes.plot(*support, "k^", ms=8, label="its 5 support points")
for steps, style, colour in ((0, ":", "C7"), (1, "--", "C0"), (5, "-", "C3")):
    adapted, _ = learner.adapt(state, support, steps)
    error = jnp.mean((net.apply({"params": adapted}, x) - curve(x)[0]) ** 2)
    label = {0: "before adaptation", 1: "after 1 gradient step"}.get(steps, f"after {steps} gradient steps")
    axes.plot(x, net.apply({"params": adapted}, x), style, color=colour, lw=2, label=f"{label}: error {error:.2f}")
axes.set(xlabel="x", ylabel="y", xlim=sinusoid.INPUTS)
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(Path(__file__).with_name("adaptation.png"), dpi=110)
