"""Load weights from the checkpoint formats of the field: ours, RepDistiller, mdistiller,
Knowledge-Distillation-Zoo, chenyaofo's pytorch-cifar-models. Nothing in a file is ever executed."""

import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# where the weights are in a training checkpoint, the student's side first
_CONTAINERS = ('model', 'net', 'snet', 'state_dict', 'student', 'net1')
_OTHER_SIDE = ('tnet', 'net2')
_ACCURACIES = ('accuracy', 'best_acc', 'prec@1', 'top1')


def load_weights(net: nn.Module, path: str | Path, part: str | None = None) -> str:
    """Fill `net` from a checkpoint file, strictly.

    Args:
        net: the network; untouched if anything is wrong.
        path: a state dict, or a training checkpoint that holds one.
        part: the key to take when a file holds several networks, e.g. 'tnet' or 'net2'; None takes the
        student's.

    Returns:
        A line for the log: which part was taken and the accuracy stored in the file, if any.

    Raises:
        ValueError: the file is missing, truncated, holds no weights, holds pickled code, or does not fit the
            network; the message names the file and says which.
    """
    content = read_checkpoint(path)
    state, key = _find_state(content, path, part)
    state = _our_names(state)
    _check_fit(net, state, path)
    net.load_state_dict(state, strict=True)
    said = [f'{path}' + (f" ['{key}']" if key else '')]
    said += [
        f'{name} {_number(content[name]):.2f}'
        for name in _ACCURACIES
        if _number(content.get(name)) is not None
    ]
    return ', '.join(said)


def read_checkpoint(path: str | Path) -> dict:
    """`torch.load` with `weights_only=True`, on the CPU, every failure a ValueError of one line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'{path}: no such checkpoint file')
    try:
        # RepDistiller's optimiser state has a NumPy float in it: allow exactly that, also by its old name
        scalar = np._core.multiarray.scalar
        with torch.serialization.safe_globals(
            [
                np.dtype,
                np.dtypes.Float64DType,
                (scalar, 'numpy.core.multiarray.scalar'),
                (scalar, 'numpy._core.multiarray.scalar'),
            ]
        ):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r'GLOBAL ([\w.]+)', str(error))
        if not blocked:
            raise ValueError(f'{path}: not a PyTorch checkpoint, or damaged') from None
        hint = (
            '; use a file that holds weights only, e.g. ckpt_epoch_N.pth or a _best file'
            if blocked[1] == 'argparse.Namespace'
            else ''
        )
        raise ValueError(
            f'{path}: refused, it contains pickled code ({blocked[1]}) and nothing of it was run{hint}'
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


def _find_state(content: dict, path: Path, part: str | None) -> tuple[dict, str | None]:
    if part is not None:
        if not _is_state(content.get(part)):
            raise ValueError(f'{path}: has no weights under {part!r}; its keys are {list(content)[:8]}')
        return content[part], part
    for key in _CONTAINERS:
        if _is_state(content.get(key)):
            return content[key], key
    if _is_state(content):
        return content, None
    found = [key for key in _OTHER_SIDE if _is_state(content.get(key))]
    hint = f'; say which part to take: {found}' if found else ''
    raise ValueError(f'{path}: holds no weights that could be found; its keys are {list(content)[:8]}{hint}')


def _is_state(x) -> bool:
    return isinstance(x, dict) and len(x) > 0 and all(isinstance(v, Tensor) for v in x.values())


def _our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip the wrappers' prefixes, then Knowledge-Distillation-Zoo's names for stages and projections."""
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    if any(key.startswith('student.') for key in state):  # mdistiller keeps both networks and the adapters
        state = {
            key.removeprefix('student.'): value for key, value in state.items() if key.startswith('student.')
        }
    return {
        re.sub(r'^res([123])\.', r'layer\1.', key).replace('.ds.', '.downsample.'): value
        for key, value in state.items()
    }


def _check_fit(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    wanted = net.state_dict()
    missing = [
        k for k in wanted if k not in state and not k.endswith('num_batches_tracked')
    ]  # older than PyTorch 0.4
    unexpected = [k for k in state if k not in wanted]
    misshapen = [
        f'{k} is {tuple(state[k].shape)}, wanted {tuple(wanted[k].shape)}'
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    if not (missing or unexpected or misshapen):
        return
    problems = [
        f'{label}: {", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""}'
        for label, keys in (('missing', missing), ('unexpected', unexpected), ('wrong shape', misshapen))
        if keys
    ]
    guess = _guess(state)
    raise ValueError(
        f'{path}: does not fit the network; {"; ".join(problems)}'
        + (f'; it looks like {guess}' if guess else '')
    )


def _guess(state: dict[str, Tensor]) -> str | None:
    """Name and class count of the known network these weights belong to."""
    from . import MODELS

    keys = {k: tuple(v.shape) for k, v in state.items() if not k.endswith('num_batches_tracked')}
    heads = [shape[0] for k, shape in keys.items() if len(shape) == 1]
    if not heads:
        return None
    num_classes = heads[-1]  # the classifier's bias is the last vector of them all
    for name, make in MODELS.items():
        with torch.device('meta'):
            known = make(num_classes=num_classes).state_dict()
        if keys == {k: tuple(v.shape) for k, v in known.items() if not k.endswith('num_batches_tracked')}:
            return f'{name} with {num_classes} classes'
    return None


def _number(x) -> float | None:
    if isinstance(x, Tensor):
        x = x.item() if x.numel() == 1 else None
    return float(x) if isinstance(x, (int, float)) else None
