"""The tables of docs/speed.md, from results/benchmarks-*.json."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / 'results'
NAMES = {  # of what the files call shortly
    'eight students / (sum of s + T + d)':
        'eight students at once, against eight steps, one teacher forward and one batch, measured apart',
}  # fmt: skip


def rows_of(name: str) -> list[dict]:
    return json.loads((RESULTS / f'benchmarks-{name}.json').read_text())['rows']


def table(*rows: tuple) -> str:
    head, *body = (f'| {" | ".join(map(str, row))} |' for row in rows)
    return '\n'.join([head, '|---' * len(rows[0]) + '|', *body]) + '\n'


def training() -> str:
    return table(
        ('training', 'ratio', 'spread', 'wanted'),
        *((NAMES.get(r['what'], r['what']), f'{r["value"]:.2f}', f'{r["low"]:.2f} to {r["high"]:.2f}',
           f'{"<=" if r["at_most"] else ">="} {r["wanted"]:g}{"" if r["met"] else ", missed"}')
          for r in rows_of('trainer')),
    )  # fmt: skip


def losses() -> str:
    def wanted(r) -> str:
        return f'>= {r["speed_goal"]:g}' if r['speed_goal'] else ''

    return table(
        ('loss', 'size', 'times as fast', 'wanted', 'MiB', 'MiB of the plain form', 'at most', ''),
        *((r['loss'], r['size'], f'{r["speed"]:.2f}', wanted(r), f'{r["mib"]:.0f}', f'{r["mib_plain"]:.0f}',
           '' if r['mib_goal'] is None else f'{r["mib_goal"]:g}', '' if r['met'] else 'missed')
          for r in rows_of('losses')),
    )  # fmt: skip


def side_by_side() -> str:
    return table(
        ('busy programs beside it', 'students in turn', 'students on workers', 'times as fast'),
        *((r['beside'], f'{r["in_turn_ms"]:.0f} ms', f'{r["workers_ms"]:.0f} ms', f'{r["ratio"]:.2f}')
          for r in rows_of('side-by-side')),
    )  # fmt: skip


def memory() -> str:
    ordered = sorted(rows_of('lm'), key=lambda r: r['tokens'])
    return table(
        ('loss', 'tokens x classes', 'seconds', 'MiB', 'seconds of the plain form', 'MiB of the plain form'),
        *((f'`{r["loss"]}`', f'{r["tokens"]} x {r["classes"]}', f'{r["seconds"]:.1f}', f'{r["mib"]:.0f}',
           *((f'{r["plain_seconds"]:.1f}', f'{r["plain_mib"]:.0f}') if 'plain_mib' in r else ('', '')))
          for r in ordered),
    )  # fmt: skip


def images() -> str:
    return table(
        ('method', 'networks', 'ms per update', 'plain form', 'times as fast', 'spread'),
        *((f'`{r["method"]}`', {'off': 'float32', 'bf16': 'bfloat16'}[r['amp']], f'{r["ms"]:.0f}',
           f'{r["ms_plain"]:.0f}', f'{r["ratio"]:.2f}', f'{r["ratio_low"]:.2f} to {r["ratio_high"]:.2f}')
          for r in rows_of('images')),
    )  # fmt: skip


PARTS = {
    'benchmarks/training': training,
    'benchmarks/losses': losses,
    'benchmarks/side-by-side': side_by_side,
    'benchmarks/memory': memory,
    'benchmarks/images': images,
}
