"""Amalgamate two teachers without their data: from images of another domain, and from better ones, which a
generator makes of what the teachers know (ka_losses/ood_ka.py).

    python tools/ood_ka.py --t_name resnet20 --t_model half0.pt half1.pt --s_name resnet20 \\
        --data_name shapes --ood scenes:2000

The teachers know a part of the classes each. A student per word of --images learns from them without labels,
on as many images in as many updates: made (half of every batch from a generator, which a discriminator of
patches keeps near the other domain, half of that domain), ood (the other domain alone), own (the teachers'
training images without labels, the upper reference). Students learn soft targets over all classes and the
teachers' maps (ka_losses/layerwise.py).

Writes to SAVE_ROOT/NOTE: log.txt, args.json, results.json with the table, and per student a folder with
last.pt (continued by --resume auto), best.pt, student.pt, metrics.csv, results.json; images.png shows what
was made.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision.utils import save_image  # noqa: E402

import dataset  # noqa: E402
import models  # noqa: E402
from dfkd_losses.deepinversion import BNStatistics  # noqa: E402
from engine import errors  # noqa: E402
from engine.batch import as_float  # noqa: E402
from engine.data import load_data  # noqa: E402
from engine.device import autocast, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.flags import add_common_flags, any_number, positive_int  # noqa: E402
from engine.ka_tools import (  # noqa: E402
    begin,
    check_places,
    class_teachers,
    in_order,
    part_figures,
    record_of,
    sound,
    train,
    write_table,
)
from engine.method_flags import refuse_repeated  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.recipe import math_args  # noqa: E402
from engine.record import class_names_of, fingerprint, provenance, write_json  # noqa: E402
from ka_losses.concat_kd import ConcatKD  # noqa: E402
from ka_losses.layerwise import LayerwiseKA  # noqa: E402
from ka_losses.ood_ka import OODKAGenerator, disc_loss  # noqa: E402
from models.generators import PatchDiscriminator, UpsamplingGenerator  # noqa: E402

IMAGES = ('made', 'ood', 'own')
LEVELS = (1, 2, 3)  # the stages whose maps are compared


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('amalgamation without data').add_argument
    flag('--t_name', nargs='+', required=True, metavar='NAME', help=f'teachers: {models.NAMES}')
    flag('--t_model', nargs=2, required=True, metavar='FILE', help='their checkpoints, two')
    flag('--s_name', required=True, metavar='NAME', help='students, one of the same names')
    flag('--split', choices=('contiguous', 'interleaved', 'random'), default='contiguous',
         help='which classes go together, as for train_base.py')
    flag('--ood', required=True, metavar='NAME',
         help='images of another domain: scenes, scenes:N (embedded rooms), shapes, cifar10, cifar100')
    flag('--images', nargs='+', choices=IMAGES, default=list(IMAGES), metavar='NAME',
         help=f'a student each; default {" ".join(IMAGES)}')
    flag('--s_steps', type=positive_int, default=5,
         help="a student's updates per update of the generator, default 5")
    flag('--nz', type=positive_int, default=100, help='length of the noise, default 100')
    flag('--width', type=positive_int, default=64,
         help='channels of the generator and discriminator; 64 are the authors\' 256, 128, 64 and 128, 256; '
              'default 64')
    for name, weight in (('adv', 1), ('local', 1), ('balance', 10), ('bn', 1), ('oh', 1), ('sim', 1)):
        flag(f'--w_{name}', type=any_number, default=float(weight), metavar='W',
             help=f"weight in the generator's loss, default {weight}")
    # fmt: on
    add_common_flags(parser, lr=1e-3, rate="Adam's, default 0.001; --epochs are passes over the other domain")
    return parser.parse_args()


def main():
    args = parse_args()
    refuse_repeated('--images', args.images)
    device = setup(args)
    amp = autocast(device, args.amp)
    folder, log = begin(args, f'ood_ka-{args.data_name.replace(":", "")}-{args.s_name}-s{args.seed}')
    data, _, test = load_data(args, device, log)
    if not isinstance(data, dataset.Resident):
        raise UserError(
            f'--data_name {args.data_name}: for data in memory only: shapes, patterns, cifar10, cifar100'
        )
    split, teachers, known = class_teachers(args, data, test, amp, log)
    data, test = in_order(data, split), in_order(test, split)
    size = data.images.shape[1]
    with user_errors():
        pictures = dataset.pictures(args.ood, args.img_root, size)
        if size % 8:
            raise ValueError(f'the discriminator needs sides that are multiples of 8, got {size}')
        torch.manual_seed(args.seed)
        models.build(args.s_name, len(split.classes))
        taps = [BNStatistics(net) for net in teachers]
    nothing = torch.full((len(pictures),), -1)
    ood = dataset.Resident(pictures, nothing, data.num_classes, data.mean, data.std, device)
    ood.pad = args.pad
    half = args.batch_size // 2
    if not 1 < half <= min(len(ood), len(data)):
        raise UserError(
            f'--batch_size {args.batch_size}: half of it must be from 2 to {min(len(ood), len(data))}'
        )
    log(f'{len(ood)} images of {args.ood}; the generator makes {half} per batch')
    origin = provenance(device) | class_names_of(data)
    weights = {key: value for key, value in vars(args).items() if key.startswith('w_')}
    names = ('ood', 's_steps', 'nz', 'width')
    recipe = math_args(args, script='ood_ka', student=args.s_name, parts=split.parts, **weights,
                       teachers=[fingerprint(t) for t in teachers],
                       **{key: getattr(args, key) for key in names})  # fmt: skip
    check_places(args, folder, args.images)
    write_json(folder / 'args.json', {'args': vars(args), **origin})
    facts = {'script': 'ood_ka', 'method': 'ood_ka', 'student': args.s_name, 'parts': split.parts,
             'teacher': '+'.join(t['name'] for t in known), 'data': args.data_name, 'seed': args.seed,
             'epochs': args.epochs}  # fmt: skip
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (data.mean, data.std))
    steps, kd = ood.steps(half), ConcatKD()
    read = part_figures(teachers, test, split, amp)
    rows = [{'row': 'the teachers, logits side by side', 'joint top-1': read['top1'],
             'each part, if known': read['known']}]  # fmt: skip

    for name in args.images:
        torch.manual_seed(args.seed)
        net = models.build(args.s_name, len(split.classes)).to(device)
        with torch.no_grad(), user_errors():
            img = next(ood.test_batches(2))[0]
            fms = [f(img, True).fms for f in (net.eval(), *teachers)]
            widths = [[maps[k].shape[1] for maps in fms] for k in LEVELS]
        torch.manual_seed(args.seed)
        blocks = nn.ModuleList(LayerwiseKA(s, ts) for s, *ts in widths).to(device)
        generator = UpsamplingGenerator(args.nz, size, (4 * args.width, 2 * args.width, args.width), 'pixels')
        judge = PatchDiscriminator(2 * args.width)
        generator.to(device), judge.to(device)
        opts = {
            'net': torch.optim.Adam([*net.parameters(), *blocks.parameters()], args.lr,
                                    weight_decay=args.weight_decay),
            'generator': torch.optim.Adam(generator.parameters(), args.lr, betas=(0.5, 0.999)),
            'judge': torch.optim.Adam(judge.parameters(), args.lr, betas=(0.5, 0.999)),
        }  # fmt: skip
        parts = {'net': net, 'blocks': blocks, 'generator': generator, 'judge': judge}
        parts |= {f'opt_{key}': opt for key, opt in opts.items()}
        record = record_of(folder / name, parts, recipe | {'images': name}, origin, args)
        makes = Makes(
            generator, judge, OODKAGenerator(**weights), opts, teachers, taps, args.w_local, (mean, std), amp
        )

        def batches(epoch: int, name=name):
            """The other domain's images or the teachers' own, and numbers drawn for this step."""
            rng = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.randperm(len(ood), generator=rng)
            source = data if name == 'own' else ood
            for k in range(steps):
                real = ood.crops(*centred(order[k * half : (k + 1) * half].to(device)))
                shown = []
                for _ in range(args.s_steps):
                    index = torch.randint(len(source), (half if name == 'made' else 2 * half,), generator=rng)
                    shown.append(source.crops(*augmented(index, rng, device, size)))
                yield real, shown, torch.randn(args.s_steps + 1, half, args.nz, generator=rng).to(device)

        def step(
            real: Tensor,
            shown: list,
            noise: Tensor,
            name=name,
            net=net,
            makes=makes,
            blocks=blocks,
            opts=opts,
        ):
            said = {}
            if name == 'made':
                said = makes.update(net, real, noise[0, : len(real)])
            net.train(), blocks.train()
            for img, z in zip(shown, noise[1:]):
                if name == 'made':
                    img = torch.cat([makes.images(z), img])
                with torch.no_grad(), amp():
                    all_t = [as_float(t(img, True)) for t in teachers]
                for tap in taps:
                    tap.seen.clear()
                with amp():
                    s = as_float(net(img, True))
                parts = [
                    block(s.fms[k], [t.fms[k] for t in all_t], return_terms=True)
                    for k, block in zip(LEVELS, blocks)
                ]
                terms = {key: sum(found[key] for _, found in parts) for key in parts[0][1]}
                terms['kd'] = kd(s.out, [t.out for t in all_t])
                loss = terms['kd'] + sum(value for value, _ in parts)
                sound(loss, *(t.out for t in all_t))
                opts['net'].zero_grad(set_to_none=True)
                loss.backward()
                opts['net'].step()
            return {'loss': loss, **terms, **said}

        def measure(net=net):
            return {f'test_{key}': value for key, value in part_figures([net], test, split, amp).items()}

        train(record, name, opts.values(), batches, steps, step, measure, args, log)
        log(f'{name}: {record.finish("student.pt", facts | {"images": name})}')
        last = record.history[-1]
        what = {
            'made': f'half made, half {args.ood}',
            'ood': f'{args.ood} alone',
            'own': "the teachers' images",
        }
        rows.append({'row': f'student, {what[name]}', 'joint top-1': last['test_top1'],
                     'each part, if known': last['test_known'], 'passes': args.epochs})  # fmt: skip
        if name == 'made':
            show(makes, torch.randn(32, args.nz, generator=torch.Generator().manual_seed(0)).to(device),
                 mean, std, folder / 'images.png')  # fmt: skip
    facts |= {'title': f'two teachers of {args.data_name} without its images', 'recipe': recipe}
    write_table(folder, facts, rows, origin, log)


class Makes:
    """The generator and the discriminator: one update of both, and images."""

    def __init__(self, generator, judge, loss, opts, teachers, taps, w_local, statistics, amp) -> None:
        self.generator, self.judge, self.loss, self.opts = generator, judge, loss, opts
        self.teachers, self.taps, self.w_local, self.amp = teachers, taps, w_local, amp
        self.mean, self.std = statistics

    def update(self, net: nn.Module, real: Tensor, z: Tensor) -> dict[str, Tensor]:
        """The discriminator learns to tell; the generator learns from it, the teachers and the student."""
        self.generator.train(), self.judge.train()
        with self.amp():
            x = (self.generator(z) - self.mean) / self.std
        x = x.float()
        with self.amp():
            judged = [self.judge(images).float() for images in (real, x.detach())]
        loss_d = self.w_local * disc_loss(*judged)
        sound(loss_d)
        self.opts['judge'].zero_grad(set_to_none=True)
        loss_d.backward()
        self.opts['judge'].step()
        net.eval()
        with self.amp():
            all_t = [as_float(t(x, True)) for t in self.teachers]
            out_s, d_fake = net(x).float(), self.judge(x).float()
        stats = [(tap.seen[m][0], m.running_mean, m.running_var) for tap in self.taps for m in tap.norms]
        fms = [[t.fms[k] for k in LEVELS] for t in all_t]
        loss, terms = self.loss(out_s, [t.out for t in all_t], fms, d_fake, stats, return_terms=True)
        sound(loss, *(t.out for t in all_t))
        self.opts['generator'].zero_grad(set_to_none=True)
        loss.backward()
        self.opts['generator'].step()
        return {'loss_d': loss_d, 'loss_g': loss, **{f'g_{key}': value for key, value in terms.items()}}

    @torch.no_grad()
    def images(self, z: Tensor) -> Tensor:
        with self.amp():
            return ((self.generator(z) - self.mean) / self.std).float()


def centred(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return index, torch.full((len(index), 2), 4, device=index.device), torch.zeros_like(index)


def augmented(index: Tensor, rng: torch.Generator, device, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random crops and flips; the crop moves by an eighth of the side, 4 pixels at most."""
    reach = min(size // 8, 4)
    shift = 4 + torch.randint(-reach, reach + 1, (len(index), 2), generator=rng)
    flip = torch.randint(2, (len(index),), generator=rng)
    return tuple(x.to(device) for x in (index, shift, flip))


def show(makes: Makes, z: Tensor, mean: Tensor, std: Tensor, path: Path) -> None:
    """Four rows of eight made images."""
    makes.generator.eval()
    pixels = (makes.images(z) * std + mean).clamp(0, 1).cpu().unflatten(0, (4, 8))
    sheet = pixels.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    save_image(sheet.repeat_interleave(2, 1).repeat_interleave(2, 2), path)


if __name__ == '__main__':
    errors.run(main)
