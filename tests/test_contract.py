"""What every row of METHODS promises, whatever its formula."""

import copy
import inspect
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_losses import METHODS
from models import Feats

ROWS = sorted(METHODS)
K = 6
STUDENT = ((4, 12, 8), (4, 12, 8), (4, 6, 4), (8, 3, 2))  # C, H, W of stem and stages: not square
TEACHER = ((5, 12, 8), (6, 12, 8), (3, 6, 4), (9, 3, 2))

# rows that need equal channels on both sides, with the reason
ALIKE = {'afd': 'channels are matched one to one', 'kdsvd': 'singular vectors live in channel space'}
# rows whose gradient is, by definition, not that of their value, with the reason
# rows whose random numbers differ once compiled, with the reason
REDRAWS = {'crd': 'multinomial draws other negatives'}
# rows that cannot take a batch of one, with the reason
PAIRS = {'reviewkd': 'batch norm of the pooled level needs two samples'}
STOPS = {'wsld': 'the weights of the samples are constants'}


def feats(sizes, n: int, dtype, relu=True) -> Feats:
    pres = [torch.randn(n, *size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]
    fms = [(p.detach().relu() if relu else p.detach().clone()).requires_grad_() for p in pres]
    feat = torch.randn(n, sizes[-1][0], dtype=torch.float64).to(dtype).requires_grad_()
    out = (3 * torch.randn(n, K, dtype=torch.float64)).to(dtype).requires_grad_()
    return Feats(out, feat, fms, pres)


class Teacher(nn.Module):
    """What builders may ask of the teacher network."""

    def __init__(self, t: Feats) -> None:
        super().__init__()
        self.widths = [x.shape[1] for x in t.fms[1:]]
        self.fc = nn.Linear(t.fms[-1].shape[1], K).to(
            t.out.dtype if t.out.dtype == torch.float64 else torch.float32
        )

    def classifier_layer(self):
        return self.fc

    def bn_before_relu(self):
        return [nn.BatchNorm2d(width) for width in self.widths]


class TrainSet:
    """What builders may ask of the training set."""

    targets = torch.arange(40) % K

    def __len__(self):
        return len(self.targets)


def world(name, n=5, dtype=torch.float32, seed=0, same=False, **kw) -> SimpleNamespace:
    """Features of both sides for a batch of n, as the trainer has them."""
    torch.manual_seed(seed)
    s = feats(STUDENT, n, dtype, **kw)
    t = feats(STUDENT if name in ALIKE else TEACHER, n, dtype, **kw)
    if same:  # the student's own values on the teacher's side
        t = Feats(
            *(x.detach().clone() for x in s[:2]), *([x.detach().clone() for x in maps] for maps in s[2:])
        )
    b = SimpleNamespace(
        img=torch.randn(n, 3, 12, 8),
        target=torch.arange(n) % K,
        index=torch.arange(n),
        epoch=0,
        net_s=Teacher(s),
        net_t=Teacher(t),
        generator=torch.Generator().manual_seed(0),
    )
    return SimpleNamespace(s=s, t=t, b=b)


def build(name: str, w: SimpleNamespace) -> nn.Module:
    torch.manual_seed(1)
    method = METHODS[name]
    env = SimpleNamespace(s=w.s, t=w.t, net_s=None, net_t=w.b.net_t, train_set=TrainSet())
    return method.build(method.loss, env).to(
        w.s.out.dtype if w.s.out.dtype == torch.float64 else torch.float32
    )


def call(name, kd, w) -> torch.Tensor:
    (w.b.generator.manual_seed if w.b.generator else torch.manual_seed)(0)
    return METHODS[name].feed(kd, w.s, w.t, w.b)


def tensors(f: Feats) -> list[torch.Tensor]:
    return [f.out, f.feat, *f.fms, *f.pres]


def grads(f: Feats) -> list[torch.Tensor]:
    return [x.grad for x in tensors(f) if x.grad is not None]


def healthy(name, w, kd=None, bound=None) -> torch.Tensor:
    """Forward and backward are finite; returns the loss."""
    kd = build(name, w) if kd is None else kd
    loss = call(name, kd, w)
    assert loss.shape == () and torch.isfinite(loss), f'loss {loss}'
    loss.backward()
    assert grads(w.s), 'no gradient reached the student'
    for g in [*grads(w.s), *(p.grad for p in kd.parameters() if p.grad is not None)]:
        assert torch.isfinite(g).all(), 'a gradient is not finite'
        assert bound is None or g.abs().max() <= bound, f'gradient of {g.abs().max():.3g}'
    return loss


@pytest.mark.parametrize('name', ROWS)
def test_arguments_have_the_names_of_the_field(name):
    sides = ['out', 'feat', 'fm', 'fms', 'pres', 'irg', 'patch']
    rest = [
        'target',
        'index',
        'img',
        'epoch',
        'net_s',
        'net_t',
        'classifier',
        'sample_idx',
        'mask',
        'generator',
    ]
    rest += ['out_s_strong', 'out_t_strong']
    known = [f'{x}_s' for x in sides] + [f'{x}_t' for x in sides] + rest
    signature = inspect.signature(METHODS[name].loss.forward)
    forward = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL][1:]
    assert set(forward) <= set(known)
    order = [0 if x.endswith('_s') else 1 if x.endswith('_t') else known.index(x) for x in forward]
    assert order == sorted(order), 'student first, then teacher, then the rest'
    constructor = list(inspect.signature(METHODS[name].loss.__init__).parameters)[1:]
    assert constructor[:2] in (['s_channels', 't_channels'], ['s_dim', 't_dim']) or not {
        's_channels',
        's_dim',
    } & set(constructor)
    for parameter in inspect.signature(METHODS[name].loss.__init__).parameters.values():
        assert parameter.name == 'self' or parameter.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name', ROWS)
def test_value_and_gradients(name, dtype):
    w = world(name, dtype=dtype)
    before = [x.detach().clone() for x in tensors(w.s) + tensors(w.t)]
    kd = build(name, w)
    loss = healthy(name, w, kd)
    assert loss.dtype == dtype
    assert not grads(w.t), 'a gradient reached the teacher'
    assert all(p.grad is not None for p in kd.parameters()), 'an adapter got no gradient'
    assert any(g.abs().max() > 0 for g in grads(w.s))
    assert all(torch.equal(x, y) for x, y in zip(tensors(w.s) + tensors(w.t), before)), 'an input was changed'


@pytest.mark.parametrize('name', ROWS)
def test_teacher_under_no_grad_gives_the_same(name):
    w, v = world(name), world(name)
    v.t = Feats(
        v.t.out.detach(), v.t.feat.detach(), [x.detach() for x in v.t.fms], [x.detach() for x in v.t.pres]
    )
    assert torch.equal(healthy(name, w), healthy(name, v))


@pytest.mark.parametrize('name', ROWS)
def test_batch_of_one(name):
    if name in PAIRS:
        with pytest.raises(ValueError, match='more than 1 value'):
            healthy(name, world(name, n=1))
        return
    healthy(name, world(name, n=1))


@pytest.mark.parametrize('side', ['student', 'teacher', 'both', 'one sample'])
@pytest.mark.parametrize('name', ROWS)
def test_zero_features(name, side):
    w = world(name)
    with torch.no_grad():
        for f, sides in ((w.s, ('student', 'both')), (w.t, ('teacher', 'both'))):
            for x in tensors(f):
                if side in sides:
                    x.zero_()
                elif side == 'one sample':
                    x[1:3] = 0  # two dead samples, duplicates of each other
    healthy(name, w, bound=1e6)


@pytest.mark.parametrize('name', ROWS)
def test_equal_inputs(name):
    healthy(name, world(name, same=True), bound=1e4)


@pytest.mark.parametrize('name', ROWS)
def test_all_samples_coincide(name):
    w = world(name)
    with torch.no_grad():
        for x in tensors(w.s) + tensors(w.t):
            x[:] = x[:1].clone()
    healthy(name, w, bound=1e6)


@pytest.mark.parametrize('scale', [1e4, -1e4])
@pytest.mark.parametrize('name', ROWS)
def test_huge_logits(name, scale):
    w = world(name)
    with torch.no_grad():
        w.s.out.copy_(scale * torch.eye(K)[:5])
        w.t.out.copy_(-scale * torch.eye(K)[:5].flip(1))
    healthy(name, w)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ROWS)
def test_half_precision_and_autocast(name, dtype):
    """Half inputs inside autocast give the value of the same numbers in float32, to rounding of nothing."""
    w = world(name, dtype=dtype)
    v = world(name, dtype=dtype)
    v.s, v.t = (
        Feats(
            f.out.detach().float().requires_grad_(),
            f.feat.detach().float().requires_grad_(),
            [x.detach().float().requires_grad_() for x in f.fms],
            [x.detach().float().requires_grad_() for x in f.pres],
        )
        for f in (v.s, v.t)
    )
    with torch.autocast('cpu', dtype=dtype):
        loss = healthy(name, w)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, healthy(name, v), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', ROWS)
def test_memory_layout_does_not_matter(name):
    w, v = world(name), world(name)
    expected = healthy(name, w)
    for f in (v.s, v.t):
        for maps in (f.fms, f.pres):
            for i, x in enumerate(maps):
                x = x.detach().contiguous(memory_format=torch.channels_last)
                maps[i] = x.requires_grad_()
    torch.testing.assert_close(healthy(name, v), expected, rtol=1e-5, atol=1e-7)
    u = world(name)
    strided = [
        torch.stack([x.detach(), x.detach()], dim=-1)[..., 0] for x in (u.s.out, u.s.feat, u.t.out, u.t.feat)
    ]
    assert not strided[0].is_contiguous()
    u.s = Feats(strided[0].requires_grad_(), strided[1].requires_grad_(), u.s.fms, u.s.pres)
    u.t = Feats(strided[2], strided[3], u.t.fms, u.t.pres)
    torch.testing.assert_close(healthy(name, u), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', [name for name in ROWS if name not in STOPS])
def test_gradcheck(name):
    w = world(name, n=3, dtype=torch.float64, seed=3, relu=False)  # a pixel of zeros is a kink of an adapter
    kd = build(name, w)
    used = [x for x in tensors(w.s) if x.grad is None]
    call(name, kd, w).backward()
    used = [x for x in used if x.grad is not None]

    def f(*_):  # the tensors are perturbed in place by gradcheck
        return call(name, copy.deepcopy(kd), w)

    assert torch.autograd.gradcheck(f, used, eps=1e-6, atol=1e-6, rtol=1e-4, nondet_tol=0, fast_mode=True)


@pytest.mark.parametrize('name', ROWS)
def test_compiles_without_a_graph_break(name):
    w, v = world(name), world(name)
    kd = build(name, w)
    w.b.generator = None  # a generator object cannot be traced: draw from the global one, seeded by call
    expected = healthy(name, w, copy.deepcopy(kd))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t, b: METHODS[name].feed(kd, s, t, b), fullgraph=True, backend='aot_eager'
    )
    b = SimpleNamespace(**{**vars(v.b), 'generator': None})
    torch.manual_seed(0)
    loss = compiled(v.s, v.t, b)
    loss.backward()
    if name in REDRAWS:
        assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads(v.s))
        return
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for g, h in zip(grads(v.s), grads(w.s)):
        torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-6)


class NoReadBack(TorchDispatchMode):
    """Fails on operations that make a GPU wait for the host: reading a value, data-dependent shapes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique'), (
            f'{name} waits for the device'
        )
        if name in ('index', 'index_put', 'index_put_'):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), 'boolean mask indexing'
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', ROWS)
def test_no_read_back(name):
    w = world(name)
    kd = build(name, w)
    with NoReadBack():
        call(name, kd, w).backward()


def test_the_read_back_guard_can_fail():
    with pytest.raises(AssertionError), NoReadBack():
        torch.ones(3)[torch.ones(3) > 0].sum().item()


@pytest.mark.parametrize('name', ROWS)
def test_state_survives(name):
    w = world(name)
    kd = build(name, w)
    healthy(name, w, kd)
    with torch.no_grad():
        for p in kd.parameters():
            p += 0.1 * p.grad
    buffer = io.BytesIO()
    torch.save(kd.state_dict(), buffer)
    buffer.seek(0)
    reloaded = build(name, world(name, seed=9))
    reloaded.load_state_dict(torch.load(buffer, weights_only=True))
    copies = [reloaded, copy.deepcopy(kd), pickle.loads(pickle.dumps(kd))]
    w = world(name, seed=4)
    expected = call(name, kd, w)
    for other in copies:
        assert torch.equal(call(name, other, w), expected)


@pytest.mark.parametrize('name', ROWS)
def test_wrong_shapes_are_named(name):
    """Another batch size, a missing axis: the message says which argument, the shape got, the one wanted."""
    w = world(name)
    kd = build(name, w)
    calls = []
    losses = kd if isinstance(kd, nn.ModuleList) else [kd]
    for loss in losses:
        loss.register_forward_pre_hook(lambda module, args: calls.append((module, args)))
    call(name, kd, w)
    module, args = calls[0]
    names = list(inspect.signature(module.forward).parameters)
    for i in [i for i, arg in enumerate(args) if isinstance(arg, (list, torch.Tensor))]:
        for wrong in spoiled(args[i]):
            changed = [wrong if j == i else a for j, a in enumerate(args)]
            with pytest.raises(ValueError) as caught:
                module.forward(*changed)
            said = str(caught.value)
            assert METHODS[name].loss.__name__ in said and any(n in said for n in names)
            flat = [x for a in changed for x in (a if isinstance(a, list) else [a])]
            shapes = [str(tuple(x.shape)) for x in flat if isinstance(x, torch.Tensor)]
            assert any(shape in said for shape in shapes), said


def spoiled(arg) -> list:
    """The argument with a sample or an axis missing; of a list, its first tensor, and its last left out."""
    if isinstance(arg, list):
        return [arg[:-1], [arg[0][:-1], *arg[1:]], [arg[0][0, 0], *arg[1:]]]
    return [arg[:-1], arg[0, 0] if arg.dim() > 1 else arg[None]]


@pytest.mark.parametrize('name', ROWS)
def test_repr_and_modes(name):
    kd = build(name, world(name))
    assert repr(kd)
    kd.eval()
    healthy(name, world(name), kd)
