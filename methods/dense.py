"""The rows of train_dense.py: a segmenter or a detector teaches a smaller one.

Every row has the network's own loss beside it, with weight 1. Weights are the authors' (of `ifvd` and
`cwd_feat` CIRKD's), for large networks and pictures; where a kind of detector has another one, by_head says
so. A feed gets what models/dense.py reads of both networks: Segmented (out, feat, fms) or Detected
(fms, pyramid, heads); batch: engine/dense.py."""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import nn

from kd_losses import (
    afdcd,
    cirkd,
    crosskd,
    cwd,
    dist,
    dkd,
    dsd,
    fgd,
    fgfi,
    freekd,
    ifvd,
    maskd,
    pkd,
    reviewkd,
    skds,
    st,
)  # fmt: skip

from .columns import Limits, Method, Needs, Own, When
from .shared import plain


@dataclass(frozen=True)
class Dense(Method):
    """A row.

    task: of --task; '': both.
    labels: it reads labels or boxes, so it is fed the labelled pictures, also where there are others.
    heads: the detectors that it is for; (): all.
    by_head: the weights for other detectors than RetinaNet, where they are others.
    clip: the largest norm of the gradient of its own parameters; None: any.
    """

    task: str = 'detection'
    labels: bool = False
    heads: tuple[str, ...] = ()
    by_head: dict[str, float] = field(default_factory=dict)
    clip: float | None = None


# fmt: off
def nothing(kd, s, t, batch): return 0.0

# segmentation; where sizes differ, the student's map is brought to the teacher's
def logits(kd, s, t, batch):  return kd(like(s.out, t.out), t.out)
def pixels(kd, s, t, batch):
    return kd(*(x.movedim(1, -1).flatten(0, 2) for x in (like(s.out, t.out), t.out)))
def feat(kd, s, t, batch):    return kd(like(s.feat, t.feat), t.feat)
def labelled_feat(kd, s, t, batch):  return kd(like(s.feat, t.feat), t.feat, batch.target)
# detection: the pyramid
def levels(kd, s, t, batch):     return kd(s.fms, t.fms)
def each_level(kd, s, t, batch): return sum(k(x, y) for k, x, y in zip(kd, s.fms, t.fms))
def whole(kd, s, t, batch):      return kd(s.pyramid, t.pyramid)
# Faster R-CNN: the teacher's second stage sees the student's boxes, on its own maps
def of_boxes(kd, s, t, batch):   return kd(s.rois.out, t.classified(s.rois.boxes)[0], s.rois.target)


def like(x, y):
    same = x.shape[2:] == y.shape[2:]
    return x if same else F.interpolate(x, y.shape[2:], mode='bilinear', align_corners=False)


# builds
def soft(loss, probe, **options):        return loss(**{'T': 1.0, **options})
def feat_widths(loss, probe, **options): return loss(probe.s.feat.shape[1], probe.t.feat.shape[1], **options)
def classes(loss, probe, **options):     return loss(probe.num_classes, **options)
def per_level(loss, probe, **options):   return nn.ModuleList(
    loss(x.shape[1], y.shape[1], **options) for x, y in zip(probe.s.fms, probe.t.fms))
def cwd_levels(loss, probe, **options):  return per_level(loss, probe, **{'tau': 1.0, **options})
def pyramids(loss, probe, **options):
    widths = [[fm.shape[1] for fm in side.pyramid] for side in (probe.s, probe.t)]
    return loss(*widths, **{'mid_channels': widths[0][0], **options})
def background_is_a_class(loss, probe, **options): return loss(**{'beta': 0.25, 'T': 1.0, **options})


seg = {'task': 'segmentation'}
read = {'labels': True}
tokens = {'when': When(pretrain=17)}  # a twelfth of the training
alone = Needs(teacher=False)
queues = {'limits': Limits('its queues of pixels and regions would differ between processes')}
one, two = {'heads': ('retinanet',)}, {'heads': ('fasterrcnn',)}

#                        loss            weight  fed by         built by            only what differs
DENSE = {
    'alone':      Dense(nn.Identity,        0.0, nothing,       needs=alone, task=''),
    'afdcd':      Dense(afdcd.AfDCD,        1.0, afdcd.feed,    afdcd.build,        **seg, clip=15.0),
    'cirkd':      Dense(cirkd.CIRKD,        1.0, cirkd.feed,    cirkd.build,        **seg, **read, **queues),
    'cwd':        Dense(cwd.CWD,            3.0, logits,        plain,              **seg),
    'cwd_feat':   Dense(cwd.CWD,           50.0, feat,          feat_widths,        **seg),
    'dist':       Dense(dist.DIST,          1.0, logits,        plain,              **seg),
    'dsd':        Dense(dsd.DSD,            1.0, dsd.feed,      plain,              **seg),
    'ifvd':       Dense(ifvd.IFVD,         20.0, labelled_feat, classes,            **seg, **read),
    'maskd_seg':  Dense(maskd.MasKD,        1.0, logits,        maskd.build_seg,    **seg, **tokens,
                        own=Own(pretrain=maskd.learn_seg)),
    'skds_pair':  Dense(skds.PairWise,      1.0, feat,          plain,              **seg),
    'skds_pixel': Dense(skds.PixelWise,    10.0, logits,        plain,              **seg),
    'st':         Dense(st.SoftTarget,      1.0, pixels,        soft,               **seg),

    'crosskd':    Dense(crosskd.CrossKD,    1.0, crosskd.feed,  plain,              **one, **read),
    'cwd_fpn':    Dense(cwd.CWD,           10.0, each_level,    cwd_levels),
    'dkd':        Dense(dkd.DKD,            1.0, of_boxes,      background_is_a_class, **two, **read),
    'fgd':        Dense(fgd.FGD,            1.0, fgd.feed,      fgd.build,          **read),
    'fgfi':       Dense(fgfi.FGFI,         0.01, fgfi.feed,     fgfi.build,         **read),
    'freekd':     Dense(freekd.FreeKD,      1.0, freekd.feed,   per_level,          **tokens,
                        own=Own(pretrain=maskd.learn)),
    'maskd':      Dense(maskd.MasKD,        7.0, each_level,    per_level,          **tokens,
                        own=Own(pretrain=maskd.learn), by_head={'fcos': 10.0, 'fasterrcnn': 1.0}),
    'pkd':        Dense(pkd.PKD,           10.0, levels,        plain,
                        by_head={'fasterrcnn': 6.0}),
    'reviewkd':   Dense(reviewkd.ReviewKD,  1.0, whole,         pyramids),
}
