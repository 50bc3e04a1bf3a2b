"""Feeds and builds that several methods share, or that are made of what they share (`same_size`, `Separate`).

A feed says what one step gives the loss, feed(kd, s, t, batch) -> scalar. s, t: Feats of student and teacher
(out, feat, fms, pres, extra); the stages are fms[1:], fms[0] is the stem; with peers, s is a list of their
Feats and t None. batch: see engine/batch.py.

A build says what its constructor is told, build(loss, probe, **options) -> module. probe: Feats of a few
images and what else there is to build from, see engine/batch.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from kd_losses import DCMStudent


# fmt: off
# logits and embeddings
def logits(kd, s, t, batch):            return kd(s.out, t.out)
def logits_and_labels(kd, s, t, batch): return kd(s.out, t.out, batch.target)
def embeddings(kd, s, t, batch):        return kd(s.feat, t.feat)
def all_logits(kd, s, t, batch):        return kd(s.out, [f.out for f in batch.all_t])

# maps: the last, all, or each stage by itself, the mean over the stages
def last_map(kd, s, t, batch):  return kd(s.fms[-1], t.fms[-1])
def all_maps(kd, s, t, batch):  return kd(s.fms[1:], t.fms[1:])
def each_map(kd, s, t, batch):  return sum(k(x, y) for k, x, y in zip(kd, s.fms[1:], t.fms[1:])) / len(kd)

# for losses that compare position by position: networks of different strides are brought to one size
def last_map_same_size(kd, s, t, batch): return kd(*same_size(s.fms[-1], t.fms[-1]))
def last_pre_same_size(kd, s, t, batch): return kd(*same_size(s.pres[-1], t.pres[-1]))
def masked_last_map(kd, s, t, batch):    return kd(
    *same_size(s.fms[-1], t.fms[-1]), generator=batch.generator)
def each_map_same_size(kd, s, t, batch): return sum(
    k(*same_size(x, y)) for k, x, y in zip(kd, s.fms[1:], t.fms[1:])) / len(kd)
def each_pre_same_size(kd, s, t, batch): return sum(
    k(*same_size(x, y)) for k, x, y in zip(kd, s.pres[1:], t.pres[1:])) / len(kd)


def same_size(x, y):
    """The larger map is averaged to the smaller one's size."""
    size = (min(x.shape[2], y.shape[2]), min(x.shape[3], y.shape[3]))
    return tuple(fm if fm.shape[2:] == size else F.adaptive_avg_pool2d(fm, size) for fm in (x, y))


# builds
def plain(loss, probe, **options):         return loss(**options)
def last_channels(loss, probe, **options): return loss(
    probe.s.fms[-1].shape[1], probe.t.fms[-1].shape[1], **options)
def widths(loss, probe, **options):        return loss(
    probe.s.feat.shape[1], probe.t.feat.shape[1], **options)
def per_stage(loss, probe, **options):     return nn.ModuleList(
    loss(**options) for _ in zip(probe.s.fms[1:], probe.t.fms[1:]))
def per_stage_channels(loss, probe, **options): return nn.ModuleList(
    loss(x.shape[1], y.shape[1], **options) for x, y in zip(probe.s.fms[1:], probe.t.fms[1:]))
# fmt: on


def vocabulary(kd, teacher, probe):
    """QuEST's words, from up to 256 vectors per word, as many images as that takes, not augmented."""
    positions = same_size(probe.t.pres[-1], probe.s.pres[-1])[0][0, 0].numel()  # of an image, as in training
    images = math.ceil(256 * len(kd.centroids) / positions)
    draw = torch.Generator().manual_seed(0)
    some = torch.randperm(len(probe.train_set), generator=draw)[:images]  # a folder's lie class by class
    with torch.no_grad():
        maps = [
            same_size(teacher(img).pres[-1], probe.s.pres[-1])[0]
            for img, _, _ in probe.train_set.subset(some).test_batches(probe.batch_size)
        ]
        kd.fit(torch.cat(maps), generator=draw)


class Separate(nn.Module):
    """Networks side by side: images, or a list of one batch per network -> a list of Feats."""

    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def weights(self, k):
        """State dict of what is kept of the k-th after training."""
        net = self.nets[k]
        return (net.deployed() if hasattr(net, 'deployed') else net).state_dict()

    def forward(self, x) -> list:
        views = [x] * len(self.nets) if isinstance(x, torch.Tensor) else x
        return [net(view, True) for net, view in zip(self.nets, views)]


def separate(nets, probe):
    return Separate(nets)


def with_heads(nets, probe):
    """DCM: every network with a head at each stage before the last."""
    return Separate(
        [DCMStudent([net, *(probe.another_net(net) for _ in f.fms[2:])]) for net, f in zip(nets, probe.s)]
    )
