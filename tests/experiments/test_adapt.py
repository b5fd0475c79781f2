"""A saved model classifies the pictures of a folder. A folder with a wrong layout raises."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import adapt, miniimagenet
from experiments.few_shot import methods, testing
from experiments.few_shot.run import DataSet
from maml_jax.nets import models
from maml_jax.runs import model_file

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 210)}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """An untrained net with a head from prototypes: its random features distinguish colours."""
    return untrained(tmp_path, monkeypatch, "layer")


def untrained(tmp_path, monkeypatch, normalisation):
    monkeypatch.setattr(methods, "HIDDEN", (32,))
    run = miniimagenet.Run(method="prototypes", net="mlp", normalisation=normalisation, size=8, inner_rate=0.01)
    run = run.resolved()
    params = methods.network(run).init(jax.random.key(0), jnp.zeros((1, *run.image_shape)))["params"]
    description = run.description(DataSet("made up", None, None, None, {}, {})) | {"step": 1}
    return model_file.save(tmp_path / "model.msgpack", params, (), description)


def paint(path, colour, seed):
    noise = np.random.default_rng(seed).integers(-20, 20, (12, 10, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for name, colour in COLOURS.items():
        for number in range(2):
            paint(tmp_path / "pictures" / name / f"{number}.png", colour, number)
        paint(tmp_path / "pictures" / f"a {name} one.png", colour, 9)
    return tmp_path / "pictures"


def test_pictures_are_classified_and_shown(model, folder, tmp_path, capsys):
    output = tmp_path / "found.json"
    adapt.main(adapt.prepare(adapt.Config(model, folder, steps=3, output=output)))
    found = json.loads(output.read_text())
    assert {each["picture"]: each["class"] for each in found} == {f"a {name} one.png": name for name in COLOURS}
    for each in found:
        assert each["confidence"] == max(each["probabilities"].values()) > 1 / 3
        assert sum(each["probabilities"].values()) == pytest.approx(1)
    assert "a red one.png: red (" in capsys.readouterr().out
    with Image.open(output.with_suffix(".png")) as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_predictions_do_not_depend_on_the_other_pictures(folder, tmp_path, monkeypatch):
    """The model was trained with batch normalisation."""
    path = untrained(tmp_path, monkeypatch, "batch")
    options = {"steps": 3, "output": tmp_path / "found.json"}
    together = adapt.main(adapt.prepare(adapt.Config(path, folder, **options)))
    assert all(f"a {each['class']} one.png" == each["picture"] for each in together)
    for each in together[1:]:
        (folder / each["picture"]).unlink()
    (alone,) = adapt.main(adapt.prepare(adapt.Config(path, folder, **options)))
    assert alone["class"] == together[0]["class"]
    np.testing.assert_allclose(alone["confidence"], together[0]["confidence"], rtol=1e-4)


def test_pictures_are_resized_as_in_training(model, folder, monkeypatch):
    content = model_file.load(model)
    about = content.description["config"] | {"resampling": "box"}
    model_file.save(model, content.params, (), content.description | {"config": about})
    used, pictures = [], adapt.images.pictures

    def watched(*args, **options):
        used.append(options["resampling"])
        return pictures(*args, **options)

    monkeypatch.setattr(adapt.images, "pictures", watched)
    adapt.prepare(adapt.Config(model, folder))
    assert used == ["box"]


def test_damaged_pictures_and_deep_folders_do_not_stop_the_rest(model, folder, tmp_path, capsys):
    """Pictures in deeper folders belong to the class, pictures in `unlabelled` are classified."""
    paint(folder / "red" / "2024" / "june" / "x.png", COLOURS["red"], 3)
    paint(folder / "unlabelled" / "blue.png", COLOURS["blue"], 4)
    (folder / "green" / "broken.png").write_bytes(b"x")
    (folder / "broken.png").write_bytes(b"x")
    (folder / "green" / "2.HEIC").write_bytes(b"x")
    with open(os.fsencode(folder) + b"/\xe9.png", "wb") as file:
        file.write((folder / "a red one.png").read_bytes())
    output = tmp_path / "found.json"
    prepared = adapt.prepare(adapt.Config(model, folder, steps=3, output=output))
    assert {name: len(pictures) for name, pictures in prepared.labelled.items()} == {"blue": 2, "green": 2, "red": 3}
    adapt.main(prepared)
    found = {each["picture"]: each["class"] for each in json.loads(output.read_text())}
    assert found == {
        **{f"a {name} one.png": name for name in COLOURS},
        "unlabelled/blue.png": "blue",
        "\\udce9.png": "red",
    }
    note = capsys.readouterr().err
    assert "1 not of a type that is read (green/2.HEIC)" in note and "BytesIO" not in note
    assert "The image broken.png in" in note and "The image green/broken.png in" in note


def test_the_default_of_steps_is_that_of_the_selection(model, folder):
    assert adapt.prepare(adapt.Config(model, folder)).steps == 10
    content = model_file.load(model)
    model_file.save(model, content.params, (), content.description | {"selected_after": 3})
    assert adapt.prepare(adapt.Config(model, folder)).steps == 3
    assert adapt.prepare(adapt.Config(model, folder, steps=0)).steps == 0


def test_a_wrong_layout_or_output_raises(model, folder, tmp_path):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            adapt.prepare(adapt.Config(**{"model": model, "folder": folder, **options}))

    refused("output must be in a directory that exists", output=tmp_path / "nowhere" / "out.json")
    refused("output must be the path of a JSON file, but got", output=tmp_path / "out.png")
    (folder / "owl").mkdir()
    (folder / "owl" / "0.HEIC").write_bytes(b"x")
    refused("no picture can be read in owl. Convert the pictures to PNG or JPEG")
    (folder / "owl" / "1.png").write_bytes(b"broken")
    refused("no picture can be read in owl")
    shutil.rmtree(folder / "owl")
    for number in range(3):
        paint(folder / f"more {number}" / "x.png", (0, 0, 0), 0)
    refused("must hold 2 to 5 folders of labelled pictures, but has 6: blue, green")
    for path in folder.glob("*.png"):
        path.unlink()
    for number in range(3):
        (folder / f"more {number}" / "x.png").unlink()
    refused("There are no pictures to classify")


def test_drawings_are_inverted_as_in_training(tmp_path, monkeypatch):
    """A model of characters gets 1 for ink and 0 for paper."""
    net = models.ConvNet(5)
    prepared = adapt.Prepared(
        adapt.Config(tmp_path, tmp_path),
        None,
        None,
        {"a": [np.full((28, 28), 255, np.uint8)], "b": [np.zeros((28, 28), np.uint8)]},
        {"x": np.full((28, 28), 255, np.uint8)},
        steps=2,
    )
    seen = []

    def predictor(run, state, steps):
        assert steps == 2

        def predict(tasks):
            seen.append(tasks)
            return jnp.zeros((1, steps + 1, 1, net.ways)), None

        return predict

    monkeypatch.setattr(testing, "predictor", predictor)
    adapt.predict(prepared)
    images, labels = seen[0].support
    assert images.shape == (1, 2, 28, 28, 1) and images[0, 0].max() == 0 and images[0, 1].min() == 1
    assert labels.tolist() == [[0, 1]]
