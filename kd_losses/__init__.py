"""The index of all distillation losses: one import, one row in METHODS per method.

A row says what a training step feeds the loss (feed), what its constructor is told (build), and the default
weight. Feeds and builds are named one-line functions, so a row reads as a sentence: "AT, each map, weight
1000, one instance per stage". To add a method, write its file, import it here and add a row; train_kd.py, the
tests and the tables pick it up from there.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .afd import AFD
from .at import AT
from .cc import CC
from .cd import CD
from .crd import CRD
from .dist import DIST
from .dkd import DKD
from .eel import EEL
from .fitnet import FitNet
from .ickd import ICKD
from .ikd import IKD
from .irg import IRG
from .kdsvd import KDSVD
from .logits import Logits
from .lskd import LSKD
from .mgd import MGD
from .mlkd import MLKD
from .nkd import NKD
from .nst import NST
from .ofakd import OFAKD
from .ofd import OFD
from .pad import PAD
from .pkt import PKT
from .reviewkd import ReviewKD
from .rkd import RKD
from .sdd import SDD, local_logits
from .sp import SP
from .srrl import SRRL
from .st import SoftTarget
from .ttm import TTM
from .vid import VID
from .wsld import WSLD


# fmt: off
# feed: what one step gives the loss.  s, t: Feats of student and teacher (out, feat, fms, pres), b: the batch
# (img, target, index, epoch, net_s, net_t, generator).  fms[0] is the stem, so fms[1:] are the stages.
def logits(kd, s, t, b):    return kd(s.out, t.out)
def labelled(kd, s, t, b):  return kd(s.out, t.out, b.target)
def embed(kd, s, t, b):     return kd(s.feat, t.feat)
def indexed(kd, s, t, b):   return kd(s.feat, t.feat, b.index, generator=b.generator)
def metric(kd, s, t, b):    return kd(s.feat, t.feat, b.target)
def last_map(kd, s, t, b):  return kd(s.fms[-1], t.fms[-1])
def masked(kd, s, t, b):    return kd(s.fms[-1], t.fms[-1], generator=b.generator)
def reread(kd, s, t, b):    return kd(s.fms[-1], t.fms[-1], t.out, b.net_t.classifier_layer())
def regions(kd, s, t, b):   return kd(local_logits(s.fms[-1], b.net_s.classifier_layer()),
                                      local_logits(t.fms[-1], b.net_t.classifier_layer()), b.target)
def graph(kd, s, t, b):     return kd(*([f.fms[-2], f.fms[-1], f.feat, f.out] for f in (s, t)))
def all_maps(kd, s, t, b):  return kd(s.fms[1:], t.fms[1:])
def review(kd, s, t, b):    return kd(to_embedding(s.fms, s), to_embedding(t.pres, t))
def each_map(kd, s, t, b):  return sum(k(x, y) for k, x, y in zip(kd, s.fms[1:], t.fms[1:])) / len(kd)
def each_pre(kd, s, t, b):  return sum(k(x, y) for k, x, y in zip(kd, s.pres[1:], t.pres[1:])) / len(kd)

def to_embedding(maps, f):  return [*maps[1:], f.feat[:, :, None, None]]  # stages, and the embedding as a map


# build: what the constructor is told.  e: e.s and e.t, Feats of a probe batch; e.net_s, e.net_t, e.train_set
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


# fmt: on
# ramp: factor on the weight, a function of the epoch (from 0) and the length of the run
def warm_up(epoch, epochs):
    return min((epoch + 1) / max(epochs / 12, 1), 1)  # DKD: 20 of its 240 epochs


def rise(epoch, epochs):
    return min(epoch / max(epochs / 12, 1), 1)  # ReviewKD: 20 of its 240 epochs, the first without it


@dataclass(frozen=True)
class Method:
    loss: type
    feed: Callable
    weight: float  # default of --lambda_kd
    build: Callable = plain
    ce: float = 1.0  # weight of cross-entropy; with several rows on one student, the product
    ramp: Callable | None = None  # None: the weight is constant


# fmt: off
# Weights are the seed zoo's (Knowledge-Distillation-Zoo, CIFAR-10, losses averaged over the stages) where it
# has the method, else the authors'.
METHODS = {
    'afd':      Method(AFD, each_map, 500.0, stage_ch),
    'at':       Method(AT, each_map, 1000.0, stages),
    'cc':       Method(CC, embed, 100.0),
    'cd':       Method(CD, each_map, 18.0, stage_ch),
    'crd':      Method(CRD, indexed, 0.2, bank),
    'dist':     Method(DIST, logits, 2.0),
    'dkd':      Method(DKD, labelled, 1.0, ramp=warm_up),
    'eel':      Method(EEL, metric, 1.0, dims),
    'fitnet':   Method(FitNet, last_map, 0.1, last_ch),
    'ickd':     Method(ICKD, last_map, 2.5, last_ch),
    'ikd':      Method(IKD, each_map, 0.2, stage_ch),
    'irg':      Method(IRG, graph, 1.0),
    'kdsvd':    Method(KDSVD, all_maps, 1.0),
    'logits':   Method(Logits, logits, 0.1),
    'lskd':     Method(LSKD, logits, 9.0, ce=0.1),
    'mgd':      Method(MGD, masked, 0.0012, last_ch),
    'mlkd':     Method(MLKD, logits, 0.9, ce=0.1),
    'nkd':      Method(NKD, labelled, 1.0),
    'nst':      Method(NST, last_map, 10.0),
    'ofakd':    Method(OFAKD, labelled, 1.0),
    'ofd':      Method(OFD, each_pre, 0.5, stage_bn),
    'pad':      Method(PAD, embed, 1.0, dims),
    'pkt':      Method(PKT, embed, 10000.0),
    'reviewkd': Method(ReviewKD, review, 0.6, level_ch, ramp=rise),
    'rkd':      Method(RKD, embed, 1.0),
    'sdd':      Method(SDD, regions, 0.9, ce=0.1),
    'sp':       Method(SP, each_map, 3000.0, stages),
    'srrl':     Method(SRRL, reread, 1.0, last_ch),
    'st':       Method(SoftTarget, logits, 0.1),
    'ttm':      Method(TTM, logits, 45.0),
    'vid':      Method(VID, each_map, 1.0, stage_ch),
    'wsld':     Method(WSLD, labelled, 2.25),
}
