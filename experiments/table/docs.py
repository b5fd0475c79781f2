"""Writes the tables of README.md and docs/ from results/.

    python -m experiments.table.docs

A table stands in a page between the comments `<!-- NAME: begin -->` and `<!-- NAME: end -->`; `REGIONS` lists the
names.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from experiments.shared import command_line
from experiments.table import few_shot, page, reinforcement, speed

PAGES = ("README.md", "docs/results.md", "docs/performance.md")


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes the tables of README.md and docs/."""

    results: Path = Path("results")
    """Folder of run directories, each with a results.json."""
    root: Path = Path(".")
    """Folder of README.md and docs/."""


def paper(results: Path) -> str:
    """Our results beside the paper's, one row for each experiment of the paper."""
    rows = few_shot.paper(results) + reinforcement.paper(results)
    return page.table(("experiment", "measure", "ours", "paper", "training"), rows)


REGIONS: dict[str, Callable[[Path], str]] = {
    "paper": paper,
    "sine curves": few_shot.sine_curves,
    "few-shot": few_shot.accuracies,
    "normalisation": few_shot.normalisation,
    "fast recipe": few_shot.fast_recipe,
    "recipe probes": few_shot.recipe_probes,
    "protocols": few_shot.protocols,
    "runs": few_shot.runs,
    "returns": reinforcement.all_returns,
    "rl runs": reinforcement.runs,
    "speed": speed.speed,
    "peers": speed.peers,
    "limits": speed.limits,
    "gpu": speed.gpu,
    "breakdown": speed.breakdown,
    "memory": speed.memory,
    "rl speed": speed.reinforcement,
}
"""Name of a region -> its content, from the folder of results."""


def render(text: str, results: Path) -> str:
    """Returns the text of a page with new contents in all regions.

    Raises:
      ValueError: if a region of the page has an unknown name or no end.
    """
    names = re.findall(r"<!-- ([\w -]+): begin -->", text)
    for name in names:
        if name not in REGIONS:
            raise ValueError(f"There is no region {name!r}; the regions are {', '.join(REGIONS)}.")
        content = f"\n{REGIONS[name](results).strip()}\n\n"
        text = page.with_region(text, content, f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->")
    return text


def prepare(config: Config) -> Config:
    """Checks the paths. Raises ValueError if the folder of results or a page does not exist."""
    for path in (config.results, *(config.root / name for name in PAGES)):
        if not path.exists():
            raise ValueError(f"{path} does not exist. Run the command in the folder of the README, or give --root.")
    return config


def main(config: Config) -> None:
    """Writes all pages."""
    for name in PAGES:
        path = config.root / name
        path.write_text(render(path.read_text("utf-8"), config.results), encoding="utf-8")
        print(f"Wrote {path}.")


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
