"""The README's tables of the benchmarks: `python -m benchmarks.table [--readme README.md]`.

Made from results/benchmarks-losses.json and results/benchmarks-trainer.json; with --readme they replace what
stands between `<!-- benchmarks:begin -->` and `<!-- benchmarks:end -->`.
"""

import argparse
import json
from pathlib import Path

from tools.table import insert

RESULTS = Path(__file__).parent.parent / 'results'


def table(results: Path = RESULTS) -> str:
    """Both tables in Markdown; a benchmark that was not run has none."""
    parts = []
    path = results / 'benchmarks-trainer.json'
    if path.exists():
        content = json.loads(path.read_text())
        lines = ['| goal | training | ratio | spread | wanted |', '|---|---|---|---|---|']
        for row in content['rows']:
            wanted = f'{"<=" if row["at_most"] else ">="} {row["wanted"]:g}'
            lines.append(f'| {row["goal"]} | {row["what"]} | {row["value"]:.2f} | {row["low"]:.2f} to '
                         f'{row["high"]:.2f} | {wanted}{"" if row["met"] else ", missed"} |')  # fmt: skip
        parts.append('\n'.join(lines))
    path = results / 'benchmarks-losses.json'
    if path.exists():
        content = json.loads(path.read_text())
        lines = [
            '| goal | loss | size | speed | wanted | MiB | plain form | at most |',
            '|---|---|---|---|---|---|---|---|',
        ]
        for row in content['rows']:
            speed = f'>= {row["speed_goal"]:g}' if row['speed_goal'] else ''
            limit = f'{row["mib_goal"]:g}' if row['mib_goal'] is not None else ''
            missed = '' if row['met'] else ' missed'
            name = f'{row["goal"]}{missed} | {row["loss"]} | {row["size"]}'
            memory = f'{row["mib"]:.0f} | {row["mib_plain"]:.0f} | {limit}'
            lines.append(f'| {name} | x{row["speed"]:.2f} | {speed} | {memory} |')
        parts.append('\n'.join(lines))
    return '\n\n'.join(parts) + '\n'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--readme', type=Path, help='file to put the tables into')
    args = parser.parse_args()
    text = table()
    if args.readme:
        insert(args.readme, 'benchmarks', text)
    print(text)


if __name__ == '__main__':
    main()
