"""Standard streams that are closed, full or of another encoding do not end a command."""

import io
import os
import subprocess
import sys

import pytest
from helpers.commands import ROOT

from experiments.shared.streams import Tolerant

COMMAND = """
import dataclasses, sys
from pathlib import Path
from experiments.shared import command_line
from maml_jax.runs.progress import Progress

@dataclasses.dataclass
class Config:
    path: Path

def experiment(config):
    progress = Progress(2, "name")
    for step in (1, 2):
        progress.update(step)
        print("text" * 5000, flush=True)
        print("text", file=sys.stderr)
    config.path.write_text("done")

command_line.run(Config, lambda config: config, experiment)
"""


@pytest.mark.parametrize("redirection", [">/dev/full 2>/dev/full", ">&- 2>&-"])
def test_a_command_runs_to_its_end(redirection, tmp_path):
    done = tmp_path / "done"
    command = f'exec "$0" -c "$1" --path "$2" {redirection}'
    ended = subprocess.run(
        ["bash", "-c", command, sys.executable, COMMAND, done], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert ended.returncode == 0 and done.read_text() == "done"


def test_text_is_kept_until_the_stream_can_be_written():
    reading, writing = os.pipe()
    with open("/dev/full", "w") as full:
        stream = Tolerant(full)
        print("text", file=stream, flush=True)
        os.dup2(writing, full.fileno())
        print("more", file=stream, flush=True)
        os.close(writing)
    with open(reading) as file:
        assert file.read() == "text\nmore\n"


def test_only_standard_output_ends_a_command_whose_reader_has_gone():
    class Broken(io.StringIO):
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError

    Tolerant(Broken()).write("text")
    with pytest.raises(BrokenPipeError):
        Tolerant(Broken(), ends=True).write("text")


def test_names_that_are_not_utf_8_are_escaped():
    content = io.BytesIO()
    with io.TextIOWrapper(content, encoding="utf-8") as stream:
        print(os.fsdecode(b"caf\xe9"), file=Tolerant(stream), flush=True)
        assert content.getvalue() == b"caf\\udce9\n"
