"""Curves of runs as an SVG picture, without any package: loss and k-NN accuracy, or any key of the
logs, against the number of images seen.

  python docs/plot.py runs/mae/log.jsonl                               writes runs/mae/curves.svg
  python docs/plot.py MAE=a/log.jsonl CAPI=b/log.jsonl --keys "knn_class=k-NN, %" --out knn.svg
"""

import argparse
import json
import math
from pathlib import Path

COLOURS = ["#4477cc", "#cc4455", "#339966", "#cc8822", "#8855bb", "#885533", "#888888"]
STYLE = """text { font: 12px sans-serif; fill: #333 } path { fill: none }
.axis { stroke: #888 } .grid { stroke: #8884 } .line { stroke-width: 2 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } }"""
WIDTH, HEIGHT, LEFT, TOP = 380, 220, 60, 30  # of a panel's inside, and its margins


def read_log(path, key):
    """The values of a key -> [(images seen, value)]."""
    points = []
    for line in Path(path).read_text().splitlines():
        record = json.loads(line)
        if record.get(key) is not None:
            points.append((record["images"], record[key]))
    return points


def ticks(low, high):
    """About five round numbers from low to high."""
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = min((n * unit for n in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(number):
    return f"{number / 1000:g}k" if abs(number) >= 1000 else f"{number:.6g}"


def text(x, y, words, anchor="middle"):
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def path(kind, *points, colour=""):
    steps = " L".join(points)
    return f'<path class="{kind}" stroke="{colour}" d="M{steps}"/>'


def panel(x0, label, series, colours):
    """One chart: {name: [(x, y)]} -> SVG elements, with x0 as the left side of its inside."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    left, right = min(xs), max(max(xs), min(xs) + 1)
    low, high = min(ys), max(ys)
    margin = 0.05 * (high - low) or 1
    low, high = low - margin, high + margin

    def place(x, y):
        across = x0 + WIDTH * (x - left) / (right - left)
        return f"{across:.1f},{TOP + HEIGHT * (high - y) / (high - low):.1f}"

    bottom = TOP + HEIGHT
    parts = [text(x0, TOP - 12, label, "start"), text(x0 + WIDTH / 2, bottom + 38, "images"),
             path("axis", place(left, high), place(left, low), place(right, low))]
    for y in ticks(low, high):
        down = float(place(left, y).split(",")[1])
        parts += [path("grid", place(left, y), place(right, y)),
                  text(x0 - 6, down + 4, short(y), "end")]
    for x in ticks(left, right):
        parts.append(text(place(x, low).split(",")[0], bottom + 18, short(x)))
    for name, points in series.items():
        parts.append(path("line", *[place(x, y) for x, y in points], colour=colours[name]))
    return parts


def picture(panels, names):
    """{label: {name: points}} -> the text of an SVG file with a legend on the right."""
    colours = dict(zip(names, COLOURS))
    parts = []
    for i, (label, series) in enumerate(panels.items()):
        parts += panel(LEFT + i * (WIDTH + LEFT), label, series, colours)
    x = len(panels) * (WIDTH + LEFT) + 20
    for i, (name, colour) in enumerate(colours.items()):
        y = TOP + 10 + 20 * i
        parts += [path("line", f"{x},{y}", f"{x + 20},{y}", colour=colour),
                  text(x + 26, y + 4, name, "start")]
    size = f'width="{x + 150}" height="{TOP + HEIGHT + 50}"'
    body = "\n".join([f"<style>{STYLE}</style>", *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("logs", nargs="+", metavar="[NAME=]LOG")
    parser.add_argument("--keys", nargs="+", metavar="KEY[=TITLE]",
                        help="default: loss, and k-NN of the first label")
    parser.add_argument("--out", help="default: curves.svg beside the first log")
    args = parser.parse_args()
    logs = {}
    for log in args.logs:
        name, _, path = log.rpartition("=")
        logs[name or Path(path).parent.name] = path
    first = next(iter(logs.values()))
    keys = args.keys
    if not keys:
        seen = [key for line in open(first) for key in json.loads(line)]
        keys = ["loss"] + [key for key in dict.fromkeys(seen) if key.startswith("knn_")][:1]
    panels = {}
    for key, _, title in (key.partition("=") for key in keys):
        series = {name: read_log(path, key) for name, path in logs.items()}
        series = {name: points for name, points in series.items() if points}
        if series:
            panels[title or key] = series
    out = Path(args.out or Path(first).with_name("curves.svg"))
    out.write_text(picture(panels, logs))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
