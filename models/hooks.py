"""Any backbone as a network of ours: name its layers, get Feats.

    net = Tap(torchvision.models.resnet18(), fms=['relu', 'layer1', 'layer2', 'layer3', 'layer4'])
    net = tap_torchvision('resnet34')                      the layers of well-known families are known

Everything else of the project works with the result: `net(x)` gives logits, `net(x, True)` Feats, the
state_dict is that of the wrapped network.
"""

import copy
import difflib
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .feats import Feats

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Hardsigmoid)


class Tap(nn.Module):
    """A network whose maps are read by hooks at named layers.

    A layer is a module's path, 'layer1.0', for its output, or (path, 'in') for its input. Of a module that is
    called several times in a forward pass, the last call counts. Activations that work in place are switched
    to copies (the results stay); functional in-place sums cannot be: tap what comes before a final activation
    as that activation's input, never as the output of the last batch norm.

    Args:
        net: the network; its forward takes images and returns logits.
        fms: layers of the maps [stem, stage 1, ...], after their activation.
        pres: the same before it; None: repeats fms.
        feat: layer of the embedding; None: the input of the classifier.
        classifier: path of the last linear layer; None: the last nn.Linear.
        bn_before_relu: paths of the batch norms that OFD asks for, aligned with fms[1:].
        to_map: turns a tapped value into (N, C, H, W), for networks with other layouts; `tokens` and
            `last_axis` are ready.

    Shape:
        x: (N, 3, H, W). `net(x)` returns (N, K); `net(x, True)` returns Feats.

    Raises:
        ValueError: a path does not exist (the closest names are listed), or there is no linear layer.
        RuntimeError: a tapped module was not called.
    """

    def __init__(
        self,
        net: nn.Module,
        fms: Sequence,
        pres: Sequence | None = None,
        feat=None,
        classifier: str | None = None,
        bn_before_relu: Sequence[str] | None = None,
        to_map: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        for module in net.modules():
            if isinstance(module, _ACTIVATIONS):
                module.inplace = False
        linear = [path for path, m in net.named_modules() if isinstance(m, nn.Linear)]
        if classifier is None and not linear:
            raise ValueError(f'{type(net).__name__} has no linear layer; say which is the classifier')
        self.classifier_path = classifier or linear[-1]
        self.taps = {
            'fms': [_layer(x) for x in fms],
            'pres': None if pres is None else [_layer(x) for x in pres],
            'feat': _layer(feat or (self.classifier_path, 'in')),
        }
        self.bn_paths, self.to_map = bn_before_relu, to_map
        self._seen, self._handles = None, []
        for path, side in self._layers():
            self._handles.append(self._hook(path, side))
        _find(net, self.classifier_path)

    def _layers(self) -> set:
        return {*self.taps['fms'], *(self.taps['pres'] or []), self.taps['feat']}

    def _hook(self, path: str, side: str):
        module = _find(self.net, path)
        if side == 'in':
            return module.register_forward_pre_hook(lambda m, args: self._keep((path, side), args[0]))
        return module.register_forward_hook(lambda m, args, out: self._keep((path, side), out))

    def _keep(self, key: tuple, value: Tensor) -> None:
        if self._seen is not None:
            self._seen[key] = value

    def forward(self, x: Tensor, feats: bool = False) -> Tensor | Feats:
        if not feats:
            return self.net(x)
        self._seen = {}
        try:
            out = self.net(x)
            seen = self._seen
        finally:
            self._seen = None
        silent = [path for path, side in self._layers() if (path, side) not in seen]
        if silent:
            raise RuntimeError(f'{type(self.net).__name__}: {", ".join(silent)} was not called')
        as_map = self.to_map or (lambda value: value)
        fms = [as_map(seen[key]) for key in self.taps['fms']]
        pres = None if self.taps['pres'] is None else [as_map(seen[key]) for key in self.taps['pres']]
        return Feats(out, seen[self.taps['feat']].flatten(1), fms, list(fms) if pres is None else pres)

    def after(self, k: int, fm: Tensor) -> Feats:
        raise ValueError(
            f'{type(self.net).__name__} is wrapped: it cannot be run from the middle, which this method needs'
        )

    def bn_before_relu(self) -> list[nn.Module]:
        if self.bn_paths is None:
            raise ValueError(
                f'{type(self.net).__name__}: this method needs bn_before_relu=[...], the paths of the batch '
                f'norms before the last activation of each stage'
            )
        return [_find(self.net, path) for path in self.bn_paths]

    def feat_modules(self) -> list[nn.Module]:
        head = self.classifier_path.split('.')[0]
        return [m for name, m in self.net.named_children() if name != head]

    def classifier_layer(self) -> nn.Linear:
        return _find(self.net, self.classifier_path)

    def close(self) -> nn.Module:
        """Remove the hooks; returns the wrapped network."""
        for handle in self._handles:
            handle.remove()
        return self.net

    def state_dict(self, *args, prefix: str = '', **kwargs):
        """Of the wrapped network, without a prefix of ours."""
        return self.net.state_dict(*args, prefix=prefix, **kwargs)

    def load_state_dict(self, state: dict, *args, **kwargs):
        """As the wrapped network's."""
        return self.net.load_state_dict(state, *args, **kwargs)

    def __deepcopy__(self, memo):
        for handle in self._handles:  # hooks belong to this object: the copy gets its own
            handle.remove()
        net = copy.deepcopy(self.net, memo)
        self._handles = [self._hook(path, side) for path, side in self._layers()]
        taps = (self.taps[key] for key in ('fms', 'pres', 'feat'))
        return Tap(net, *taps, self.classifier_path, self.bn_paths, self.to_map)


def _layer(x) -> tuple[str, str]:
    return (x, 'out') if isinstance(x, str) else tuple(x)


def _find(net: nn.Module, path: str) -> nn.Module:
    modules = dict(net.named_modules())
    if path not in modules:
        close = difflib.get_close_matches(path, modules, n=3, cutoff=0.3)
        raise ValueError(f'{type(net).__name__} has no layer {path!r}; the closest are {", ".join(close)}')
    return modules[path]


def tokens(x: Tensor) -> Tensor:
    """(N, 1 + S S, D) tokens, the class token first -> (N, D, S, S)."""
    side = round((x.shape[1] - 1) ** 0.5)
    if 1 + side * side != x.shape[1]:
        raise ValueError(f'tokens: expected 1 + S S tokens, got {x.shape[1]}')
    return x[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def last_axis(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def tap_torchvision(name: str, num_classes: int = 1000) -> Tap:
    """torchvision's network of this name with fresh weights, its stages tapped.

    Known: resnetN, wide_resnet and resnext, vggN_bn, mobilenet_v2, shufflenet_v2, convnext, regnet, densenet,
    efficientnet_bN, vit.

    Raises:
        ValueError: torchvision has no such network, or its layers are not known here (use Tap).
    """
    from torchvision.models import get_model, list_models

    if name not in list_models():
        close = difflib.get_close_matches(name, list_models(), n=3)
        raise ValueError(f'torchvision has no network {name!r}; the closest are {", ".join(close)}')
    net = get_model(name, weights=None, num_classes=num_classes)
    for beginning, layers in _FAMILIES.items():
        if name.startswith(beginning):
            return Tap(net, **layers(net))
    raise ValueError(f"the layers of torchvision's {name} are not known here: wrap it with models.hooks.Tap")


def _resnet(net) -> dict:
    stages = [getattr(net, f'layer{i}') for i in (1, 2, 3, 4)]
    last = [f'layer{i}.{len(stage) - 1}' for i, stage in enumerate(stages, 1)]
    bn = 'bn3' if hasattr(stages[0][0], 'bn3') else 'bn2'
    return {
        'fms': ['relu', 'layer1', 'layer2', 'layer3', 'layer4'],
        'pres': [('relu', 'in'), *((f'{path}.relu', 'in') for path in last)],  # the last of its calls
        'bn_before_relu': [f'{path}.{bn}' for path in last],
    }


def _vgg(net) -> dict:
    before = [i - 1 for i, m in enumerate(net.features) if isinstance(m, nn.MaxPool2d)]
    bns = [f'features.{i - 1}' for i in before if isinstance(net.features[i - 1], nn.BatchNorm2d)]
    return {
        'fms': [f'features.{i}' for i in before],
        'pres': [(f'features.{i}', 'in') for i in before],
        'bn_before_relu': bns[1:] or None,
    }


def _named(*paths, **more):
    return lambda net: {'fms': list(paths), **more}


def _vit(net) -> dict:
    depth = len(net.encoder.layers)
    chosen = [round(depth * share) - 1 for share in (0.25, 0.5, 0.75, 1)]
    layers = [f'encoder.layers.encoder_layer_{i}' for i in (0, *chosen)]
    return {'fms': layers, 'to_map': tokens}


_FAMILIES = {
    'resnet': _resnet,
    'wide_resnet': _resnet,
    'resnext': _resnet,
    'vgg': _vgg,
    'mobilenet_v2': _named('features.0', 'features.3', 'features.6', 'features.13', 'features.17'),
    'shufflenet_v2': _named('conv1', 'stage2', 'stage3', 'stage4'),
    'convnext': _named('features.0', 'features.1', 'features.3', 'features.5', 'features.7'),
    'regnet': _named('stem', *(f'trunk_output.block{i}' for i in (1, 2, 3, 4))),
    'densenet': _named('features.relu0', *(f'features.denseblock{i}' for i in (1, 2, 3, 4))),
    'efficientnet_b': _named('features.0', 'features.2', 'features.3', 'features.5', 'features.7'),
    'vit': _vit,
}
