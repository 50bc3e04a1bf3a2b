"""Any backbone as a network of ours: name its layers, get Feats.

    net = Tap(torchvision.models.resnet18(), fms=['relu', 'layer1', 'layer2', 'layer3', 'layer4'])
    net = tap_torchvision('resnet34')                      the layers of well-known families are known

Everything else of the project works with the result: `net(x)` gives logits, `net(x, True)` Feats, the
state_dict is that of the wrapped network.
"""

import difflib
import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .feats import Feats


class TapError(RuntimeError, ValueError):
    """A map that cannot be handed out. Also a ValueError, so that a script reports it in one line."""


class Tap(nn.Module):
    """A network whose maps are read by hooks at named layers.

    A layer is a module's path, 'layer1.0', for its output, or (path, 'in') for its input. Of a module that is
    called several times in a forward pass, the last call counts. Modules that work in place are switched to
    copies (the results stay); functional in-place operations cannot be, and a map that is changed after it
    was read is refused: tap what comes before a final activation as that activation's input, never as the
    output of the last batch norm.

    The Tap has the modules, parameters and buffers of the network under the network's own names: files,
    optimisers, torch.func.functional_call and averaged models see no difference, at any depth. It can be
    copied and pickled, alone or as a part of other modules (pickled: with a to_map that has a name).

    Args:
        net: the network; its forward takes images and returns logits. Kept as `.wrapped`.
        fms: layers of the maps [stem, stage 1, ...], after their activation.
        pres: the same before it; None: repeats fms.
        feat: layer of the embedding; None: the input of the classifier, or, where that is the output of an
            nn.Dropout, what went into the dropout (a functional dropout cannot be seen: name a layer).
        classifier: path of the last linear layer; None: the last nn.Linear.
        bn_before_relu: paths of the batch norms that OFD asks for, aligned with fms[1:].
        to_map: turns a tapped value into (N, C, H, W), for networks with other layouts; `tokens` and
            `last_axis` are ready.
        tokens: layers of a vision transformer whose patch tokens are handed out, for ViTKD the first two
            blocks and the final layer norm.

    Shape:
        x: (N, 3, H, W). `net(x)` returns (N, K); `net(x, True)` returns Feats, feat flattened to (N, D).

    Raises:
        ValueError: a path does not exist (the closest names are listed), a side is not 'in' or 'out', or
            there is no linear layer.
        TapError (a RuntimeError and a ValueError), by net(x, True): a tapped module was not called, gave no
            tensor, or its map was changed in place afterwards; in training, a map got no gradient although
            weights before it are trained (activation checkpointing of the reentrant kind does that); the Tap
            is inside nn.DataParallel, or that inside the Tap.
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
        tokens: Sequence = (),
    ) -> None:
        super().__init__()
        self.__dict__['wrapped'] = net  # not a child: names would get a prefix
        self._modules, self._parameters, self._buffers = net._modules, net._parameters, net._buffers
        self._non_persistent_buffers_set = net._non_persistent_buffers_set
        self._version, self.training = net._version, net.training
        for module in net.modules():
            if getattr(module, 'inplace', False) is True:
                module.inplace = False
        linear = [path for path, m in net.named_modules() if isinstance(m, nn.Linear)]
        if classifier is None and not linear:
            raise ValueError(f'{type(net).__name__} has no linear layer; say which is the classifier')
        self.classifier_path = classifier or linear[-1]
        self.taps = {
            'fms': [_layer(x) for x in fms],
            'pres': None if pres is None else [_layer(x) for x in pres],
            'feat': _layer(feat or (self.classifier_path, 'in')),
            'tokens': [_layer(x) for x in tokens],
        }
        self.bn_paths, self.to_map = bn_before_relu, to_map
        _find(net, self.classifier_path)
        self._pass = _Pass(net)
        self._handles = [self._hook(layer, before_dropout=feat is None) for layer in self._layers()]
        for module in net.modules() if feat is None else ():
            if isinstance(module, _DropoutNd):
                self._handles.append(module.register_forward_hook(self._pass.dropped_out))

    def _hook(self, layer: tuple, before_dropout: bool):
        module, read = _find(self.wrapped, layer[0]), _Read(self._pass, layer)
        if layer[1] == 'out':
            return module.register_forward_hook(read.output)
        if before_dropout and layer == self.taps['feat']:
            return module.register_forward_pre_hook(read.input_before_dropout, with_kwargs=True)
        return module.register_forward_pre_hook(read.input, with_kwargs=True)

    def _layers(self) -> list:
        """Each layer once, in an order that is the same in every process."""
        maps = [*self.taps['fms'], *(self.taps['pres'] or []), *self.taps['tokens']]
        return list(dict.fromkeys([*maps, self.taps['feat']]))

    def forward(self, x: Tensor, feats: bool = False) -> Tensor | Feats:
        if getattr(self, '_is_replica', False):
            raise TapError(_PARALLEL)
        if not feats:
            return self.wrapped(x)
        self._pass.begin(x)
        try:
            out = self.wrapped(x)
            seen = {layer: self._checked(layer) for layer in self._layers()}
        finally:
            self._pass.end()
        as_map = self.to_map or (lambda value: value)
        fms = [as_map(seen[layer]) for layer in self.taps['fms']]
        pres = None if self.taps['pres'] is None else [as_map(seen[layer]) for layer in self.taps['pres']]
        patches = [as_map(seen[layer]).flatten(2).mT for layer in self.taps['tokens']]
        feat = seen[self.taps['feat']].flatten(1)
        return Feats(out, feat, fms, list(fms) if pres is None else pres, tokens=patches)

    def _checked(self, layer: tuple):
        """What was read at a layer in this pass, if it can be handed out."""
        where = f'{type(self.wrapped).__name__}: {"the input of " * (layer[1] == "in")}{layer[0]}'
        if layer not in self._pass.values:
            raise TapError(
                f'{where} was not called; if it was replaced, make the Tap after that (close() gives the '
                f'network)'
            )
        value, versions, lost = self._pass.values[layer]
        if not isinstance(value, Tensor) and (not self.to_map or layer == self.taps['feat']):
            raise TapError(
                f'{where} is a {type(value).__name__}, not a tensor: tap another layer or give to_map'
            )
        if any(x._version != version for x, version in versions):
            raise TapError(
                f'{where} is changed in place after it was read (x += ..., F.relu(x, inplace=True)): tap '
                f"what comes later, e.g. (path, 'in') of the next module, or write that operation without "
                f'in-place'
            )
        if lost:
            raise TapError(
                f'{where} has no gradient although the network trains, so nothing can be distilled there: '
                f'activation checkpointing around it needs use_reentrant=False; where no gradient is meant, '
                f'freeze the weights (requires_grad_(False)) and leave out no_grad'
            )
        return value

    def train(self, mode: bool = True) -> 'Tap':
        self.wrapped.training = mode
        return super().train(mode)

    def after(self, k: int, fm: Tensor) -> Feats:
        raise ValueError(
            f'{type(self.wrapped).__name__} is wrapped: it cannot be run from the middle, which this method '
            f'needs'
        )

    def bn_before_relu(self) -> list[nn.Module]:
        if self.bn_paths is None:
            raise ValueError(
                f'{type(self.wrapped).__name__}: this method needs bn_before_relu=[...], the paths of the '
                f'batch norms before the last activation of each stage'
            )
        return [_find(self.wrapped, path) for path in self.bn_paths]

    def feat_modules(self) -> list[nn.Module]:
        head = self.classifier_path.split('.')[0]
        return [m for name, m in self.wrapped.named_children() if name != head]

    def classifier_layer(self) -> nn.Linear:
        return _find(self.wrapped, self.classifier_path)

    def close(self) -> nn.Module:
        """Remove the hooks; returns the wrapped network."""
        for handle in self._handles:
            handle.remove()
        return self.wrapped

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.wrapped._save_to_state_dict(destination, prefix, keep_vars)  # a network may have its own way

    def _load_from_state_dict(self, *args):
        self.wrapped._load_from_state_dict(*args)


_PARALLEL = (
    'a Tap does not work with nn.DataParallel, whose threads share one set of hooks: use one process per '
    'GPU, torchrun and DistributedDataParallel'
)


class _Pass:
    """What the hooks of a Tap see in the forward pass under way; between passes nothing.

    Students that train side by side call one teacher from several threads: each thread has its own pass.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net, self._of_thread = net, threading.local()

    def __getstate__(self) -> dict:
        return {'net': self.net}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state['net'])

    def _now(name, default):
        return property(
            lambda self: getattr(self._of_thread, name, default),
            lambda self, value: setattr(self._of_thread, name, value),
        )

    values, dropped = _now('values', None), _now('dropped', None)
    trains, image_needs_grad = _now('trains', False), _now('image_needs_grad', False)

    def begin(self, x) -> None:
        self.values, self.image_needs_grad = {}, _needs_grad([x])
        self.trains = self.net.training and torch.is_grad_enabled()  # then maps should have gradients

    def end(self) -> None:
        self.values, self.trains, self.dropped = None, False, None

    def keep(self, layer: tuple, module: nn.Module, value, needs_grad: bool) -> None:
        """A map, or what holds several, the changes its tensors have seen, and whether a gradient is missing.

        needs_grad: something is learnt in the module, or before it. Where gradients are switched off it
        cannot be seen that something before it learns; there the order of the modules tells.
        """
        versions, lost = [], False
        if torch.compiler.is_compiling():  # the checks are not traced: keep a copy
            self.values[layer] = _copied(value), versions, lost
            return
        if getattr(module, '_is_replica', False):
            raise TapError(_PARALLEL)
        if isinstance(value, Tensor) and self.trains and not value.requires_grad:
            if value.is_floating_point():
                lost = needs_grad or (not torch.is_grad_enabled() and self._learns_before(layer[0]))
        if any(x.is_inference() for x in _tensors(value)):  # they count no changes
            value = _copied(value)
        else:
            versions = [(x, x._version) for x in _tensors(value)]
        self.values[layer] = value, versions, lost

    def _learns_before(self, path: str) -> bool:
        if self.image_needs_grad:
            return True
        for name, module in self.net.named_modules():
            if name == path:
                return False
            if name and _needs_grad(module.parameters(recurse=False)):
                return True
        return False

    def dropped_out(self, module: nn.Module, args: tuple, out) -> None:
        if self.values is not None:
            self.dropped = args[0] if args else None, out


class _Read:
    """The hooks of one layer: methods of an object, so that they are copied and pickled with their module."""

    def __init__(self, seen: _Pass, layer: tuple) -> None:
        self.seen, self.layer = seen, layer

    def input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.seen.values is not None:
            value = args[0] if args else next(iter(kwargs.values()), None)
            self.seen.keep(self.layer, module, value, False)

    def input_before_dropout(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        before, after = self.seen.dropped or (None, None)
        dropped = before is not None and args and args[0] is after
        self.input(module, (before,) if dropped else args, kwargs)

    def output(self, module: nn.Module, args: tuple, value) -> None:
        if self.seen.values is not None:
            needs_grad = self.seen.trains and (_needs_grad(args) or _needs_grad(module.parameters()))
            self.seen.keep(self.layer, module, value, needs_grad)


def _tensors(value) -> list[Tensor]:
    """Of a map, or of tuples, lists and dictionaries of maps."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [x for part in parts for x in _tensors(part)]


def _copied(value):
    """The same, of clones."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return type(value)((key, _copied(x)) for key, x in value.items())
    if isinstance(value, (tuple, list)):
        parts = [_copied(x) for x in value]
        return type(value)(*parts) if hasattr(value, '_fields') else type(value)(parts)
    return value


def _needs_grad(tensors) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def _layer(x) -> tuple[str, str]:
    if isinstance(x, str):
        return x, 'out'
    if isinstance(x, (tuple, list)) and len(x) == 2 and isinstance(x[0], str) and x[1] in ('in', 'out'):
        return tuple(x)
    raise ValueError(f"a layer is a path, (path, 'in') or (path, 'out'), got {x!r}")


def _find(net: nn.Module, path: str) -> nn.Module:
    modules = dict(net.named_modules())
    if path not in modules:
        close = difflib.get_close_matches(path, modules, n=3, cutoff=0.3)
        raise ValueError(f'{type(net).__name__} has no layer {path!r}; the closest are {", ".join(close)}')
    return modules[path]


def tokens(x: Tensor, prefix: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """(N, P + H W, D) tokens, P of them in front that stand for no place -> (N, D, H, W).

    For Tap's to_map as it is, or with functools.partial(tokens, prefix=..., size=...).

    Args:
        prefix: P, tokens in front: 1 of a ViT (class), 2 of a distilled DeiT (class, distillation), 5 of a
            DINOv2 with registers (class, four registers). None: the first of 1, 0, 2, 5 that leaves a square.
        size: (H, W) of the patches; None: a square.

    Raises:
        ValueError: the tokens left are not H W, or no square.
    """
    if x.dim() != 3:
        raise ValueError(f'tokens: expected (N, L, D), got {tuple(x.shape)}')
    many = x.shape[1]
    for p in (1, 0, 2, 5) if prefix is None else (prefix,):
        height, width = size or [math.isqrt(max(many - p, 0))] * 2
        if p + height * width == many and many > p:
            return x[:, p:].transpose(1, 2).unflatten(2, (height, width))
    wanted = f'{size[0]} x {size[1]} of them' if size else 'a square of them'
    front = '1, 0, 2 or 5' if prefix is None else prefix
    raise ValueError(
        f'tokens: got {many} tokens, expected {front} in front and {wanted}: say prefix and size'
    )


def last_axis(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def tap_torchvision(name: str, num_classes: int = 1000) -> Tap:
    """torchvision's network of this name with fresh weights, its stages tapped.

    Known: resnetN, wide_resnet and resnext, vggN_bn, mobilenet_v2 and _v3, shufflenet_v2, convnext, regnet,
    densenet, efficientnet_bN and _v2, vit, swin and swin_v2.

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
    raise ValueError(
        f"the layers of torchvision's {name} are not known here: wrap it with models.hooks.Tap and give that "
        'a name in MODELS of models/__init__.py (docs/extending.md, Your own network)'
    )


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
    shallow = [f'encoder.layers.encoder_layer_{i}' for i in range(2)]
    return {'fms': layers, 'to_map': tokens, 'tokens': [*shallow, 'encoder.ln']}


def _efficientnet(net) -> dict:
    last = len(net.features) - 2  # before the 1x1 convolution that widens for the classifier
    return {'fms': [f'features.{i}' for i in (0, 2, 3, 5, last)]}


_FAMILIES = {
    'resnet': _resnet,
    'wide_resnet': _resnet,
    'resnext': _resnet,
    'vgg': _vgg,
    'mobilenet_v2': _named('features.0', 'features.3', 'features.6', 'features.13', 'features.17'),
    'mobilenet_v3_large': _named('features.0', 'features.3', 'features.6', 'features.12', 'features.15'),
    'mobilenet_v3_small': _named('features.0', 'features.1', 'features.3', 'features.8', 'features.11'),
    'shufflenet_v2': _named('conv1', 'stage2', 'stage3', 'stage4'),
    'convnext': _named('features.0', 'features.1', 'features.3', 'features.5', 'features.7'),
    'regnet': _named('stem', *(f'trunk_output.block{i}' for i in (1, 2, 3, 4))),
    'densenet': _named('features.relu0', *(f'features.denseblock{i}' for i in (1, 2, 3, 4))),
    'efficientnet': _efficientnet,
    'swin': _named(*(f'features.{i}' for i in (0, 1, 3, 5, 7)), to_map=last_axis),
    'vit': _vit,
}
