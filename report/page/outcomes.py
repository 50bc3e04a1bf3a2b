"""Accuracies, curves and costs of the page, from results/."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from report import ka, lm, table
from report.ka_rows import is_of_a_tool

RESULTS = Path(__file__).parent.parent.parent / 'results'
HEADLINE = 'cifar10-resnet20-resnet8-12epochs'  # what README shows, too
PLACES = {('kd', 'self', 'peers'): 0, ('dense',): 1, ('lm',): 2, ('ka', 'copy'): 3, ('dfkd',): 4}
DATA = {'cifar10': 'CIFAR-10', 'cifar100': 'CIFAR-100', 'digits': 'digits'}


@dataclass
class Experiment:
    """Runs that can be compared. values: {method: {seed: last value}}, curves: {method: mean curve}."""

    key: str
    label: str
    metric: str = 'top-1, %'
    better: int = 1  # -1: less is better
    reference: str = 'the student alone'
    paradigms: tuple = ('kd', 'self', 'peers')  # of the rows that it is about
    values: dict = field(default_factory=dict)
    curves: dict = field(default_factory=dict)
    alone: dict = field(default_factory=dict)  # {method: {seed: value}} of its reference
    alone_curves: dict = field(default_factory=dict)
    teachers: dict = field(default_factory=dict)  # {method: [values]}
    epochs: int = 0
    smoke: bool = False

    def gain(self, method: str) -> tuple[float, float | None, int] | None:
        """Mean over seeds of what it is better than its reference, the deviation, the number of seeds."""
        if not (alone := self.alone.get(method)):
            return None
        gains = [self.better * gain for gain in table.gains(self.values[method], alone)]
        return statistics.mean(gains), statistics.stdev(gains) if len(gains) > 1 else None, len(gains)

    def both(self, method: str) -> list[int]:
        """The seeds that it and its reference have."""
        return sorted(self.values[method].keys() & (self.alone.get(method) or {}).keys())


def experiments() -> list[Experiment]:
    """The headline first, then the others by length."""
    made = []
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        results = table.read_results([str(folder)])
        scripts = {r.get('script') for r in results}
        if scripts & {'train_kd', 'train_dml'}:
            made += distilled(folder.name, results)
        elif scripts & {'train_ka', 'train_lm', 'train_dfkd', 'train_dense'}:
            mine = [r for r in results if r['script'] != 'train_base']
            for number, runs in enumerate(settings(folder, mine), 1):
                made += others(folder.name, runs, number)
    made = [e for e in made if e.values]
    return sorted(
        made, key=lambda e: (e.key != HEADLINE, e.smoke, PLACES[e.paradigms], -len(e.values), e.key)
    )


def distilled(name: str, results: list[dict]) -> list[Experiment]:
    groups = table.group(results)
    found: dict[tuple, Experiment] = {}
    for key, runs in groups.items():
        data, teacher, student, method, epochs = key
        if table.is_baseline(method):
            continue
        one = student.split('+')[0]
        e = found.setdefault((data, one, epochs), Experiment(name, ''))
        recipe = runs[0]['recipe']
        if teacher and not e.label or not e.label:
            schedule = ', one cycle' if recipe.get('schedule') == 'onecycle' else ''
            e.label = f'{DATA.get(data, data)}, {one}, {epochs} epochs{schedule}'
        if teacher and '→' not in e.label:
            e.label = e.label.replace(f', {one},', f', {teacher} → {one},')
        e.epochs, e.smoke = epochs, epochs < 5
        if method in e.values:
            continue  # the same method with another teacher
        alone = table.baseline_of(groups, key) or []
        fill(e, method, runs, 'top1', alone)
        e.teachers[method] = sorted({r['teacher_top1'] for r in runs if r.get('teacher_top1') and teacher})
    made = list(found.values())
    for number, e in enumerate(made[1:], 2):
        e.key += f'-{number}'
    return made


def settings(folder: Path, results: list[dict]) -> list[list[dict]]:
    """Runs that may be compared: of one task, data, student and length; the setting of most runs first."""
    if any(r['script'] == 'train_ka' for r in results):
        results = [r for r in ka.read_results([str(folder)]) if not is_of_a_tool(r)]
    keys = ('experiment', 'task', 'data', 'size', 'student', 'labelled', 'unlabelled', 'steps')
    found: dict[str, list] = {}
    for r in results:
        if r['script'] == 'train_lm' and lm.name_of(r) != r['method']:
            continue  # with other settings than the row's
        teacher = r['teacher'] if r['script'] == 'train_dfkd' else ''
        found.setdefault(repr([*map(r.get, keys), teacher]), []).append(r)
    return sorted(found.values(), key=lambda runs: -len(runs))


def others(name: str, results: list[dict], number: int = 1) -> list[Experiment]:
    """Amalgamation, language models, without data. number: which of the folder's settings."""
    e = Experiment(name, '')
    groups: dict[str, list] = {}
    for r in results:
        groups.setdefault(r['method'], []).append(r)
    first = next((runs[0] for runs in groups.values() if runs[0].get('last')), None)
    if first is None:
        return []
    script, data = first['script'], DATA.get(first['data'], first['data'])
    figure, alone = 'top1', None
    if script == 'train_lm':
        figure, alone = 'loss', 'ce'
        e.metric, e.better, e.reference = 'held-out loss, nats', -1, 'cross-entropy alone'
        e.paradigms = ('lm',)
        e.label = f'{data}, {first["steps"]} steps'
    elif script == 'train_dense':
        figure, alone, e.paradigms = (
            ('miou' if first['task'] == 'segmentation' else 'ap'),
            'alone',
            ('dense',),
        )
        e.key, e.metric = f'{name}-{first["task"]}', {'miou': 'mIoU, %', 'ap': 'AP'}[figure]
        e.label = f'{first["task"]}, {first["student"]}, {first["steps"]} steps'
    elif script == 'train_dfkd':
        e.paradigms = ('dfkd',)
        e.label = f'{data} without data, {first["teacher"]} → {first["student"]}'
    else:
        alone, e.reference, e.paradigms = 'scratch', 'a network that reads labels', ('ka', 'copy')
        many = len(first.get('teachers') or first.get('parts') or '')
        e.label = f'{data}, amalgamation of {many or "several"} teachers, {first["epochs"]} epochs'
    e.epochs = first.get('epochs', 0)
    e.key += f'-{number}' if number > 1 else ''
    if first.get('experiment', name) != name:
        e.label += f', {first["experiment"]}'
    for method, runs in groups.items():
        runs = [r for r in runs if figure in (r.get('last') or {})]
        if method in (alone, 'ensemble', 'baseline') or not runs:
            continue
        same = [r for r in groups.get(alone, []) if r.get('classes') == runs[0].get('classes')]
        fill(e, method, runs, figure, [r for r in same if figure in r['last']])
        said = [r.get('teacher') for r in runs]
        teachers = [
            t.get(figure) if isinstance(t, dict) else r.get('teacher_top1') for t, r in zip(said, runs)
        ]
        e.teachers[method] = sorted({t for t in teachers if t is not None})
    return [e]


def fill(e: Experiment, method: str, runs: list[dict], figure: str, alone: list[dict]) -> None:
    for several in (runs, alone):
        table.refuse_twins(f'{e.key}: {method}', several)
    e.values[method] = {r['seed']: r['last'][figure] for r in runs}
    e.curves[method] = mean_curve(runs)
    e.alone[method] = {r['seed']: r['last'][figure] for r in alone}
    e.alone_curves[method] = mean_curve(alone)


def mean_curve(runs: list[dict]) -> list[float]:
    return [round(statistics.mean(values), 3) for values in zip(*(r['curve'] for r in runs))]


def attach(entries: list) -> list[Experiment]:
    """Give every entry its runs and costs; the experiments."""
    found = experiments()
    steps = {r['row']: r for r in read('benchmarks-steps.json')}
    losses, lm = read('benchmarks-losses.json'), read('benchmarks-lm.json')
    for entry in entries:
        entry.runs = [e for e in found if entry.name in e.values and entry.paradigm in e.paradigms]
        if entry.paradigm in ('kd', 'self'):
            entry.cost = steps.get(entry.name)
        if entry.paradigm != 'lm':
            entry.benches = [r for r in losses if r['loss'].split()[0] == entry.path.stem]
        else:
            entry.benches = [r for r in lm if r['loss'] == entry.name]
    return found


def read(name: str) -> list[dict]:
    path = RESULTS / name
    return json.loads(path.read_text())['rows'] if path.exists() else []
