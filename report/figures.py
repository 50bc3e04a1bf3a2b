"""Figures of an amalgamation run: `python -m report figures save/NOTE --out FOLDER`.

First the arrays that are shown are worked out from the run's checkpoints and saved (*.npz), then drawn
(*.png); where the checkpoints are gone the saved arrays are drawn again.

    space     the common feature space of cfl and the raw features beside it, t-SNE (CFL's figure)
    panels    image, student, teacher, truth, for each dense task (SBM's figure)
    curves    test accuracy per epoch
    routing   which teacher's classes the images of each part are sent to
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from engine import pictures
from engine.errors import UserError
from engine.ka_build import chosen_setting
from engine.parser import Parser
from engine.record import output_folder
from methods.ka import KA as METHODS
from report.ka import read_results
from report.plot import pyplot_or_error

IMAGES = 50  # per class, in the t-SNE figure


# ------------------------------------------------------------------------------------------------- arrays


def setting_of(folder: Path):
    """Data and teachers of a run, from what it wrote."""
    args = argparse.Namespace(**json.loads((folder / 'args.json').read_text())['args'])
    names = [name for name in args.ka_mode if name in METHODS]
    device = torch.device('cpu')
    kind = chosen_setting(args)
    return kind(args, {name: METHODS[name] for name in names}, device, lambda line: None), args


def result_of(folder: Path, name: str) -> dict:
    return json.loads((folder / name / 'results.json').read_text())


def trained(folder: Path, name: str, setting) -> torch.nn.Module:
    net = setting.student(METHODS[name])
    net.load_state_dict(torch.load(folder / name / 'student.pt', weights_only=True))
    return net.eval()


@torch.no_grad()
def collect_space(folder: Path, name: str = 'cfl') -> dict[str, np.ndarray]:
    """Features of student and teachers in the common space and raw, and their t-SNE."""
    setting, args = setting_of(folder)
    net = trained(folder, name, setting)
    classes = range(0, len(setting.split.classes), max(len(setting.split.classes) // 20, 1))
    index = torch.cat([(setting.test.targets == c).nonzero()[:IMAGES, 0] for c in classes])
    img = setting.test.crops(index, torch.full((len(index), 2), 4), torch.zeros_like(index))
    s, ts = net(img, True), setting.teachers_on(img)
    layers = tuple(args.ka_layers or METHODS[name].needs.layers)
    e = argparse.Namespace(s=s, all_t=ts, net_s=net, layers=layers)
    options = result_of(folder, name)['recipe']['method'][3]
    blocks = METHODS[name].build(METHODS[name].loss, e, **options)
    blocks.load_state_dict(torch.load(folder / name / 'ka.pt', weights_only=True))
    block = blocks.eval()[-1]  # one per stage
    raw = [f.fms[layers[-1]] if block.conv else f.feat for f in (s, *ts)]
    h_s, h_ts = block.common(raw[0], raw[1:])
    arrays = {'label': setting.test.targets[index].numpy()}
    arrays['common'] = project(torch.cat([embedded(h) for h in (h_s, *h_ts)]))
    if len({x.shape[1] for x in raw}) == 1:
        arrays['raw'] = project(torch.cat([embedded(x) for x in raw]))
    return arrays


def embedded(h: torch.Tensor) -> torch.Tensor:
    """One unit vector per image, averaged over the positions of a map."""
    h = torch.nn.functional.normalize(h.flatten(1), dim=1).view_as(h)
    return h.mean(dim=(2, 3)) if h.dim() == 4 else h


def project(x: torch.Tensor, perplexity: float = 30, steps: int = 750) -> np.ndarray:
    """Exact t-SNE to two dimensions (L. van der Maaten, G. Hinton, JMLR 2008), equal for equal input."""
    x = x.double()
    d2 = torch.cdist(x, x).square()
    # each point's kernel width by bisection: its neighbours have the wanted perplexity
    low, high = torch.full((len(x), 1), 1e-12).double(), torch.full((len(x), 1), 1e12).double()
    nothing = torch.eye(len(x), dtype=torch.bool)
    for _ in range(80):
        beta = (low * high).sqrt()
        p = torch.softmax((-d2 * beta).masked_fill(nothing, -torch.inf), dim=1)
        entropy = -(p * p.clamp(min=1e-300).log()).sum(dim=1, keepdim=True)
        wide = entropy > np.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
    p = ((p + p.T) / (2 * len(x))).clamp(min=1e-12)
    _, _, axes = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    y = (x - x.mean(dim=0)) @ axes[:2].T
    y = y / y.std() * 1e-4
    speed, gain = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        q = 1 / (1 + torch.cdist(y, y).square())
        q = q.masked_fill(nothing, 0)
        force = ((12 if step < 250 else 1) * p - (q / q.sum()).clamp(min=1e-12)) * q
        slope = 4 * (force.sum(dim=1, keepdim=True) * y - force @ y)
        gain = torch.where(slope * speed < 0, gain + 0.2, gain * 0.8).clamp(min=0.01)
        speed = (0.5 if step < 250 else 0.8) * speed - 200 * gain * slope
        y = y + speed
        y = y - y.mean(dim=0)
    return y.float().numpy()


@torch.no_grad()
def collect_panels(folder: Path, name: str = 'sbm') -> dict[str, np.ndarray]:
    """Per task what student, teacher and truth say of a few test images."""
    setting, _ = setting_of(folder)
    return setting.shows(trained(folder, name, setting))


# ------------------------------------------------------------------------------------------------ drawing


def draw_space(arrays: dict, path: Path, plt) -> None:
    spaces = [key for key in ('common', 'raw') if key in arrays]
    titles = {'common': 'common space', 'raw': 'raw features'}
    fig, axes = plt.subplots(1, len(spaces), figsize=(6 * len(spaces) + 1.6, 6), layout='constrained')
    label = arrays['label']
    classes = np.unique(label)
    colours = plt.get_cmap('tab20' if len(classes) > 10 else 'tab10').colors
    for axis, key in zip(np.atleast_1d(axes), spaces):
        clouds = arrays[key].reshape(-1, len(label), 2)
        for number, cloud in enumerate(clouds[1:]):
            for k, c in enumerate(classes):
                axis.scatter(*cloud[label == c].T, s=16, marker='^sDvP*Xp'[number], facecolors='none',
                             edgecolors=[colours[k % 20]], linewidths=0.7)  # fmt: skip
        for k, c in enumerate(classes):
            axis.scatter(*clouds[0][label == c].T, s=9, color=[colours[k % 20]])
        axis.set(title=titles[key], xticks=[], yticks=[])
    whose = ['student', *(f'teacher {i}' for i in range(1, len(clouds)))]
    dot = {'linestyle': '', 'markersize': 6}
    marks = [
        plt.Line2D(
            [], [], color='black', marker='o^sDvP*Xp'[i], fillstyle='none' if i else 'full', label=who, **dot
        )
        for i, who in enumerate(whose)
    ]
    marks += [
        plt.Line2D([], [], color=colours[k % 20], marker='o', label=f'class {c}', **dot)
        for k, c in enumerate(classes)
    ]
    fig.legend(handles=marks, loc='outside right upper', frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_panels(arrays: dict, path: Path, plt) -> None:
    tasks, images = [str(task) for task in arrays['tasks']], arrays['image']
    columns = ('student', 'teacher', 'truth')
    arrays = {'classes': len(pictures.PALETTE)} | arrays
    across = 2 if len(images) > 1 else 1  # scenes side by side
    down = -(-len(images) // across)
    fig, axes = plt.subplots(
        down * len(tasks), across * 4, figsize=(8 * across, 2.03 * down * len(tasks)), layout='constrained',
        squeeze=False,
    )  # fmt: skip
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for n in range(len(images)):
        made, left = pictures.dense(arrays, n), n % across * 4
        for row, task in enumerate(tasks):
            line = axes[n // across * len(tasks) + row, left : left + 4]
            if left == 0:
                line[0].set_ylabel(pictures.NAMES[task], fontsize=11)
            line[0].imshow(made['image'])
            for axis, who in zip(line[1:], columns):
                axis.imshow(made[f'{who}: {pictures.NAMES[task]}'])
    for axis, title in zip(axes[0], ('image', *columns) * across):
        axis.set_title(title, fontsize=12)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    fig.savefig(path, dpi=150)
    plt.close(fig)


def draw_curves(arrays: dict, path: Path, plt) -> None:
    names = [key for key in arrays if not key.startswith('level ')]
    fig, axes = plt.subplots(figsize=(7.5, 4.6), layout='constrained')
    colours = iter(plt.get_cmap('tab10').colors * 2)
    for name in sorted(names, key=lambda key: (key != 'scratch', -arrays[key][-1])):
        curve = arrays[name]
        alone = name == 'scratch'
        label = f'{"with labels" if alone else name}  {curve[-1]:.1f}'
        style = {'color': 'black', 'linewidth': 2.4} if alone else {'color': next(colours), 'linewidth': 1.6}
        axes.plot(range(1, len(curve) + 1), curve, label=label, **style)
    for name in (key for key in arrays if key.startswith('level ')):
        level = float(arrays[name])
        axes.axhline(level, color='grey', linestyle='--', linewidth=1.2, label=f'{name[6:]}  {level:.1f}')
    axes.set(xlabel='epoch', ylabel='joint test top-1 (%)', title='last epoch in the legend')
    axes.grid(alpha=0.3)
    fig.legend(loc='outside right upper', frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_routing(arrays: dict, path: Path, plt) -> None:
    names = list(arrays)
    across = min(len(names), 5)
    down = -(-len(names) // across)
    fig, axes = plt.subplots(
        down, across, figsize=(2.3 * across, 2.5 * down), layout='constrained', squeeze=False
    )
    fig.get_layout_engine().set(h_pad=0.12)
    for axis, name in zip(axes.flat, names):
        matrix = arrays[name]
        axis.imshow(matrix, vmin=0, vmax=100, cmap='Blues')
        ticks = range(len(matrix))
        axis.set(title=name, xticks=ticks, yticks=ticks)
        axis.set_xticklabels([f'{i + 1}' for i in ticks])
        axis.set_yticklabels([f'{i + 1}' for i in ticks])
        axis.title.set_fontsize(10)
        for i in ticks:
            for j in ticks:
                axis.text(j, i, f'{matrix[i, j]:.1f}', ha='center', va='center', fontsize=9,
                          color='white' if matrix[i, j] > 60 else 'black')  # fmt: skip
    for axis in axes.flat[len(names) :]:
        axis.axis('off')
    fig.supxlabel('argmax falls into part', fontsize=10)
    fig.supylabel('image is of part', fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def collect(folder: Path) -> dict[str, dict]:
    """{figure: its arrays} of everything that the run can show."""
    results = {r['method']: r for r in read_results([str(folder)])}
    ensemble = results.pop('ensemble', {'ensembles': {}})
    made = {}
    if any('routing' in r for r in results.values()):
        curves = {name: np.array(r['curve']) for name, r in results.items()}
        forms = ensemble['ensembles']
        if forms:
            name, form = next(iter(forms.items()))
            curves[f'level {name if name.startswith("source") else "ensemble " + name}'] = np.array(
                form['top1']
            )
        made['curves'] = curves
        shown = {f'ensemble {key}': form['routing'] for key, form in forms.items() if key == 'A'}
        shown |= {name: r['routing'] for name, r in results.items()}
        made['routing'] = {name: np.array(matrix) for name, matrix in shown.items()}
    if (folder / 'cfl' / 'ka.pt').exists():
        made['space'] = collect_space(folder)
    if (folder / 'sbm' / 'student.pt').exists():
        made['panels'] = collect_panels(folder)
    return made


DRAW = {'space': draw_space, 'panels': draw_panels, 'curves': draw_curves, 'routing': draw_routing}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument('folder', type=Path, help='a run of train_ka.py, or a folder with saved arrays')
    parser.add_argument('--out', type=Path, required=True, help='folder for arrays and figures')
    args = parser.parse_args()
    plt = pyplot_or_error('no figures,')
    output_folder(args.out)
    made = collect(args.folder) if (args.folder / 'args.json').exists() else {}
    for name, arrays in made.items():
        np.savez_compressed(args.out / f'{name}.npz', **arrays)
    for name, draw in DRAW.items():
        saved = args.out / f'{name}.npz'
        if saved.exists():
            with np.load(saved) as file:
                draw({key: file[key] for key in file.files}, args.out / f'{name}.png', plt)
            print(f'figure: {args.out / name}.png')
    if not any((args.out / f'{name}.npz').exists() for name in DRAW):
        raise UserError(f'{args.folder}: no run of train_ka.py, and no arrays in {args.out}')
    return 0
