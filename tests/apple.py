"""Tensors that say they lie on Apple's GPU and compute on the CPU, so that tests see what that device lacks.

It has no float64 and no eigenvectors, does not mix with tensors of the CPU, and a random generator is the
CPU's. PyTorch believes that the tensors are on its device meta, which every build has.
"""

import copy

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

APPLE, META, CPU = torch.device('mps'), torch.device('meta'), torch.device('cpu')
MISSING = ('_linalg_eigh', 'linalg_qr', 'linalg_eig', 'linalg_lstsq')
# these take indices, or what is copied, from the CPU
TAKE_FROM_CPU = ('copy_', '_to_copy', 'index', '_unsafe_index', 'index_put', 'index_put_', '_index_put_impl_')


class Apple(torch.Tensor):
    """Its values are the CPU's tensor `near`."""

    @staticmethod
    def __new__(cls, near, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype, device=META,
            requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, near, requires_grad=False):
        self.near = near

    @property
    def device(self):
        return APPLE

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """An operation with tensors of either device."""
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    far = {id(x.near): x for x in tensors if isinstance(x, Apple)}
    if far and name not in TAKE_FROM_CPU and any(x.dim() for x in tensors if not isinstance(x, Apple)):
        raise RuntimeError(f'{name}: some tensors are on mps, some on the CPU')
    if far and name in MISSING:
        raise NotImplementedError(f'{name}: not there on mps')
    there = bool(far)
    if kwargs.get('device') is not None:
        there = kwargs['device'].type == 'meta'
        kwargs = kwargs | {'device': CPU}
    elif name == 'copy_':
        there = isinstance(args[0], Apple)
    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))

    def wrap(x):
        if not there or not isinstance(x, torch.Tensor):
            return x
        if id(x) in far:  # changed in place
            return far[id(x)]
        if x.dtype == torch.float64:
            raise TypeError(f'{name}: mps has no float64')
        return Apple(x)

    if name in ('_to_copy', 'copy_') and isinstance(args[-1], Apple) and args[-1].dtype != out.dtype:
        if not there and out.dtype == torch.float64:
            raise TypeError(f'{name}: a tensor of mps is converted there, which has no float64')
    return tree_map(wrap, out)


def unwrap(x):
    return x.near if isinstance(x, Apple) else x


def is_numbers(x):
    return isinstance(x, list) and all(isinstance(n, int) for n in x)


def as_index(x):
    return torch.tensor(x) if is_numbers(x) else x


class Dispatch(TorchDispatchMode):
    """What is made there without a tensor that lies there already."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Names(TorchFunctionMode):
    """mps is said, meta is meant. (Within x.backward() it would not be asked: torch.autograd.backward(x).)"""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **kwargs or {})
        args, kwargs = tree_map(self.meant, (args, kwargs or {}))
        # without these, a list's values would be dropped, or a list refused
        if func is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if func is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=args[0].dtype).to(META)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get('device') == META:
            return func(*args, **kwargs | {'device': CPU}).to(META)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = [args[0], tree_map(as_index, args[1], is_leaf=is_numbers), *args[2:]]
        return func(*args, **kwargs)

    @staticmethod
    def meant(x):
        return META if isinstance(x, (str, torch.device)) and str(x) == 'mps' else x


def send(value):
    """Copies on the device of all tensors and modules in lists, tuples and dicts."""
    if isinstance(value, torch.nn.Module):
        return send_module(copy.deepcopy(value))
    if isinstance(value, dict):
        return {key: send(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [send(x) for x in value]
        return type(value)(*parts) if hasattr(value, '_fields') else type(value)(parts)
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.float64:
        raise TypeError('mps has no float64')
    return Apple(value.detach().clone(), value.requires_grad)


def send_module(module):
    """module.to('mps'): parameters one by one, since their class changes; the rest as the module does it."""
    for part in module.modules():
        own = {name: None if p is None else torch.nn.Parameter(send(p), p.requires_grad)
               for name, p in part._parameters.items()}  # fmt: skip
        parts, part._parameters, part._modules = part._modules, {}, {}
        with Names(), Dispatch():
            part._apply(lambda x: x.to(META))
        part._parameters, part._modules = own, parts
    return module
