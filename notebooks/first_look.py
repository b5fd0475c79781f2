# %% [markdown]
# # A first look: fit a sine curve from five points
#
# Each task is a sine curve with its own amplitude and phase (Finn, Abbeel and Levine 2017, section 5.1). Meta-training
# finds parameters from which one gradient step on a few points of a new curve fits the curve well.
#
# This file is a notebook for Jupyter (with jupytext) and VS Code. It also runs as a script.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import maml_jax
from maml_jax import losses
from maml_jax.nets import models
from maml_jax.tasks import sinusoid

# %% [markdown]
# A **loss** is a function of the parameters and one batch. The network is the paper's: two hidden layers of 40 units.

# %%
net = models.MLP((40, 40), 1)
apply = models.apply_params(net)
loss_fn = losses.mean_squared_error(apply)
params = net.init(jax.random.key(0), jnp.zeros((1, 1)))["params"]

# %% [markdown]
# A **meta-learner** combines a loss, an inner learner and an outer optimizer. A **task** has a support set, which the
# inner loop adapts to, and a query set, which measures the adapted parameters. `draw` samples 25 new curves for each
# meta-step, from a key and the number of the meta-step. `train` calls `draw` inside the compiled program.

# %%
learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.01, steps=1), optax.adam(1e-3))


def draw(key, step):
    return sinusoid.draw_tasks(jax.random.fold_in(key, step), 25, shots=10, queries=10)


curve = []
for state, metrics in maml_jax.train(
    learner, learner.init(params), draw, jax.random.key(1), steps=15_000, steps_per_call=500
):
    curve.append((metrics["step"], metrics["loss"]))

plt.plot(*np.transpose(curve))
plt.xlabel("meta-steps")
plt.ylabel("mean squared error after one step")
plt.show()

# %% [markdown]
# Evaluate on 600 new curves with five points each: the error before adaptation and after each of ten steps.

# %%
tasks = sinusoid.draw_tasks(jax.random.key(2), 600, shots=5, queries=100)
evaluation = jax.jit(learner.evaluate, static_argnums=2)(state, tasks, 10)
error = np.median(evaluation.loss, 0)
print("median error after 0, 1, 5 and 10 steps:", error[[0, 1, 5, 10]].round(3))

# %% [markdown]
# Plot one of the curves before and after adaptation.

# %%
x = jnp.linspace(-5, 5, 200)[:, None]
one = jax.tree.map(lambda leaf: leaf[0], tasks)
order = jnp.argsort(one.query[0][:, 0])
plt.plot(one.query[0][order], one.query[1][order], "r", label="the curve")
plt.plot(*one.support, "^", label="five support points")
for steps, style in ((0, ":"), (1, "--"), (10, "-")):
    adapted, _ = learner.adapt(state, one.support, steps)
    plt.plot(x, apply(adapted, x), f"g{style}", label=f"after {steps} steps")
plt.legend()
plt.show()
