"""Two result files side by side: every figure that both hold, the second one's ratio to the first, and its error."""

import json
from pathlib import Path
from statistics import median, stdev

HELP = "two result files side by side, with ratio and error"
ABOUT = ("machine", "versions")  # of a result, beside its figures
NOT_SHOWN = {*ABOUT, "parts"}  # the latter are what the rows of `all` were made of
APART = 3  # standard errors from which a difference is marked


def add_arguments(parser):
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)


def run(args):
    """Print the table; return its rows."""
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (args.first, args.second))
    for about in ABOUT:
        if first.get(about) != second.get(about):
            print(f"another {about.removesuffix('s')}: {first.get(about)} and {second.get(about)}")
    rows = list(compared(dict(series(first)), dict(series(second))))
    width = max((len(row["name"]) for row in rows), default=0)
    print(f"{'':<{width}}{args.first.stem[:14]:>16}{args.second.stem[:14]:>16}{'ratio':>10}{'error':>10}")
    for row in rows:
        cells = "".join(f"{row[key]:>{size}.4g}" for key, size in (("first", 16), ("second", 16), ("ratio", 10)))
        print(f"{row['name']:<{width}}{cells}{row['error']:>10.2g}{'  *' * row['apart']}")
    print(f"*: more than {APART} standard errors apart, or another count")
    return {"rows": rows, "passed": True}


def series(node, path=()):
    """Yield (path, [numbers]) of all figures of a result: one number for each round, or a single one.

    What stands in a list under its own "name" has that in the path; lists of figures without texts are rounds.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in NOT_SHOWN:
                yield from series(value, (*path, str(key)))
    elif isinstance(node, list) and node:
        if all(map(is_round, node)):
            rounds = [dict(series(each)) for each in node]
            yield from ((path + key, [each[key][0] for each in rounds]) for key in rounds[0])
        else:
            for place, value in enumerate(node):
                own = value.get("name", place) if isinstance(value, dict) else place
                yield from series(value, (*path, str(own)))
    elif is_round(node):
        yield path, [node]


def is_round(node):
    """Whether a node is a number, or numbers by name."""
    if isinstance(node, dict):
        return all(map(is_round, node.values()))
    return isinstance(node, (int, float)) and not isinstance(node, bool)


def compared(first, second):
    """Yield a row for every figure that both have, with the standard error of the ratio of the medians."""
    for path, values in first.items():
        middle, other = median(values), median(second.get(path, [0]))
        if middle and path in second and (middle != other or len(values) > 1):
            ratio, error = other / middle, 0.0
            for each, center in ((values, middle), (second[path], other)):
                if len(each) > 1 and center:
                    error += (stdev(each) / len(each) ** 0.5 / center) ** 2
            error = abs(ratio) * error**0.5
            row = {"name": " ".join(path), "first": middle, "second": other, "ratio": ratio, "error": error}
            yield row | {"apart": abs(ratio - 1) > APART * error}
