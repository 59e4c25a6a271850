"""Print a Markdown table of the scores that evaluate.py wrote, or of the k-NN tests in logs.

Files with the same name are seeds of one row: a cell has their mean and, behind +-, half the
distance from the lowest to the highest.

  python docs/tables.py MAE=runs/mae-0/last.eval.json MAE=runs/mae-1/last.eval.json
  python docs/tables.py MAE=runs/mae/log.jsonl --rows trained untrained --columns knn_kind
"""

import argparse
import json
from pathlib import Path


def cell(values):
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.1f}"
    return f"{mean} +- {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else mean


def scores_of(path):
    """The scores {row: {name: score}} of a file: of a log the last k-NN test, and the one before
    training; else of this call of evaluate.py and of those before, the newest first."""
    text = Path(path).read_text()
    if path.endswith(".jsonl"):
        tests = [record for record in map(json.loads, text.splitlines()) if "rank" in record]
        return {"trained": tests[-1], "untrained": tests[0]}
    report, scores = json.loads(text), {}
    for part in [report, *report.get("before", [])]:
        for row, found in part["scores"].items():
            scores[row] = found | scores.get(row, {})
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--rows", nargs="+", default=["trained"], help="trained, untrained, raw")
    parser.add_argument("--columns", nargs="+", help='scores, such as "knn class"; default: all')
    args = parser.parse_args()
    table = {}
    for file in args.files:
        name, _, path = file.partition("=")
        for row in args.rows:
            title = name if row == "trained" else f"{name}, {row}"
            for column, score in scores_of(path).get(row, {}).items():
                table.setdefault(title, {}).setdefault(column, []).append(score)
    columns = args.columns or list(dict.fromkeys(name for row in table.values() for name in row))
    print("| | " + " | ".join(columns) + " |")
    print("| --- " * (len(columns) + 1) + "|")
    for title, row in table.items():
        print(f"| {title} | " + " | ".join(cell(row.get(name, [])) for name in columns) + " |")


if __name__ == "__main__":
    main()
