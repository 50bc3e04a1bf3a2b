"""What the adapters of several methods use: one case of a vector, parameters, a tiny network."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Case:
    """Call the loss, compare the value under `loss`, then the gradients under `grads` and `gradparams`."""

    call: Callable
    inputs: dict  # argument name in the file -> tensor
    loss: str = 'loss'
    grads: dict = field(default_factory=dict)  # key in the file -> tensor whose .grad is meant

    def check(self, vector) -> None:
        value = self.call(**self.inputs)
        assert value.shape == (), f'{vector.name}: the loss is not a scalar'
        vector.compare(self.loss, value)
        present = {key: tensor for key, tensor in self.grads.items() if key in vector}
        if present:
            value.backward()
        for key, tensor in present.items():
            assert tensor.grad is not None, f'{vector.name}: no gradient for {key}'
            vector.compare(key, tensor.grad)
        for name, tensor in self.inputs.items():
            assert not (teacher(name) and tensor.grad is not None), f'{vector.name}: gradient in {name}'


def teacher(name: str) -> bool:
    return name.endswith('_t') or '_t_' in name


def case(z, module, *names, suffix='', rename=None, call=None, more=None) -> Case:
    """The common case: inputs in_<name>, value loss<suffix>, gradients grad_<name><suffix>.

    rename: {argument: name in the file} where the file has another map for the same argument.
    more: further expected gradients {key: tensor}.
    """
    inputs = {name: z.input((rename or {}).get(name, name)) for name in names}
    grads = {
        f'grad_{name}{suffix}': x for name, x in inputs.items() if x.requires_grad and not name.endswith('_t')
    }
    return Case(call or module.double().forward, inputs, f'loss{suffix}', grads | (more or {}))


def parameters(z, module, roles: dict) -> dict:
    """Set parameters from param_<role>; returns the expected gradients {gradparam_<role>: parameter}."""
    filled = fill(module, {path: z.param(role) for role, path in roles.items()})
    return {f'gradparam_{role}': filled[path] for role, path in roles.items()}


def fill(module, values: dict) -> dict:
    """Set parameters by path; returns {path: parameter}, in float64."""
    module.double()
    parameters = {path: module.get_parameter(path) for path in values}
    with torch.no_grad():
        for path, value in values.items():
            parameters[path].copy_(value)
    return parameters


TINY = [f'{layer}_{kind}' for layer in ('conv1', 'conv2', 'fc') for kind in 'wb']


def tiny_forward(p: dict, img: torch.Tensor):
    h1 = F.conv2d(img, p['conv1_w'], p['conv1_b'], padding=1).tanh()
    h2 = F.conv2d(h1, p['conv2_w'], p['conv2_b'], stride=2, padding=1).tanh()
    return h1, F.linear(h2.mean(dim=(2, 3)), p['fc_w'], p['fc_b'])


def tiny_net(z, side: str, img: torch.Tensor):
    """(h1, logits) of the two-convolution network that sobolev.md defines."""
    p = {key: z.param(f'{side}_{key}') for key in TINY}
    return tiny_forward(p, img)


def tiny_pair(z):
    """Both networks on the same image, as leaves; the student's parameters by role."""
    img = z.input('img')
    p_s = {key: z.param(f's_{key}').requires_grad_() for key in TINY}
    p_t = {key: z.param(f't_{key}') for key in TINY}
    return img, p_s, tiny_forward(p_s, img), tiny_forward(p_t, img)


def tiny_grads(p_s: dict) -> dict:
    """Expected gradients; autograd leaves None where a parameter is not in the graph, the file has zeros."""
    for p in p_s.values():
        p.grad = torch.zeros_like(p)
    return {f'gradparam_s_{key}': p for key, p in p_s.items()}


# ---------------------------------------------------------------------------------------------- amalgamation


def many(z, stem: str) -> list[str]:
    """The names stem0, stem1, ... of the file's inputs."""
    names = []
    while f'in_{stem}{len(names)}' in z:
        names.append(f'{stem}{len(names)}')
    return names


def listed(z, module, call, inputs: list[str], suffix='', key='loss', more=None) -> Case:
    """A case with inputs taken by name: call({name: value}) -> loss, gradients grad_<name><suffix>."""
    values = {name: z.input(name) for name in inputs}
    if module is not None:
        module.double()
    grads = {f'grad_{name}{suffix}': x for name, x in values.items() if x.requires_grad}
    return Case(lambda **x: call(x), values, f'{key}{suffix}', grads | (more or {}))


def roles_of(z) -> list[str]:
    return [key.removeprefix('param_') for key in z.arrays if key.startswith('param_')]


def terms_of(z, module, call, inputs, names) -> None:
    """Compare return_terms with the file's loss_<term>; call(values, **options)."""
    values = {name: z.input(name) for name in inputs}
    loss, terms = call(values, return_terms=True)
    assert torch.equal(loss, call(values)) and set(terms) == set(names)
    for term, key in names.items():
        if key:
            z.compare(key, terms[term])


# ----------------------------------------------------------------------- the random features of the contract

# C, H, W of stem and stages: not square
STUDENT = ((4, 12, 8), (4, 12, 8), (4, 6, 4), (8, 3, 2))
TEACHER = ((5, 12, 8), (6, 12, 8), (3, 6, 4), (9, 3, 2))


def seed(number: int) -> None:
    """torch.manual_seed for the CPU; without a GPU the usual one notes the stack, for later, every time."""
    torch.default_generator.manual_seed(number)


def leaf(*shape, dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


class Grown(TorchDispatchMode):
    """The operations that made a tensor of `times` axes of a length that nothing else has, or a multiple."""

    def __init__(self, length: int, times: int) -> None:
        super().__init__()
        self.unit, self.made = length**times, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor) and x.numel() and x.numel() % self.unit == 0:
                self.made.add(f'{func.overloadpacket.__name__} {tuple(x.shape)}')
        return out
