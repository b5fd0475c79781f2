"""README and docs: every Python block runs, in the order of its page, and every table is what results/ says."""

import ast
import dataclasses
import importlib
import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import maml_jax
from experiments.reinforcement import options as reinforcement
from experiments.shared import command_line
from experiments.table import docs
from maml_jax import losses
from maml_jax.nets import models
from maml_jax.tasks import sinusoid
from maml_jax.tasks.cache import DataError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))

SHORTER = {
    "docs/quickstart.md": {"steps=2_000, steps_per_call=500": "steps=400, steps_per_call=200"},
    "docs/data.md": {"steps=1_000, steps_per_call=100": "steps=4, steps_per_call=2"},
}
"""Trainings that the tests make shorter. The README's runs as it stands."""


def blocks(page: str) -> list[str]:
    """The Python code of a page, that in tabs included."""
    text = (ROOT / page).read_text()
    for long, short in SHORTER.get(page, {}).items():
        assert long in text
        text = text.replace(long, short)
    return [
        textwrap.dedent(code) for _, code in re.findall(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    ]


def run(page: str) -> dict:
    """All blocks of a page share one scope."""
    scope: dict = {}
    for block in blocks(page):
        exec(compile(block, page, "exec"), scope)
    return scope


@pytest.fixture
def birds(tmp_path, monkeypatch):
    """Twenty classes of pictures in `data/birds`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pixels = np.random.default_rng(0)
    for kind in range(20):
        folder = tmp_path / "data" / "birds" / f"kind-{kind}"
        folder.mkdir(parents=True)
        for index in range(16):
            Image.fromarray(pixels.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(folder / f"{index}.png")


def test_readme_is_short_and_has_both_commands():
    assert len(README.splitlines()) < 200
    for command in ("pip install -e . && python -m experiments.sinusoid", "pip install -e '.[test]' && pytest"):
        assert f"```sh\n{command}\n```" in README


def test_the_readme_learns_and_its_check_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = run("README.md")
    assert scope["loss"].shape == (6,) and scope["loss"][0] > 2.5 and scope["loss"][5] < 0.5
    assert "The meta-gradient is exact." in capsys.readouterr().out


def test_the_quickstart_learns_and_its_check_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = run("docs/quickstart.md")
    loss = scope["evaluation"].loss.mean(0)
    assert loss[10] < 0.7 * loss[0] and scope["report"].exact


@pytest.mark.parametrize("page", ["docs/algorithms.md", "docs/dropout.md", "docs/reinforcement_learning.md"])
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


def test_a_folder_of_images_trains(tmp_path, monkeypatch, birds, capsys):
    monkeypatch.chdir(tmp_path)
    run("docs/data.md")
    assert "'classes': 13, 'images': 208" in capsys.readouterr().out
    (tmp_path / "data" / "birds" / "kind-3" / "7.png").unlink()
    with pytest.raises(DataError, match=r"Class kind-3 .* expected at least 16, found 15"):
        run("docs/data.md")


def test_every_page_with_code_is_run():
    tested = {"README.md", "docs/quickstart.md", "docs/runs.md"}
    tested |= {"docs/algorithms.md", "docs/data.md", "docs/dropout.md", "docs/reinforcement_learning.md"}
    assert {page for page in PAGES if blocks(page)} == tested


def test_a_killed_run_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for steps in (range(500, 3001, 500), [3000]):
        run("docs/runs.md")
        assert [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()] == list(steps)


@pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])
def test_a_recipe_can_be_meta_trained(library):
    import flax.linen as nn

    scope = {"jax": jax, "jnp": jnp, "nn": nn, "losses": losses, "maml_jax": maml_jax}
    name = {"linen": "nn.Sequential([nn.Dense(40), nn.relu", "nnx": "nnx.split", "equinox": "eqx.partition"}[library]
    recipe = next(block for block in blocks("README.md") if name in block)
    assert len(recipe.strip().splitlines()) <= 6
    exec(recipe, scope)
    learner = maml_jax.maml(scope["loss_fn"], maml_jax.sgd(0.01, steps=1), optax.adam(1e-2))
    state, step, curve = learner.init(scope["params"]), jax.jit(learner.step), []
    for index in range(150):
        state, info = step(state, sinusoid.draw_tasks(jax.random.key(index), 25, shots=10, queries=10))
        curve.append(float(info.loss))
    assert sum(curve[-20:]) < 0.9 * sum(curve[:20])


def test_padding_has_no_effect():
    block = next(block for block in blocks("docs/quickstart.md") if "def weighted_loss" in block)
    scope = {"jax": jax, "jnp": jnp}
    exec(block, scope)
    scope["apply"] = lambda slope, x: slope * x
    x, y = jax.random.normal(jax.random.key(0), (2, 4, 1))
    padded, weights = jnp.full((6, 1), 7.0), jnp.array([1.0, 1, 1, 1, 0, 0])
    loss = losses.mean_squared_error(scope["apply"])(0.5, (x, y))[0]
    batch = (padded.at[:4].set(x), padded.at[:4].set(y) + 3 * (weights == 0)[:, None], weights)
    assert jnp.allclose(scope["weighted_loss"](0.5, batch)[0], loss)


@pytest.mark.parametrize("page", ["README.md", "docs/algorithms.md"])
def test_expressions_in_tables_are_learners(page):
    scope = {name: getattr(maml_jax, name) for name in maml_jax.__all__} | {"models": models, "optax": optax}
    scope |= {"inner": maml_jax.sgd(0.1, steps=1), "outer": optax.sgd(0.1), "loss_fn": lambda params, batch: (0.0, {})}
    names = "sgd|maml|maml_plus_plus|unrolled|reptile|imaml|meta_curvature|no_adaptation"
    found = re.findall(rf"^\|.*?`((?:{names})\(.*?\))` \|", (ROOT / page).read_text(), re.MULTILINE)
    found = [expression for expression in found if "..." not in expression]
    assert len(found) >= 10
    for expression in found:
        ast.parse(expression)
        assert isinstance(eval(expression, scope), maml_jax.InnerLearner | maml_jax.MetaLearner)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_options_of_commands_exist(page):
    """Those of each `python -m experiments...` in a shell block."""
    shared = (command_line.Hosts, reinforcement.Config)
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        for name, rest in re.findall(r"python -m (experiments[\w.]+)([^\n]*)", block.replace("\\\n", " ")):
            found = [value for value in vars(importlib.import_module(name)).values() if dataclasses.is_dataclass(value)]
            known = {field.name for options in (*found, *shared) for field in dataclasses.fields(options)}
            options = {option.replace("-", "_") for option in re.findall(r"--([\w-]+)", rest)}
            assert options <= known, f"{name}: {options - known}"


@pytest.mark.parametrize("page", docs.PAGES)
def test_tables_are_what_the_results_say(page):
    text = (ROOT / page).read_text()
    assert docs.render(text, ROOT / "results") == text, "Run python -m experiments.table.docs."


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_a_table_have_as_many_cells_as_its_head(page):
    head = None
    for line in (ROOT / page).read_text().splitlines():
        cells = line.count(" |") if line.startswith("|") else None
        assert head is None or cells in (None, head), line
        head = cells


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_results_folder_that_a_page_names_exists():
    for page in PAGES:
        for name in re.findall(r"`results/([\w+./-]+)`", (ROOT / page).read_text()):
            assert (ROOT / "results" / name).exists(), f"{page}: results/{name}"
