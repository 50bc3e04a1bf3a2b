"""Load weights from the checkpoint formats of the field: ours, RepDistiller, mdistiller,
Knowledge-Distillation-Zoo, chenyaofo's pytorch-cifar-models, timm, Lightning, torchvision, safetensors.
Nothing in a file is ever executed."""

import copy
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# where the weights are in a training checkpoint: the student's side first, an average of weights after them
_CONTAINERS = ('model', 'net', 'snet', 'state_dict', 'student', 'net1', 'model_state_dict', 'weights')
_CONTAINERS += ('state_dict_ema', 'model_ema', 'teacher')
_OTHER_SIDE = ('tnet', 'net2')
# keys and prefixes of a teacher's weights, or of an average's
_NOT_ITSELF = re.compile(
    r'teacher|momentum|(?:^|[._])(?:ema|swa|avg|averaged|frozen|ref|target|'
    r't|net_t|t_net|tnet|model_t|t_model|encoder_k)(?:$|[._])'
)
_WRAPPERS = re.compile(r'(?<![^.])(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.')
_ACCURACIES = ('accuracy', 'best_acc', 'prec@1', 'top1')


def load_weights(
    net: nn.Module,
    path: str | Path,
    part: str | None = None,
    new_head: bool = False,
    class_names: Sequence[str] | None = None,
    scale: Sequence | None = None,
    head: str = '',
) -> str:
    """Fill `net` from a checkpoint file, strictly.

    Prefixes that wrappers leave before the names (module., _orig_mod., model., backbone., ... in any nesting)
    are stripped, and what lies beside the network under other prefixes (a loss, another network) is left out.

    Args:
        net: the network; untouched if anything is wrong.
        path: a state dict, a training checkpoint that holds one, or NAME.safetensors.
        part: the key to take when a file holds several networks, e.g. 'tnet' or 'net2'; None takes the
            student's.
        new_head: leave the classifier as it is, whatever the file has for it; the rest must fit.
        class_names: what the network's logits stand for: a file that knows its classes and has others, or
            another order, is refused. None: not compared.
        scale: (mean, std) of the images that it will get. None: not compared.
        head: what helps where only the classifier differs, for the message.

    Returns:
        A line for the log: which part was taken, what was left out, the accuracy stored in the file, and
        that it knows images normalised otherwise, if the file says so.

    Raises:
        ValueError: the file is missing, truncated, holds no weights, holds pickled code, or does not fit the
            network; its classes are others; the message names the file and says which.
    """
    content = read_checkpoint(path)
    state, key, others = _find_state(content, path, part)
    names, known_scale = _stored_class_names(content, state), _stored_scale(content, state)
    whole = state
    state, prefix, beside = _unwrapped(state, net.state_dict())
    if method := changed_by(beside):
        raise ValueError(
            f'{path}: a student to which {method} has added layers; models.load_student(path, name, '
            f'num_classes) builds and loads it'
        )
    left = []
    if new_head:
        if not head_names(net):
            raise ValueError(f'{type(net).__name__} has no linear layer that a new one could replace')
        state, left = _with_head_of(net, state)
    if problem := _misfit(net, state):
        headless = not new_head and any(name in problem for name in head_names(net))
        headless = headless and not _misfit(net, _with_head_of(net, state)[0])
        hint = f'; only the classifier differs{head and ": "}{head}' if headless else ''
        hint += _head_beside(net, whole, beside, prefix) if headless else ''
        guess = _guess(state)
        raise ValueError(
            f'{path}: does not fit the network; {problem}{f"; it looks like {guess}" if guess else ""}{hint}'
        )
    if not new_head:
        compare_classes(path, names, class_names)
    net.load_state_dict(state, strict=True)
    said = [f'{path}' + (f" ['{key}']" if key else '')]
    said += [f'also in the file: {", ".join(others)}'] if others else []
    said += [f'without the prefix {prefix}'] if prefix else []
    said += [f'left out: {_few(beside)}'] if beside else []
    if new_head:
        other = _head_beside(net, whole, beside, prefix)
        said.append(
            'a new classifier' + (other if other and not left else f', left out: {_few(left) or _NONE}')
        )
    said += [
        f'{name} {_number(content[name]):.2f}'
        for name in _ACCURACIES
        if _number(content.get(name)) is not None
    ]
    return ', '.join(said) + _other_scale(known_scale, scale)


def num_classes_in(net: nn.Module, path: str | Path) -> int | None:
    """How many classes the classifier of a file of weights tells apart; None if it has no classifier.

    Args:
        net: the architecture, with any number of classes.
        path: as for load_weights.

    Raises:
        ValueError: the file cannot be read.
    """
    state, _, _ = _find_state(read_checkpoint(path), path, None)
    state, _, _ = _unwrapped(state, net.state_dict())
    heads = [state[name] for name in head_names(net) if name in state and name.endswith('weight')]
    return heads[0].shape[0] if heads else None


_NONE = 'nothing, the file has none'


def named_weights(
    net: nn.Module | dict, class_names: Sequence[str] | None, scale: Sequence | None = None
) -> dict:
    """The state dict of a network (or one that is given) as it is, with the attribute `class_names`.

    scale: (mean, std) of its images, where the name of the data does not say them: the attribute `scale`.

    An attribute, because a plain state dict is what everybody can load; torch.save and torch.load keep it.
    """
    state = net.state_dict() if isinstance(net, nn.Module) else net
    if class_names or scale:
        state = OrderedDict(state) if type(state) is dict else state  # a plain one has no attributes
    if class_names:
        state.class_names = list(class_names)
    if scale:
        state.scale = [list(part) for part in scale]
    return state


def _stored_scale(content: dict, state: dict) -> Sequence | None:
    args = content.get('args')  # of a checkpoint of ours: its recipe
    return getattr(state, 'scale', None) or (args.get('own_scale') if isinstance(args, dict) else None)


def _other_scale(stored: Sequence | None, given: Sequence | None) -> str:
    """A warning for the log; empty if both are alike, or one is unknown."""
    if not stored or not given or _differ(stored, given) < 1e-3:
        return ''
    return (
        f'; warning: it was trained on images normalised with {normalised(stored)}, these have '
        f'{normalised(given)}: store the first mean and std in train.npz, or, for a teacher of train_kd.py, '
        f'say them with --t_mean and --t_std'
    )


def _differ(a: Sequence, b: Sequence) -> float:
    return max(abs(x - y) for one, other in zip(a, b) for x, y in zip(one, other))


def normalised(scale: Sequence) -> str:
    """'mean (0.4914, 0.4822, 0.4465) std (...)', for people."""
    mean, std = (tuple(round(float(x), 4) for x in part) for part in scale)
    return f'mean {mean} std {std}'


def _stored_class_names(content: dict, state: dict) -> list | None:
    origin = content.get('origin')
    found = getattr(state, 'class_names', None) or content.get('class_names')
    return found or (origin.get('class_names') if isinstance(origin, dict) else None)


def compare_classes(path: str | Path, stored: Sequence[str] | None, wanted: Sequence[str] | None) -> None:
    """Refuse weights whose logits stand for other classes than the data's; None: nothing is known.

    Raises:
        ValueError: names the classes that differ.
    """
    if not stored or not wanted or list(stored) == list(wanted):
        return
    strange, lacking = ([x for x in a if x not in set(b)] for a, b in ((stored, wanted), (wanted, stored)))
    differ = [f'the data has no {_few(strange)}'] if strange else []
    differ += [f'the weights have no {_few(lacking)}'] if lacking else []
    if not differ:
        k = next(k for k, (a, b) in enumerate(zip(stored, wanted)) if a != b)
        differ = [f'in another order: class {k} of the weights is {stored[k]}, of the data {wanted[k]}']
    raise ValueError(f"{path}: was trained for other classes than the data's; {'; '.join(differ)}")


# names that tell a student to which a method has added layers that stay in use
CHANGED = {'simkd': 'loss.projector.0.weight', 'norm': 'transform.expand.0.weight'}


def changed_by(names: Sequence[str]) -> str | None:
    """The method whose additions to a student are among these names (models/changed.py builds them)."""
    for method, mark in CHANGED.items():
        if any(f'.{name}'.endswith(f'.{mark}') for name in names):
            return method
    return None


def read_checkpoint(path: str | Path) -> dict:
    """`torch.load` with `weights_only=True`, on the CPU, every failure a ValueError of one line.

    NAME.safetensors is read by the package safetensors, which is imported only here.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'{path}: no such checkpoint file')
    if path.suffix == '.safetensors':
        return _read_safetensors(path)
    if _is_torchscript(path):
        raise ValueError(
            f'{path}: is a TorchScript archive; ' + _save_alone(f'torch.jit.load({str(path)!r})')
        )
    try:
        # RepDistiller's optimiser state has a NumPy number in it, others keep accuracies as such: allow
        # numbers, also by their old name
        scalar = np._core.multiarray.scalar
        kinds = [f'{kind}{bits}' for kind in ('Int', 'UInt') for bits in (8, 16, 32, 64)]
        kinds += ['Float16', 'Float32', 'Float64', 'Bool']
        with torch.serialization.safe_globals(
            [
                np.dtype,
                *(getattr(np.dtypes, f'{kind}DType') for kind in kinds),
                (scalar, 'numpy.core.multiarray.scalar'),
                (scalar, 'numpy._core.multiarray.scalar'),
            ]
        ):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL ([\w.]+)|got <class '([\w.]+)'>", str(error))
        if not blocked:
            raise ValueError(f'{path}: not a PyTorch checkpoint, or damaged') from None
        name = blocked[1] or blocked[2]
        hint = (
            '; use a file that holds weights only, e.g. ckpt_epoch_N.pth or a _best file'
            if name == 'argparse.Namespace'
            else ''
        )
        raise ValueError(
            f'{path}: refused, it contains pickled code ({name}) and nothing of it was run{hint}; '
            + _save_alone(f'torch.load({str(path)!r}, weights_only=False)')
            + ", of a dict ['model'], ['state_dict'] or whatever holds its weights in place of .state_dict()"
        ) from None
    except (
        RuntimeError,
        EOFError,
        OSError,
        KeyError,
        ValueError,
        AttributeError,
        IndexError,
        TypeError,
        AssertionError,
        zipfile.BadZipFile,
    ) as error:
        detail = (str(error).splitlines() or ['empty'])[0]
        raise ValueError(f'{path}: truncated or not a PyTorch checkpoint ({detail[:120]})') from None
    if not isinstance(content, dict):
        raise ValueError(
            f'{path}: holds a {type(content).__name__}, expected a state dict or a training checkpoint'
        )
    return content


def _save_alone(loaded: str) -> str:
    return f'if you trust it, save its weights alone: torch.save({loaded}.state_dict(), NEW)'


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith('/constants.pkl') for name in file.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _read_safetensors(path: Path) -> dict:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(
            f'{path}: to read it, safetensors must be installed (pip install safetensors)'
        ) from None
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f'{path}: truncated or not a safetensors file ({str(error)[:120]})') from None


def _find_state(content: dict, path: Path, part: str | None) -> tuple[dict, str | None, list[str]]:
    """The weights, their key in the file (None: the file is nothing else), and the keys of other weights."""
    places = {key: content[key] for key in (*_CONTAINERS, *_OTHER_SIDE) if isinstance(content.get(key), dict)}
    for outer, inner in list(places.items()):  # one more level, e.g. {'model': {'state_dict': ...}}
        if not _is_state(inner):
            places |= {f'{outer}.{key}': inner[key] for key in _CONTAINERS if key in inner}
    found = {key: state for key, state in places.items() if _is_state(state)}
    if part is not None:
        state = found.get(part, content.get(part))
        if not _is_state(state):
            raise ValueError(f'{path}: has no weights under {part!r}; its keys are {list(content)[:8]}')
        return state, part, [key for key in found if key != part]
    if not _is_state(content) and all(_NOT_ITSELF.search(key) for key in found):
        # no name is known, or a teacher's or an average's alone: the largest under other names goes before
        # these, and what has a twentieth of its entries is a loss's, not a network's
        others = [key for key, x in content.items() if isinstance(key, str) and _is_state(x)]
        found |= {key: content[key] for key in sorted(others, key=lambda key: -len(content[key]))}
        few = max(map(len, found.values()), default=0) / 20
        found = dict(sorted(found.items(), key=lambda x: (len(x[1]) < few, bool(_NOT_ITSELF.search(x[0])))))
    ours = [key for key in found if key not in _OTHER_SIDE]
    if ours:
        return found[ours[0]], ours[0], [key for key in found if key != ours[0]]
    if _is_state(content):
        return content, None, []
    hint = ''
    if found:
        first = next(iter(found))
        hint = f'; say which part to take: {list(found)}; in Python models.load_weights(net, {str(path)!r}, '
        hint += f'part={first!r}), then save net.state_dict()'
    raise ValueError(f'{path}: holds no weights that could be found; its keys are {list(content)[:8]}{hint}')


def _is_state(x) -> bool:
    """Names and tensors; a counter or a note among them does not matter."""
    if not isinstance(x, dict) or not all(isinstance(key, str) for key in x):
        return False
    return sum(isinstance(value, Tensor) for value in x.values()) > len(x) / 2


def _unwrapped(state: dict, wanted: dict) -> tuple[dict, str, list[str]]:
    """(the network's entries under the names it has, the prefix they had, names of the other entries).

    The prefix is the one under which most of the network's names are found. Of equals, a student's and not
    its teacher's or an average's, then the first.
    """
    probes = [*list(wanted)[:3], *list(wanted)[-3:]]
    prefixes = {
        name[: -len(probe)]: 0 for name in state for probe in probes if f'.{name}'.endswith(f'.{probe}')
    } | {'': 0}
    taken = {p: _under(p, state, wanted) for p in prefixes}
    fits = {p: len(taken[p].keys() & wanted.keys()) for p in prefixes}
    best = max(prefixes, key=lambda p: (fits[p], not _NOT_ITSELF.search(p)), default='')
    if fits.get(best, 0) < len(wanted) / 2:  # another network: show it without what all names have in common
        best = _common_prefix(state)
    entries = taken.get(best) or _under(best, state, wanted)
    entries = {name: x for name, x in entries.items() if isinstance(x, Tensor) or name in wanted}
    beside = [name for name, x in state.items() if not name.startswith(best) or not isinstance(x, Tensor)]
    if all(_shape(entries.get(name)) == _shape(x) for name, x in wanted.items() if _counts(name)):
        # the network is whole: what no part of it is called lies beside it, e.g. an auxiliary classifier
        parts = {name.partition('.')[0] for name in wanted}
        strange = {name for name in entries if name.partition('.')[0] not in parts}
        entries = {name: x for name, x in entries.items() if name not in strange}
        beside += [name for name in state if name[len(best) :] in strange and name not in beside]
    return entries, best, [name for name in beside if name not in wanted]


def _counts(name: str) -> bool:
    """Whether a file must have this entry: those older than PyTorch 0.4 have no numbers of batches."""
    return not name.endswith('num_batches_tracked')


def _under(prefix: str, state: dict, wanted: dict) -> dict:
    names = {name: _bare(name[len(prefix) :], wanted) for name in state if name.startswith(prefix)}
    return {new if new in wanted else _renamed(new): state[name] for name, new in names.items()}


def _bare(name: str, wanted: dict) -> str:
    """Without what wrappers around a part of the network leave inside its names: features.module.0.weight."""
    short = name if name in wanted else _WRAPPERS.sub('', name)
    return short if short in wanted else name


def _renamed(name: str) -> str:
    """Knowledge-Distillation-Zoo's stages and projections, torchvision's DenseNet as it was once saved."""
    name = re.sub(r'^res([123])\.', r'layer\1.', name).replace('.ds.', '.downsample.')
    return re.sub(r'(denselayer\d+\.(?:norm|conv))\.([12]\.)', r'\1\2', name)


def _common_prefix(state: dict) -> str:
    prefix = ''
    while len(heads := {name[len(prefix) :].partition('.')[:2] for name in state}) == 1:
        head, dot = heads.pop()
        if not dot:
            break
        prefix += head + dot
    return prefix


def _with_head_of(net: nn.Module, state: dict) -> tuple[dict, list[str]]:
    """(state with the network's own classifier, names of entries that were left out for it).

    Left out is what the file has for the classifier, and heads of other names: entries whose first word is
    none of the body's.
    """
    head = head_names(net)
    wanted = net.state_dict()
    body = {name.partition('.')[0] for name in wanted if name not in head}
    left = [name for name in state if name in head or name.partition('.')[0] not in body]
    rest = {name: x for name, x in state.items() if name not in left}
    return rest | {name: wanted[name] for name in head}, left


def _head_beside(net: nn.Module, state: dict, beside: list[str], prefix: str) -> str:
    """What to do with entries beside the network that may be its classifier, by their width."""
    wanted, head = net.state_dict(), head_names(net)
    inputs = {tuple(wanted[name].shape[1:]) for name in head if wanted[name].dim() > 1}
    alike = [name for name in beside if (_shape(state[name]) or ((),))[1:] in inputs]
    places = {name.rpartition('.')[0] for name in alike}
    names = [name for name in beside if name.rpartition('.')[0] in places]
    if not names:
        return ''
    here = f'{prefix}{sorted(head)[0].rpartition(".")[0]}.*'
    return f'; beside it the file has {_few(names)}: rename them to {here} if that is the classifier'


def head_names(net: nn.Module) -> set[str]:
    """The classifier's entries in the state dict: of classifier_layer(), else of the last nn.Linear.

    Those of further_heads(), too, if the network has several.
    """
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    head = net.classifier_layer() if hasattr(net, 'classifier_layer') else (linear or [None])[-1]
    if head is None:
        return set()
    modules = dict(net.named_modules())
    paths = [path for path, module in modules.items() if module is head]
    further = net.further_heads() if hasattr(net, 'further_heads') else []
    paths = (paths[-1], *(path for path, module in modules.items() if any(module is m for m in further)))
    return {name for name in net.state_dict() if name.startswith(tuple(f'{path}.' for path in paths))}


def _misfit(net: nn.Module, state: dict) -> str:
    """What does not fit; empty if all does."""
    wanted = net.state_dict()
    missing = [k for k in wanted if k not in state and _counts(k)]
    unexpected = [k for k in state if k not in wanted]
    shapes = {k: (_shape(state[k]), _shape(wanted[k])) for k in wanted if k in state}
    misshapen = [f'{k} is {there}, wanted {here}' for k, (there, here) in shapes.items() if there != here]
    if not (missing or unexpected or misshapen):
        return ''
    if missing and unexpected and not misshapen:
        try:  # modules may know names of older versions, as torchvision's transformers do
            copy.deepcopy(net).load_state_dict(state, strict=True)
            return ''
        except RuntimeError:
            pass
    return '; '.join(
        f'{label}: {", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""}'
        for label, keys in (('missing', missing), ('unexpected', unexpected), ('wrong shape', misshapen))
        if keys
    )


def _shape(x) -> tuple | None:
    return tuple(x.shape) if isinstance(x, Tensor) else None


def _few(names: Sequence[str]) -> str:
    return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')


def _guess(state: dict[str, Tensor]) -> str | None:
    """Name and class count of the known network these weights belong to."""
    from . import MODELS, OF_IMAGENET, build

    keys = {k: _shape(v) for k, v in state.items() if not k.endswith('num_batches_tracked')}
    heads = [shape[0] for k, shape in keys.items() if shape and len(shape) == 1]
    if not heads:
        return None
    num_classes = heads[-1]  # the classifier's bias is the last vector of them all
    makes = MODELS
    if keys.get('conv1.weight') == (64, 3, 7, 7):  # torchvision's stem, for large images
        makes = {f'torchvision:{name}': partial(build, f'torchvision:{name}') for name in OF_IMAGENET}
    for name, make in makes.items():
        with torch.device('meta'):
            known = make(num_classes=num_classes).state_dict()
        if keys == {k: tuple(v.shape) for k, v in known.items() if not k.endswith('num_batches_tracked')}:
            return f'{name} with {num_classes} classes'
    return None


def _number(x) -> float | None:
    if isinstance(x, Tensor):
        x = x.item() if x.numel() == 1 else None
    return float(x) if isinstance(x, (int, float)) else None
