"""Small few-shot runs on Omniglot."""

import functools

import jax
import jax.numpy as jnp

from experiments import omniglot
from experiments.few_shot import methods
from experiments.few_shot.run import DataSet
from maml_jax import losses
from maml_jax.nets import models
from maml_jax.runs import model_file
from maml_jax.tasks import episodes
from maml_jax.tasks import omniglot as data


@functools.cache
def characters(folder, cache):
    """Omniglot, with made-up hashes."""
    images = data.load(folder, cache)
    parts = [episodes.equal_classes(255 - images.images[part]) for part in data.split("paper", images.names)]
    return DataSet("Omniglot", *parts, dict.fromkeys(("train", "val", "test"), "0" * 64), {})


def small_run(tmp_path, **options):
    """A resolved run of the fully connected net, without rotations."""
    return omniglot.Run(**{"workdir": tmp_path / "run", "net": "mlp", "rotations": "none", **options}).resolved()


def initial(run, classes=None):
    """The learner of the run and its initial state."""
    net = methods.network(run, outputs=classes, training=True)
    learner = methods.learner(run, net, losses.cross_entropy(models.apply_params(net)))
    return learner, learner.init(net.init(jax.random.key(0), jnp.zeros((1, *run.image_shape)))["params"])


def save(path, run, data_set, state, step=1, selected_after=None):
    """A saved model as training writes it."""
    description = run.description(data_set) | {"step": step, "score": 0.5}
    if selected_after is not None:
        description["selected_after"] = selected_after
    return model_file.save(path, state.params, state.inner_params, description)
