"""The tree of tdd: which classes every stage of the student has learnt to tell apart, as its teacher does.

    python train_kd.py --kd_mode tdd+st --kd_args tdd.threshold=0.8 --t_name resnet20 \\
        --t_model save/teacher/net.pt --s_name resnet8 --note trees
    python tools/tree.py --run save/trees/tdd+st --out save/trees

Groups of classes are found anew at every stage, so a class may change its company: the picture is a tree only
as far as groups fall apart from one stage to the next. Nothing is trained or evaluated here. Writes
OUT/tree.json and OUT/tree.png.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402

from engine import errors  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.record import output_folder, provenance, write_atomic  # noqa: E402
from models.checkpoint import read_checkpoint  # noqa: E402
from report.plot import pyplot  # noqa: E402


def parse_args(words=None):
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag('--run', required=True, metavar='FOLDER', help='of a student that train_kd.py trained with tdd')
    flag('--out', required=True, metavar='FOLDER', help='where tree.json and tree.png go')
    return parser.parse_args(words)


def main():
    args = parse_args()
    run = Path(args.run)
    with user_errors():
        last = read_checkpoint(run / 'last.pt')
    found = [x for name, x in last.get('kd', {}).items() if name.split('.')[-1] == 'class_to_group']
    if len(found) != 1:
        raise UserError(f'--run {args.run}: its last.pt has no groups of tdd')
    names = last['origin'].get('class_names') or [str(c) for c in range(found[0].shape[1])]
    stages = arranged(found[0].tolist())
    facts = {'stages': [[[names[c] for c in group] for group in groups] for groups in stages],
             'changes': [changes(a, b) for a, b in zip(stages, stages[1:])],
             'run_commit': last['origin']['commit'], 'run_command': last['origin']['command']}  # fmt: skip
    folder = output_folder(Path(args.out))
    facts |= provenance(torch.device('cpu'))
    write_atomic(folder / 'tree.json', json.dumps(facts, indent=1).encode())
    figure(stages, names, folder / 'tree.png')
    for number, groups in enumerate(facts['stages'], 1):
        print(f'stage {number}: ' + ' | '.join(', '.join(group) for group in groups))


def arranged(levels: list[list[int]]) -> list[list[list[int]]]:
    """Per stage the groups as lists of classes, from top to bottom with few crossings.

    levels: per stage the group of every class.
    """
    order = sorted(range(len(levels[0])), key=lambda c: ([-level.count(level[c]) for level in levels], c))
    for level in reversed(levels):  # companions together, those of the first stage above all
        first = {}
        for place, c in enumerate(order):
            first.setdefault(level[c], place)
        order.sort(key=lambda c: first[level[c]])
    stages = []
    for level in levels:
        groups = {}
        for place, c in enumerate(order):
            groups.setdefault(level[c], []).append((place, c))
        by_place = sorted(groups.values(), key=lambda group: sum(place for place, _ in group) / len(group))
        stages.append([[c for _, c in group] for group in by_place])
    return stages


def changes(before: list[list[int]], after: list[list[int]]) -> int:
    """Groups that are no part of a single group of the stage before: none in a tree."""
    return sum(not any(set(group) <= set(one) for one in before) for group in after)


def figure(stages: list[list[list[int]]], names: list[str], path: Path) -> None:
    """Stages from left to right; a box per group, as high as its classes are many."""
    if not (plt := pyplot(f'{path}: not drawn,')):
        return
    count = len(names)
    chart, axes = plt.subplots(figsize=(2.2 * len(stages) + 1, 0.3 * count + 1), layout='constrained')
    columns = [[list(range(count))], *stages]  # the root, where nothing is told apart yet
    middles = []
    for x, groups in enumerate(columns):
        top, middle = 0, []
        for number, group in enumerate(groups):
            colour = '0.9' if x == 0 else 'white' if len(group) == 1 else f'C{number % 10}'
            box = plt.Rectangle(
                (x - 0.3, top + 0.1), 0.6, len(group) - 0.2, facecolor=colour, alpha=0.35, edgecolor='black'
            )
            axes.add_patch(box)
            text = 'all classes' if x == 0 else '\n'.join(names[c] for c in group)
            axes.text(x, top + len(group) / 2, text, ha='center', va='center', fontsize=8, linespacing=1.5)
            middle.append(top + len(group) / 2)
            top += len(group)
        middles.append(middle)
    for x, (left, right) in enumerate(zip(columns, columns[1:])):
        for i, a in enumerate(left):
            for j, b in enumerate(right):
                if shared := len(set(a) & set(b)):
                    ends = [x + 0.3, x + 0.7], [middles[x][i], middles[x + 1][j]]
                    axes.plot(*ends, color='0.4', linewidth=0.8 + 0.8 * (shared - 1), solid_capstyle='butt')
    axes.set(xlim=(-0.4, len(columns) - 0.6), ylim=(count + 0.1, -0.1), yticks=[])
    axes.set_xticks(range(len(columns)), ['', *(f'stage {k}' for k in range(1, len(columns)))])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    chart.savefig(path, dpi=130)
    plt.close(chart)


if __name__ == '__main__':
    errors.run(main)
