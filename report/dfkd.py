"""Table and figure of data-free runs: `python -m report dfkd save/NOTE ... --out FOLDER`.

    table.md      per method: how often student and teacher agree, top-1 of the last and best epoch, updates
    images.png    the last images of every method, a strip each, and real test images below

With --out a folder that has result files only, the table is written from those.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.io import ImageReadMode, read_image
from torchvision.utils import save_image

import dataset
from engine.errors import UserError, user_errors
from engine.parser import Parser
from engine.record import output_folder
from methods.dfkd import DFKD
from report.table import by_recipe, extremes, in_brackets, read_json, read_results


def mine(results: list[dict]) -> list[dict]:
    return [r for r in results if r.get('script') == 'train_dfkd']


def table(results: list[dict]) -> str:
    """A table for each data set, teacher and student; a row is a method with its seeds."""
    groups, lines = {}, []
    for r in mine(results):
        groups.setdefault((r['data'], r['teacher'], r['student']), {}).setdefault(r['method'], []).append(r)
    for methods in groups.values():
        for name, runs in list(methods.items()):
            methods[name] = by_recipe(runs)
    for (data, teacher, student), methods in groups.items():
        every = [r for recipes in methods.values() for runs in recipes.values() for r in runs]
        top1 = sorted({r['teacher_top1'] for r in every} - {None})  # a dry run may have no trained teacher
        shown = extremes(top1) if top1 else 'unknown'
        lines += [
            f'**{data}: {teacher} (top-1 {shown}) to {student}, no training image**\n',
            '| | agreement with the teacher | top-1, last epoch | best* | updates of the student | of images '
            '| share of the time | seeds |',
            '|---|---|---|---|---|---|---|---|',
        ]
        ordered = [(name, *one) for name in DFKD for one in methods.get(name, {}).items()]
        for name, label, runs in ordered:
            recipe = runs[0]['recipe']
            rounds = recipe['ep_steps'] // recipe['kd_steps']
            making = recipe['warmup' if DFKD[name].images.kind == 'fixed' else 'epochs'] * rounds
            updates = (recipe['epochs'] - recipe['warmup']) * rounds * recipe['kd_steps']
            cells = [
                f'`{name}`{in_brackets(label)}',
                extremes([r['last']['agreement'] for r in runs]),
                extremes([r['last']['top1'] for r in runs]),
                extremes([r['best']['top1'] for r in runs]),
                f'{updates:,}',
                f'{making * recipe["g_steps"]:,}',
                f'{360_000 * sum(r["hours_synth"] for r in runs) / sum(r["seconds"] for r in runs):.0f} %',
                ', '.join(str(r['seed']) for r in sorted(runs, key=lambda r: r['seed'])),
            ]
            lines.append(f'| {" | ".join(cells)} |')
        lines += [
            '',
            '\\* the best epoch, chosen on the test set, as published figures are. The share of time is what',
            'making images takes.\n',
        ]
    return '\n'.join(lines)


def figure(folders: list[Path], root: str, path: Path) -> list[str]:
    """A strip of 16 images per method, then real ones, for each data set; returns what the strips are."""
    found, strips, names = {}, [], []
    for folder in folders:
        for file in sorted(folder.glob('*/results.json')):
            if grids := sorted(file.parent.glob('images/epoch*.png')):
                result = read_json(file)
                data = result['data'], result['recipe'].get('image_size', 224)
                found.setdefault(data, []).append((file.parent.name, grids[-1]))
    for (data, size), runs in found.items():
        with user_errors():
            test = dataset.load_test(data, root, image_size=size)
        side = next(test.test_batches(2))[0].shape[-1]
        for name, grid in runs:
            strips.append(cut(read_image(str(grid), ImageReadMode.RGB), side))
            names.append(name)
        if isinstance(test, dataset.Resident):
            strips.append(test.images[:16].permute(0, 3, 1, 2))
            names.append('real')
    if not strips:  # pictures of unfinished runs only
        return names
    side = 2 * max(strip.shape[-1] for strip in strips)
    same = [interpolate(pad(strip.float() / 255, (0,) * 7 + (16 - len(strip),)), (side, side))
            for strip in strips]  # fmt: skip
    save_image(torch.cat(same), path, nrow=16)
    return names


def cut(grid: Tensor, size: int, border: int = 2) -> Tensor:
    """The first 16 images at most of a grid as save_image draws it, each `size` pixels a side."""
    tops, lefts = (range(border, length - size, size + border) for length in grid.shape[1:])
    return torch.stack([grid[:, y : y + size, x : x + size] for y in tops for x in lefts][:16])


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument('folders', nargs='+', help='of runs, or of result files')
    parser.add_argument('--out', required=True, help='folder for table.md and images.png')
    parser.add_argument('--img_root', default='./data', help='where the data lies, default ./data')
    args = parser.parse_args()
    results = mine(read_results(args.folders))
    if not results:
        raise UserError(f'no results of train_dfkd.py below {", ".join(args.folders)}')
    out = output_folder(Path(args.out))
    (out / 'table.md').write_text(table(results))
    folders = [Path(folder) for folder in args.folders]
    if any(list(folder.glob('*/images/*.png')) for folder in folders):
        print('images.png:', *figure(folders, args.img_root, out / 'images.png'))
    print(table(results))
    return 0
