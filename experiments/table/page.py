"""The table of all rows as one self-contained HTML file, and as Markdown."""

import base64
import io
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from experiments.shared import plots
from experiments.table.compare import Group, Line, Number, Paired, Run, hours, over_starts
from experiments.table.rows import METHODS, Published

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #6a6a6a; --card: #8881; }
@media (prefers-color-scheme: dark) { :root { --soft: #a8a8a8; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .5rem; border-bottom: 1px solid var(--line); }
td b { font-size: 1.1rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
small { color: var(--soft); display: block; overflow-wrap: anywhere; line-height: 1.35; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
code { overflow-wrap: anywhere; }
details { margin: .5rem 0; }
@media (max-width: 46rem) {
  thead { display: none; }
  tr { display: block; background: var(--card); border-radius: 6px; margin: .7rem 0; padding: .3rem; }
  td { display: block; border: 0; padding: .25rem .5rem; }
  td[data-name]::before { content: attr(data-name); color: var(--soft); font-size: .8rem; display: block; }
}
"""

LEGEND = (
    "Accuracy on test tasks of held-out classes, in per cent, with the 95% interval over tasks, after the inner steps "
    "of the published protocol. Several seeds: mean and range."
)


def interval(number: Number | Published) -> str:
    """Formats accuracy and half width. A published accuracy keeps the published digits."""
    digits = ".2f" if isinstance(number, Number) else "g"
    half_width = "" if number.half_width is None else f" ± {number.half_width:{digits}}"
    return f"{number.accuracy:{digits}}{half_width}"


def over_seeds(numbers: Sequence[Number]) -> str:
    """Formats the accuracy of one seed, or the mean and range of several seeds."""
    if len(numbers) == 1:
        return interval(numbers[0])
    found = [number.accuracy for number in numbers]
    return f"{sum(found) / len(found):.2f} ({min(found):.2f} to {max(found):.2f}, {len(found)} seeds)"


def short(groups: Sequence[Group]) -> list[str]:
    """Lists the rows that have no result of the full schedule, with their meta-steps so far."""
    lines = [line for group in groups for line in _longest(group)]
    return [f"{line.row.name}: {_so_far(line)}" for line in lines if line.steps < line.row.steps]


def _schedules(pair: Paired) -> str:
    steps = dict.fromkeys((f"{pair.first.steps:,}", f"{pair.second.steps:,}"))
    return " and ".join(steps)


def _longest(group: Group) -> list[Line]:
    """Returns the line with the longest schedule of each row."""
    return list({line.row.name: line for line in reversed(group.lines)}.values())[::-1]


def _so_far(line: Line) -> str:
    schedule = f"{line.row.steps:,} meta-steps"
    if line.runs:
        further = f", in training, {line.trained:,}" if line.trained > line.steps else ""
        return f"{line.steps:,} of {schedule}{further}"
    return f"in training, {line.trained:,} of {schedule}" if line.trained else f"not started, {schedule}"


# HTML


def head(title: str) -> str:
    """Returns the HTML of a page up to the start of its body."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
    )


def html(groups: Sequence[Group], without_row: Sequence[Run]) -> str:
    """Returns the HTML page.

    Args:
      groups: from `compare.group`.
      without_row: runs that belong to no row of the table, which are listed at the end.
    """
    lines = [line for group in groups for line in _longest(group)]
    evaluated = [line for line in lines if line.runs]
    full = [line for line in evaluated if line.steps >= line.row.steps]
    shorter, missing = len(evaluated) - len(full), len(lines) - len(evaluated)
    summary = f"{len(lines)} rows: {len(full)} with the full schedule, {shorter} with a shorter schedule, "
    summary += f"{missing} without a result."
    parts = [
        head("maml_jax: reproduction"),
        f"<h1>Few-shot classification, reproduced</h1><p>{summary} {LEGEND}</p>",
        *map(_section, groups),
    ]
    if unfinished := short(groups):
        listed = "".join(f"<li>{escape(each)}</li>" for each in unfinished)
        parts.append(f"<h2>Rows without the full schedule</h2><ul>{listed}</ul>")
    if without_row:
        commands = {run.path: _command(run) for run in without_row}
        listed = "".join(
            f"<li><code>{escape(str(path))}</code>: {escape(each)}</li>" for path, each in commands.items()
        )
        parts.append(f"<h2>Runs that belong to no row of the table</h2><ul>{listed}</ul>")
    return "\n".join([*parts, "</body></html>\n"])


def _section(group: Group) -> str:
    parts = [f"<section><h2>{escape(group.title)}</h2>"]
    names = "".join(f"<th>{name}</th>" for name in ("method", "ours", "published", "cost"))
    body = "".join(map(_line, group.lines))
    for method, number in group.others.items():
        body += f"<tr><td>{escape(METHODS[method])}</td><td></td>{_published(number)}<td></td></tr>"
    parts.append(f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>")
    if group.paired:
        parts.append("<h3>Differences on the same tasks, paired bootstrap, 95%</h3><ul>")
        for pair in group.paired:
            name = f"{pair.first.title} minus {pair.second.title}, seed {pair.seed}, {_schedules(pair)} meta-steps"
            parts.append(f"<li>{escape(name)}: <b>{escape(str(pair.difference))}</b></li>")
        parts.append("</ul>")
    if any(line.runs for line in group.lines):
        parts.append(image(curves(group), f"{group.title}: accuracy over inner steps"))
    for path in dict.fromkeys(run.path / "curves.png" for line in group.lines for run in line.runs):
        if path.exists():
            picture = image(path.read_bytes(), f"training of {path.parent.name}")
            parts.append(f"<details><summary>{escape(path.parent.name)}: training</summary>{picture}</details>")
    return "\n".join([*parts, "</section>"])


def _line(line: Line) -> str:
    ours = []
    for name, numbers in (("", line.numbers()), ("inductive: ", line.inductive())):
        if numbers:
            ours.append(f"<div>{name}<b>{escape(over_seeds(numbers))}</b></div>")
        for number in numbers:
            seed = f"seed {number.seed}: {interval(number)}; " if len(numbers) > 1 else ""
            text = f"{seed}after {number.inner_steps} inner steps; {number.protocol}"
            ours.append(f"<small>{escape(text)}</small>")
    cost = [f"<div>{escape(_so_far(line))}</div>"]
    for run in line.runs:
        cost.append(f"<small>{escape(f'{run.path.name}: {run.cost(line.label)}')}</small>")
    return (
        f"<tr><td><b>{escape(line.title)}</b><small>{escape(line.row.name)}</small></td>"
        f'<td data-name="ours">{"".join(ours)}</td>{_published(line.published)}'
        f'<td data-name="cost">{"".join(cost)}</td></tr>'
    )


def _published(number: Published | None) -> str:
    if number is None:
        return "<td></td>"
    return f'<td data-name="published"><b>{interval(number)}</b><small>{escape(number.source)}</small></td>'


def curves(group: Group) -> bytes:
    """PNG of the accuracy over inner steps, with a line for each method that has a result."""
    lines = [line for line in group.lines if line.runs]
    several = len({line.data for line in lines}) > 1
    shown = {}
    for line in lines:
        data = f" on {line.data}" if several else ""
        seeds = f", {len(line.runs)} seeds" if len(line.runs) > 1 else ""
        shown[f"{line.title}{data}, {line.steps:,} meta-steps{seeds}"] = line.curve()
    target = io.BytesIO()
    plots.inner_steps(target, shown)
    return target.getvalue()


def image(png: bytes, alt: str) -> str:
    """Returns the HTML of a PNG that is embedded in the page."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _command(run: Run) -> str:
    return run.results["made_by"]["command"] if run.results else "unfinished"


# Markdown


def markdown(groups: Sequence[Group], *, unfinished: bool = True) -> str:
    """Returns all tables: the summary, the methods of each setting, protocols and provenance.

    Args:
      groups: from `compare.group`.
      unfinished: whether to list the rows that have no result of the full schedule.
    """
    parts = [textwrap.fill(LEGEND, 120), summary(groups), accuracies(groups)]
    parts += ["### Protocols\n", protocols(groups), "### Runs\n", provenance(groups)]
    if unfinished and (still := short(groups)):
        parts.append("\n".join(["Rows without the full schedule:", "", *(f"- {each}" for each in still), ""]))
    return "\n".join(parts).rstrip() + "\n"


def summary(groups: Sequence[Group]) -> str:
    """MAML beside the published accuracy, one row for each setting."""
    rows = []
    for group in groups:
        line = next((line for line in group.lines if line.method == "maml"), None)
        if line is not None and line.runs:
            rows.append([group.title, over_seeds(line.numbers()), *_quoted(line.published), _schedule(line)])
    return table(("MAML, second order", "ours, %", "published, %", "source", "meta-steps"), rows)


ACCURACIES = ("method", "transductive, %", "inductive, %", "inner steps", "meta-steps", "published, %", "source")
DIFFERENCES = ("MAML, second order, minus", "meta-steps", "seed", "difference, points")
PROTOCOLS = ("setting", "split, classes, sha256", "tasks", "task seeds", "queries per class", "rotations")
PROVENANCE = ("run", "method", "seed", "inner rate", "model", "hours", "hardware", "commit", "date")
"""Columns of the tables."""


def accuracies(groups: Sequence[Group]) -> str:
    """A table of all methods for each setting, and the differences on the same tasks."""
    parts = []
    for group in groups:
        rows = []
        for line in group.lines:
            both = [over_seeds(numbers) if numbers else "" for numbers in (line.numbers(), line.inductive())]
            rows.append([line.title, *both, str(line.inner_steps), _schedule(line), *_quoted(line.published)])
        rows += [[METHODS[name], "", "", "", "", *_quoted(number)] for name, number in group.others.items()]
        parts += [f"### {group.title}\n", table(ACCURACIES, rows)]
        if group.paired:
            pairs = [
                [pair.second.title, _schedules(pair), str(pair.seed), str(pair.difference)] for pair in group.paired
            ]
            parts.append("Paired differences on the same tasks, with the 95% interval of a bootstrap over tasks:\n")
            parts.append(table(DIFFERENCES, pairs))
    return "\n".join(parts)


def protocols(groups: Sequence[Group]) -> str:
    """Tasks of each setting."""
    rows = []
    for group in groups:
        found = [summary["protocol"] for line in group.lines for _, summary in line.summaries()]
        if found:
            digests = dict.fromkeys(each["split_sha256"][:12] for each in found)
            digests.pop("not recorded", None)
            split = f"{found[0]['split']}, {found[0]['classes']} classes, {_listed(digests)}"
            values = (sorted({each[key] for each in found}) for key in ("tasks", "seed", "queries", "rotations"))
            rows.append([group.title, split, *map(_listed, values)])
    return table(PROTOCOLS, rows)


def provenance(groups: Sequence[Group]) -> str:
    """Meta-step of the model, cost, hardware and commit of each run."""
    rows: dict[str, list[str]] = {}
    for line in (line for group in groups for line in group.lines):
        for run, summary in line.summaries():
            results, rate = run.results or {}, summary["protocol"]["inner_rate"]
            rows.setdefault(run.path.name, [
                f"`{run.path.name}`",
                line.title,
                str(run.seed),
                "learned" if rate is None else f"{rate:g}",
                f"{results['selected']['step']:,}",
                *cost(run.made_by),
            ])  # fmt: skip
    return table(PROVENANCE, rows.values())


def cost(made_by: dict[str, Any]) -> list[str]:
    """Hours, hardware, commits and day of a run, over all its starts."""
    took = hours(made_by)
    places = [over_starts(made_by, key) for key in ("hardware", "commit")]
    return ["" if took is None else f"{took:.2f}", *places, made_by["finished"][:10]]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def _schedule(line: Line) -> str:
    """Formats the meta-steps of a line, with the number of the full schedule if the line has fewer."""
    return f"{line.steps or line.trained:,}" + ("" if line.steps >= line.row.steps else f" of {line.row.steps:,}")


def _quoted(number: Published | None) -> list[str]:
    return ["", ""] if number is None else [interval(number), number.source]


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def with_region(text: str, content: str, begin: str, end: str) -> str:
    """Returns the text with `content` between the marks `begin` and `end`.

    Raises:
      ValueError: unless the text has each mark once, in this order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"The text must have the marks {begin.strip()!r} and {end!r} once each, in this order.")
    before, rest = text.split(begin)
    return f"{before}{begin}{content}{end}{rest.split(end)[1]}"
