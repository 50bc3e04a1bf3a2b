"""Drawings of a method's page: where student and teacher are tapped, dots per seed, curves."""

import re
import statistics
from html import escape

from report.page.facts import STAGES, Entry

COLUMNS = {
    'image': ('images', 'stem', 'stage 1', 'stage 2', 'stage 3', 'embedding', 'logits'),
    'lm': ('tokens', 'embed', 'block 1', 'block 2', 'block 3', 'hidden', 'logits'),
    'dense': ('picture', 'stem', 'stage 1', 'stage 2', 'stage 3', 'features', 'output'),
    'dfkd': ('images', 'stem', 'stage 1', 'stage 2', 'stage 3', 'embedding', 'logits'),
}
KEYS = (None, None, 1, 2, 3, 'feat', 'out')  # what taps.py calls the columns
NAMES = {1: 'stage 1', 2: 'stage 2', 3: 'stage 3', 'feat': 'the embedding', 'out': 'the logits'}
assert STAGES == 3
WIDTH, BOX, STEP, LEFT = 760, 82, 104, 16


def several(entry: Entry) -> bool:
    """Whether several teachers teach."""
    return entry.paradigm == 'ka' or bool(getattr(getattr(entry.row, 'needs', None), 'all_teachers', False))


def spoken(entry: Entry) -> str:
    """The diagram in words."""

    def of(side: str) -> str:
        return ', '.join(NAMES[key] for key in KEYS if key in entry.taps[side])

    if entry.paradigm in ('self', 'peers'):
        who = 'each network' if entry.paradigm == 'peers' else 'the student'
        text = f'The loss reads {of("s") or "nothing"} of {who}'
    else:
        teacher = 'the teachers' if several(entry) else 'the teacher'
        parts = [f'{of("s")} of the student'] if entry.taps['s'] else []
        parts += [f'{of("t")} of {teacher}'] if entry.taps['t'] else []
        text = f'The loss reads {" and ".join(parts) or "what a user hands in"}'
    more = [word for key, word in (('labels', 'the labels'), ('memory', 'what is kept of earlier batches'))
            if key in entry.needs]  # fmt: skip
    return text + (f', and {" and ".join(more)}' if more else '') + '.'


def diagram(entry: Entry) -> str:
    """Two networks, the loss between them, and a line from every place that it reads."""
    names = COLUMNS.get(entry.paradigm, COLUMNS['image'])
    if entry.paradigm == 'self':
        nets = [('student', 's', 148, 1)]
    elif entry.paradigm == 'peers':
        nets = [('network 1', 's', 34, 1), ('network 2 ...', 's', 206, 1)]
    else:
        teacher = 'teachers' if several(entry) else 'teacher'
        nets = [(teacher, 't', 34, 3 if several(entry) else 1), ('student', 's', 206, 1)]
    made, bar = [], (60, 34) if entry.paradigm == 'self' else (120, 34)
    height = 228 if entry.paradigm == 'self' else 290
    lines, dots = [], []
    for who, side, top, copies in nets:
        start = LEFT + STEP * (entry.paradigm == 'dfkd')  # where images come from is drawn on the left
        made.append(f'<text class="who" x="{start}" y="{top - 10}">{who}</text>')
        below = top > bar[0]
        for column, (word, key) in enumerate(zip(names, KEYS)):
            x = LEFT + column * STEP
            tapped = key is not None and key in entry.taps[side]
            if column:
                y = top + 22
                made.append(
                    f'<path class="flow" d="M{x - STEP + BOX} {y}H{x - 4}" marker-end="url(#arrow)"/>'
                )
            for copy in range(copies - 1, 0, -1):
                made.append(f'<rect class="box behind" x="{x + 4 * copy}" y="{top - 4 * copy}" '
                            f'width="{BOX}" height="44" rx="7"/>')  # fmt: skip
            kind = 'box tapped' if tapped else 'box'
            made.append(f'<rect class="{kind}" x="{x}" y="{top}" width="{BOX}" height="44" rx="7"/>')
            made.append(f'<text x="{x + BOX / 2:g}" y="{top + 26}">{word}</text>')
            if tapped:
                end = top if below else top + 44
                to = bar[0] + bar[1] + 5 if below else bar[0] - 5
                lines.append(f'<path class="tap" d="M{x + BOX / 2:g} {end}V{to}" marker-end="url(#tip)"/>')
                dots.append(f'<circle class="dot" cx="{x + BOX / 2:g}" cy="{end}" r="4.5"/>')
    left, right = LEFT + STEP, LEFT + 6 * STEP + BOX
    if entry.paradigm == 'dfkd':
        images = getattr(entry.row, 'images', None)
        maker = 'generator' if getattr(images, 'generator', None) else 'pixels'
        made.append(f'<rect class="box" x="{LEFT}" y="{bar[0] - 5}" width="{BOX}" height="44" rx="7"/>'
                    f'<text x="{LEFT + BOX / 2:g}" y="{bar[0] + 21}">{maker}</text>')  # fmt: skip
        for end in (80, 204):
            start = bar[0] - 5 if end < bar[0] else bar[0] + 39
            end += 3 if end < bar[0] else -3
            made.append(
                f'<path class="flow" d="M{LEFT + BOX / 2:g} {start}V{end}" marker-end="url(#arrow)"/>'
            )
        lines.append(f'<path class="tap" d="M{left} {bar[0] + 17}H{LEFT + BOX + 6}" marker-end="url(#tip)"/>')
    beside = [word for key, word in (('memory', 'memory'), ('labels', 'labels')) if key in entry.needs]
    inner = f'loss of {entry.name}' + (f', with {" and ".join(beside)}' if beside else '')
    made.append(
        f'<rect class="loss" x="{left}" y="{bar[0]}" width="{right - left}" height="{bar[1]}" rx="17"/>'
        f'<text class="in" x="{(left + right) / 2:g}" y="{bar[0] + 22}">{escape(inner)}</text>'
    )
    title = escape(spoken(entry))
    markers = ''.join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path class="{kind}" d="M0 0L8 4L0 8z"/></marker>'
        for name, kind in (('arrow', 'head'), ('tip', 'tiphead'))
    )
    return (
        f'<svg class="diagram" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">'
        f'<defs>{markers}</defs>{"".join(made)}{"".join(lines)}{"".join(dots)}</svg>'
    )


def dots(rows: list[tuple[str, str, list[float]]], metric: str) -> str:
    """A line per row with a dot per value: [(name, class, values)]."""
    values = [v for _, _, shown in rows for v in shown]
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or abs(high) * 0.01 or 1
    low, high = low - pad, high + pad
    left, width, row = 150, 560, 30
    height = row * len(rows) + 44

    def at(v: float) -> str:
        return f'{left + (v - low) / (high - low) * width:.1f}'

    made = []
    for tick in ticks(low, high):
        made.append(f'<path class="grid" d="M{at(tick)} 8V{height - 34}"/>'
                    f'<text class="tick" x="{at(tick)}" y="{height - 18}">{tick:g}</text>')  # fmt: skip
    for i, (name, kind, shown) in enumerate(rows):
        y = 8 + row * i + row / 2
        made.append(f'<text class="name" x="{left - 12}" y="{y + 4:g}">{escape(name)}</text>')
        made.append(f'<path class="grid" d="M{left} {y:g}H{left + width}"/>')
        made += [
            f'<circle class="{kind}" cx="{at(v)}" cy="{y:g}" r="5.5"><title>{v:.2f}</title></circle>'
            for v in shown
        ]
        if len(shown) > 1:
            mean = at(statistics.mean(shown))
            made.append(f'<path class="{kind} mean" d="M{mean} {y - 10:g}v20"/>')
    made.append(f'<text class="tick" x="{left + width / 2:g}" y="{height - 3}">{escape(metric)}</text>')
    said = '; '.join(f'{name}: {", ".join(f"{v:.2f}" for v in shown)}' for name, _, shown in rows)
    return (
        f'<svg class="plot" viewBox="0 0 740 {height}" role="img" aria-label="{escape(said)}">'
        f'{"".join(made)}</svg>'
    )


def curves(rows: list[tuple[str, str, list[float]]], metric: str, levels: list[float]) -> str:
    """A curve per row, which ends at the last evaluation: phases before have none; a level per teacher."""
    values = [v for _, _, curve in rows for v in curve] + levels
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or 1
    low, high = low - pad, high + pad
    count = max(len(curve) for _, _, curve in rows)
    left, top, width, height = 48, 10, 670, 200

    def place(i: int, v: float) -> str:
        return f'{left + i / max(count - 1, 1) * width:.1f} {top + (high - v) / (high - low) * height:.1f}'

    made = []
    for tick in ticks(low, high):
        y = place(0, tick).split()[1]
        made.append(f'<path class="grid" d="M{left} {y}h{width}"/>')
        made.append(f'<text class="tick end" x="{left - 8}" y="{float(y) + 4:.1f}">{tick:g}</text>')
    for level in levels:
        y = place(0, level).split()[1]
        made.append(f'<path class="level" d="M{left} {y}h{width}"/>')
    for _, kind, curve in rows:
        points = 'L'.join(place(count - len(curve) + i, v) for i, v in enumerate(curve))
        made.append(f'<path class="{kind} line" d="M{points}"/>')
    for i in range(count):
        if count <= 14 or i % (count // 10) == 0:
            x = place(i, low).split()[0]
            made.append(f'<text class="tick" x="{x}" y="{top + height + 18}">{i + 1}</text>')
    said = '; '.join(f'{name}: {", ".join(f"{v:g}" for v in curve)}' for name, _, curve in rows)
    return (
        f'<svg class="plot" viewBox="0 0 740 236" role="img" '
        f'aria-label="{escape(metric)} per evaluation. {escape(said)}">{"".join(made)}</svg>'
    )


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers between."""
    span = (high - low) / 5
    unit = 10 ** (len(re.sub(r'\..*', '', f'{span:.0f}')) - 1) if span >= 1 else 10 ** -next(
        d for d in range(1, 9) if span * 10**d >= 1
    )  # fmt: skip
    unit *= next(m for m in (1, 2, 5, 10) if unit * m >= span)
    first = int(low // unit) + 1
    return [round(unit * k, 6) for k in range(first, int(high // unit) + 1)]
