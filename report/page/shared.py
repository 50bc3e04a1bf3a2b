"""What the index and the pages of methods are put together with."""

import re
from functools import cache
from html import escape
from pathlib import Path

from report.page.facts import PARADIGMS, Entry

HERE = Path(__file__).parent
FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{{title}}</title>
<meta name="description" content="{{about}}">
<!-- Written by `python -m report refresh`. -->
<style>
{{style}}
</style>
</head>
<body>
{{body}}
<script>
{{script}}
</script>
</body>
</html>
"""


@cache
def part(name: str) -> str:
    """A file beside this one."""
    return (HERE / name).read_text().strip()


def fill(template: str, **values) -> str:
    """{{name}} replaced, once: what is put in is not looked at again."""
    return re.sub(r'\{\{(\w+)\}\}', lambda match: str(values[match[1]]), template)


def document(kind: str, heading: str, about: str, **values) -> str:
    """A whole file; kind: 'index' or 'method', whose template, style and script it has."""
    return fill(
        FRAME, title=escape(heading), about=escape(about),
        style=part('style.css') + '\n' + part(f'{kind}.css'), body=fill(part(f'{kind}.html'), **values),
        script=part(f'{kind}.js'),
    )  # fmt: skip


def text(said: str) -> str:
    return escape(said, quote=False)


def prose(said: str) -> str:
    """Text with `code`, links to arXiv, and [links](page.md) of docs/ as a page in docs/page/ needs them."""
    made = re.sub(r'`([^`]+)`', r'<code>\1</code>', text(said))
    made = re.sub(r'\[([^\]]+)\]\(([\w/-]+\.md(?:#[\w-]+)?)\)', r'<a href="../\2">\1</a>', made)
    return re.sub(
        r'arXiv:(\d{4}\.\d{4,5}|[\w.-]+/\d{7})', r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', made
    )


def paragraphs(said: list[str]) -> str:
    return ''.join(f'<p>{prose(paragraph)}</p>' for paragraph in said)


def chip(word: str) -> str:
    return f'<span class="chip">{text(word)}</span>'


def options(words: dict) -> str:
    return ''.join(f'<option value="{escape(str(key))}">{text(word)}</option>' for key, word in words.items())


def paradigm(entry: Entry) -> str:
    return PARADIGMS.get(entry.paradigm, entry.paradigm.replace('_', ' '))


def unlike(kind: str) -> str:
    """In what the networks of a pair differ."""
    return {'channels': 'channels', 'size': 'size of maps', 'depth': 'number of maps', 'networks': 'families',
            'transformer': 'transformer and convolutions'}.get(kind, kind)  # fmt: skip
