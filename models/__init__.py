"""The networks by name: `build('resnet20', num_classes=10)`.

Names are RepDistiller's. Every network gives logits for `net(x)` and Feats(out, feat, fms, pres) for `net(x,
True)`. `torchvision:NAME` is torchvision's network with its stages tapped (models/hooks.py).
"""

import re
import shlex
from functools import partial
from pathlib import Path

from torch import nn

from .checkpoint import load_weights, named_weights, normalised, num_classes_in
from .feats import Feats
from .folding import folded
from .hooks import tap_torchvision
from .mobilenetv1 import MobileNetV1
from .mobilenetv2 import MobileNetV2
from .mobilenetv2_tiny import MobileNetV2Tiny
from .renormalise import trained_on
from .resnet import resnet
from .resnetv2 import ResNetV2
from .shufflenetv1 import ShuffleV1
from .shufflenetv2 import ShuffleV2
from .vgg import VGG
from .vit import ViT
from .wrn import wrn

__all__ = [
    'MODELS',
    'NAMES',
    'Feats',
    'build',
    'build_for',
    'folded',
    'how_to_fill',
    'how_to_load',
    'load_student',
    'load_weights',
    'named_weights',
    'narrowed',
    'num_classes_in',
    'trained_on',
]

MODELS = {f'resnet{depth}': partial(resnet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)}
MODELS |= {f'resnet{depth}x4': partial(resnet, depth, wide=True) for depth in (8, 32)}

MODELS |= {
    'ResNet18': partial(ResNetV2, (2, 2, 2, 2), False),
    'ResNet34': partial(ResNetV2, (3, 4, 6, 3), False),
    'ResNet50': partial(ResNetV2, (3, 4, 6, 3), True),
}
MODELS |= {f'wrn_{depth}_{widen}': partial(wrn, depth, widen) for depth in (16, 40) for widen in (1, 2)}
MODELS |= {f'vgg{depth}': partial(VGG, depth) for depth in (8, 11, 13, 16, 19)}
MODELS |= {'MobileNetV2': MobileNetV2, 'ShuffleV1': ShuffleV1, 'ShuffleV2': ShuffleV2}
MODELS |= {'MobileNetV1': MobileNetV1, 'MobileNetV2Tiny': MobileNetV2Tiny}  # ImageNet's, tiny ImageNet's
MODELS |= {f'vit_{dim}_6': partial(ViT, dim, 6) for dim in (128, 192)}
MODELS |= {'deit_128_6': partial(ViT, 128, 6, distilled=True)}

OF_IMAGENET = [f'resnet{depth}' for depth in (18, 34, 50, 101, 152)]
NAMES = (
    f'{", ".join(MODELS)}, any resnetN or resnetNx4 (N = 6n + 2), wrn_N_K (N = 6n + 4), vit_D_L, '
    f'vit_D_LxT, vit_D_LxT_S and deit_D_L (D = 64n), torchvision:NAME'
)


def build(name: str, num_classes: int = 100) -> nn.Module:
    """The network called `name` with fresh weights. Other legal sizes, e.g. resnet26, wrn_28_4 or vit_64_3,
    work too.

    Raises:
        ValueError: no network has this name, or its depth is not legal (resnet 6n + 2, wrn 6n + 4), or
            its width (vit and deit, multiples of 64); resnet18, 34, 50, 101, 152, ImageNet's.
    """
    if name in MODELS:
        return MODELS[name](num_classes=num_classes)
    if name.startswith('torchvision:'):
        return tap_torchvision(name.removeprefix('torchvision:'), num_classes)
    if name in OF_IMAGENET:  # of these 50 and 152 are 6n + 2, and would be narrow networks of three stages
        small = name.replace('resn', 'ResN')
        said = f', or {small}, its four stages for small images' if small in MODELS else ''
        raise ValueError(f'{name} is a network for ImageNet: torchvision:{name}{said}')
    if m := re.fullmatch(r'resnet(\d+)(x4)?', name):
        return resnet(int(m[1]), wide=bool(m[2]), num_classes=num_classes)
    if m := re.fullmatch(r'wrn_(\d+)_(\d+)', name):
        return wrn(int(m[1]), int(m[2]), num_classes=num_classes)
    if m := re.fullmatch(r'(vit|deit)_(\d+)_(\d+)', name):
        return ViT(int(m[2]), int(m[3]), num_classes, distilled=m[1] == 'deit')
    # T times as many tokens, for ka_vit, of images of S pixels a side, 32 where the name does not say
    if m := re.fullmatch(r'vit_(\d+)_(\d+)x([2-9])(?:_(\d+))?', name):
        return ViT(int(m[1]), int(m[2]), num_classes, image_size=int(m[4] or 32), times=int(m[3]))
    raise ValueError(f'no network is called {name!r}; there are {NAMES}')


def build_for(path: str | Path, name: str, num_classes: int = 100) -> nn.Module:
    """The network called `name` as the weights in this file need it, for load_weights.

    That is build(name, num_classes), except for a student to which a method has added layers that stay in
    use (simkd, norm): then with these layers; and for a slimmed network, which is narrower.

    Raises:
        ValueError: as build; the file cannot be read.
    """
    from .changed import changed_network  # kd_losses is needed for such a file only

    return changed_network(build(name, num_classes), path)


def narrowed(net: nn.Module, path: str | Path | None) -> nn.Module:
    """net as narrow as the slimmed network in this file (tools/slim.py); net itself for any other."""
    if path is None:
        return net
    from .changed import read_state
    from .checkpoint import _unwrapped
    from .slimming import shaped_like

    return shaped_like(net, _unwrapped(read_state(path), net.state_dict())[0])


def how_to_load(path: str | Path, name: str, data: str | None, num_classes: int, images=None) -> str:
    """What to do with a file of weights, for the end of a log.

    data: the value of --data_name and the flags after it (engine.flags.data_words); None if tools/eval.py
    cannot read it.
    images: a data set of those that it knows; what their mean and std are is said, too.
    """
    file = shlex.quote(str(path))
    measured = f'python tools/eval.py --net_name {name} --data_name {data} {file} measures them, '
    loaded = f'models.load_student({str(path)!r}, {name!r}, {num_classes}) is the network'
    if images is not None:
        loaded += f', for images normalised with {normalised((images.mean, images.std))}'
    return f'{path}; {measured if data else ""}{loaded}'


def how_to_fill(path: str | Path, made: str, imports: str) -> str:
    """The same for a network that has no name: what `made`, in Python after `imports`, builds."""
    filled = f'net = {made}; models.load_weights(net, {str(path)!r}); net.eval()'
    return f'{path}; in Python: import models; {imports}; {filled}'


def load_student(path: str | Path, name: str, num_classes: int = 100) -> nn.Module:
    """A trained network, in evaluation mode, whatever method of ours has trained it.

        net = models.load_student('save/run/simkd/student.pt', 'resnet8', num_classes=10)
        logits = net(images)

    images: (N, 3, H, W) of pixels in 0..1, less the mean and divided by the std of the training images, per
    channel: dataset.mean_std('cifar10'), or what the last line of log.txt says.

    Args:
        path: student.pt, net.pt, best.pt, or any file that load_weights reads.
        name, num_classes: of the network, as for build.

    Raises:
        ValueError: as build and load_weights.
    """
    net = build_for(path, name, num_classes)
    load_weights(net, path)
    return net.eval()
