"""The report of a plan as one page of HTML: no script, nothing from the network, every text escaped."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

from narrowcast.errors import UnsupportedError
from narrowcast.files import atomic_path

from .report import draw_png

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{{ model }}: {{ recipe }}</title>
<style>
  :root { color-scheme: light dark }
  body { font: 14px/1.45 sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em }
  h1, h2 { font-weight: 600 } h2 { margin-top: 2em; border-bottom: 1px solid #8885 }
  table { border-collapse: collapse } th, td { padding: .15em 1em .15em 0; text-align: left; vertical-align: top }
  td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } td.name { overflow-wrap: anywhere }
  tr:hover td { background: #8881 } .scroll { overflow-x: auto } img { max-width: 100%; background: #fff }
  .warning { border-left: 4px solid #c4661f; padding-left: .8em } .quiet { opacity: .7 }
</style>
<h1>{{ model }}: {{ recipe }}</h1>
<p>{{ kind }}{% if kv_cache and kv_cache != "float" %}, {{ kv_cache }} cache{% endif %}, written by {{ written_by }}
{%- if plan %}, {{ plan }}{% endif %}.</p>

<h2>Measured on held-out data</h2>
{% if metrics %}
<table>
<tr><th>metric<th class="n">float32<th class="n">this plan<th class="n">95 % bounds
{% for m in metrics %}
<tr><td>{{ m.name | replace("_", " ") }}<td class="n">{{ m.float32 | figure }}<td class="n">{{ m.value | figure }}
<td class="n">{% if m.low is not none and m.high is not none %}{{ m.low | figure }} to {{ m.high | figure }}{% endif %}

{% endfor %}
</table>
{% else %}
<p>This plan carries no metric: {{ "models of kind generic have none of their own." if kind == "generic"
  else "it was made without data." }}</p>
{% endif %}
{% if certificate.measured_on is mapping %}
<p class="quiet">Against the same weights in float32; measured on {{ certificate.measured_on.device }}, kernels
{{ certificate.measured_on.kernels }}, torch {{ certificate.measured_on.torch }}.</p>
{% endif %}

<h2>Bytes</h2>
<table>
<tr><td>weights in float32, before<td class="n">{{ bytes_float32 | count }}
<tr><td>the file it was made from<td class="n">{{ bytes_source | count }}
<tr><td>weights of this plan, after<td class="n">{{ weight_bytes | count }}
<tr><td>the plan file<td class="n">{{ bytes | count }}
</table>
<table>
<tr><th>precision<th class="n">layers<th class="n">bytes
{% for name, part in precisions.items() %}
<tr><td>{{ name }}<td class="n">{{ part.layers or "" }}<td class="n">{{ part.bytes | count }}
{% endfor %}
</table>

<h2>Calibration data</h2>
{% if data %}
{% for warning in data.warnings %}
<p class="warning">{{ warning }}</p>
{% else %}
<p>Nothing to object to.</p>
{% endfor %}
<table>
<tr><th><th class="n">batches<th class="n">{{ data.unit }}<th class="n">padding<th class="n">{{ data.error }}
<th class="n">95 % bounds
{% for name, part in [("calibration", data.calibration), ("held out", data.held_out)] if part is mapping %}
<tr><td>{{ name }}<td class="n">{{ part.batches }}<td class="n">{{ part.rows | count }}
<td class="n">{{ part.padding | percent }}
{% if part.error is mapping %}
<td class="n">{{ part.error.value | figure }}<td class="n">{{ part.error.low | figure }} to {{ part.error.high | figure }}
{% else %}
<td><td>
{% endif %}
{% endfor %}
</table>
<p>Held-out over calibration error: {{ data.held_out_over_calibration | figure or "not measured" }}.
Held-out data that was calibrated on as well: {{ data.shared | percent }}.
{% if kind == "decoder" %}
{% if data.begin_token is none %}This model's texts begin with no special token.
{% else %}Windows that do not begin with token {{ data.begin_token }}: {{ data.without_begin_token | percent }}.
{% endif %}
{% endif %}</p>
{% if data.calibration is none %}<p>Recipe {{ recipe }} does not look at calibration data.</p>{% endif %}
{% elif data_recorded %}
<p>This plan was made without data.</p>
{% else %}
<p>This plan says nothing of its calibration data: it was made by a version that did not measure it. Compress the
model again to have the figures.</p>
{% endif %}

<h2>Error of every layer</h2>
{% if plot %}
<img alt="SQNR per layer, coloured by precision" src="data:image/png;base64,{{ plot }}">
{% else %}
<p>{{ no_plot }}</p>
{% endif %}

<h2>Layers</h2>
{% if timing is mapping %}
<p>Milliseconds on this machine ({{ timing.device }}, kernels {{ timing.kernels }}, {{ timing.threads }} threads), medians of
{{ timing.repeats }} runs; whole runs:
{% for case, ms in timing.cases.items() %}{{ case }} {{ ms | figure }} ms{{ ", " if not loop.last else "." }}
{% endfor %}</p>
{% else %}
<p class="quiet">Not timed.</p>
{% endif %}
{% set cases = timing.cases if timing is mapping else {} %}
<div class="scroll"><table>
<tr><th>layer<th>op<th>weights<th class="n">group<th class="n">bytes<th class="n">SQNR dB
{%- for case in cases %}<th class="n">{{ case }} ms{% endfor %}<th>why<th>notes
{% for row in layers %}
<tr><td class="name">{{ row.name }}<td>{{ row.op }}<td>{{ row.precision }}<td class="n">{{ row.group_size or "" }}
<td class="n">{{ row.bytes | count }}<td class="n">{{ row.sqnr_db | decibels }}
{%- for case in cases %}<td class="n">{{ row.ms.get(case) | milliseconds }}{% endfor %}<td>{{ row.why }}
<td>{{ row.notes | join("; ") }}
{% else %}
<tr><td>The graph multiplies by no weight.
{% endfor %}
</table></div>

<h2>Left in float</h2>
{% if left_in_float %}
<table>
<tr><th>layer<th>op<th>why
{% for row in left_in_float %}
<tr><td class="name">{{ row.name }}<td>{{ row.op }}<td>{{ row.why }}
{% endfor %}
</table>
{% else %}
<p>No layer.</p>
{% endif %}

<h2>Notes</h2>
{% for note in notes %}
<p class="warning">{{ note }}</p>
{% else %}
<p>None.</p>
{% endfor %}
</html>
"""


def write_page(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes a report of :func:`report.report_of` as one page, whole or not at all.

    Without matplotlib the page says so in the place of the plot. Raises UnsupportedError without jinja2, OSError
    when the file cannot be written.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UnsupportedError("reports need jinja2: pip install jinja2") from error
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "figure": lambda x: "" if x is None else f"{x:.5g}",
        "percent": lambda x: f"{x:.1%}",
        "count": lambda x: "unknown" if x is None else f"{x:,}",
        "decibels": lambda x: "" if x is None else f"{x:.1f}",
        "milliseconds": lambda x: f"{x:.4f}" if x else "",
    }
    plot, no_plot = _plot(report)
    text = environment.from_string(_PAGE).render(report, plot=plot, no_plot=no_plot)
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _plot(report: dict[str, Any]) -> tuple[str | None, str]:
    """The plot as base64 of a PNG, or None and the reason."""
    if all(row["sqnr_db"] is None for row in report["layers"]):
        return None, "No layer's error was measured."
    file = io.BytesIO()
    try:
        draw_png(report["layers"], f"{report['model']}: {report['recipe']}", file)
    except UnsupportedError as error:
        return None, f"No plot: {error}."
    return base64.b64encode(file.getvalue()).decode(), ""
