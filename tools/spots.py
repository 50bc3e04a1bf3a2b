"""Where sakd's policy distils: the chance of every spot, by class, over the test images.

    python train_kd.py --kd_mode sakd --t_name resnet20 --t_model save/teacher/net.pt --s_name resnet8 \\
        --note spots
    python tools/spots.py --run save/spots/sakd --s_name resnet8 --t_name resnet20 \\
        --t_model save/teacher/net.pt --out save/spots

Spots are the stages and, last, the logits. A chance is what the policy's two numbers of a spot say once the
noise of the training is averaged out. Writes OUT/spots.json and OUT/spots.png.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import models  # noqa: E402
from engine import errors  # noqa: E402
from engine.data import read_test  # noqa: E402
from engine.device import autocast, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.flags import add_data_flags, add_machine_flags, seed_number  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.record import output_folder, provenance, write_atomic  # noqa: E402
from engine.teachers import load_teacher  # noqa: E402
from models.checkpoint import read_checkpoint  # noqa: E402
from report.plot import pyplot  # noqa: E402


def parse_args(words=None):
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument
    flag('--run', required=True, metavar='FOLDER', help='of a student that train_kd.py trained with sakd')
    flag('--s_name', required=True, metavar='NAME', help='that student')
    flag('--t_name', required=True, metavar='NAME', help='its teacher')
    flag('--t_model', required=True, metavar='FILE', help="the teacher's weights")
    flag('--out', required=True, metavar='FOLDER', help='where spots.json and spots.png go')
    flag('--seed', type=seed_number, default=2, help='changes nothing here; default 2')
    # fmt: on
    add_data_flags(parser)
    add_machine_flags(parser)
    return parser.parse_args(words)


def main():
    args = parse_args()
    device = setup(args)
    amp = autocast(device, args.amp)
    with user_errors():
        last = read_checkpoint(Path(args.run) / 'last.pt')
    found = [name for name in last.get('kd', {}) if name.endswith('policy.linear.weight')]
    if len(found) != 1:
        raise UserError(f'--run {args.run}: its last.pt has no policy of sakd')
    weight, bias = (last['kd'][found[0].removesuffix('weight') + end].float() for end in ('weight', 'bias'))
    test = read_test(args, device)
    nets = []
    for name, path in ((args.t_name, args.t_model), (args.s_name, Path(args.run) / 'student.pt')):
        with user_errors():
            net = models.build_for(path, name, test.num_classes)
        print(f'{name}: top-1 {load_teacher(net, path, test, amp)["top1"]:.2f} on the test set')
        nets.append(net.eval())
    chances, labels = [], []
    with torch.no_grad(), amp():
        for img, target, *_ in test.test_batches(250):
            both = torch.cat([net(img, True).feat.float() for net in nets], dim=1).cpu()
            if both.shape[1] != weight.shape[1]:
                raise UserError(f'--run {args.run}: its policy was made for other networks')
            two = F.linear(both, weight, bias).unflatten(1, (-1, 2))
            chances.append((two[:, :, 0] - two[:, :, 1]).sigmoid())
            labels.append(target.cpu())
    chances, labels = torch.cat(chances), torch.cat(labels)
    spots = [f'stage {k + 1}' for k in range(chances.shape[1] - 1)] + ['logits']
    names = test.class_names or [str(c) for c in range(test.num_classes)]
    by_class = {name: chances[labels == c].mean(0).tolist() for c, name in enumerate(names)}
    facts = {'spots': spots, 'chance': chances.mean(0).tolist(), 'deviation': chances.std(0).tolist(),
             'by_class': by_class, 'run_commit': last['origin']['commit'],
             'run_command': last['origin']['command']} | provenance(device)  # fmt: skip
    folder = output_folder(Path(args.out))
    write_atomic(folder / 'spots.json', json.dumps(facts, indent=1).encode())
    figure(facts, folder / 'spots.png')
    print(', '.join(f'{spot} {chance:.2f}' for spot, chance in zip(spots, facts['chance'])))


def figure(facts: dict, path: Path) -> None:
    if not (plt := pyplot(f'{path}: not drawn,')):
        return
    names = list(facts['by_class'])
    chart, axes = plt.subplots(figsize=(5, 0.3 * len(names) + 1.4), layout='constrained')
    rows = [*facts['by_class'].values(), facts['chance']]
    shown = axes.imshow(rows, vmin=0, vmax=1, cmap='viridis', aspect='auto')
    axes.set_xticks(range(len(facts['spots'])), facts['spots'])
    axes.set_yticks(range(len(rows)), [*names, 'all'])
    for i, row in enumerate(rows):
        for j, chance in enumerate(row):
            colour = 'white' if chance < 0.6 else 'black'
            axes.text(j, i, f'{chance:.2f}', ha='center', va='center', color=colour, fontsize=8)
    chart.colorbar(shown, label='chance that the policy distils here')
    chart.savefig(path, dpi=130)
    plt.close(chart)


if __name__ == '__main__':
    errors.run(main)
