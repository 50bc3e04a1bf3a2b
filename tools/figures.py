"""Pictures of a teacher and its students, from their checkpoints and the test set.

    python tools/figures.py --t_name resnet20 --t_model save/teacher/net.pt --s_name resnet8 \\
        --s_model save/run/st/student.pt save/run/dkd/student.pt --data_name cifar10 --out save/pictures

correlation.png: how far the mean logits of each class are from the teacher's, a panel per student. Row c of
a network's matrix is the mean logit vector of test images of class c; shown is |student - teacher| / max_diff
without its diagonal, 0 to 1 for all panels (mdistiller's figure; no correlation is computed).
tsne.png: features before the classifier of some test images, projected by exact t-SNE, equal for equal input;
a panel per network, a colour per class.
cam.png: where each network looks for the true class, on a test image of each of 8 classes. Class activation
map where the classifier is one linear layer after the mean over positions, else Grad-CAM; each map from its
least to its greatest value.
attention.png: where its last maps are large (mean square over the channels), on the same images.

Writes these, their arrays (.npz), and figures.json: for each student the largest and mean difference of the
matrices, how many test images it and the teacher say the same class of, mean KL(teacher || student), mean
difference of logits. Any two networks with the same classes can be compared. Without matplotlib cam.png and
attention.png are drawn, and of the others the arrays kept.
"""

import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import models  # noqa: E402
from engine import errors, pictures  # noqa: E402
from engine.data import read_test  # noqa: E402
from engine.device import autocast, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.flags import add_data_flags, add_machine_flags, positive_float, positive_int  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.record import output_folder, provenance, write_atomic  # noqa: E402
from engine.teachers import load_teacher  # noqa: E402
from report.figures import project  # noqa: E402
from report.plot import pyplot  # noqa: E402

WHAT = ('correlation', 'tsne', 'cam', 'attention')
ROWS = 8  # images of cam.png


def parse_args(words=None):
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument
    flag('--t_name', required=True, metavar='NAME', help=f'teacher; {models.NAMES}')
    flag('--t_model', required=True, metavar='FILE', help='its weights')
    flag('--s_name', required=True, nargs='+', metavar='NAME', help='students, or one name for all')
    flag('--s_model', required=True, nargs='+', metavar='FILE',
         help='their weights; a panel is called after the folder of its file')
    flag('--out', required=True, metavar='FOLDER', help='where pictures, arrays and figures.json go')
    flag('--what', nargs='+', choices=WHAT, default=list(WHAT), help='default all')
    flag('--max_diff', type=positive_float, default=3.0,
         help="difference of mean logits that is shown darkest; default 3, mdistiller's")
    flag('--classes', type=positive_int, default=20, help='shown by t-SNE, evenly spaced; default 20')
    flag('--images', type=positive_int, default=50, help='of each of these classes, default 50')
    flag('--normalise', action='store_true', help='t-SNE of features of length 1')
    # fmt: on
    add_data_flags(parser)
    add_machine_flags(parser)
    return parser.parse_args(words)


# ------------------------------------------------------------------------------------ from outputs to figures


def class_means(out: Tensor, target: Tensor, K: int) -> Tensor:
    """(K, K): row c is the mean of the logits (N, K) of images of class c; 0 for a class without images."""
    known = target >= 0
    sums = out.new_zeros(K, out.shape[1]).index_add_(0, target[known], out[known])
    return sums / torch.bincount(target[known], minlength=K).clamp(min=1)[:, None]


def difference(m_s: Tensor, m_t: Tensor, max_diff: float = 3.0) -> tuple[Tensor, float, float]:
    """|m_s - m_t| / max_diff with a diagonal of zeros, its maximum, its mean over all K^2 entries."""
    d = ((m_s - m_t).abs() / max_diff).fill_diagonal_(0)
    return d, float(d.max()), float(d.mean())


def agreement(out_s: Tensor, out_t: Tensor) -> dict[str, float]:
    log_s, log_t = out_s.log_softmax(dim=1), out_t.log_softmax(dim=1)
    return {
        'same_class': 100 * float((out_s.argmax(dim=1) == out_t.argmax(dim=1)).cpu().double().mean()),
        'kl': float((log_t.exp() * (log_t - log_s)).sum(dim=1).mean()),
        'logit_difference': float((out_s - out_t).abs().mean()),
    }


def cam(fm: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """Class activation maps (N, H, W): maps (N, C, H, W) by the rows (K, C) of a classifier, classes (N,)."""
    return torch.einsum('nchw,nc->nhw', fm, weight[classes])


def grad_cam(fm: Tensor, logit: Tensor) -> Tensor:
    """Positive part of the maps (N, C, H, W), weighted by the mean gradient of each image's logit (N,)."""
    (slope,) = torch.autograd.grad(logit.sum(), fm, allow_unused=True)
    if slope is None:
        raise ValueError('the logits do not come from the last maps: there is no Grad-CAM')
    return (slope.mean(dim=(2, 3), keepdim=True) * fm).sum(dim=1).relu().detach()


def attention(fm: Tensor) -> Tensor:
    """(N, H, W): the mean square over channels, of length 1 over positions; 0 for a map of zeros."""
    return F.normalize(fm.square().mean(dim=1).flatten(1), dim=1).view(len(fm), *fm.shape[2:])


def stretched(x: Tensor) -> Tensor:
    """Each map (N, H, W) from 0 to 1; a constant one becomes 0."""
    low, high = x.amin(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-30), torch.zeros_like(x))


# -------------------------------------------------------------------------------- from networks to outputs


@torch.no_grad()
def outputs(net: nn.Module, data, amp) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K) logits, (N, D) features, (N,) labels of a test set, on the CPU."""
    net.eval()
    outs, feats, targets = [], [], []
    for img, target, _ in data.test_batches(128):
        with amp():
            f = net(img, True)
        outs.append(f.out.float().cpu())
        feats.append(f.feat.float().flatten(1).cpu())
        targets.append(target.cpu())
    return torch.cat(outs), torch.cat(feats), torch.cat(targets)


def looks(net: nn.Module, img: Tensor, target: Tensor) -> tuple[Tensor, str]:
    """Where a network looks for each image's true class, (N, H, W), and by which of the two ways."""
    f = net.eval()(img.clone().requires_grad_(), True)
    fm = f.fms[-1]
    if fm.dim() != 4:
        raise ValueError('the network has no maps (N, C, H, W): there is no class activation map')
    for layer in reversed([m for m in net.modules() if isinstance(m, nn.Linear)]):
        if (layer.out_features, layer.in_features) == (f.out.shape[1], fm.shape[1]):
            with torch.no_grad():
                if torch.allclose(layer(fm.mean(dim=(2, 3))), f.out, rtol=1e-3, atol=1e-3):
                    return cam(fm, layer.weight, target), 'CAM'
    return grad_cam(fm, f.out.gather(1, target[:, None])[:, 0]), 'Grad-CAM'


def attends(net: nn.Module, img: Tensor, target: Tensor) -> tuple[Tensor, str]:
    """Where its last maps are large, (N, H, W), whatever the class."""
    with torch.no_grad():
        fm = net.eval()(img, True).fms[-1]
    if fm.dim() != 4:
        raise ValueError('the network has no maps (N, C, H, W): there is no attention')
    return attention(fm.float()), 'attention'


def chosen(target: Tensor, classes: int, images: int) -> Tensor:
    """Positions of the first images of evenly spaced classes."""
    K = int(target.max()) + 1
    n = min(classes, K)
    spaced = [i * K // n for i in range(n)]
    return torch.cat([(target == c).nonzero()[:images, 0] for c in spaced])


def activation_maps(args, name: str, look, nets: list[nn.Module], test, target: Tensor):
    """(arrays of the figure, by which way each network's maps are made); None where a network has no maps."""
    img, target = pictures_of(test, chosen(target, ROWS, 1))
    try:
        maps, ways = zip(*(look(net, img, target) for net in nets))
    except ValueError as error:
        if args.what != list(WHAT):
            raise UserError(f'--what {name}: {error}') from None
        print(f'no {name}.png: {error}')
        return None
    size = img.shape[2:]
    maps = [F.interpolate(stretched(x.float())[:, None], size, mode='bilinear')[:, 0] for x in maps]
    arrays = {'image': img, 'maps': torch.stack(maps).detach(), 'label': target}
    return {key: x.float().cpu().numpy() for key, x in arrays.items()}, ways


def pictures_of(data, index: Tensor) -> tuple[Tensor, Tensor]:
    """(images, labels) at these positions of the test set, as networks get them."""
    found = {}
    wanted = set(index.tolist())
    for img, target, number in data.test_batches(128):
        for k, i in enumerate(number.tolist()):
            if i in wanted:
                found[i] = img[k], target[k]
        if len(found) == len(wanted):
            break
    return tuple(torch.stack([found[i][part] for i in index.tolist()]) for part in (0, 1))


# ------------------------------------------------------------------------------------------------ drawing


def draw_correlation(arrays: dict, path: Path, names: list[str], figures: list[dict], plt) -> None:
    panels = arrays['difference']
    fig, axes = plt.subplots(
        1, len(panels), figsize=(3.7 * len(panels) + 1, 4.6), layout='constrained', squeeze=False
    )
    for axis, d, name, said in zip(axes[0], panels, names, figures):
        shown = axis.imshow(d, vmin=0, vmax=1, cmap='PuBuGn')
        axis.set(title=f'{name}\nlargest {said["max"]:.3f}, mean {said["mean"]:.4f}',
                 xlabel='logit of class')  # fmt: skip
    axes[0][0].set_ylabel('image is of class')
    fig.colorbar(
        shown, ax=axes[0].tolist(), shrink=0.8, label=f'|student - teacher| / {float(arrays["max_diff"]):g}'
    )
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_tsne(arrays: dict, path: Path, names: list[str], title: str, plt) -> None:
    points, label = arrays['points'], arrays['label']
    fig, axes = plt.subplots(1, len(points), figsize=(4.2 * len(points) + 1.1, 4.5), layout='constrained',
                             squeeze=False)  # fmt: skip
    colours = plt.get_cmap('tab20' if len(np.unique(label)) > 10 else 'tab10').colors
    for axis, cloud, name in zip(axes[0], points, names):
        for k, c in enumerate(np.unique(label)):
            of = arrays['classes'][c] if len(arrays['classes']) else f'class {c}'
            axis.scatter(*cloud[label == c].T, s=7, color=[colours[k % len(colours)]],
                         label=of if axis is axes[0][0] else None)  # fmt: skip
        axis.set(title=name, xticks=[], yticks=[])
    fig.suptitle(title, fontsize=11)
    fig.legend(loc='outside right upper', frameon=False, fontsize=8, markerscale=2)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_maps(arrays: dict, path: Path, titles: list[str]) -> None:
    rows = []
    for image, *maps in zip(arrays['image'], *arrays['maps']):
        low = image.min()
        shown = (image - low) / max(float(image.max() - low), 1e-12)
        grey = np.repeat(shown.mean(axis=0, keepdims=True), 3, axis=0)
        row = {'image': pictures.image(shown)}
        for title, x in zip(titles, maps):
            warm = pictures.heat(x).transpose(2, 0, 1) / 255
            row[title] = pictures.image(0.5 * grey + 0.5 * warm)
        rows.append(row)
    write_atomic(path, pictures.png(pictures.grid(rows)))


def save(folder: Path, name: str, arrays: dict) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_atomic(folder / f'{name}.npz', file.getvalue())


# ------------------------------------------------------------------------------------------------ the script


def main():
    args = parse_args()
    args.seed = 0  # nothing is drawn by chance here
    s_names = args.s_name * len(args.s_model) if len(args.s_name) == 1 else args.s_name
    if len(s_names) != len(args.s_model):
        raise UserError(f'--s_name: {len(args.s_name)} names for {len(args.s_model)} files')
    plt = None
    if {'correlation', 'tsne'} & set(args.what):
        plt = pyplot('no correlation.png and tsne.png, their arrays only:')
    device = setup(args)
    amp, test, folder = autocast(device, args.amp), read_test(args, device), output_folder(Path(args.out))
    nets, titles, said = [], [], []
    for name, path in zip((args.t_name, *s_names), (args.t_model, *args.s_model)):
        with user_errors():
            net = models.build_for(path, name, test.num_classes)
        top1 = load_teacher(net, path, test, amp)['top1']
        nets.append(net)
        label = Path(path).resolve().parent.name if said else 'teacher'
        taken = [title.partition(', ')[0] for title in titles]  # panels are called by it
        label += f' {sum(x.startswith(label) for x in taken) + 1}' if label in taken else ''
        titles.append(f'{label}, {name}, {top1:.1f} %')
        said.append({'name': name, 'file': str(path), 'top1': top1})
    outs, feats, targets = zip(*(outputs(net, test, amp) for net in nets))
    means = [class_means(out, targets[0], test.num_classes) for out in outs]
    if missing := int((torch.bincount(targets[0].clamp(min=0), minlength=test.num_classes) == 0).sum()):
        print(f'{missing} classes have no test images: their rows are 0')
    differences = [difference(m, means[0], args.max_diff) for m in means[1:]]
    for row, (_, most, mean), out in zip(said[1:], differences, outs[1:]):
        row |= {'max': most, 'mean': mean, **agreement(out, outs[0])}
    table(titles, said)

    made = []
    if 'correlation' in args.what:
        arrays = {'means': torch.stack(means).numpy(), 'max_diff': np.array(args.max_diff),
                  'difference': torch.stack([d for d, *_ in differences]).numpy()}  # fmt: skip
        save(folder, 'correlation', arrays)
        if plt:
            draw_correlation(arrays, folder / 'correlation.png', titles[1:], said[1:], plt)
            made.append('correlation')
    if 'tsne' in args.what:
        index = chosen(targets[0], args.classes, args.images)
        if len(index) < 10:
            raise UserError(f't-SNE of {len(index)} images: needs 10 or more')
        shown = [feat[index] for feat in feats]
        shown = [F.normalize(x, dim=1) for x in shown] if args.normalise else shown
        perplexity = min(30.0, (len(index) - 1) / 3)
        points = np.stack([project(x, perplexity) for x in shown])
        names = np.array(getattr(test, 'class_names', None) or [])
        arrays = {
            'points': points,
            'label': targets[0][index].numpy(),
            'index': index.numpy(),
            'classes': names,
        }
        save(folder, 'tsne', arrays)
        how = 'of length 1' if args.normalise else 'as they are'
        title = f't-SNE of features {how}, {len(index)} test images, perplexity {perplexity:.3g}'
        if plt:
            draw_tsne(arrays, folder / 'tsne.png', titles, title, plt)
            made.append('tsne')
    for name, look in (('cam', looks), ('attention', attends)):
        if name in args.what and (seen := activation_maps(args, name, look, nets, test, targets[0])):
            arrays, ways = seen
            save(folder, name, arrays)
            names = [f'{title.partition(",")[0]}: {way}' for title, way in zip(titles, ways)]
            draw_maps(arrays, folder / f'{name}.png', names)
            made.append(name)
    facts = {'script': 'figures', 'data': args.data_name, 'max_diff': args.max_diff, 'teacher': said[0],
             'students': said[1:], **provenance(device)}  # fmt: skip
    write_atomic(folder / 'figures.json', (json.dumps(facts, indent=1) + '\n').encode())
    for name in made:
        print(f'figure: {folder / name}.png')


def table(titles: list[str], said: list[dict]) -> None:
    width = max(map(len, titles))
    print(f'{"":{width}}  largest    mean  same class      KL  logits')
    for title, row in zip(titles[1:], said[1:]):
        print(f'{title:{width}}  {row["max"]:7.4f}  {row["mean"]:6.4f}  {row["same_class"]:8.2f} %  '
              f'{row["kl"]:6.4f}  {row["logit_difference"]:6.4f}')  # fmt: skip


if __name__ == '__main__':
    errors.run(main)
