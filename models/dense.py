"""torchvision's networks for segmentation and detection, and what a distillation loss may read of them.

    net = build('segmentation', 'deeplabv3_resnet50', 21)      one of torchvision's own, whole
    net = build('detection', 'fasterrcnn_resnet18_fpn', 91)    its builders over any of its ResNets
    net = build('segmentation', 'lraspp:resnet18', 6)          small ones of the same classes, for pictures
    net = build('detection', 'fasterrcnn:resnet10', 4, 64)     of 64 pixels or so, learnt from scratch

Levels are named and read by models.hooks.Tap; nothing of torchvision is copied or changed. state_dict is that
of the network without a Tap. `segment` and `Detected` run a network and keep what losses ask for.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import detection, resnet, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from dataset.labels import labelled_cross_entropy

from .hooks import Tap

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEADS = {'segmentation': ('lraspp', 'fcn', 'deeplabv3'), 'detection': ('fasterrcnn', 'retinanet', 'fcos')}
# where the maps of a quarter, an eighth and a sixteenth of the picture come from
LEVELS = {
    'resnet': ('layer1', 'layer2', 'layer3'),
    'mobilenet_v2': ('3', '6', '13'),
    'mobilenet_v3_large': ('3', '6', '12'),
    'mobilenet_v3_small': ('1', '3', '8'),
}
WIDTHS = {'fasterrcnn': 48, 'retinanet': 64, 'fcos': 64}  # of the small pyramids
THRESHOLDS = {'score_thresh': 0.05, 'nms_thresh': 0.5, 'detections_per_img': 100}  # as fasterrcnn's

# ------------------------------------------------------------------------------------------------- building


def build(task: str, name: str, num_classes: int, size: int = 64, frozen: bool = False) -> nn.Module:
    """A network by name, its levels tapped, with fresh weights.

    Args:
        task: 'segmentation' or 'detection'.
        name: see above; 'HEAD:BACKBONE' is small, BACKBONE@WIDTH a narrower mobilenet.
        num_classes: of detection with the background.
        size: of the small detectors, which scale every picture until its longer side is this, and of their
            anchors.
        frozen: batch norms of FPN detectors on a ResNet or MobileNetV2 keep the statistics they are loaded
            with.

    Raises:
        ValueError: a name that is not known here.
    """
    make = _segmenter if task == 'segmentation' else _detector
    net = make(name, num_classes, size, frozen)
    for module in net.modules():
        if getattr(module, 'inplace', False) is True:
            module.inplace = False  # or a map that a hook has read would change
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # mobilenets have 0.01: statistics would lag behind a short training
    if task == 'segmentation':
        levels = [f'backbone.{path}' for path in _levels(net.backbone)]
        return Tap(
            net, [*levels, _read_by_classifier(net), 'classifier'], feat='classifier', classifier='classifier'
        )
    levels = [f'fpn.layer_blocks.{i}' for i in range(len(net.backbone.fpn.layer_blocks))]
    extra = dict(getattr(net.backbone.fpn.extra_blocks, 'named_children', dict)())
    levels += [f'fpn.extra_blocks.{name}' for name in ('p6', 'p7') if name in extra]
    net.backbone = Tap(net.backbone, levels, feat=levels[-1], classifier=levels[-1])
    _boxes_in_float32(net)
    return net


def _boxes_in_float32(net: nn.Module) -> None:
    """Under autocast torchvision makes anchors and boxes in the maps' precision: pixels apart in bfloat16."""
    two = isinstance(net, detection.FasterRCNN)
    anchors = net.rpn.anchor_generator if two else net.anchor_generator
    anchors.register_forward_pre_hook(_of_float32_maps)
    for head in (net.rpn.head, net.roi_heads.box_predictor) if two else (net.head,):
        head.register_forward_hook(_at_least_float32)


def _of_float32_maps(module, inputs: tuple) -> tuple:
    """An anchor generator reads sizes, precision and device of the maps."""
    images, maps = inputs
    return images, [fm[:1, :1].to(_at_least(fm.dtype)) for fm in maps]


def _at_least_float32(module, inputs: tuple, out):
    if isinstance(out, dict):
        return {key: _at_least_float32(module, inputs, x) for key, x in out.items()}
    if isinstance(out, (list, tuple)):
        return type(out)(_at_least_float32(module, inputs, x) for x in out)
    return out.to(_at_least(out.dtype))


def _at_least(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _unknown(task: str, name: str) -> ValueError:
    heads, backbones = ', '.join(HEADS[task]), 'resnet10, resnet18, resnet50, mobilenet_v3_small@0.5'
    own = {'segmentation': 'deeplabv3_resnet50, lraspp_mobilenet_v3_large',
           'detection': 'fasterrcnn_resnet50_fpn, retinanet_resnet18_fpn'}[task]  # fmt: skip
    return ValueError(f'no network for {task} is called {name!r}; there are torchvision\'s, {own} and so on, '
                      f'and small ones, HEAD:BACKBONE, heads {heads}, backbones as {backbones}')  # fmt: skip


def _segmenter(name: str, K: int, size: int, frozen: bool) -> nn.Module:
    head, _, backbone = name.partition(':')
    if not backbone:
        if name not in torchvision.models.list_models(module=segmentation):
            raise _unknown('segmentation', name)
        return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=K)
    if head not in HEADS['segmentation']:
        raise _unknown('segmentation', name)
    body, levels = _backbone('segmentation', name, backbone)
    low, high = levels[0], levels[1] if isinstance(body, resnet.ResNet) else levels[2]
    if head == 'lraspp':
        (c_low, c_high), wanted = _channels(body, (low, high)), {low: 'low', high: 'high'}
        return segmentation.LRASPP(IntermediateLayerGetter(body, wanted), c_low, c_high, K, inter_channels=64)
    (c_high,), body = _channels(body, (high,)), IntermediateLayerGetter(body, {high: 'out'})
    if head == 'fcn':
        return segmentation.FCN(body, segmentation.fcn.FCNHead(c_high, K))
    return segmentation.DeepLabV3(body, segmentation.deeplabv3.DeepLabHead(c_high, K, (1, 2, 3)))


def _levels(backbone: IntermediateLayerGetter) -> list[str]:
    """Paths of its maps, shallow to deep: the stages of a ResNet, else what the head reads."""
    stages = [name for name, _ in backbone.named_children() if name.startswith('layer')]
    return stages or list(backbone.return_layers)


def _read_by_classifier(net: nn.Module):
    """The layer whose map the last convolution of the head reads."""
    if isinstance(net, segmentation.LRASPP):
        return 'classifier.high_classifier', 'in'
    return 'classifier.2' if isinstance(net, segmentation.FCN) else 'classifier.3'


def _backbone(task: str, name: str, backbone: str) -> tuple[nn.Module, tuple[str, ...]]:
    kind, _, width = backbone.partition('@')
    family = next((f for f in LEVELS if kind.startswith(f)), None)
    if family is None or (width and family == 'resnet') or not re.fullmatch(r'(\d*\.?\d+)?', width):
        raise _unknown(task, name)
    if kind == 'resnet10':
        return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]), LEVELS[family]
    if kind not in torchvision.models.list_models(module=torchvision.models):
        raise _unknown(task, name)
    net = torchvision.models.get_model(kind, weights=None, **({'width_mult': float(width)} if width else {}))
    return net if family == 'resnet' else net.features, LEVELS[family]


def _channels(body: nn.Module, levels: tuple[str, ...]) -> list[int]:
    getter = IntermediateLayerGetter(body, {path: path for path in levels})
    was = body.training
    getter.eval()
    with torch.no_grad():
        found = [fm.shape[1] for fm in getter(torch.zeros(1, 3, 64, 64)).values()]
    getter.train(was)
    return found


def _detector(name: str, K: int, size: int, frozen: bool) -> nn.Module:
    head, _, backbone = name.partition(':')
    if backbone and head in HEADS['detection']:
        return _small_detector(head, *_backbone('detection', name, backbone), K, size)
    found = re.fullmatch(r'(fasterrcnn|retinanet|fcos)_(resnet\d+|mobilenet_v2)_fpn', name)
    if not name.startswith(HEADS['detection']):
        raise _unknown('detection', name)
    if backbone or not found and name not in torchvision.models.list_models(module=detection):
        raise _unknown('detection', name)
    said = {} if name.startswith('fasterrcnn') else THRESHOLDS
    if not found:
        return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=K, **said)
    head, kind = found.groups()
    extra = {} if head == 'fasterrcnn' else {'extra_blocks': LastLevelP6P7(256, 256)}
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    if kind == 'mobilenet_v2':  # strides 4, 8, 16, 32
        levels = ('3', '6', '13', '17')
        levels, channels = (levels, [24, 32, 96, 320]) if not extra else (levels[1:], [32, 96, 320])
        body = torchvision.models.mobilenet_v2(weights=None, norm_layer=norm).features
        backbone = BackboneWithFPN(
            body, {path: str(i) for i, path in enumerate(levels)}, channels, 256, **extra
        )
    elif kind not in torchvision.models.list_models(module=torchvision.models):
        raise _unknown('detection', name)
    else:
        backbone = resnet_fpn_backbone(
            backbone_name=kind, weights=None, trainable_layers=3 if frozen else 5,
            norm_layer=norm, returned_layers=[2, 3, 4] if extra else [1, 2, 3, 4], **extra,
        )  # fmt: skip
    made = {'fasterrcnn': detection.FasterRCNN, 'retinanet': detection.RetinaNet, 'fcos': detection.FCOS}[
        head
    ]
    sizes = (640, 672, 704, 736, 768, 800)  # by chance; the last in evaluation
    return made(backbone, K, min_size=sizes, **said)


def _small_detector(head: str, body: nn.Module, levels: tuple, K: int, size: int) -> nn.Module:
    width, channels = WIDTHS[head], _channels(body, levels)
    backbone = BackboneWithFPN(body, {path: str(i) for i, path in enumerate(levels)}, channels, width)
    backbone.fpn.extra_blocks = None  # BackboneWithFPN adds a pooled level otherwise
    common = {'min_size': size, 'max_size': size, 'image_mean': MEAN, 'image_std': STD}
    sides, ratios = tuple(round(side * size / 64) for side in (10, 18, 32)), (0.5, 1.0, 2.0)
    if head == 'fcos':
        anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
        return detection.FCOS(backbone, K, anchor_generator=anchors, **THRESHOLDS, **common)
    anchors = AnchorGenerator(tuple((side,) for side in sides), (ratios,) * 3)
    if head == 'retinanet':
        norm = partial(nn.GroupNorm, 8)
        towers = detection.retinanet.RetinaNetHead(width, 3, K, norm_layer=norm)
        return detection.RetinaNet(backbone, K, anchor_generator=anchors, head=towers, **THRESHOLDS, **common)
    return detection.FasterRCNN(
        backbone, None, rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(['0', '1', '2'], 5, 2),
        box_head=detection.faster_rcnn.TwoMLPHead(width * 25, 128),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(128, K),
        rpn_pre_nms_top_n_train=200, rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=100, rpn_batch_size_per_image=64, box_batch_size_per_image=64, **common,
    )  # fmt: skip


# --------------------------------------------------------------------------------------- what losses may read


@dataclass
class Segmented:
    """out: logits before they are enlarged, (N, K, h, w); feat: the map that the last convolution reads; fms:
    of the backbone, shallow to deep; everything in float32."""

    out: Tensor
    feat: Tensor
    fms: list[Tensor]

    def loss(self, target: Tensor) -> Tensor:
        """Cross-entropy of the enlarged logits; -1: no label; 0 where there is none at all."""
        return labelled_cross_entropy(enlarged(self.out, target.shape[1:]), target, -1)

    def replaced(self, out: Tensor) -> 'Segmented':
        """The same with other logits."""
        return Segmented(out, self.feat, self.fms)


def segment(net: Tap, x: Tensor) -> Segmented:
    *fms, feat, out = (fm.float() for fm in net(normalised(x), True).fms)
    return Segmented(out, feat, fms)


def enlarged(out: Tensor, size) -> Tensor:
    """To the picture's size, as torchvision's networks do it."""
    return F.interpolate(out.float(), tuple(size), mode='bilinear', align_corners=False)


@lru_cache
@torch.inference_mode(False)  # or a training after it could not use them
def _per_channel(device: torch.device) -> list[Tensor]:
    """Mean and deviation on the device: made there once, since every copy waits."""
    return [torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD)]


def normalised(x: Tensor) -> Tensor:
    mean, std = _per_channel(x.device)
    return (x - mean) / std


@dataclass
class Rois:
    """Sampled boxes of a batch and what the second stage says of them; classes: the background is 0."""

    boxes: list[Tensor]
    target: Tensor  # (R,)
    out: Tensor  # (R, K)
    box: Tensor  # (R, 4 K)
    towards: list[Tensor]  # per picture, what `box` should be


class Detected:
    """What a detector makes of a batch. The heads run when they are asked for, so a loss on maps is cheap.

    Args:
        net: of build().
        images: ImageList, as net.transform gives it.
        targets: per picture boxes and labels as net.transform gives them, or None.
        amp: gives the context of autocast.

    fms: maps of the pyramid, shallow to deep, without the level that Faster R-CNN merely pools; pyramid: all
    of them. float32.
    """

    def __init__(self, net: nn.Module, images, targets=None, amp: Callable = contextlib.nullcontext) -> None:
        self.net, self.images, self.targets, self.amp = net, images, targets, amp
        self.with_grad = torch.is_grad_enabled()
        with amp():
            tapped = net.backbone(images.tensors, True)
        self.levels = tapped.out
        self.fms = [fm.float() for fm in tapped.fms]

    @property
    def two_stage(self) -> bool:
        return isinstance(self.net, detection.FasterRCNN)

    @property
    def pyramid(self) -> list[Tensor]:
        return [fm.float() for fm in self.levels.values()]

    @contextlib.contextmanager
    def as_before(self):
        """Heads run in the precision of the maps, with gradients if those had them."""
        with self.amp(), torch.set_grad_enabled(self.with_grad):
            yield

    def replaced(self, maps: list[Tensor]) -> 'Detected':
        """The same with other maps in the tapped levels; heads then run with gradients."""
        other = object.__new__(Detected)
        other.__dict__ = {key: self.__dict__[key] for key in ('net', 'images', 'targets', 'amp')}
        other.with_grad, other.fms = True, maps
        other.levels = type(self.levels)(zip(self.levels, [*maps, *list(self.levels.values())[len(maps) :]]))
        return other

    # ----------------------------------------------------------------------------------------- one stage

    @cached_property
    def head(self) -> dict[str, Tensor]:
        """Of RetinaNet and FCOS: cls_logits (N, rows, K), bbox_regression (N, rows, 4); rows are all levels,
        each in the order y, x, anchor. With them `towers` is known."""
        self.towers = {'class': [], 'box': []}
        hooks = []
        if isinstance(self.net, detection.RetinaNet):
            for kept, part in zip(self.towers.values(), self._parts()):
                # the third layer before its ReLU; once per level, in order
                hook = part.conv[2][-2].register_forward_hook(
                    lambda m, args, out, kept=kept: kept.append(out)
                )
                hooks.append(hook)
        try:
            with self.as_before():
                return self.net.head(list(self.levels.values()))
        finally:
            for hook in hooks:
                hook.remove()

    def _parts(self) -> tuple[nn.Module, nn.Module]:
        return self.net.head.classification_head, self.net.head.regression_head

    def finished(self, towers: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
        """What the rest of RetinaNet's head, from that ReLU on, predicts from maps of another network."""
        made = []
        for maps, part, last in zip(towers.values(), self._parts(), ('cls_logits', 'bbox_reg')):
            convolution = getattr(part, last)
            A = self.head['cls_logits'].shape[1] // sum(fm.shape[2] * fm.shape[3] for fm in maps)
            rows = []
            for fm in maps:
                with self.amp():
                    y = convolution(part.conv[3](part.conv[2][-1](fm)))
                y = y.unflatten(1, (A, -1)).permute(0, 3, 4, 1, 2)  # N, H, W, A, K
                rows.append(y.flatten(1, 3))
            made.append(torch.cat(rows, dim=1).float().flatten(0, 1))
        return tuple(made)

    @cached_property
    def anchors(self) -> list[Tensor]:
        """Per picture (rows, 4)."""
        net = self.net.rpn if self.two_stage else self.net
        return net.anchor_generator(self.images, list(self.levels.values()))

    def anchors_of_levels(self) -> list[Tensor]:
        """Of one picture, per tapped level (H, W, A, 4)."""
        sizes = [tuple(fm.shape[2:]) for fm in self.levels.values()]
        count = len(self.anchors[0]) // sum(h * w for h, w in sizes)
        parts = self.anchors[0].split([h * w * count for h, w in sizes])
        return [part.view(*size, count, 4) for part, size in zip(parts, sizes)][: len(self.fms)]

    def matched(self) -> tuple[Tensor, int]:
        """Which anchors count for the loss of RetinaNet, all pictures' rows, and how many are objects."""
        rows = []
        for anchors, target in zip(self.anchors, self.targets):
            if len(target['boxes']):
                rows.append(self.net.proposal_matcher(box_iou(target['boxes'], anchors)))
            else:
                rows.append(torch.full((len(anchors),), -1, device=anchors.device))
        rows = torch.cat(rows)
        return (rows != self.net.proposal_matcher.BETWEEN_THRESHOLDS).float(), int((rows >= 0).sum())

    # ----------------------------------------------------------------------------------------- two stages

    @cached_property
    def rois(self) -> Rois:
        """What Faster R-CNN's second stage is trained on in this step; `proposal_losses` is known then."""
        net, heads = self.net, self.net.roi_heads
        with self.as_before():
            was, net.rpn.training = net.rpn.training, True  # of the module itself: nothing below it changes
            proposals, self.proposal_losses = net.rpn(self.images, self.levels, self.targets)
            net.rpn.training = was
            boxes, _, labels, towards = heads.select_training_samples(proposals, self.targets)
            out, box = self.classified(boxes)
        return Rois(boxes, torch.cat(labels), out, box, towards)

    def classified(self, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (R, K) and box deltas (R, 4 K) of given boxes, from this network's own maps."""
        heads = self.net.roi_heads
        with self.as_before():
            pooled = heads.box_roi_pool(self.levels, boxes, self.images.image_sizes)
            out, box = heads.box_predictor(heads.box_head(pooled))
        return out.float(), box.float()

    # ------------------------------------------------------------------------------------------- the loss

    def loss(self) -> Tensor:
        """The network's own, summed."""
        net = self.net
        if self.two_stage:
            rois = self.rois
            labels = rois.target.split([len(boxes) for boxes in rois.boxes])
            second = fastrcnn_loss(rois.out, rois.box, list(labels), list(rois.towards))
            return sum(second) + sum(self.proposal_losses.values())
        head = {key: value.float() for key, value in self.head.items()}
        more = []
        if isinstance(net, detection.FCOS):
            more = [[fm.shape[2] * fm.shape[3] for fm in self.levels.values()]]
        return sum(net.compute_loss(self.targets, head, self.anchors, *more).values())
