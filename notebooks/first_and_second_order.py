# %% [markdown]
# # First against second order: time, memory, exactness
#
# The meta-gradient is the derivative of the query loss after adaptation, through the adaptation. First order leaves out
# that the inner gradients depend on where they were taken (Finn, Abbeel and Levine 2017, section 5.2). What does it
# save, and what does it lose? On a small net that is given many points of sine curves; `python -m
# experiments.benchmark` measures the paper's settings, with more care.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import maml_jax
from maml_jax import losses
from maml_jax.nets import models
from maml_jax.tasks import sinusoid

# %%
net = models.MLP((64, 64, 64), 1)
loss_fn = losses.mean_squared_error(models.apply_params(net))
tasks = sinusoid.draw_tasks(jax.random.key(1), 4, shots=1000, queries=1000)
params = net.init(jax.random.key(0), tasks.support[0][0])["params"]
# The net begins with small weights; larger ones, so that there is something to see in its derivatives.
params = jax.tree.map(lambda leaf: leaf * 20, params)

# %% [markdown]
# ## Time and memory
#
# `order` is all that differs, and for second order `remat`: what is kept of the inner steps. Outer gradient
# descent at rate 1 lets the meta-gradient be read off as the difference of the parameters.


# %%
def measured(steps, order, remat="none"):
    inner = maml_jax.sgd(0.01, steps=steps, order=order, remat=remat)
    learner = maml_jax.maml(loss_fn, inner, optax.sgd(1.0))
    state = learner.init(params)
    step = jax.jit(learner.step).lower(state, tasks).compile()
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        after, _ = jax.block_until_ready(step(state, tasks))
        seconds.append(time.perf_counter() - start)
    memory = step.memory_analysis()
    gradient = jax.tree.map(jnp.subtract, state.params, after.params)
    return {
        "milliseconds": 1e3 * np.median(seconds[1:]),
        "megabytes": memory.temp_size_in_bytes / 1e6 if memory else np.nan,
        "gradient": np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)]),
    }


ways = {
    "first order": {"order": 1},
    "second order": {"order": 2},
    "second order, 'full'": {"order": 2, "remat": "full"},
    "second order, 'mixflow'": {"order": 2, "remat": "mixflow"},
}
inner_steps = (1, 4, 16)
found = {name: [measured(steps, **way) for steps in inner_steps] for name, way in ways.items()}

figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, rows in found.items():
    for axes, what in zip(panels, ("milliseconds", "megabytes")):
        axes.plot(inner_steps, [row[what] for row in rows], "o-", label=name)
        axes.set(xlabel="inner steps", ylabel=what, xscale="log", yscale="log")
panels[0].legend()
plt.show()

# %% [markdown]
# ## Exactness
#
# All ways to compute second order are one number, up to rounding. First order is another direction, and the more so the
# more inner steps there are.

# %%
for index, steps in enumerate(inner_steps):
    exact = found["second order"][index]["gradient"]
    print(f"{steps} inner steps")
    for name, rows in found.items():
        other = rows[index]["gradient"]
        cosine = exact @ other / np.linalg.norm(exact) / np.linalg.norm(other)
        difference = np.linalg.norm(other - exact) / np.linalg.norm(exact)
        print(f"    {name:22} cosine with the exact one {cosine:.6f}, relative difference {difference:.1e}")

# %% [markdown]
# Is 'second order' itself right? Against differences of the meta-loss in float64:

# %%
report = maml_jax.check_meta_gradient(
    loss_fn, params, jax.tree.map(lambda leaf: leaf[:1], tasks), maml_jax.sgd(0.01, steps=2)
)
print(report)
