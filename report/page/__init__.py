"""Write docs/index.html and a page per method, docs/page/NAME.html: `python -m report page`.

The table can be searched, filtered and sorted, and methods can be compared. A method's page shows its
formula, what it taps, its arguments, accuracy and cost, and its file, to be copied. All of it is made from
the rows, the loss files, docs/differences.md, docs/pairs.md and results/. `python -m report refresh` writes
it, too.
"""

from pathlib import Path

from engine.parser import Parser
from engine.record import write_atomic

DOCS = Path(__file__).parent.parent.parent / 'docs'


def texts(pairs_text: str | None = None) -> dict[Path, str]:
    """{file: what it must say}; pairs_text: docs/pairs.md, if it is about to change."""
    from report.page import facts, index, method, outcomes

    entries = facts.entries(pairs_text)
    found = outcomes.attach(entries)
    made = {DOCS / 'index.html': index.page(entries, found)}
    for before, entry, after in zip([entries[-1], *entries], entries, [*entries[1:], entries[0]]):
        made[DOCS / 'page' / f'{entry.key}.html'] = method.page(entry, before, after)
    return made


def left_over(made) -> list[Path]:
    """Pages of methods that are no more."""
    return sorted(path for path in (DOCS / 'page').glob('*.html') if path not in made)


def main() -> int:
    Parser(__doc__).parse_args()
    made = texts()
    (DOCS / 'page').mkdir(exist_ok=True)
    for path, text in made.items():
        if not path.exists() or path.read_bytes() != text.encode():
            write_atomic(path, text.encode())
    for path in left_over(made):
        path.unlink()
    print(f'{len(made)} pages, {sum(len(text.encode()) for text in made.values()) / 2**20:.1f} MiB: {DOCS}')
    return 0
