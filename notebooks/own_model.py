# %% [markdown]
# # Your own model, loss and data
#
# All sensors of one type respond to temperature alike, but each sensor has its own gain, offset and noise. A new sensor
# was calibrated at four temperatures. What will the sensor read at other temperatures, and how certain is the
# prediction? The data here are synthetic. The tutorial needs NumPy arrays, a loss and a model of any library.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import maml_jax
from maml_jax import Task

# %% [markdown]
# ## Data
#
# 300 sensors with 20 readings each, as loaded from a file: `[sensor, reading, 1]`.

# %%
random = np.random.default_rng(0)
temperature = random.uniform(-1, 1, (300, 20, 1)).astype(np.float32)
gain, offset, noise = (random.uniform(low, high, (300, 1, 1)) for low, high in ((0.5, 2), (-1, 1), (0.02, 0.1)))
reading = gain * np.tanh(2 * temperature) + offset + noise * random.standard_normal(temperature.shape)
data = {"x": jnp.asarray(temperature), "y": jnp.asarray(reading, jnp.float32)}
known, new = (jax.tree.map(lambda leaf, part=part: leaf[part], data) for part in (slice(0, 250), slice(250, 300)))

# %% [markdown]
# `draw` samples a meta-batch on the device: 16 sensors, each with four support and twelve query readings.


# %%
def episodes(data, sensors, key):
    def one_sensor(sensor, key):
        order = jax.random.permutation(key, data["x"].shape[1])
        x, y = data["x"][sensor][order], data["y"][sensor][order]
        return Task((x[:4], y[:4]), (x[4:16], y[4:16]))

    return jax.vmap(one_sensor)(sensors, jax.random.split(key, len(sensors)))


def draw(data, step):
    chosen, key = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
    return episodes(data, jax.random.choice(chosen, data["x"].shape[0], (16,), replace=False), key)


# %% [markdown]
# ## Your own loss
#
# The model predicts a mean and the logarithm of a standard deviation. The loss is the negative log-likelihood. The
# second output of the loss holds metrics, here the squared error.


# %%
def likelihood(apply):
    def loss_fn(params, batch):
        x, y = batch
        mean, spread = jnp.split(apply(params, x), 2, -1)
        log_deviation = 2 * jnp.tanh(spread) - 1  # Bounded, because a few points that fit by chance would dominate.
        error = jnp.square(mean - y)
        loss = jnp.mean(0.5 * error * jnp.exp(-2 * log_deviation) + log_deviation)
        return loss, {"squared_error": jnp.mean(error)}

    return loss_fn


# %% [markdown]
# ## The same model in linen and in nnx
#
# The library takes any pytree of parameters and any function of it.

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
# Check the meta-gradient of this loss before training.

# %%
inner = maml_jax.sgd(0.02, steps=3, learn_rates="layer")
report = maml_jax.check_meta_gradient(*settings["linen"], episodes(known, jnp.arange(2), jax.random.key(1)), inner)
print(report)

# %% [markdown]
# ## Train, and evaluate on new sensors
#
# The inner learner has one learned rate for each array of parameters. The outer optimizer clips the meta-gradient,
# because the gradient of a likelihood can be large.

# %%
results = {}
for library, (loss_fn, params) in settings.items():
    learner = maml_jax.maml(loss_fn, inner, optax.chain(optax.clip_by_global_norm(10.0), optax.adam(1e-3)))
    for state, _ in maml_jax.train(learner, learner.init(params), draw, known, steps=2_000, steps_per_call=500):
        pass
    tasks = episodes(new, jnp.arange(50), jax.random.key(2))
    evaluation = jax.jit(learner.evaluate)(state, tasks)
    results[library] = np.sqrt(np.mean(evaluation.aux["squared_error"], 0))
    print(f"{library}: error on new sensors after 0 to 3 steps: {results[library].round(3)}")
