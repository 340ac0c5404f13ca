"""Puts a run's report together and writes it as one HTML file that loads nothing."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dinov2.config import Config, ConfigError, load_config
from dinov2.config.command_line import option, parse
from dinov2.eval.report.curves import ChartGroup, chart_groups
from dinov2.eval.report.results import (
    MEANINGS,
    Comparison,
    EmbeddedImage,
    FoundResults,
    ImageShelf,
    MistakesView,
    ResultView,
    compare_results,
    find_results,
    main_results,
    view_mistakes,
    view_results,
)
from dinov2.eval.results import RESULTS_FILE
from dinov2.logging import read_metrics
from dinov2.utils.files import write_text_atomically

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Option:
    """One option: dotted name, value and default as text, and its one-line meaning."""

    name: str
    value: str
    default: str
    meaning: str

    @property
    def changed(self) -> bool:
        """Whether the run had another value than the default."""
        return self.value != self.default


@dataclass(frozen=True)
class RunOptions:
    """What is known of a run's options.

    Attributes:
        config: None where there is no file, or it is of another version.
        options: all, in the order of the schema; empty without a config.
        raw: the file's text where it could not be understood.
        problem: why not; empty where all is well.
    """

    config: Config | None = None
    options: tuple[Option, ...] = ()
    raw: str = ""
    problem: str = ""

    @property
    def num_iterations(self) -> int | None:
        """How long the run was to be; None where that is not known."""
        return None if self.config is None else self.config.optim.epochs * self.config.train.OFFICIAL_EPOCH_LENGTH


def read_options(run_dir: Path) -> RunOptions:
    """Reads ``config.yaml`` of a run's folder; what is wrong with it is told in the result and not raised."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return RunOptions(problem=f"There is no {CONFIG_FILE} in the folder.")
    try:
        config = load_config(path)
    except (ConfigError, OSError) as error:
        raw = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
        return RunOptions(raw=raw, problem=f"The file could not be understood by this version: {error}")
    defaults = {name: value for name, value, _ in _leaves(Config(), "")}
    options = (Option(name, _show(value), _show(defaults[name]), help) for name, value, help in _leaves(config, ""))
    return RunOptions(config=config, options=tuple(options))


def _leaves(options: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Dotted name, value and meaning of every option."""
    for field in fields(options):
        # `vars` and not attributes: showing an option does not count as using it.
        value = vars(options)[field.name]
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field.metadata["help"]


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else "(empty)"


_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (?P<level>[A-Z]+)\s+(?P<source>\S+:\d+) (?P<text>.*)")
_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?", re.IGNORECASE)
_NAMED = re.compile(r"[A-Z]{6,}: ")
_LOUD = ("WARNING", "ERROR", "CRITICAL")
_LONGEST = 4000  # characters of one message
MOST_MESSAGES = 60


@dataclass(frozen=True)
class LogMessage:
    """Messages of one level, place in the code and wording, whatever numbers they hold.

    Attributes:
        level: ``WARNING``, ``ERROR`` or ``CRITICAL``; ``ALARM`` for a warning with a name, such as ``COLLAPSE: …``.
        file: the log, relative to the folder that was searched.
        count: how often it was said.
        first: when it was said first.
        last: when it was said last.
        text: the first one.
        latest: the last one, empty where it reads the same.
    """

    level: str
    file: str
    count: int
    first: str
    last: str
    text: str
    latest: str


@dataclass
class _Entry:
    level: str
    time: str
    text: str


def read_warnings(folders: Sequence[Path]) -> list[LogMessage]:
    """Finds what is above INFO in the ``log/*.txt`` files at any depth of some folders; plain warnings come last."""
    found: list[LogMessage] = []
    seen: set[Path] = set()
    for folder in folders:
        for path in sorted(folder.rglob("log/*.txt")):
            if path.resolve() in seen or not path.is_file():
                continue
            seen.add(path.resolve())
            found += _messages_of(path, str(path.relative_to(folder)))
    return sorted(found, key=lambda message: (message.level == "WARNING", message.first))


def count_warnings(messages: Sequence[LogMessage]) -> int:
    """How many messages there are in all."""
    return sum(message.count for message in messages)


def log_span(run_dir: Path) -> tuple[str, str] | None:
    """When the first and the last line of ``log/log.txt`` were written; None without such lines."""
    path = run_dir / "log" / "log.txt"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        times = [match["time"] for line in file if (match := _LINE.match(line))]
    return (times[0], times[-1]) if times else None


def _messages_of(path: Path, name: str) -> list[LogMessage]:
    groups: dict[tuple[str, str], list[_Entry]] = {}
    counts: dict[tuple[str, str], int] = {}
    for entry in _entries(path):
        key = entry.level, _NUMBER.sub("#", entry.text.split("\n", 1)[0])
        counts[key] = counts.get(key, 0) + 1
        groups.setdefault(key, [entry, entry])[1] = entry
    messages = []
    for key, (first, last) in groups.items():
        latest = "" if first.text == last.text else last.text
        alarm = first.level == "WARNING" and _NAMED.match(first.text) is not None
        messages.append(
            LogMessage("ALARM" if alarm else first.level, name, counts[key], first.time, last.time, first.text, latest)
        )
    return messages


def _entries(path: Path) -> Iterator[_Entry]:
    """The loud messages of one file, each with the lines that follow it up to the next message."""
    entry: _Entry | None = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            match = _LINE.match(line)
            if match is None:
                if entry is not None and len(entry.text) < _LONGEST:
                    entry.text = f"{entry.text}\n{line.rstrip()}"[:_LONGEST]
                continue
            if entry is not None:
                yield entry
            loud = match["level"] in _LOUD
            entry = _Entry(match["level"], match["time"], match["text"].rstrip()[:_LONGEST]) if loud else None
    if entry is not None:
        yield entry


STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --card: #f6f7f9; --ink: #1c2024; --quiet: #5b636b; --edge: #d9dde2; --accent: #0b5cad;
  --bad: #b42318; --bad-ground: #fdeceb; --warn: #8a5300; --warn-ground: #fff4dc; --good: #176b3a;
  --c0: #0b62b8; --c1: #c2500a; --c2: #0f7b55; --c3: #9a3f93; --c4: #a37500; --c5: #5a6570;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171a; --card: #1d2125; --ink: #e6e9ec; --quiet: #a0a9b2; --edge: #363c43; --accent: #79b8ff;
    --bad: #ff8d84; --bad-ground: #3a1b19; --warn: #f0c062; --warn-ground: #352a12; --good: #6fcf97;
    --c0: #6db3ff; --c1: #ff9d5c; --c2: #5fd0a5; --c3: #e396dc; --c4: #e3bd4f; --c5: #aab4be;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body {
  margin: 0 auto; max-width: 1180px; padding: 1.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 {
  font-size: 1.3rem; line-height: 1.25; margin: 2.75rem 0 .5rem; padding-top: .9rem;
  border-top: 1px solid var(--edge);
}
h3 { font-size: 1.08rem; line-height: 1.3; margin: 1.6rem 0 .35rem; overflow-wrap: anywhere; }
h4 { font-size: 1rem; margin: 1.1rem 0 .35rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 75ch; }
a { color: var(--accent); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .87em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; }
.quiet { color: var(--quiet); }
.small { font-size: .88em; }
.path { overflow-wrap: anywhere; }
nav { margin: 1.25rem 0 0; font-size: .93rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; list-style: none; margin: 0; padding: 0; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 190px), 1fr)); gap: .75rem;
  margin: 1.1rem 0;
}
.tile { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: .7rem .9rem; }
.tile .label { color: var(--quiet); font-size: .84rem; }
.tile .value {
  font-size: 1.45rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere;
}
.tile.bad .value { color: var(--bad); }
.tile.warn .value { color: var(--warn); }
.tile.good .value { color: var(--good); }
.note {
  border-left: 4px solid var(--edge); background: var(--card); padding: .5rem .8rem;
  border-radius: 0 6px 6px 0; max-width: 80ch;
}
.note.bad { border-color: var(--bad); background: var(--bad-ground); }
.note.warn { border-color: var(--warn); background: var(--warn-ground); }
.note { margin: .6rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .92rem; }
th, td {
  text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid var(--edge);
}
thead th { font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td .range { display: block; color: var(--quiet); font-size: .88em; }
td.word { overflow-wrap: anywhere; min-width: 9rem; }
td.wide { min-width: 15rem; }
td.right { background: color-mix(in srgb, var(--good) 14%, transparent); }
td.wrong { background: color-mix(in srgb, var(--bad) 12%, transparent); }
.counts td, .counts th { padding-left: .6rem; border: 1px solid var(--edge); }
dl.facts { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .2rem 1.1rem; margin: .6rem 0; }
dl.facts dt { color: var(--quiet); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
details { border: 1px solid var(--edge); border-radius: 8px; padding: .1rem .9rem; margin: .7rem 0; }
details[open] { padding-bottom: .7rem; }
summary { cursor: pointer; padding: .5rem 0; font-weight: 600; overflow-wrap: anywhere; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1rem;
  margin: .9rem 0;
}
figure { margin: 0; break-inside: avoid; }
figure.chart {
  background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: .7rem .8rem .6rem;
}
figcaption { overflow-wrap: anywhere; }
figure.chart figcaption { font-weight: 600; font-size: .94rem; }
figure.chart > svg { display: block; width: 100%; height: auto; }
.legend {
  display: flex; flex-wrap: wrap; gap: .1rem .9rem; list-style: none; margin: .2rem 0 0; padding: 0;
  font-size: .84rem;
}
.swatch { width: 18px; height: 8px; margin-right: .35rem; vertical-align: middle; }
.broken { color: var(--bad); font-size: .84rem; }
svg .grid { stroke: var(--edge); stroke-width: 1; }
svg .mark { stroke: var(--bad); stroke-width: 1.2; stroke-dasharray: 2 3; }
svg .tick { fill: var(--quiet); font-size: 11px; }
svg .end { text-anchor: end; }
svg .mid { text-anchor: middle; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 5 3; }
svg .band { stroke: none; opacity: .22; }
svg .line.c0 { stroke: var(--c0); } svg .band.c0, svg .dot.c0 { fill: var(--c0); }
svg .line.c1 { stroke: var(--c1); } svg .band.c1, svg .dot.c1 { fill: var(--c1); }
svg .line.c2 { stroke: var(--c2); } svg .band.c2, svg .dot.c2 { fill: var(--c2); }
svg .line.c3 { stroke: var(--c3); } svg .band.c3, svg .dot.c3 { fill: var(--c3); }
svg .line.c4 { stroke: var(--c4); } svg .band.c4, svg .dot.c4 { fill: var(--c4); }
svg .line.c5 { stroke: var(--c5); } svg .band.c5, svg .dot.c5 { fill: var(--c5); }
svg.interval { display: block; width: 120px; height: 16px; }
svg.interval .axis { stroke: var(--edge); stroke-width: 2; }
svg.interval .whisker { stroke: var(--c0); stroke-width: 4; opacity: .5; }
svg.interval circle { fill: var(--c0); }
.photos {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 200px), 1fr)); gap: .9rem;
  margin: .8rem 0;
}
.photos figure { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: .6rem; }
.photos img { display: block; width: 100%; height: auto; max-height: 256px; object-fit: contain; border-radius: 4px; }
.photos .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; align-items: start; }
.photos figcaption { font-size: .84rem; margin-top: .4rem; }
.absent {
  display: grid; place-items: center; min-height: 120px; padding: .5rem; text-align: center; border-radius: 4px;
  border: 1px dashed var(--quiet); color: var(--quiet); font-size: .84rem; overflow-wrap: anywhere;
}
.picture { margin: 1rem 0; }
.picture img {
  display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--edge);
  border-radius: 6px;
}
@media (max-width: 560px) {
  body { padding: 1rem .9rem 3rem; }
  h1 { font-size: 1.4rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: .45rem; }
  .photos { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; }
  td.word { min-width: 7rem; }
  td.wide { min-width: 9rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media print {
  :root {
    --ground: #fff; --card: #fff; --ink: #000; --quiet: #444; --edge: #bbb; --accent: #000; --bad: #8f1a12;
    --c0: #0b62b8; --c1: #c2500a; --c2: #0f7b55; --c3: #9a3f93; --c4: #a37500; --c5: #5a6570;
  }
  body { max-width: none; padding: 0; font-size: 10pt; }
  table { font-size: 8pt; }
  th, td { padding-right: .5rem; }
  td.word, td.wide { min-width: 5rem; }
  td.number, td .range { white-space: normal; }
  svg.interval { width: 72px; height: auto; }
  nav { display: none; }
  .scroll { overflow: visible; }
  h2, h3, h4 { break-after: avoid; }
  tr, figure, .tile { break-inside: avoid; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
}
"""


TEMPLATE = """
{%- macro figure_cell(cell) -%}
  <td class="number">{{ cell.value or "-" }}
  {%- if cell.interval %}<span class="range">{{ cell.interval }}</span>{% endif %}
  {{- cell.drawing if cell.drawing }}</td>
{%- endmacro -%}
{%- macro facts(rows) -%}
  <dl class="facts">{% for name, value in rows %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{%- endmacro -%}
{%- macro image(entry, alt) -%}
  {%- if entry.address -%}
  <img src="{{ entry.address }}" width="{{ entry.width }}" height="{{ entry.height }}" alt="{{ alt }}">
  {%- else -%}
  <div class="absent">Not shown: {{ entry.problem }}.</div>
  {%- endif -%}
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>Report of {{ report.title }}</title>
<style>{{ style }}</style>
</head>
<body>
<header>
<p class="quiet small">Report of a pretraining run</p>
<h1>{{ report.title }}</h1>
<p>{{ report.status }}</p>
<div class="tiles">
{% for tile in report.tiles %}
<div class="tile {{ tile.tone }}"><div class="label">{{ tile.label }}</div><div class="value">{{ tile.value }}</div>
<div class="small quiet">{{ tile.remark }}</div></div>
{% endfor %}
</div>
<nav aria-label="Contents"><ul>
<li><a href="#warnings">Warnings</a></li><li><a href="#results">Results</a></li>
<li><a href="#mistakes">Worst mistakes</a></li><li><a href="#curves">Curves</a></li>
<li><a href="#pictures">Pictures</a></li><li><a href="#options">Options</a></li>
</ul></nav>
</header>
<main>
<section id="run">
<h2>What was this run?</h2>
{{ facts(report.facts) }}
</section>

<section id="warnings">
<h2>Did anything look wrong?</h2>
{% if report.warnings %}
<p>Warnings and errors in the logs: {{ report.num_warnings }}. Alike ones are shown once.</p>
{% for message in report.warnings %}
<div class="note {{ "warn" if message.level == "WARNING" else "bad" }}">
<div class="small quiet"><strong>{{ message.level | lower }}</strong>
{%- if message.count > 1 %}, {{ message.count }} times from {{ message.first }} to {{ message.last }}
{%- else %}, {{ message.first }}{% endif %}, in <span class="path">{{ message.file }}</span></div>
<pre>{{ message.text }}</pre>
{%- if message.latest %}<div class="small quiet">the last of them:</div><pre>{{ message.latest }}</pre>{% endif %}
</div>
{% endfor %}
{% if report.num_warnings_left_out %}<p class="quiet">{{ report.num_warnings_left_out }} further kinds of messages are
left out.</p>{% endif %}
{% else %}
<p>{{ report.no_warnings }}</p>
{% endif %}
</section>

<section id="results">
<h2>How good are the features?</h2>
{% if report.comparisons %}
<p>Every line judges one backbone by one method. Figures are per part where a part has several photos, since a part is
what is accepted or rejected. Below a figure stands its 95 % interval, where one was computed: with other parts of the
same kind the figure would hardly leave it. Lines whose intervals overlap widely cannot be told apart by these
photos.</p>
{% for comparison in report.comparisons %}
<div class="scroll"><table>
<thead><tr><th>method</th><th>weights</th><th>judged on</th>
{%- for name, meaning in comparison.header %}<th title="{{ meaning }}">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in comparison.rows %}
<tr><th scope="row">{{ row.evaluator }}<span class="small quiet"><br>{{ row.variant }}</span></th>
<td class="word wide">{{ row.weights }}<br><span class="small quiet">{{ row.name }}</span></td>
<td>{{ row.counted }}</td>
{%- for cell in row.cells %}{{ figure_cell(cell) }}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
<details><summary>What do these figures mean?</summary>
{{ facts(report.glossary) }}</details>
{% for result in report.results %}
<details><summary>All figures: {{ result.title }} <span class="quiet small">({{ result.name }})</span></summary>
<p class="quiet">{{ result.counts }}</p>
{% for detail in result.details %}
<h4>{{ detail.title }}</h4>
<div class="scroll"><table><thead><tr><th>figure</th><th>per photo</th><th>per part</th></tr></thead><tbody>
{% for row in detail.figures %}
<tr><th scope="row">{{ row.name }}<br><span class="small quiet">{{ row.meaning }}</span></th>
{{- figure_cell(row.image) }}{{ figure_cell(row.part) }}</tr>
{% endfor %}
</tbody></table></div>
{% for confusion in detail.confusions %}
<h4>What were the {{ confusion.level }} called?</h4>
<div class="scroll"><table class="counts"><thead><tr><th>is</th>
{%- for name in confusion.classes %}<th>called {{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for name, counts in confusion.rows %}{% set row = loop.index0 %}
<tr><th scope="row">{{ name }}</th>{% for count in counts %}
<td class="number {{ "right" if loop.index0 == row else "wrong" if count else "" }}">{{ count }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% endfor %}
{% if result.num_variants > result.details | length %}
<h4>All variants</h4>
<div class="scroll"><table><thead><tr>
{%- for name in result.variants_header %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{%- for row in result.variants %}
<tr>{% for cell in row %}<td class="number">{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% if result.num_variants > result.variants | length %}<p class="quiet">The first {{ result.variants | length }} of
{{ result.num_variants }} are shown.</p>{% endif %}
{% endif %}
{% for spread in result.spreads %}
<h4>How much does luck count with few labels? (per {{ spread.level }})</h4>
<p class="quiet">Mean and deviation over the tries, below them the smallest and the largest value.</p>
<div class="scroll"><table><thead><tr><th>variant</th>
{%- for name in spread.header %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{%- for variant, cells in spread.rows %}
<tr><th scope="row">{{ variant }}</th>{% for value, range in cells %}
<td class="number">{{ value }}<span class="range">{{ range }}</span></td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endfor %}
<h4>What was it computed from?</h4>
{{ facts(result.facts) }}
</details>
{% endfor %}
{% else %}
<p>No results of evaluators were found. Let <code>eval/knn.py</code>, <code>eval/linear.py</code>,
<code>eval/log_regression.py</code> or <code>eval/retrieval.py</code> write into the run's folder, or name their folders
with <code>--results</code>.</p>
{% endif %}
{% for name, problem in report.unreadable_results %}
<p class="note warn"><span class="path">{{ name }}</span> cannot be read: {{ problem }}</p>
{% endfor %}
</section>

<section id="mistakes">
<h2>Which mistakes are the worst?</h2>
{% for view in report.mistakes %}
<h3>{{ view.title }}</h3>
<p class="quiet small path">{{ view.counted + ", " if view.counted }}{{ view.name }}</p>
{% if view.problem %}<p class="note warn">The predictions cannot be read: {{ view.problem }}</p>{% endif %}
{% for group in view.groups %}
<h4>{{ group.question }} {{ group.count or "None." }}</h4>
{% if group.mistakes %}
<p class="quiet">{{ group.explanation }}
{%- if group.count > group.mistakes | length %} The first {{ group.mistakes | length }} are shown.{% endif %}</p>
<div class="photos">
{% for mistake in group.mistakes %}
<figure>{% if mistake.instead %}<div class="pair">{{ image(mistake.photo, mistake.verdict) }}
{{- image(mistake.instead, "the photo that looked most alike") }}</div>
{%- else %}{{ image(mistake.photo, mistake.verdict) }}{% endif %}

<figcaption>{{ mistake.verdict }}
{%- if mistake.part %}<br>part {{ mistake.part }}{% endif %}
{%- if mistake.rest_of_part %}<br><span class="quiet">{{ mistake.rest_of_part }}</span>{% endif %}
<br><span class="quiet path">{{ mistake.path }}</span>
{%- if mistake.instead_path %}<br><span class="quiet path">right: {{ mistake.instead_path }}</span>{% endif -%}
</figcaption></figure>
{% endfor %}
</div>
{% endif %}
{% endfor %}
{% else %}
<p>No predictions were found beside results of evaluators.</p>
{% endfor %}
</section>

<section id="curves">
<h2>How did training go?</h2>
{% if report.metrics_problem %}<p class="note">{{ report.metrics_problem }}</p>{% endif %}
{% if report.curves %}<p class="quiet">Horizontally: iterations. A number in a legend is the last value. Of long curves
the mean is drawn, in a pale band from the smallest to the largest value. A dotted line
marks where the run itself warned.</p>{% endif %}
{% for group in report.curves %}
<h3>{{ group.question }}</h3>
{% if group.explanation %}<p class="quiet">{{ group.explanation }}</p>{% endif %}
<div class="charts">
{% for chart in group.charts %}
<figure class="chart"><figcaption>{{ chart.title }}</figcaption>
{%- if chart.remark %}<div class="small quiet">{{ chart.remark }}</div>{% endif %}{{ chart.drawing }}
<ul class="legend">{% for entry in chart.legend %}
<li>{{ entry.mark }}{{ entry.name }} <strong>{{ entry.last }}</strong></li>{% endfor %}</ul>
{%- if chart.broken %}<div class="broken">{{ chart.broken }}</div>{% endif %}</figure>
{% endfor %}
</div>
{% endfor %}
</section>

<section id="pictures">
<h2>What do the features see?</h2>
{% for name, picture in report.pictures %}
<figure class="picture">{{ image(picture, name) }}<figcaption class="quiet small path">{{ name }}</figcaption></figure>
{% else %}
<p>No pictures were found. <code>python tools/visualize_features.py … --output {{ report.folder }}/plots</code> draws
some.</p>
{% endfor %}
{% if report.num_pictures_left_out %}<p class="quiet">{{ report.num_pictures_left_out }} further pictures are left
out.</p>{% endif %}
</section>

<section id="options">
<h2>With which options was it run?</h2>
{% if report.options.problem %}<p class="note warn">{{ report.options.problem }}</p>{% endif %}
{% if report.options.raw %}<pre>{{ report.options.raw }}</pre>{% endif %}
{% if report.options.options %}
<p>{{ report.changed | length }} of {{ report.options.options | length }} options differ from their defaults.</p>
{% if report.changed %}
<div class="scroll"><table><thead><tr><th>option</th><th>value</th><th>default</th><th>meaning</th></tr></thead><tbody>
{% for option in report.changed %}
<tr><th scope="row"><code>{{ option.name }}</code></th><td class="word"><strong>{{ option.value }}</strong></td>
<td class="word quiet">{{ option.default }}</td><td class="word quiet">{{ option.meaning }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
<details><summary>All options</summary>
<div class="scroll"><table><thead><tr><th>option</th><th>value</th><th>meaning</th></tr></thead><tbody>
{% for option in report.options.options %}
<tr><th scope="row"><code>{{ option.name }}</code></th><td class="word">{{ option.value }}</td>
<td class="word quiet">{{ option.meaning }}</td></tr>
{% endfor %}
</tbody></table></div></details>
{% endif %}
</section>
</main>
<footer class="quiet small">
<p>Written {{ report.written }}. This file holds everything that it shows, and loads nothing.</p>
</footer>
</body>
</html>
"""


METRICS_FILE = "metrics.jsonl"
MOST_PICTURES = 24
MOST_IMAGE_BYTES = 40_000_000
REDRAWN = ("losses", "schedules", "throughput", "knn", "monitors")  # plots of a run that the page draws by itself

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page; ``tone`` is good, warn, bad, or empty."""

    label: str
    value: str
    remark: str = ""
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page shows; names are those of the template."""

    title: str
    folder: str
    status: str
    written: str
    tiles: tuple[Tile, ...]
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[LogMessage, ...]
    num_warnings: int
    num_warnings_left_out: int
    no_warnings: str
    comparisons: tuple[Comparison, ...]
    results: tuple[ResultView, ...]
    unreadable_results: tuple[tuple[str, str], ...]
    glossary: tuple[tuple[str, str], ...]
    mistakes: tuple[MistakesView, ...]
    curves: tuple[ChartGroup, ...]
    metrics_problem: str
    pictures: tuple[tuple[str, EmbeddedImage], ...]
    num_pictures_left_out: int
    options: RunOptions
    changed: tuple[Option, ...]


def write_report(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    results: Sequence[str | Path] = (),
    pictures: Sequence[str | Path] = (),
    num_mistakes: int = 12,
) -> Path:
    """Writes what is known of a run into one HTML file; what is missing in the folder is missing in the report.

    Args:
        run_dir: folder of a run, or of an evaluator's results.
        output: file to write; by default ``report.html`` in that folder.
        results: further folders in which results of evaluators are sought, at any depth.
        pictures: further pictures, or folders of PNG files, besides those in the run's folder ``plots``.
        num_mistakes: photos shown per kind of mistake.

    Returns:
        The file.

    Raises:
        FileNotFoundError: when a folder or a picture does not exist.
        ValueError: when the folder is no run's, or ``num_mistakes`` is negative.
    """
    folder, others = Path(run_dir), [Path(path) for path in results]
    if num_mistakes < 0:
        raise ValueError(f"num_mistakes must be at least 0, found {num_mistakes}")
    for path in (folder, *others):
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder")
    known = (CONFIG_FILE, METRICS_FILE, RESULTS_FILE)
    if not any((folder / name).is_file() for name in known):
        raise ValueError(f"{folder} is not the folder of a run: it holds none of {', '.join(known)}")
    path = folder / "report.html" if output is None else Path(output)
    page = render(gather(folder, others, [Path(picture) for picture in pictures], num_mistakes))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, page)
    return path


def gather(folder: Path, others: Sequence[Path], pictures: Sequence[Path], num_mistakes: int) -> Report:
    """Reads everything that the page shows."""
    shelf = ImageShelf(MOST_IMAGE_BYTES)
    options = read_options(folder)
    records, metrics_problem = _read_metrics(folder)
    found = find_results(folder, others)
    detailed = main_results(found)
    warnings = read_warnings([folder, *others])
    drawn = _pictures(folder, pictures)
    mistakes = [view for entry in detailed for view in view_mistakes(entry, shelf, num_mistakes)]
    return Report(
        title=folder.resolve().name or str(folder),
        folder=str(folder),
        status=_status(records, options),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        tiles=tuple(_tiles(records, options, warnings, found)),
        facts=tuple(_facts(folder, options)),
        warnings=tuple(warnings[:MOST_MESSAGES]),
        num_warnings=count_warnings(warnings),
        num_warnings_left_out=max(len(warnings) - MOST_MESSAGES, 0),
        no_warnings=_no_warnings([folder, *others]),
        comparisons=compare_results(found),
        results=tuple(view_results(entry) for entry in detailed),
        unreadable_results=tuple((entry.name, entry.problem) for entry in found if entry.results is None),
        glossary=tuple(MEANINGS.values()),
        mistakes=tuple(mistakes),
        curves=tuple(chart_groups(records)),
        metrics_problem=metrics_problem,
        pictures=tuple((name, shelf.picture(path)) for name, path in drawn[:MOST_PICTURES]),
        num_pictures_left_out=max(len(drawn) - MOST_PICTURES, 0),
        options=options,
        changed=tuple(option for option in options.options if option.changed),
    )


def render(report: Report) -> str:
    """The page as text; names of files that are no text are shown with their bytes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE).render(report=report, style=Markup(STYLE)).strip() + "\n"
    return _UNPRINTABLE.sub("\ufffd", page).encode("utf-8", "backslashreplace").decode("utf-8")


def _read_metrics(folder: Path) -> tuple[list[dict[str, Any]], str]:
    path = folder / METRICS_FILE
    if not path.is_file():
        return [], f"There is no {METRICS_FILE} in the folder: training has not started here."
    try:
        records = read_metrics(path)
    except (OSError, ValueError) as error:
        return [], f"The curves cannot be drawn: {error}"
    return records, "" if records else f"{METRICS_FILE} holds no numbers yet."


def _iterations_done(records: Sequence[Mapping[str, Any]]) -> int:
    return max((record["iteration"] for record in records if isinstance(record.get("iteration"), int)), default=-1) + 1


def _status(records: Sequence[Mapping[str, Any]], options: RunOptions) -> str:
    done, planned = _iterations_done(records), options.num_iterations
    if done == 0:
        return "No training is recorded in this folder."
    if planned is None:
        return f"{done} iterations are recorded; how many were planned is not known."
    if done >= planned:
        return f"Finished: all {planned} iterations are done."
    return f"Stopped, or still running: {done} of {planned} iterations are recorded."


def _tiles(
    records: Sequence[Mapping[str, Any]],
    options: RunOptions,
    warnings: Sequence[LogMessage],
    found: Sequence[FoundResults],
) -> list[Tile]:
    tiles = []
    done, planned = _iterations_done(records), options.num_iterations
    if done:
        complete = planned is not None and done >= planned
        remark = f"of {planned}" if planned is not None else ""
        tiles.append(Tile("iterations", f"{done}", remark, "good" if complete else "warn" if planned else ""))
    losses = [record["total_loss"] for record in records if "total_loss" in record]
    if losses:
        broken = losses[-1] is None
        tiles.append(
            Tile("last total loss", "not finite" if broken else f"{losses[-1]:.4g}", tone="bad" if broken else "")
        )
    num_errors = sum(message.count for message in warnings if message.level != "WARNING")
    count = count_warnings(warnings)
    remark = f"{num_errors} of them errors or alarms" if num_errors else ""
    tiles.append(Tile("warnings in the logs", str(count), remark, "bad" if num_errors else "warn" if count else "good"))
    readable = sum(entry.results is not None for entry in found)
    tiles.append(Tile("results of evaluators", str(readable)))
    return tiles


def _facts(folder: Path, options: RunOptions) -> list[tuple[str, str]]:
    facts = [("folder", str(folder.resolve()))]
    if options.config is not None:
        values = {option.name: option.value for option in options.options}
        facts.append(("photos", values["train.dataset_path"]))
        backbone = f"{values['student.arch']}, patches of {values['student.patch_size']} pixels"
        facts.append(("backbone", f"{backbone}, global crops of {values['crops.global_crops_size']} pixels"))
        facts.append(("started from", values["student.pretrained_weights"].replace("(empty)", "random weights")))
    span = log_span(folder)
    if span is not None:
        facts.append(("first and last line of the log", f"{span[0]} and {span[1]}"))
    best = _best_teacher(folder)
    if best:
        facts.append(("best teacher kept", best))
    return facts


def _best_teacher(folder: Path) -> str:
    """Which teacher the run itself found best; empty where it kept none."""
    try:
        best = json.loads((folder / "eval" / "best" / "best.json").read_text(encoding="utf-8"))
        metric = str(best["metric"]).replace("_", " ")
        return f"{best['teacher']}: {metric} {float(best['score']):.3f} after iteration {int(best['iteration'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _no_warnings(folders: Sequence[Path]) -> str:
    if any(path.is_file() for folder in folders for path in folder.rglob("log/*.txt")):
        return "The logs hold no warnings and no errors."
    return "No logs were found, so nothing is known of warnings."


def _pictures(folder: Path, given: Sequence[Path]) -> list[tuple[str, Path]]:
    """Pictures with the names that they have in the page.

    Raises:
        FileNotFoundError: when one that was named does not exist.
    """
    drawn = [path for path in sorted((folder / "plots").glob("*.png")) if path.stem not in REDRAWN]
    found = {path.resolve(): (path.relative_to(folder).as_posix(), path) for path in drawn}
    for place in given:
        if not place.exists():
            raise FileNotFoundError(f"there is no picture or folder {place}")
        for path in sorted(place.glob("*.png")) if place.is_dir() else [place]:
            found.setdefault(path.resolve(), (str(path), path))
    return list(found.values())


@dataclass(frozen=True)
class ReportOptions:
    """Options of the command."""

    output_dir: Path = option(help="folder of the run", positional=True)
    output: Path | None = option(None, help="HTML file to write (usually report.html in that folder)")
    results: tuple[Path, ...] = option((), help="further folders with results of evaluators, at any depth")
    pictures: tuple[Path, ...] = option((), help="pictures, or folders of PNG files, besides those in plots/")
    num_mistakes: int = option(12, help="photos shown per kind of mistake")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report and names it; returns the exit code."""
    options = parse(
        ReportOptions,
        argv,
        description=(
            "Writes options, curves, results of evaluators, pictures, warnings and worst mistakes of a run into one "
            "HTML file that can be read offline."
        ),
        example="python tools/report_run.py outputs/vits14 --results outputs/knn outputs/linear",
    )
    path = write_report(
        options.output_dir,
        options.output,
        results=options.results,
        pictures=options.pictures,
        num_mistakes=options.num_mistakes,
    )
    sys.stdout.write(f"{path}\n")
    return 0
