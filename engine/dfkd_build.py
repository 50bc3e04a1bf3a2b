"""From the flags of train_dfkd.py to its students."""

import copy
import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

import models
from dataset import Resident, owned, pictures
from engine.device import precision
from engine.dfkd_flags import Wanted
from engine.dfkd_kinds import SOURCES
from engine.dfkd_source import Setting, Source
from engine.errors import UserError, user_errors
from engine.meter import Meter
from engine.optimise import adam, set_learning_rate, sgd
from engine.recipe import resume_point
from engine.record import Record, fingerprint, fingerprint_of
from engine.teachers import load_teachers
from methods.dfkd import Method, Recipe
from models.checkpoint import read_checkpoint


@dataclass
class Probe:
    """What a loss may be built from."""

    net_t: nn.Module  # a teacher for its hooks alone


@dataclass
class Plain:
    """What sgd asks of the flags of other scripts."""

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool = False


@dataclass
class Run:
    """One student in training: everything that belongs to it and to no other."""

    name: str
    row: Method
    recipe: Recipe
    net: nn.Module
    kd: nn.Module
    opt: torch.optim.Optimizer
    source: Source
    record: Record
    meter: Meter
    net_t: nn.Module  # its teacher: hooks belong to one method
    untouched: str  # fingerprint of it

    def done(self, epoch: float) -> float:
        """Share of the student's epochs that lie behind."""
        length = self.recipe.epochs - self.recipe.warmup
        now = epoch if self.recipe.per_step else math.floor(epoch)
        return max(now - self.recipe.warmup, 0) / length

    def factor(self, epoch: float) -> float:
        """On the student's learning rate."""
        done, recipe = self.done(epoch), self.recipe
        if recipe.sched == 'cosine':
            least = recipe.eta_min / recipe.lr
            return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2
        return 0.1 ** sum(done >= share for share in recipe.milestones)

    def set_rates(self, epoch: float) -> None:
        factor = self.factor(epoch)
        set_learning_rate(self.opt, self.recipe.lr * factor)
        self.source.rate = factor if self.recipe.sched_g == 'student' else 1.0

    def check_teacher(self) -> None:
        """The teacher is what it was: not a weight, not a running statistic, not a gradient has changed."""
        if fingerprint(self.net_t) != self.untouched or any(
            p.grad is not None for p in self.net_t.parameters()
        ):
            raise RuntimeError(f'{self.name} has changed its teacher: this is a bug of the method')


def read_teacher(args, test, amp, log) -> tuple[list[nn.Module], dict]:
    """The frozen teacher, and what the result files say of it."""
    if args.t_model:
        return load_teachers(args, test.num_classes, test, amp, log)
    torch.manual_seed(args.seed)
    with user_errors():
        net = models.build(args.t_name[0], test.num_classes).eval().requires_grad_(False)
    log('a random teacher: --dry_run without --t_model')
    facts = {'teacher': args.t_name[0], 'teacher_top1': None}
    return [net.to(test.device, memory_format=torch.channels_last)], facts


def setting_of(args, test, device, amp) -> Setting:
    """What may be known of the data: sizes, and how the teacher's images were normalised."""
    size = next(test.test_batches(2))[0].shape[-1]
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (test.mean, test.std))
    return Setting(mean, std, size, test.num_classes, device, amp)


def other_domain(args, row: Method, wanted: Wanted, setting: Setting, net_t) -> Resident | None:
    """Real images of another domain, for a row that needs them."""
    if not row.needs.ood:
        return None
    with user_errors():
        images = pictures(args.ood_name, args.img_root, setting.size)
    ood = setting.in_memory(images)
    count = wanted.options['ood_subset']
    if 0 < count < len(ood):
        ood = ood.subset(least_sure(net_t, ood, setting).topk(count).indices)
    if len(ood) < max(wanted.recipe.batch_size, wanted.recipe.synth_batch_size):
        raise UserError(f'--ood_name {args.ood_name}: has {len(ood)} images only, --batch_size is larger')
    return ood


@torch.no_grad()
def least_sure(net_t, ood: Resident, setting: Setting) -> Tensor:
    """(N,) entropy of what the teacher says."""
    found = []
    for img, _, _ in ood.test_batches(500):
        with setting.amp():
            p = net_t(img).float().softmax(dim=1)
        found.append(-torch.xlogy(p, p).sum(dim=1))
    return torch.cat(found)


def build_run(args, name: str, wanted: Wanted, folder, origin, net_s, net_t, setting: Setting) -> Run:
    """A student with its image source, optimiser and record; the record's checkpoint if there is one."""
    row, recipe, device = wanted.row, wanted.recipe, setting.device
    torch.manual_seed(args.seed)  # nothing may depend on the runs built before it
    net = copy.deepcopy(net_s)
    initial = fingerprint(net)
    net.to(device, memory_format=torch.channels_last)
    setting = replace(setting, ood=other_domain(args, row, wanted, setting, net_t))
    if not recipe.ep_steps:
        rounds = len(setting.ood) // recipe.batch_size
        recipe = replace(recipe, ep_steps=recipe.kd_steps * rounds)
    if row.needs.statistics:  # of maps that folding would leave out
        own_t = copy.deepcopy(net_t).eval()
    else:
        noise = torch.randn(2, 3, setting.size, setting.size, device=device)
        own_t = models.folded(net_t, noise, precision(setting.amp, device))
    with user_errors():
        kd = row.build(row.loss, Probe(own_t), wanted.weights, wanted.options).to(device)
        source = SOURCES[row.images.kind](
            name, row, recipe, wanted.weights, wanted.options, kd, own_t, net, setting
        )
        if not row.needs.statistics:  # hooks should see the images alone
            try_student(row, kd, net, own_t, noise, recipe)
    if row.needs.pool or (args.pool_init and hasattr(source, 'fill')):
        source.fill(read_pool(args.pool_init, setting)[-recipe.pool_max :])  # 0: all
    opt = optimiser(net, recipe)
    pool = args.pool_init and hasattr(source, 'fill') and fingerprint_of({'images': source.pool.images})
    math = {
        'script': 'train_dfkd', 'data_name': args.data_name, 'seed': args.seed, 'amp': args.amp,
        'student': args.s_name, 'initial': initial, 'teacher': args.t_name[0],
        'teacher_weights': fingerprint(net_t), 'method': name, **asdict(recipe), 'weights': wanted.weights,
        'options': wanted.options, 'ood': args.ood_name if row.needs.ood else None, 'pool_init': pool or None,
    }  # fmt: skip
    math['image_size'] = args.image_size
    if getattr(args, 'own_images', None):
        math['own_images'] = args.own_images
    if setting.ood is not None and owned(args.ood_name):
        math['own_ood'] = setting.ood.digest()
    record = Record(folder / name, {'net': net, 'opt': opt, 'source': source}, math, origin, 'test')
    record.resume(resume_point(args.resume, folder / name))
    return Run(
        name, row, recipe, net, kd, opt, source, record, Meter(name, 0, device), own_t, fingerprint(own_t)
    )


@torch.no_grad()
def try_student(row: Method, kd: nn.Module, net: nn.Module, net_t: nn.Module, x: Tensor, recipe: Recipe):
    """The student's loss once: networks that do not fit show here, before anything is trained."""
    row.student(kd, net.eval()(x, True), net_t(x, True), recipe.T)


def optimiser(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optim == 'sgd':
        return sgd(net.parameters(), Plain(recipe.lr, recipe.momentum, recipe.weight_decay))
    return adam(net.parameters(), recipe.lr, weight_decay=recipe.weight_decay)


def read_pool(path: str, setting: Setting) -> Tensor:
    """The images of --pool_save: (N, H, W, 3) bytes."""
    with user_errors():
        images = read_checkpoint(path).get('pool')
    size = setting.size
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.shape[1:] != (size, size, 3):
        raise UserError(
            f"--pool_init {path}: wanted {{'pool': (N, {size}, {size}, 3) bytes}}, see --pool_save"
        )
    return images
