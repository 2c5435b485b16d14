"""The charts of compare.py: SVG by hand, readable on light and dark pages."""

import functools
import math
import os
import statistics
from xml.sax.saxutils import escape

WIDTH, LEFT, LINE = 720, 190, 20
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328; }
.t { font-weight: 600; font-size: 15px; } .s { fill: #656d76; font-size: 12px; }
.g { stroke: #d0d7de; } .c0 { fill: #0969da; stroke: #0969da; }
.c1 { fill: #8c959f; stroke: #8c959f; } .e { stroke: #1f2328; }
.l { fill: none; stroke-width: 2; } .k1 { stroke: #bc4c00; } .k2 { stroke: #1a7f37; }
.k3 { stroke: #8250df; } .k4 { stroke: #bf3989; } .k5 { stroke: #9a6700; }
.k0 { stroke: #0969da; } .k6 { stroke: #57606a; } .k7 { stroke: #cf222e; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .s { fill: #9198a1; } .g { stroke: #3d444d; }
.c0 { fill: #4493f8; stroke: #4493f8; } .c1 { fill: #6e7681; stroke: #6e7681; }
.e { stroke: #e6edf3; } .k0 { stroke: #4493f8; } .k1 { stroke: #f0883e; }
.k2 { stroke: #3fb950; } .k3 { stroke: #ab7df8; } .k4 { stroke: #db61a2; }
.k5 { stroke: #d29922; } .k6 { stroke: #9198a1; } .k7 { stroke: #f85149; } }
"""


def shown(row, value):
    """A figure with its unit, as the name of its row tells."""
    if value is None:
        return "-"
    if row.startswith(("requests/s", "tokens/s")):
        return "{:,.0f}".format(value)
    if row.startswith(("share", "TLS, share")):
        return "%.0f %%" % (100 * value)
    if row.startswith("memory, a further"):
        return "%.0f KB" % (value / 1e3)
    if row.startswith("memory"):
        return "%.1f MB" % (value / 1e6)
    if row.startswith("cores"):
        return "%.2f" % value
    for unit, factor, below in ("\u00b5s", 1e6, 1e-3), ("ms", 1e3, 1), ("s", 1, 1e9):
        if abs(value) < below:
            return "%.3g %s" % (value * factor, unit)


def spread(values, show):
    """The median of some values, with the least and the greatest."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    if len(values) == 1:
        return show(values[0])
    return "%s (%s-%s)" % tuple(map(show, (statistics.median(values), min(values),
                                           max(values))))


def svg(title, note, height, parts):
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img" '
            'aria-label="%s"><style>%s</style>\n<text class="t" x="8" y="20">%s</text>\n'
            '<text class="s" x="8" y="38">%s</text>\n%s\n</svg>\n' % (
                WIDTH, height, escape(title, {'"': "&quot;"}), STYLE, escape(title),
                escape(note), "\n".join(parts)))


def text(x, y, words, kind="", anchor="start"):
    return '<text x="%.1f" y="%.1f" class="%s" text-anchor="%s">%s</text>' % (
        x, y, kind, anchor, escape(words))


def bars(title, note, groups, show):
    """Horizontal bars on a logarithmic scale, with a mark from least to most.
    groups: (title, [(label, values, whether it is ours)])."""
    values = [v for _, rows in groups for _, vs, _ in rows for v in vs]
    low = 10 ** math.floor(math.log10(min(values)))
    high = max(values) * 1.05
    room = WIDTH - LEFT - 100

    def place(value):
        return LEFT + room * math.log(max(value, low) / low) / math.log(high / low)

    parts, y = [], 50
    for title_of_group, rows in groups:
        if title_of_group:
            parts.append(text(8, y + 15, title_of_group, "s"))
            y += LINE
        for label, vs, ours in rows:
            middle = statistics.median(vs)
            parts.append(text(LEFT - 8, y + 14, label, "", "end"))
            parts.append('<rect class="c%d" x="%d" y="%.1f" width="%.1f" height="13"/>' % (
                not ours, LEFT, y + 3, max(1, place(middle) - LEFT)))
            if len(vs) > 1:
                parts.append('<path class="e" d="M%.1f %.1fH%.1f"/>' % (
                    place(min(vs)), y + 9.5, place(max(vs))))
            parts.append(text(place(max(vs)) + 6, y + 14, show(middle)))
            y += LINE
        y += 8
    return svg(title, note + "; logarithmic, with a line from least to most",
               y + 4, parts)


def lines(title, note, curves, show):
    """Curves over counts, both axes logarithmic. curves: title -> [[count, value]]."""
    points = [p for curve in curves.values() for p in curve]
    most = max(n for n, _ in points)
    low = 10 ** math.floor(math.log10(min(v for _, v in points)))
    high = max(low * 10, 10 ** math.ceil(math.log10(max(v for _, v in points))))
    left, top, bottom = 70, 54, 300
    right = WIDTH - 20

    def x(n):
        return left + (right - left) * math.log(n) / math.log(most)

    def y(value):
        return bottom - (bottom - top) * math.log(value / low) / math.log(high / low)

    parts, step = [], low
    while step <= high * 1.01:
        parts.append('<path class="g" d="M%d %.1fH%d"/>' % (left, y(step), right))
        parts.append(text(left - 6, y(step) + 4, show(step), "s", "end"))
        step *= 10
    n = 1
    while n <= most:
        parts.append(text(x(n), bottom + 18, "{:,}".format(n), "s", "middle"))
        n *= 10
    for number, (name, curve) in enumerate(curves.items()):
        path = "L".join("%.1f %.1f" % (x(n), y(value)) for n, value in curve)
        parts.append('<path class="l k%d" d="M%s"/>' % (number % 8, path))
        at = bottom + 44 + 18 * (number // 2)
        across = left + (number % 2) * 330
        parts.append('<path class="l k%d" d="M%d %dh24"/>' % (number % 8, across, at - 4))
        parts.append(text(across + 30, at, name))
    return svg(title, note, bottom + 44 + 18 * ((len(curves) + 1) // 2), parts)


CHARTS = (  # file, title, rows (each a group; its title)
    ("requests", "Requests a second, higher is better", (
        ("requests/s, 1 client", "1 client"), ("requests/s, 16 clients", "16 clients"),
        ("requests/s, 64 clients", "64 clients"))),
    ("first-token", "Added to the time to the first token, lower is better", (
        ("first token, added, 1 client", "1 client"),
        ("first token, added, 16 clients at once", "16 clients at once"),
        ("first token, added, 16 clients at any time", "16 clients at any time"))),
    ("tokens", "Tokens a second over 256 streams, higher is better", (
        ("tokens/s, 256 streams", ""),)),
    ("gaps", "Worst gap (p99) of streams of 50 tokens a second, lower is better", (
        ("worst gap p99, 256 streams of 50 tokens/s", "256 streams"),
        ("worst gap p99, 500 streams of 50 tokens/s", "500 streams"),
        ("worst gap p99, 1000 streams of 50 tokens/s", "1,000 streams"))),
    ("memory", "Resident memory, lower is better", (
        ("memory, idle", "idle"), ("memory, 256 streams", "with 256 streams"))),
)
OURS = {"share": "neuroengine share", "listen": "neuroengine listen",
        "coroutines": "neuroengine listen, coroutines",
        "native": "the relay alone", "/v1": "the relay alone, /v1"}


def draw(directory, facts, values, curves):
    """Write all charts for which there are figures."""
    os.makedirs(directory, exist_ok=True)
    note = "%s, %d cores for all, median of %d rounds" % (
        facts["date"][:10], facts["cores"], facts["rounds"])
    for name, title, rows in CHARTS:
        groups = []
        for row, group in rows:
            found = []
            for column, got in values.get(row, {}).items():
                got = [v for v in got if v is not None and v > 0]
                if got:
                    found.append((OURS.get(column, column), got, column in OURS))
            if found:
                found.sort(key=lambda bar: -statistics.median(bar[1]))
                groups.append((group, found))
        if groups:
            write(directory, name, bars(title, note, groups,
                                        functools.partial(shown, rows[0][0])))
    if curves:
        write(directory, "curves", lines(
            "What one costs the relay, against how many there are", note, curves,
            functools.partial(shown, "")))


def write(directory, name, chart):
    with open(os.path.join(directory, name + ".svg"), "w", encoding="utf-8") as file:
        file.write(chart)
