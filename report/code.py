"""Generated code: imports of the packages of losses, the block of methods in example_train_script.sh."""

import ast
import re
from pathlib import Path

from methods import KD, PEERS

SHELL = {'cd', 'test', 'time', 'kill'}  # words of the shell that a function must not replace
# what a method's networks are, where it is not the usual pair, and how many peers, where it is not two
TEACHERS = {'tfkd_self': 'T_NAME=$S_NAME T_RUN=$S_RUN '}
COUNTS = {'one': 3, 'okddip': 4}


def package(folder: Path) -> str:
    """__init__.py of a package of losses, with imports and __all__ as its files are; the rest stays."""
    path = folder / '__init__.py'
    text = path.read_text()
    tree = ast.parse(text)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    listed = next(
        node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == '__all__'
    )
    used = {node.module: [alias.name for alias in node.names] for node in imports}
    names, lines, found = [], [], {}
    for file in sorted(folder.glob('[!_]*.py')):
        classes, others = public(file)
        for name in classes:
            if (other := found.setdefault(name, file)) != file:
                raise ValueError(f'{file}: has a class {name}, as {other} has: one would hide the other')
        names += classes
        kept = [name for name in used.get(file.stem, []) if name in others]
        if classes or kept:
            lines += wrapped(f'from .{file.stem} import ', sorted({*classes, *kept}, key=order))
    here = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    here |= {node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)}
    names += [name for name in ast.literal_eval(listed.value) if name in here]
    return replaced_lines(
        text, (imports[0].lineno, imports[-1].end_lineno, lines),
        (listed.lineno, listed.end_lineno,
         ['__all__ = [', *(f'    {name!r},' for name in sorted(set(names), key=order)), ']']),
    )  # fmt: skip


def public(file: Path) -> tuple[list[str], list[str]]:
    """The classes of a file that others may use, and its functions."""
    nodes = [node for node in ast.parse(file.read_text()).body if hasattr(node, 'name')]
    names = [node.name for node in nodes if not node.name.startswith('_')]
    classes = [node.name for node in nodes if isinstance(node, ast.ClassDef) and node.name[0].isupper()]
    return classes, [name for name in names if name not in classes]


def order(name: str) -> tuple:
    """As ruff sorts: CAPITALS, then Classes, then functions."""
    return not name.isupper(), not name[0].isupper(), name


def wrapped(start: str, names: list[str], width: int = 110) -> list[str]:
    line = start + ', '.join(names)
    return [line] if len(line) <= width else [f'{start}(', *(f'    {name},' for name in names), ')']


def replaced_lines(text: str, *places: tuple[int, int, list[str]]) -> str:
    """text with lines first..last (from 1) replaced by others, at each place; # fmt: skip goes with them."""
    lines = text.splitlines()
    for first, last, new in sorted(places, reverse=True):
        lines[first - 1 : last] = new
    return '\n'.join(lines) + '\n'


def script_block() -> str:
    """A shell function per method with its weight spelled out, and the lists of their names."""
    groups = {
        '# A frozen teacher and a student.': [n for n, m in KD.items() if m.needs.teacher],
        '# The student teaches itself: these need no teacher.': [
            n for n, m in KD.items() if not m.needs.teacher
        ],
    }
    lines = []
    for title, names in groups.items():
        lines += [title, *(function(n, call(n), KD[n].weight) for n in names), '']
    lines += ['# Networks that learn from each other.']
    for name in PEERS:
        networks = ' "$S_NAME"' * COUNTS.get(name, 2)
        lines.append(f'{name + "()":12s} {{ peers {name:11s} {PEERS[name].weight:g}{networks}; }}')
    lines += ['', f"METHODS='{' '.join(KD)}'"]
    lines += [f"TEAMS='{' '.join(n for n, m in KD.items() if m.needs.all_teachers)}'"]
    lines += [f"VITS='{' '.join(n for n, m in KD.items() if m.needs.tokens)}'"]
    lines += [f"PEERS='{' '.join(PEERS)}'"]
    return '\n'.join(lines) + '\n'


def call(name: str) -> str:
    """How the script trains a method of train_kd.py."""
    return f'{TEACHERS.get(name, "")}{"team" if KD[name].needs.all_teachers else "kd"} {name}'


def function(name: str, call: str, weight: float) -> str:
    return f'{name + "_" * (name in SHELL) + "()":12s} {{ {call:14s} --lambda_kd {weight:g}; }}'


def between(text: str, begin: str, end: str, new: str, where: str) -> str:
    """text with what stands between two lines replaced."""
    pattern = re.compile(rf'(^{re.escape(begin)}\n).*?(^{re.escape(end)}$)', re.S | re.M)
    if not pattern.search(text):
        raise ValueError(f'{where} has no {begin} ... {end}')
    return pattern.sub(lambda m: m[1] + new + m[2], text, count=1)
