# %% [markdown]
# # First and second order: time, memory, exactness
#
# The meta-gradient is the derivative of the query loss after adaptation, through the adaptation. First order treats the
# inner gradients as constants (Finn, Abbeel and Levine 2017, section 5.2). How much time and memory does first order
# save, and how far is its gradient from the exact gradient? This tutorial measures both on a small network and sine
# curves with many points. `python -m experiments.benchmark` measures the paper's settings.

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
# The network starts with small weights. Larger weights make the second derivatives visible.
params = jax.tree.map(lambda leaf: leaf * 20, params)

# %% [markdown]
# ## Time and memory
#
# The variants differ in `order` and in `remat`, which chooses what the forward pass keeps of the inner steps. The outer
# optimizer is gradient descent with rate 1, so the meta-gradient is the difference of the parameters.


# %%
def measure(steps, order, remat="none"):
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


variants = {
    "first order": {"order": 1},
    "second order": {"order": 2},
    "second order, remat='full'": {"order": 2, "remat": "full"},
    "second order, remat='mixflow'": {"order": 2, "remat": "mixflow"},
}
inner_steps = (1, 4, 16)
found = {name: [measure(steps, **variant) for steps in inner_steps] for name, variant in variants.items()}

figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, rows in found.items():
    for axes, quantity in zip(panels, ("milliseconds", "megabytes")):
        axes.plot(inner_steps, [row[quantity] for row in rows], "o-", label=name)
        axes.set(xlabel="inner steps", ylabel=quantity, xscale="log", yscale="log")
panels[0].legend()
plt.show()

# %% [markdown]
# ## Exactness
#
# All variants of second order give the same gradient up to rounding. First order gives another direction, and the angle
# grows with the inner steps.

# %%
for index, steps in enumerate(inner_steps):
    exact = found["second order"][index]["gradient"]
    print(f"{steps} inner steps")
    for name, rows in found.items():
        other = rows[index]["gradient"]
        cosine = exact @ other / np.linalg.norm(exact) / np.linalg.norm(other)
        difference = np.linalg.norm(other - exact) / np.linalg.norm(exact)
        print(f"    {name:29} cosine with second order {cosine:.6f}, relative difference {difference:.1e}")

# %% [markdown]
# `check_meta_gradient` compares the second-order meta-gradient with central differences of the meta-loss in float64.

# %%
report = maml_jax.check_meta_gradient(
    loss_fn, params, jax.tree.map(lambda leaf: leaf[:1], tasks), maml_jax.sgd(0.01, steps=2)
)
print(report)
