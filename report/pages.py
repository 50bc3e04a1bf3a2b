"""docs/methods.md and docs/flags.md: what the rows, the loss files and the parsers say."""

import argparse
import ast
import importlib
import re
from pathlib import Path
from unittest import mock

from engine import listing
from methods import KA, KD, LM, PEERS
from methods.dense import DENSE
from methods.dfkd import DFKD

ROOT = Path(__file__).parent.parent
TRAINERS = ('train_base', 'train_kd', 'train_dml', 'train_ka', 'train_lm', 'train_dfkd', 'train_dense')
OTHERS = ('tools.eval', 'tools.reproduce', 'tools.missing', 'tools.fedka', 'tools.pseudo_labels',
          'tools.subtask', 'tools.recombination', 'tools.ood_ka', 'tools.transformer_ka',
          'tools.select_mixup', 'tools.sequences', 'tools.graphs', 'tools.spots', 'tools.tree', 'tools.box',
          'tools.slim', 'tools.graft', 'tools.figures', 'tools.kdexplainer', 'tools.knowledge',
          'tools.transferability', 'tools.transferability_graph', 'dataset.download', 'report.table',
          'report.ka', 'report.figures', 'report.dfkd', 'report.dense', 'report.explain', 'report.tasks',
          'report.refresh')  # fmt: skip

# ------------------------------------------------------------------------------------------------ methods

METHODS_HEAD = """# Methods

Written by `python -m report refresh` from the rows of `methods/`, `ka_losses/`, `dfkd_losses/` and the first
lines of the loss files; `python train_kd.py --kd_mode list` prints weights, needs and the arguments of each
loss.

The weight is the default of `--lambda_kd` (`--lambda_ka`): loss = cross-entropy + weight * method, unless the
row gives cross-entropy another weight, which stands in brackets; 0 where the loss contains it. "With" names
arguments that the weight was made for where they are not the defaults of the loss's class. Weights are
those of Knowledge-Distillation-Zoo on CIFAR-10 where it has the method, else the authors'
([words](words.md)), unless [differences](differences.md) or the page of a setting says otherwise. "Maps" are
the feature maps at the end of a network's stages, "embedding" is the vector before the classifier. Stages
are averaged. The last column links to what each file is verified against and where it differs from the paper
([differences](differences.md)), and, where we found something in published code of the method, to
[errata](errata.md) (search for its file there).

In the column *needs*: "image numbers" are each image's index in the training set; "parts of the networks
themselves", classifiers or the way from a stage to the end; "further forward passes", of other views or
images; "one process": not with several under torchrun; "a look at the training set before": one pass of the
teacher; "50 of 200 epochs alone": a phase ([running](running.md)). Where cross-entropy comes "later", its
weight is 0 at first.
"""

TAUGHT = {name: method for name, method in KD.items() if method.needs.teacher}
GROUPS = {
    'A frozen teacher and a student (`train_kd.py`)': TAUGHT,
    'Self-distillation, no teacher (`train_kd.py`)': {n: m for n, m in KD.items() if n not in TAUGHT},
    'Networks that learn from each other (`train_dml.py`)': PEERS,
    'Language models (`train_lm.py`)': LM,
    'Segmentation and detection (`train_dense.py`)': DENSE,
    'Amalgamation: several teachers that know different things, no labels (`train_ka.py`)':
        KA,
    'Without data: images are made from what the teacher knows (`train_dfkd.py`)': DFKD,
}  # fmt: skip


def methods_page() -> str:
    lines, shown = [METHODS_HEAD], set()
    for title, rows in GROUPS.items():
        lines += [
            f'\n## {title}\n',
            '| method | what it does | paper | needs | weight | |',
            '|---|---|---|---|---|---|',
        ]
        for name, row in rows.items():
            facts = listing.facts(name, row)
            shown.add(facts['module'])
            lines.append(methods_line(name, row, facts))
    lines += [
        '\n## Losses to copy, and losses with a tool of their own\n',
        '| file | what it does | paper | trained by | |',
        '|---|---|---|---|---|',
    ]
    tools = {tool: tool.read_text() for tool in sorted((ROOT / 'tools').glob('*.py'))}
    for path in sorted(ROOT.glob('*_losses/[!_]*.py')):
        if f'{path.parent.name}.{path.stem}' not in shown:
            title, paper, *_ = ast.get_docstring(ast.parse(path.read_text())).split('\n\n')
            paper = ' '.join(paper.split())
            title = ' '.join(title.split()).rstrip('.')
            module = f'from {path.parent.name}.{path.stem} import'
            trained = ', '.join(link(tool) for tool, text in tools.items() if module in text)
            lines.append(
                f'| {link(path)} | {title} | {listing.short(paper)} | {trained} | {more(path.stem, path)} |'
            )
    return '\n'.join(lines) + '\n'


def methods_line(name: str, row, facts: dict) -> str:
    path = ROOT / (facts['module'].replace('.', '/') + '.py')
    shown = f'[`{name}`](../{path.relative_to(ROOT)})' if facts['module'] else f'`{name}`'
    reference = 'images that were made before' if hasattr(row, 'images') else 'cross-entropy with labels'
    what = facts['title'] or f'the reference: {reference}'
    weight = facts['weight'] + (f' (ce {facts["ce"]})' if facts['ce'] else '')
    if not hasattr(row, 'images') and (unlike := listing.unlike_defaults(row)):
        weight += f', with `{unlike}`'
    return f'| {shown} | {what} | {facts["paper"]} | {facts["needs"]} | {weight} | {more(name, path)} |'


def more(name: str, path: Path) -> str:
    """Links to where the documents say more of a method, and of what was found in code of its file."""
    differences, errata = ((ROOT / 'docs' / f'{page}.md').read_text() for page in ('differences', 'errata'))
    found = [f'[more](differences.md#{name})'] if f'<a id="{name}"></a>' in differences else []
    found += ['[errata](errata.md)'] if f'](../{path.relative_to(ROOT)})' in errata else []
    return ', '.join(found)


def link(path: Path) -> str:
    place = path.relative_to(ROOT)
    return f'[`{place}`](../{place})'


# -------------------------------------------------------------------------------------------------- flags

FLAGS_HEAD = """# Flags

Written by `python -m report refresh` from the scripts' own parsers: what `--help` says. `--a-b` means
`--a_b`; there are no abbreviations. [Running](running.md) explains how they go together.

## The training scripts

`base`, `kd`, `dml`, `ka`, `lm`, `dfkd`, `dense`: train_base.py, train_kd.py, train_dml.py, train_ka.py,
train_lm.py, train_dfkd.py, train_dense.py.

| flag | of | meaning |
|---|---|---|
"""


class Stop(Exception):
    """Carries a parser out of the script that made it."""


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a script, at the moment when it would read the command line."""

    def stop(parser, *_, **__):
        raise Stop(parser)

    module = importlib.import_module(name)
    with mock.patch.object(argparse.ArgumentParser, 'parse_known_args', stop):
        try:
            (getattr(module, 'parse_args', None) or module.main)()
        except Stop as found:
            return found.args[0]
    raise AssertionError(f'{name} reads no flags')


def flags_page() -> str:
    rows = {}
    for script in TRAINERS:
        for flag, meaning in described(parser_of(script)):
            rows.setdefault((flag, meaning), []).append(script.removeprefix('train_'))
    places = {flag: place for place, (flag, _) in reversed(list(enumerate(rows)))}  # one flag, one place
    ordered = sorted(rows.items(), key=lambda row: places[row[0][0]])
    lines = [FLAGS_HEAD.rstrip('\n')]
    for (flag, meaning), scripts in ordered:
        of = 'all' if len(scripts) == len(TRAINERS) else ', '.join(scripts)
        lines.append(f'| {flag} | {of} | {meaning} |')
    for script in OTHERS:
        lines += [f'\n## {command(script)}\n', '| flag | meaning |', '|---|---|']
        lines += [f'| {flag} | {meaning} |' for flag, meaning in described(parser_of(script))]
    return '\n'.join(lines) + '\n'


def command(name: str) -> str:
    folder, _, word = name.partition('.')
    return {'tools': f'tools/{word}.py', 'report': f'python -m report {word}'}.get(
        folder, f'python -m {name}'
    )


def described(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """[(flag, meaning)] of a parser, without --help."""
    made = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = (
            ' '.join(f'`{option}`' for option in action.option_strings)
            or f'`{action.metavar or action.dest}`'
        )
        text = parser._get_formatter()._expand_help(action) if action.help else ''
        if action.choices:
            text = f'one of {", ".join(map(str, action.choices))}' + (f'; {text}' if text else '')
        made.append((name, re.sub(r'\s+', ' ', text).replace('|', ' or ')))
    return made
