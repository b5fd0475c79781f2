"""Forms of JSON files: all entries that differ are named."""

from pathlib import Path

import pytest

from maml_jax.runs.files import WorkdirError, read_json
from maml_jax.runs.forms import ABSENT, check_form

FORM = {"a": int, "b?": float | None, "c": [{"d": str}], "e": {"f": int, "*": [bool]}, "g?": {"*": ABSENT}}
RIGHT = {"a": 1, "b": 2, "c": [{"d": ""}], "e": {"f": 1, "h": [True]}, "more": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"b": None, "g": {}}, None),
        ({"a": True}, "a must be an integer, but is True"),
        ({"a": 1.0, "b": "x"}, "a must be an integer, but is 1.0; b must be a number or null, but is 'x'"),
        ({"c": []}, "c must be a list with entries, but is []"),
        ({"c": {}}, "c must be a list with entries, but is {}"),
        ({"c": [{"d": ""}, {}, 5]}, "c[1].d is missing; c[2] must be an object, but is 5"),
        ({"e": {"f": 1, "h": [1]}}, "e.h[0] must be True or False, but is 1"),
        ({"e": {}}, "e.f is missing"),
        ({"g": {"h": 1}}, "g.h is unknown"),
        ({"a": "x" * 100}, f"a must be an integer, but is '{'x' * 59}..."),
    ],
)
def test_the_message_names_every_entry_that_differs(change, message):
    if message is None:
        return check_form(Path("file"), RIGHT | change, FORM)
    with pytest.raises(WorkdirError) as error:
        check_form(Path("file"), RIGHT | change, FORM)
    assert str(error.value) == f"file has another form: {message}. Restore the file, or move it away."


def test_a_file_that_is_nested_too_deep_cannot_be_read(tmp_path):
    (tmp_path / "file").write_text("[" * 100_000)
    with pytest.raises(WorkdirError, match="file cannot be read: "):
        read_json(tmp_path / "file")
