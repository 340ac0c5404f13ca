"""The page's text and structure. Every value is escaped on its way in."""

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
