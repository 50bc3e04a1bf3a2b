"""The index of all distillation losses: one import, one row in METHODS per method.

A row says what a training step feeds the loss (feed), what its constructor is told (build), the default
weight, and, where a method needs it, what else the trainer must provide: see Method. Feeds and builds are
named functions of a line or a few, so a row reads as a sentence: "AT, each map, weight 1000, one instance per
stage". To add a method, write its file, import it here and add a row; the scripts, the tests and the tables
pick it up from there. train_kd.py trains every row but those with `peers`, which are train_dml.py's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ab import AB
from .adain import AdaINKD
from .afd import AFD
from .at import AT
from .bss import BSS
from .byot import BYOT, BYOTStudent
from .catkd import CATKD, to_cam
from .cc import CC
from .cd import CD
from .crd import CRD
from .cskd import CSKD
from .ctkd import CTKD, cosine_lambda
from .dcm import DCM, DCMStudent
from .ddgsd import DDGSD
from .dgkd import DGKD
from .dist import DIST
from .dkd import DKD
from .dlb import DLB
from .dml import DML
from .dot import DOT
from .eel import EEL
from .fcfd import FCFD, ghost_statistics
from .fitnet import FitNet
from .fsp import FSP
from .ft import FactorTransfer
from .ickd import ICKD
from .ikd import IKD
from .irg import IRG
from .kdcl import KDCL, general_weights
from .kdsvd import KDSVD
from .logits import Logits
from .lskd import LSKD
from .lwm import LwM, grad_cam
from .mgd import MGD
from .mhgd import MHGD, clipped
from .mlkd import MLKD
from .nkd import NKD
from .norm import NORM, NORMStudent
from .nst import NST
from .ofakd import OFAKD
from .ofd import OFD
from .okddip import OKDDip
from .onadvfd import OnAdvFD
from .one import ONE, Branches
from .pad import PAD
from .pkt import PKT
from .pskd import PSKD
from .quest import QuEST
from .reviewkd import ReviewKD
from .rkd import RKD
from .sad import SAD
from .sdd import SDD, local_logits
from .semckd import SemCKD
from .simkd import SimKD, SimKDStudent
from .sla import SLA, SLAStudent
from .sobolev import Sobolev, input_gradient
from .sp import SP
from .srrl import SRRL
from .st import SoftTarget
from .tfkd import TfKDReg, TfKDSelf
from .ttm import TTM
from .uskd import USKD
from .vid import VID
from .vkd import VkD
from .wsld import WSLD


# fmt: off
# feed: what one step gives the loss.  s, t: Feats of student and teacher (out, feat, fms, pres, extra); the
# stages are fms[1:], fms[0] is the stem.  b: the batch (img, target, index, views, epoch, epochs, generator,
# rng, net_s, net_t; ts: all teachers' Feats; raw: the student's before they were cast to float32; prepared:
# what `prepare` gave; student(img), teacher(img): forward passes). With `peers`, s is a list of their Feats.
def logits(kd, s, t, b):    return kd(s.out, t.out)
def labelled(kd, s, t, b):  return kd(s.out, t.out, b.target)
def curriculum(kd, s, t, b): return kd(s.out, t.out, cosine_lambda(b.epoch + 1, 1.0, max(b.epochs / 24, 1)))
def strong(kd, s, t, b):    return two_views(kd, s.out, t.out, b.student(b.views['strong']).out, b)
def team(kd, s, t, b):      return kd(s.out, [x.out for x in b.ts], b.target, generator=b.generator)
def embed(kd, s, t, b):     return kd(s.feat, t.feat)
def indexed(kd, s, t, b):   return kd(s.feat, t.feat, b.index, generator=b.generator)
def metric(kd, s, t, b):    return kd(s.feat, t.feat, b.target)
def uncertain(kd, s, t, b): return (kd.l2 if b.epoch < b.epochs // 8 else kd)(s.feat, t.feat)  # 30 of 240
def last_map(kd, s, t, b):  return kd(s.fms[-1], t.fms[-1])
def met_map(kd, s, t, b):   return kd(*meet(s.fms[-1], t.fms[-1]))
def met_pre(kd, s, t, b):   return kd(*meet(s.pres[-1], t.pres[-1]))
def masked(kd, s, t, b):    return kd(*meet(s.fms[-1], t.fms[-1]), generator=b.generator)
def reread(kd, s, t, b):    return kd(seen(s), seen(t), t.out, b.net_t.classifier_layer())
def reused(kd, s, t, b):    return kd.distance(s.extra, seen(t))
def wide(kd, s, t, b):      return kd(s.extra, t.fms[-1])
def cams(kd, s, t, b):      return kd(*(to_cam(seen(f), net.classifier_layer().weight)
                                        for f, net in ((s, b.net_s), (t, b.net_t))))
def regions(kd, s, t, b):   return kd(local_logits(seen(s), b.net_s.classifier_layer()),
                                      local_logits(seen(t), b.net_t.classifier_layer()), b.target)
def graph(kd, s, t, b):     return kd(*([f.fms[-2], f.fms[-1], f.feat, f.out] for f in (s, t)))
def all_maps(kd, s, t, b):  return kd(s.fms[1:], t.fms[1:])
def review(kd, s, t, b):    return kd(to_embedding(s.fms, s), to_embedding(t.pres, t))
def each_map(kd, s, t, b):  return sum(k(x, y) for k, x, y in zip(kd, s.fms[1:], t.fms[1:])) / len(kd)
def each_pre(kd, s, t, b):  return sum(k(x, y) for k, x, y in zip(kd, s.pres[1:], t.pres[1:])) / len(kd)
def each_met(kd, s, t, b):  return sum(
    k(*meet(x, y)) for k, x, y in zip(kd, s.fms[1:], t.fms[1:])) / len(kd)
def pre_met(kd, s, t, b):   return sum(
    k(*meet(x, y)) for k, x, y in zip(kd, s.pres[1:], t.pres[1:])) / len(kd)
def flow(kd, s, t, b):      return sum(
    k(*pair) for k, *pair in zip(kd, s.fms, s.fms[1:], t.fms, t.fms[1:])) / len(kd)
def jacobian(kd, s, t, b):  return kd(b.raw.out, None, b.img, b.target, b.prepared)
def focus(kd, s, t, b):     return kd(b.raw.out, b.raw.fms[-1], None, None, b.target, b.prepared)
def restyled(kd, s, t, b):  return kd(
    s.pres[-1], t.pres[-1], t.out, lambda fm: pooled_logits(b.net_t, fm.relu()))

# without a teacher
def own(kd, s, t, b):       return kd(s.out, b.target)
def middle(kd, s, t, b):    return kd(s.fms[-2].mean(dim=(2, 3)), s.out, b.target)
def exits(kd, s, t, b):     return kd(*s.extra, b.target)
def joint(kd, s, t, b):     return kd(s.extra, s.out, b.target)
def remembered(kd, s, t, b): return kd(s.out, b.target, b.index, b.epoch)
def deeper(kd, s, t, b):    return sum(kd(x, y) for x, y in zip(s.fms[1:], s.fms[2:]))

# peers
def mutual(kd, s, t, b):    return sum(kd(x.out, [y.out for y in s if y is not x]) for x in s)
def cyclic(kd, s, t, b):    return sum(kd(x.out, y.out, b.target) for x, y in zip(s, [s[-1], *s[:-1]]))
def pooled(kd, s, t, b):    return kd([x.out for x in s], b.target, kd.weights)
def gated(kd, s, t, b):     return kd([x.out for x in s], trunk(s[0]), b.target,
                                      slow_start(b.epoch, b.epochs))
def led(kd, s, t, b):       return kd([x.out for x in s[:-1]], [x.feat for x in s[:-1]], s[-1].out, b.target,
                                      slow_start(b.epoch, b.epochs))
# fmt: on


def dense(kd, s, t, b):
    if len(s) != 2:
        raise ValueError(f'DCM: is for two networks, got {len(s)}')
    return kd(*([*x.extra, x.out] for x in s), b.target)


def two_views(kd, out_s, out_t, strong_s, b):
    """MLKD's released code, with its cross-entropy on the strong view at 0.1 beside a weight of 0.9."""
    with torch.no_grad():
        strong_t = b.teacher(b.views['strong']).out
    return kd(out_s, out_t, strong_s, strong_t) + F.cross_entropy(strong_s, b.target) / 9


def boundary(kd, s, t, b):
    """BSS: attack the teacher, then look at the attacked images with both networks."""
    out = s.out.detach(), t.out
    attacked, valid = kd.attack(lambda x: b.teacher(x).out, b.img, *out, b.target, b.generator)
    with torch.no_grad():
        goal = b.teacher(attacked).out
    return kd(b.student(attacked).out, goal, valid)


def mixed(kd, s, t, b):
    """FCFD: two random paths through both networks, beside the student's own."""
    last = len(s.fms) - 1
    maps = [[kd.to_teacher(s.fms[k], k)] for k in range(1, last + 1)]
    outs = []
    for student_first, k in b.rng.sample([(way, k) for way in (True, False) for k in range(1, last)], 2):
        if student_first:
            rest = b.net_t.after(k, maps[k - 1][0])
            for stage, fm in zip(maps[k:], rest.fms):
                stage.append(fm)
        else:
            with ghost_statistics(b.net_s):
                rest = b.net_s.after(k, kd.to_student(t.fms[k], k))
        outs.append(rest.out)
    return kd(maps, t.fms[1:], s.out, t.out, outs, warm_up(b.epoch, b.epochs))


def same_class(kd, s, t, b):
    """CS-KD: the partners go through the network in training mode, without gradient."""
    with torch.no_grad():
        out_pair = b.student(b.views['pair']).out
    return kd(s.out, out_pair)


def both_views(kd, s, t, b):
    other = b.student(b.views['second'])
    return kd(s.out, other.out, s.feat, other.feat, b.target)


def last_batch(kd, s, t, b):
    """DLB: the last batch's second view now, against what was said of its first view then."""
    past = ()
    if kd.last is not None:
        img, target, then = kd.last
        past = (b.student(img).out, then, target)
    loss = kd(s.out, b.target, *past)
    if kd.training:
        kd.remember(b.views['second'], b.target, s.out)
    return loss


def meet(x, y):
    """For losses that compare position by position: the larger map is averaged to the smaller one's size."""
    size = (min(x.shape[2], y.shape[2]), min(x.shape[3], y.shape[3]))
    return tuple(fm if fm.shape[2:] == size else F.adaptive_avg_pool2d(fm, size) for fm in (x, y))


def to_embedding(maps, f):
    """The stages' maps, and the embedding as a map."""
    return [*maps[1:], f.feat[:, :, None, None]]


def seen(f):
    """The last map as it is averaged for the classifier (a WRN's fms[-1] is before its last batch norm)."""
    return f.pres[-1].relu()


def trunk(f):
    return f.fms[-2].mean(dim=(2, 3))


def pooled_logits(net, fm):
    return net.classifier_layer()(fm.mean(dim=(2, 3)))


# fmt: off
# build: what the constructor is told.  e: e.s and e.t, Feats of a probe batch (e.t None without a teacher,
# e.s a list with `peers`), e.net_s, e.net_t, e.train_set, e.batch_size, e.epochs, e.num_classes, and
# e.fresh(net), another network of its kind
def plain(C, e, **hp):      return C(**hp)
def last_ch(C, e, **hp):    return C(e.s.fms[-1].shape[1], e.t.fms[-1].shape[1], **hp)
def dims(C, e, **hp):       return C(e.s.feat.shape[1], e.t.feat.shape[1], **hp)
def bank(C, e, **hp):       return C(
    e.s.feat.shape[1], e.t.feat.shape[1], len(e.train_set), e.train_set.targets, **hp)
def level_ch(C, e, **hp):   return C(
    *([x.shape[1] for x in to_embedding(f.fms, f)] for f in (e.s, e.t)), **hp)
def stages(C, e, **hp):     return nn.ModuleList(C(**hp) for _ in zip(e.s.fms[1:], e.t.fms[1:]))
def stage_ch(C, e, **hp):   return nn.ModuleList(
    C(x.shape[1], y.shape[1], **hp) for x, y in zip(e.s.fms[1:], e.t.fms[1:]))
def stage_bn(C, e, **hp):   return nn.ModuleList(
    C(x.shape[1], y.shape[1], **{'margin': C.margin_from_bn(bn.weight, bn.bias), 'reduction': 'mean', **hp})
    for x, y, bn in zip(e.s.pres[1:], e.t.pres[1:], e.net_t.bn_before_relu()))
def margin_2(C, e, **hp):   return stage_ch(C, e, **{'margin': 2.0, **hp})  # the seed zoo's
def with_bn(C, e, **hp):    return last_ch(C, e, **{'use_bn': True, **hp})  # the seed zoo's on CIFAR-10
def alike(C, e, **hp):      return C(**{'normalize': False, **hp})  # the authors' for networks of one kind
def two_view(C, e, **hp):   return C(**{'two_view': True, **hp})
def depths(C, e, **hp):     return C([x.shape[1] for x in e.t.fms[1:]], **hp)
def layers(C, e, **hp):     return C(
    *([x.shape[1] for x in f.fms[1:]] for f in (e.s, e.t)), e.batch_size, **hp)
def bridges(C, e, **hp):    return C(
    *([x.shape[1] for x in f.fms[1:]] for f in (e.s, e.t)),
    [x.shape[2] / y.shape[2] for x, y in zip(e.s.fms[1:], e.t.fms[1:])], **hp)
def table(C, e, **hp):      return C(len(e.train_set), e.num_classes, **{'total_epochs': e.epochs, **hp})
def weak_head(C, e, **hp):  return C(e.s.fms[-2].shape[1], e.num_classes, **hp)
def exit_dims(C, e, **hp):  return C(
    [e.s.feat.shape[1]] + [e.s.fms[-1].shape[1]] * (len(e.s.fms) - 2), **hp)
def gate(C, e, **hp):       return C(e.s[0].fms[-2].shape[1], len(e.s), **hp)
def attention(C, e, **hp):  return C(e.s[0].feat.shape[1], **hp)
def equal_say(C, e, **hp):
    kd = C(**hp)
    kd.weights = torch.full((len(e.s),), 1 / len(e.s))  # until there are better ones
    return kd
def rivals(C, e, **hp):     return C(**hp, channels=[x.fms[-1].shape[1] for x in e.s])


# student: the network that takes the student's place
def transformed(net, kd, e): return NORMStudent(
    net, e.s.fms[-1].shape[1], e.t.fms[-1].shape[1], kd.num_repeats)
def reusing(net, kd, e):    return SimKDStudent(net, kd, e.net_t.classifier_layer(), e.t.fms[-1].shape[2:])
def rotated(net, kd, e):    return SLAStudent(net, e.s.feat.shape[1], e.num_classes)
def with_exits(net, kd, e): return BYOTStudent(net, [x.shape[1:] for x in e.s.fms[1:]], e.num_classes)


# peers: the networks that learn from each other, as one module
def separate(nets, e):      return Separate(nets)
def with_heads(nets, e):    return Separate(
    [DCMStudent([net, *(e.fresh(net) for _ in f.fms[2:])]) for net, f in zip(nets, e.s)])
# fmt: on


def without_bias(net, kd, e):
    """CAT-KD: the classifier's bias is held at 0, so that logits are averages of class activation maps."""
    bias = net.classifier_layer().bias
    with torch.no_grad():
        bias.zero_()
    bias.requires_grad_(False)
    return net


def one_trunk(nets, e):
    if len({str(net) for net in nets}) > 1:
        raise ValueError('ONE: branches of one trunk need networks of one architecture')
    return Branches(nets)


class Separate(nn.Module):
    """Networks side by side: images, or a list of one batch per network -> a list of Feats."""

    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def weights(self, k):
        """State dict of what is kept of the k-th after training."""
        net = self.nets[k]
        return (net.deployed() if hasattr(net, 'deployed') else net).state_dict()

    def forward(self, x: Tensor | list[Tensor]) -> list:
        views = [x] * len(self.nets) if isinstance(x, Tensor) else x
        return [net(view, True) for net, view in zip(self.nets, views)]


# ramp: factor on the weight, a function of the epoch (from 0) and the length of the run
def warm_up(epoch, epochs):
    return min((epoch + 1) / max(epochs / 12, 1), 1)  # DKD, FCFD: 20 of their 240 epochs


def rise(epoch, epochs):
    return min(epoch / max(epochs / 12, 1), 1)  # ReviewKD: 20 of its 240 epochs, the first without it


def fall(epoch, epochs):
    """BSS in the seed zoo: off for 10 of 200 epochs, then linear to 0 at 80 %."""
    return 0 if epoch < epochs / 20 else max(1 - 1.25 * epoch / epochs, 0)


def hill(epoch, epochs):
    """NORM: a tenth, a half, one, a half, a tenth of the weight, from epochs 0, 10, 20, 180, 210 of 240."""
    return (0.1, 0.5, 1, 0.5, 0.1)[sum(epoch >= x * epochs / 24 for x in (1, 2, 18, 21))]


def decay(epoch, epochs):
    """CD's early decay: 0.9 of the weight from 30 % of the run, 0.81 from 80 %."""
    return 0.9 ** sum(epoch >= share * epochs for share in (0.3, 0.8))


def afterwards(epoch, epochs):
    return float(epoch >= 0.3 * epochs)  # CD's early decay: the feature loss alone for 60 of 200 epochs


def late(epoch, epochs):
    return float(epoch >= epochs * 2 / 3)  # SAD: after 40 of 60 thousand steps


def slow_start(epoch, epochs):
    """ONE, OKDDip: 80 of their 300 epochs."""
    whole = max(epochs * 80 / 300, 1)
    return math.exp(-5 * (1 - min(epoch, whole) / whole) ** 2)


# prepare, pretrain_feed, start: the teacher's side
def image_gradient(net_t, t, b):
    with torch.enable_grad():
        img = b.img.detach().requires_grad_()
        return input_gradient(b.teacher(img).out, img, b.target)


def last_cam(net_t, t, b):
    with torch.enable_grad():
        fm = t.fms[-1].detach().requires_grad_()
        return grad_cam(net_t.after(len(t.fms) - 1, fm).out, fm, b.target, side='t')


def paraphrase(kd, t, b):
    return kd.pretrain_loss(t.fms[-1])


def attend(kd, t, b):
    return kd.attention_loss(t.fms[1:], b.generator)


@torch.no_grad()
def vocabulary(kd, look, e):
    """QuEST's words, from up to 256 vectors per word, as many images as that takes, not augmented."""
    maps, wanted = [], 256 * len(kd.centroids)
    for img, _, _ in e.train_set.test_batches(e.batch_size):
        fm = look(img).pres[-1]
        maps.append(meet(fm, e.s.pres[-1])[0])  # of the size that training will see
        if sum(len(m) for m in maps) * maps[0][0, 0].numel() >= wanted:
            break
    kd.fit(torch.cat(maps), generator=torch.Generator().manual_seed(0))


# optimiser, step: instead of SGD and one backward pass
def two_momenta(parameters, args):
    return DOT(parameters, args.lr, args.momentum, weight_decay=args.weight_decay)


def apart(opt, loss_ce, loss_kd, epoch):
    """DOT: a gradient for each loss."""
    opt.zero_grad(set_to_none=True)
    loss_kd.backward(retain_graph=True)
    opt.step_kd()
    opt.zero_grad(set_to_none=True)
    loss_ce.backward()
    opt.step()


def no_longer(opt, loss_ce, loss_kd, epoch):
    """MHGD: the distillation gradient of a parameter is never longer than that of cross-entropy."""
    params = [p for group in opt.param_groups for p in group['params'] if p.requires_grad]
    ce = torch.autograd.grad(loss_ce, params, retain_graph=True, allow_unused=True)
    kd = clipped(torch.autograd.grad(loss_kd, params, allow_unused=True), ce, epoch)
    for p, a, b in zip(params, ce, kd):
        p.grad = b if a is None else a if b is None else a + b
    opt.step()


# ensemble, after, optimisers, refresh: peers
def gated_logits(kd, s):
    return kd.combine(torch.stack([x.out for x in s]), trunk(s[0]))


def two_adams(kd, peers):
    adversary = torch.optim.Adam(kd.adversaries.parameters(), lr=2e-5, weight_decay=0.1)
    return {
        'adversary': adversary,
        'networks': torch.optim.Adam(peers.parameters(), lr=2e-5, weight_decay=0.1),
    }


def adversarial(kd, peers, b, opts):
    """OnAdvFD: from a fresh forward pass, a step of the adversaries, then one of the networks."""
    fms = [x.fms[-1] for x in b.peers(b.img)]
    opts['adversary'].zero_grad(set_to_none=True)
    loss = kd.adversaries.d_loss(fms)
    loss.backward()
    opts['adversary'].step()
    opts['networks'].zero_grad(set_to_none=True)
    kd.adversaries.requires_grad_(False)
    kd.adversaries.g_loss(fms).backward()
    kd.adversaries.requires_grad_(True)
    opts['networks'].step()


@torch.no_grad()
def on_held_out(kd, look):
    """KDCL's general mode: weights of the networks from held-out data."""
    if kd.mode != 'general':
        return
    held_out = look()
    if held_out is None:
        raise ValueError('KDCL: mode general weighs the networks on held-out data, --val_split gives some')
    outs, target = held_out
    kd.weights = general_weights(outs.softmax(dim=2), F.one_hot(target, outs.shape[2]))


@dataclass(frozen=True)
class Method:
    loss: type
    feed: Callable
    weight: float  # default of --lambda_kd
    build: Callable = plain
    ce: float = 1.0  # weight of cross-entropy, 0 where the loss contains it; of several rows the product
    ramp: Callable | None = None  # (epoch, epochs) -> factor on the weight; None: constant
    ce_ramp: Callable | None = None  # the same for cross-entropy
    init: int = 0  # of 200: epochs of this loss alone, before cross-entropy alone
    pretrain: int = 0  # of 200: epochs in which the loss's own modules learn, before anything else
    pretrain_feed: Callable | None = None  # (kd, t, b) -> what they minimise
    start: Callable | None = None  # (kd, look, e), once at first; look: images -> the teacher's Feats
    teacher: bool = True  # False: a student of this method alone needs none
    student: Callable | None = None  # (net, kd, e) -> the network that is trained and used instead of net
    views: tuple = ()  # further images of each batch: 'second' view, 'strong' view, 'pair' of the same class
    prepare: Callable | None = None  # (net_t, t, b) -> what the teacher gives besides, once for all students
    input_grad: bool = False  # the student's images require gradients
    whole: bool = False  # an incomplete last batch is left out
    optimiser: Callable | None = None  # (parameters, args) -> instead of SGD
    step: Callable | None = None  # (opt, loss_ce, loss_kd, epoch) -> instead of one backward pass and a step
    peers: Callable | None = None  # (nets, e) -> module from images to a list of Feats; train_dml.py only
    ensemble: Callable | None = None  # (kd, list of Feats) -> logits; None: the mean of all
    after: Callable | None = None  # (kd, peers, b, opts), a second step after the usual one
    optimisers: Callable | None = None  # (kd, peers) -> {name: optimiser} for it
    refresh: Callable | None = None  # (kd, look), each epoch; look() -> outputs and labels of held-out data
    team: bool = False  # uses all teachers, not only the first
    relational: bool = False  # relates samples: --global_relations gathers those of all processes
    one_process: str = ''  # why it cannot run on several processes; empty: it can
    eager: str = ''  # why a CUDA graph cannot repeat its step; empty: it can


BANK = 'its memory of the training set would differ between processes'
STEP = 'it has a training step of its own, which does not average over processes'
SOLVER = 'its linear algebra reads back from the device'

# fmt: off
# Weights are the seed zoo's (Knowledge-Distillation-Zoo, CIFAR-10, losses averaged over the stages) where it
# has the method, else the authors'.
METHODS = {
    'ab':       Method(AB, pre_met, 10.0, margin_2, init=50),
    'adain':    Method(AdaINKD, restyled, 1.0, last_ch),
    'afd':      Method(AFD, each_met, 500.0, stage_ch),
    'at':       Method(AT, each_map, 1000.0, stages),
    'bss':      Method(BSS, boundary, 2.0, ramp=fall),
    'byot':     Method(BYOT, exits, 1.0, exit_dims, ce=0, teacher=False, student=with_exits),
    'catkd':    Method(CATKD, cams, 0.7, alike, student=without_bias),
    'cc':       Method(CC, embed, 100.0, relational=True),
    'cd':       Method(CD, each_map, 18.0, stage_ch),
    'cd_edt':   Method(CD, each_map, 18.0, stage_ch, ramp=decay, ce_ramp=afterwards),
    'crd':      Method(CRD, indexed, 0.2, bank, one_process=BANK),
    'cskd':     Method(CSKD, same_class, 1.0, teacher=False, views=('pair',)),
    'ctkd':     Method(CTKD, curriculum, 0.9, ce=0.1),
    'dcm':      Method(DCM, dense, 1.0, ce=0, teacher=False, peers=with_heads),
    'ddgsd':    Method(DDGSD, both_views, 1.0, ce=0, teacher=False, views=('second',)),
    'dgkd':     Method(DGKD, team, 1.0, ce=0, team=True),
    'dist':     Method(DIST, logits, 2.0, relational=True),
    'dkd':      Method(DKD, labelled, 1.0, ramp=warm_up),
    'dlb':      Method(DLB, last_batch, 1.0, ce=0, teacher=False, views=('second',), one_process=BANK,
                       eager='what it keeps of a batch is another tensor at every step'),
    'dml':      Method(DML, mutual, 1.0, teacher=False, peers=separate),
    'dot':      Method(SoftTarget, logits, 0.9, ce=0.1, optimiser=two_momenta, step=apart, one_process=STEP,
                       eager='its optimiser cannot skip a step on the device'),
    'eel':      Method(EEL, metric, 1.0, dims, relational=True),
    'fcfd':     Method(FCFD, mixed, 1.0, bridges, eager='its paths are drawn by the host'),
    'fitnet':   Method(FitNet, met_map, 0.1, last_ch),
    'fsp':      Method(FSP, flow, 1.0, stages, init=50),
    'ft':       Method(FactorTransfer, met_map, 200.0, with_bn, pretrain=30, pretrain_feed=paraphrase),
    'ickd':     Method(ICKD, last_map, 2.5, last_ch),
    'ikd':      Method(IKD, each_met, 0.2, stage_ch),
    'irg':      Method(IRG, graph, 1.0, relational=True),
    'kdcl':     Method(KDCL, pooled, 1.0, equal_say, ce=0, teacher=False, peers=separate, views=('each',),
                       refresh=on_held_out),
    'kdsvd':    Method(KDSVD, all_maps, 1.0, eager=SOLVER),
    'logits':   Method(Logits, logits, 0.1),
    'lskd':     Method(LSKD, logits, 9.0, ce=0.1),
    'lwm':      Method(LwM, focus, 0.4, prepare=last_cam),
    'mgd':      Method(MGD, masked, 0.0012, last_ch),
    'mhgd':     Method(MHGD, all_maps, 1.0, depths, pretrain=40, pretrain_feed=attend, step=no_longer,
                       one_process=STEP, eager=SOLVER),
    'mlkd':     Method(MLKD, logits, 0.9, ce=0.1, relational=True),
    'mlkd_strong': Method(MLKD, strong, 0.9, two_view, ce=0.1, views=('strong',)),
    'nkd':      Method(NKD, labelled, 1.0),
    'norm':     Method(NORM, wide, 1.0, ramp=hill, student=transformed),
    'nst':      Method(NST, last_map, 10.0),
    'ofakd':    Method(OFAKD, labelled, 1.0),
    'ofd':      Method(OFD, each_pre, 0.5, stage_bn),
    'okddip':   Method(OKDDip, led, 1.0, attention, ce=0, teacher=False, peers=separate),
    'onadvfd':  Method(OnAdvFD, cyclic, 1.0, rivals, ce=0, teacher=False, peers=separate, after=adversarial,
                       optimisers=two_adams, one_process=STEP),
    'one':      Method(ONE, gated, 1.0, gate, ce=0, teacher=False, peers=one_trunk, ensemble=gated_logits),
    'pad':      Method(PAD, uncertain, 1.0, dims),
    'pkt':      Method(PKT, embed, 10000.0, relational=True),
    'pskd':     Method(PSKD, remembered, 1.0, table, ce=0, teacher=False, one_process=BANK),
    'quest':    Method(QuEST, met_pre, 1.0, last_ch, start=vocabulary),
    'reviewkd': Method(ReviewKD, review, 0.6, level_ch, ramp=rise),
    'rkd':      Method(RKD, embed, 1.0, relational=True),
    'sad':      Method(SAD, deeper, 0.1, teacher=False, ramp=late),
    'sdd':      Method(SDD, regions, 0.9, ce=0.1),
    'semckd':   Method(SemCKD, all_maps, 100.0, layers, whole=True),
    'simkd':    Method(SimKD, reused, 1.0, last_ch, ce=0, student=reusing),
    'sla':      Method(SLA, joint, 1.0, ce=0, teacher=False, student=rotated),
    'sobolev':  Method(Sobolev, jacobian, 20.0, prepare=image_gradient, input_grad=True),
    'sp':       Method(SP, each_map, 3000.0, stages, relational=True),
    'srrl':     Method(SRRL, reread, 1.0, last_ch),
    'st':       Method(SoftTarget, logits, 0.1),
    'tfkd':     Method(TfKDReg, own, 1.0, ce=0, teacher=False),
    'tfkd_self': Method(TfKDSelf, labelled, 1.0, ce=0),
    'ttm':      Method(TTM, logits, 4.0),
    'uskd':     Method(USKD, middle, 1.0, weak_head, teacher=False),
    'vid':      Method(VID, each_map, 1.0, stage_ch),
    'vkd':      Method(VkD, embed, 1.0, dims, eager=SOLVER),
    'wsld':     Method(WSLD, labelled, 2.25),
}
