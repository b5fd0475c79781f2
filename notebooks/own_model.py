# %% [markdown]
# # Your own model, loss and data
#
# Sensors of one make all answer to temperature alike, but each has a gain, an offset and a noise of its own. A new one
# has been calibrated at four temperatures: what will it read at others, and how sure is that? The data here are made
# up; what matters is that nothing but NumPy arrays, a loss of one's own and a model of any library is needed.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import maml_jax
from maml_jax import Task
from maml_jax.training import train

# %% [markdown]
# ## Data
#
# Readings of 300 sensors, 20 each, as one would load them from a file: `[sensor, reading, 1]`.

# %%
random = np.random.default_rng(0)
temperature = random.uniform(-1, 1, (300, 20, 1)).astype(np.float32)
gain, offset, noise = (random.uniform(low, high, (300, 1, 1)) for low, high in ((0.5, 2), (-1, 1), (0.02, 0.1)))
reading = gain * np.tanh(2 * temperature) + offset + noise * random.standard_normal(temperature.shape)
data = {"x": jnp.asarray(temperature), "y": jnp.asarray(reading, jnp.float32)}
known, new = (jax.tree.map(lambda leaf, part=part: leaf[part], data) for part in (slice(0, 250), slice(250, 300)))

# %% [markdown]
# A meta-batch is drawn on the device: 16 sensors, four readings of each to adapt to, and twelve to be judged by.


# %%
def episodes(data, sensors, key):
    def of_sensor(sensor, key):
        order = jax.random.permutation(key, data["x"].shape[1])
        x, y = data["x"][sensor][order], data["y"][sensor][order]
        return Task((x[:4], y[:4]), (x[4:16], y[4:16]))

    return jax.vmap(of_sensor)(sensors, jax.random.split(key, len(sensors)))


def draw(data, step):
    chosen, key = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
    return episodes(data, jax.random.choice(chosen, data["x"].shape[0], (16,), replace=False), key)


# %% [markdown]
# ## A loss of one's own
#
# The model says a mean and the logarithm of a standard deviation, and the loss is the negative log-likelihood. What is
# reported beside it, here the squared error, may be any arrays.


# %%
def likelihood(apply):
    def loss_fn(params, batch):
        x, y = batch
        mean, spread = jnp.split(apply(params, x), 2, -1)
        log_deviation = 2 * jnp.tanh(spread) - 1  # Bounded, or a few points that fit by chance run away with it.
        error = jnp.square(mean - y)
        loss = jnp.mean(0.5 * error * jnp.exp(-2 * log_deviation) + log_deviation)
        return loss, {"squared_error": jnp.mean(error)}

    return loss_fn


# %% [markdown]
# ## A model of linen, and the same one of nnx
#
# The core takes any pytree of parameters, and any function of them.

# %%
linen_net = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(32), nn.tanh, nn.Dense(2)])
linen_params = linen_net.init(jax.random.key(0), jnp.zeros((1, 1)))["params"]

rngs = nnx.Rngs(0)
nnx_net = nnx.Sequential(
    nnx.Linear(1, 32, rngs=rngs), nnx.tanh, nnx.Linear(32, 32, rngs=rngs), nnx.tanh, nnx.Linear(32, 2, rngs=rngs)
)
graph, nnx_params, rest = nnx.split(nnx_net, nnx.Param, ...)

settings = {
    "linen": (likelihood(lambda params, x: linen_net.apply({"params": params}, x)), linen_params),
    "nnx": (likelihood(lambda params, x: nnx.merge(graph, params, rest)(x)), nnx_params),
}

# %% [markdown]
# Before anything is trained: is the meta-gradient of this loss what it should be?

# %%
inner = maml_jax.sgd(0.02, steps=3, learn_rates="layer")
report = maml_jax.check_meta_gradient(*settings["linen"], episodes(known, jnp.arange(2), jax.random.key(1)), inner)
print(report)

# %% [markdown]
# ## Training, and sensors that are new
#
# With a learned rate for every array of parameters. The outer gradient is clipped: a likelihood can be steep.

# %%
results = {}
for library, (loss_fn, params) in settings.items():
    learner = maml_jax.maml(loss_fn, inner, optax.chain(optax.clip_by_global_norm(10.0), optax.adam(1e-3)))
    for state, _ in train(learner, learner.init(params), draw, known, steps=2_000, steps_per_call=500):
        pass
    tasks = episodes(new, jnp.arange(50), jax.random.key(2))
    evaluation = jax.jit(learner.evaluate)(state, tasks)
    results[library] = np.sqrt(np.mean(evaluation.aux["squared_error"], 0))
    print(f"{library}: error on new sensors after 0 to 3 steps: {results[library].round(3)}")
