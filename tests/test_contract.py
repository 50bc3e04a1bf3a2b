"""What every row of METHODS promises, whatever its formula."""

import copy
import inspect
import io
import itertools
import pickle
import random
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from methods import METHODS
from models import Feats
from tests import methods
from tests.methods.shared import STUDENT, TEACHER, Grown, leaf, seed
from tests.test_train import KINDS

ROWS = sorted(METHODS)
K = 6


def file_of(row: str) -> str:
    """The loss file that a row is of: its own name (dot, an optimiser), or that of its loss."""
    return row if row in FILES else METHODS[row].loss.__module__.split('.')[-1]


FILES = methods.files('kd_losses')
OWN = {row: methods.of(file_of(row)) for row in ROWS if methods.exists(file_of(row))}
EXCEPTIONS = {row: methods.exceptions(file_of(row), row) for row in ROWS}


def own(row: str, name: str, default=None):
    """What tests/methods has of this name for the row."""
    return getattr(OWN.get(row), name, default)


def rows_but(*kinds: str) -> list[str]:
    """The rows that are no exception of any of these kinds."""
    return [row for row in ROWS if not EXCEPTIONS[row].keys() & set(kinds)]


def feats(sizes, n: int, dtype, relu=True) -> Feats:
    pres = [leaf(n, *size, dtype=dtype) for size in sizes]
    fms = [(p.detach().relu() if relu else p.detach().clone()).requires_grad_() for p in pres]
    feat = leaf(n, sizes[-1][0], dtype=dtype)
    out = (3 * torch.randn(n, K, dtype=torch.float64)).to(dtype).requires_grad_()
    return Feats(out, feat, fms, pres)


class Net(nn.Module):
    """What rows may ask of a network: its parts, the way from a map to the logits, from images to Feats."""

    def __init__(self, f: Feats) -> None:
        super().__init__()
        self.sizes = [x.shape[1:] for x in f.fms]
        channels = [size[0] for size in self.sizes]
        self.steps = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(channels, channels[1:]))
        self.stem = nn.Conv2d(3, channels[0], 1)
        self.fc = nn.Linear(channels[-1], K)
        self.to(f.out.dtype if f.out.dtype == torch.float64 else torch.float32).requires_grad_(False)

    def classifier_layer(self):
        return self.fc

    def bn_before_relu(self):
        return [nn.BatchNorm2d(size[0]) for size in self.sizes[1:]]

    def after(self, k, fm):
        pres = []
        for step, size in zip(self.steps[k:], self.sizes[k + 1 :]):
            pres.append(step(F.adaptive_avg_pool2d(fm, size[1:])))
            fm = pres[-1].tanh()  # smooth, for gradcheck
        feat = fm.tanh().mean(dim=(2, 3))
        return Feats(self.fc(feat), feat, [x.tanh() for x in pres], pres)

    def forward(self, img, feats=True):
        return self.after(0, self.stem(img).tanh())


class TrainSet:
    """What builders may ask of the training set."""

    targets = torch.arange(40) % K
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)

    def __init__(self, dtype=torch.float32):
        self.images = torch.linspace(-1, 1, 40 * 3 * 96, dtype=dtype).sin().reshape(40, 3, 12, 8)

    def __len__(self):
        return len(self.targets)

    def steps(self, batch_size):
        return 5

    def test_batches(self, size):
        yield self.images, self.targets, torch.arange(40)


def inputs(name, n=5, dtype=torch.float32, number=0, same=False, **kw) -> SimpleNamespace:
    """Features of both sides for a batch of n, as the trainer has them."""
    seed(number)
    method = METHODS[name]
    s = feats(STUDENT, n, dtype, **kw)
    t = feats(STUDENT if 'equal_channels' in EXCEPTIONS[name] else TEACHER, n, dtype, **kw)
    if same:  # the student's own values on the teacher's side
        t = Feats(
            *(x.detach().clone() for x in s[:2]), *([x.detach().clone() for x in maps] for maps in s[2:4])
        )
    other = feats(STUDENT, n, dtype, **kw)  # what the student says of other images
    third = feats(STUDENT, n, dtype, **kw)
    if own(name, 'extra'):  # of a changed student
        s, other, third = (f._replace(extra=own(name, 'extra')(n, dtype, K)) for f in (s, other, third))
    if same and own(name, 'extra_as_teacher'):
        s = s._replace(extra=own(name, 'extra_as_teacher')(t).requires_grad_())
    if own(name, 'tokens'):  # of transformers
        s, other, third = (f._replace(tokens=own(name, 'tokens')(n, dtype, 4)) for f in (s, other, third))
        t = t._replace(tokens=[x.detach() for x in s.tokens] if same else own(name, 'tokens')(n, dtype, 6))
    if own(name, 'arrange'):
        own(name, 'arrange')(s, t)
    net_s, net_t = Net(s), Net(t)
    size = own(name, 'image_size', (12, 8))
    img = torch.randn(n, 3, *size, dtype=net_s.fc.weight.dtype).requires_grad_(method.needs.image_gradient)
    views = {view: torch.randn_like(img) for view in method.needs.views}
    w = SimpleNamespace(s=s, t=t, other=other)
    w.b = SimpleNamespace(img=img, target=torch.arange(n) % K, index=torch.arange(n), views=views, epoch=50,
                          epochs=100, net_s=net_s, net_t=net_t, student=lambda img: w.other, teacher=net_t,
                          exact=net_t, all_t=[t, t], nets_t=[net_t, net_t],
                          generator=torch.Generator())  # fmt: skip
    if method.own.once_per_batch:
        connect(name, w)
        w.b.from_teacher = method.own.once_per_batch(
            net_t, Feats(t.out, t.feat, [x.to(img) for x in t.fms], t.pres), w.b
        )
    w.b.inner = method.when.inner and method.when.inner(50, 100)
    if method.own.peers:
        w.s, w.t = [s, other, third][: own(name, 'networks', 3)], None
        if same:
            w.s[1] = Feats(*t[:4], s.extra)
    return w


def connect(name, w) -> None:
    """A graph from the image, or from the student's last map, to its logits."""
    if METHODS[name].needs.image_gradient:
        w.b.raw = w.b.net_s(w.b.img)
    else:
        fm = w.s.fms[-1]
        w.b.raw = w.s._replace(out=w.b.net_s.after(3, fm.to(w.b.img.dtype)).out)


def build(name: str, w: SimpleNamespace) -> nn.Module:
    seed(1)
    method = METHODS[name]
    student = w.s[0] if isinstance(w.s, list) else w.s
    env = SimpleNamespace(s=w.s, t=w.t, all_t=w.b.all_t, net_s=w.b.net_s, net_t=w.b.net_t,
                          train_set=TrainSet(w.b.img.dtype), batch_size=len(student.out), epochs=100,
                          num_classes=K, another_net=copy.deepcopy)  # fmt: skip
    dtype = torch.float64 if student.out.dtype == torch.float64 else torch.float32
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # drawn Feats are of no network, whose end catkd and adain check
        patch.setattr(sys.modules[method.loss.__module__], '_close', lambda *_: True, raising=False)
        kd = method.build(method.loss, env, **own(name, 'options', {})).to(dtype)
    if own(name, 'before'):  # in place of the row's
        own(name, 'before')(kd, w.t, dtype)
    return kd


def call(name, kd, w) -> torch.Tensor:
    (w.b.generator.manual_seed if w.b.generator else seed)(0)
    w.b.rng = random.Random(0)
    return METHODS[name].feed(kd, w.s, w.t, w.b)


def tensors(f) -> list[torch.Tensor]:
    """All tensors of Feats, lists of them, and what they hold."""
    if f is None:
        return []
    return [f] if isinstance(f, torch.Tensor) else [x for part in f for x in tensors(part)]


def relay(w, change) -> None:
    """Put changed copies, new leaves, in the place of all features."""

    def again(f):
        if f is None or isinstance(f, torch.Tensor):
            return None if f is None else change(f.detach()).requires_grad_()
        return Feats(*map(again, f)) if isinstance(f, Feats) else [again(x) for x in f]

    w.s, w.t, w.other = again(w.s), again(w.t), again(w.other)
    w.b.all_t = [w.t, w.t]


def grads(f) -> list[torch.Tensor]:
    return [x.grad for x in tensors(f) if x.is_leaf and x.grad is not None]


def learning(w) -> list[torch.Tensor]:
    """Gradients on the student's side: its features, those of other images, the image itself."""
    return grads([w.s, w.other, w.b.img])


def healthy(name, w, kd=None, bound=None) -> torch.Tensor:
    """Forward and backward are finite; returns the loss."""
    kd = build(name, w) if kd is None else kd
    loss = call(name, kd, w)
    assert loss.shape == () and torch.isfinite(loss), f'loss {loss}'
    loss.backward()
    assert learning(w), 'no gradient reached the student'
    for g in [*learning(w), *(p.grad for p in kd.parameters() if p.grad is not None)]:
        assert torch.isfinite(g).all(), 'a gradient is not finite'
        assert bound is None or g.abs().max() <= bound, f'gradient of {g.abs().max():.3g}'
    return loss


@pytest.mark.parametrize('name', ROWS)
def test_arguments_have_the_names_of_the_field(name):
    sides = ['out', 'outs', 'feat', 'fm', 'fms', 'pres', 'irg', 'patch', 'cam', 'attacked_out', 'jac']
    sides += ['proj', 'tokens']
    rest = (
        'target prior index img epoch net_s net_t classifier teacher_tail sample_idx mask keep valid lam ramp'
    )
    rest += ' noise grid generator query_spatial query_frequency out_s_strong out_t_strong kd_weight weights'
    rest += ' noise_t out_t_key num_items progress out_s_gen out_t_gen target_gen'
    sides += ['img', 'txt', 'scale']  # pairs of image and text
    # of one network, or of several that are equals
    equals = 'out out_pair out_a out_b feat_a feat_b out_1 out_2 outs_1 outs_2 outs peers feat feats feat_mid'
    equals += ' out_leader joint_out fm fm_next out_prev_now out_prev_then target_prev maps outs_mix'
    equals += ' fm_s1 fm_s2 fm_t1 fm_t2 out_dist out_key out_adv out_rand'
    rest, equals = rest.split(), equals.split()
    known = [f'{x}_s' for x in sides] + [f'{x}_t' for x in sides] + rest + equals
    signature = inspect.signature(METHODS[name].loss.forward)
    forward = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL][1:]
    assert set(forward) <= set(known), set(forward) - set(known)
    forward = [x for x in forward if x not in equals]
    if METHODS[name].needs.teacher and 'own_order' not in EXCEPTIONS[name]:
        check_order(forward, known)
    constructor = list(inspect.signature(METHODS[name].loss.__init__).parameters)[1:]
    pairs = (['s_channels', 't_channels'], ['s_dim', 't_dim'])
    assert constructor[:2] in pairs or not {'s_channels', 's_dim'} & set(constructor)
    for parameter in inspect.signature(METHODS[name].loss.__init__).parameters.values():
        assert parameter.name == 'self' or parameter.annotation is not inspect.Parameter.empty


def check_order(forward, known):
    order = [0 if x.endswith('_s') else 1 if x.endswith('_t') else known.index(x) for x in forward]
    assert order == sorted(order), 'student first, then teacher, then the rest'


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name', ROWS)
def test_value_and_gradients(name, dtype):
    w = inputs(name, dtype=dtype)
    before = [x.detach().clone() for x in tensors(w.s) + tensors(w.t)]
    kd = build(name, w)
    loss = healthy(name, w, kd)
    assert loss.dtype == dtype
    assert not grads(w.t), 'a gradient reached the teacher'
    resting = EXCEPTIONS[name].get('resting', ('nothing', ''))[0]
    for path, p in kd.named_parameters():
        assert p.grad is not None or path.startswith(resting), f'{path} got no gradient'
    assert any(g.abs().max() > 0 for g in learning(w))
    assert all(torch.equal(x, y) for x, y in zip(tensors(w.s) + tensors(w.t), before)), 'an input was changed'


@pytest.mark.parametrize('name', ROWS)
def test_teacher_under_no_grad_gives_the_same(name):
    w, v = inputs(name), inputs(name)
    for x in tensors(v.t):
        x.requires_grad_(False)
    assert torch.equal(healthy(name, w), healthy(name, v))


@pytest.mark.parametrize('name', ROWS)
def test_batch_of_one(name):
    if 'no_batch_of_one' in EXCEPTIONS[name]:
        with pytest.raises(ValueError, match=EXCEPTIONS[name]['no_batch_of_one'][1]):
            healthy(name, inputs(name, n=1))
        return
    healthy(name, inputs(name, n=1))


@pytest.mark.parametrize('side', ['student', 'teacher', 'both', 'one sample'])
@pytest.mark.parametrize('name', ROWS)
def test_zero_features(name, side):
    w = inputs(name)
    with torch.no_grad():
        for f, sides in (([w.s, w.other], ('student', 'both')), (w.t, ('teacher', 'both'))):
            for x in tensors(f):
                if side in sides:
                    x.zero_()
                elif side == 'one sample':
                    x[1:3] = 0  # two dead samples, duplicates of each other
    healthy(name, w, bound=1e6)


@pytest.mark.parametrize('name', ROWS)
def test_equal_inputs(name):
    healthy(name, inputs(name, same=True), bound=1e4)


@pytest.mark.parametrize('name', ROWS)
def test_all_samples_coincide(name):
    w = inputs(name)
    with torch.no_grad():
        for x in tensors(w.s) + tensors(w.t):
            x.copy_(x[:1].clone().expand_as(x))
    healthy(name, w, bound=1e6)


@pytest.mark.parametrize('scale', [1e4, -1e4])
@pytest.mark.parametrize('name', ROWS)
def test_huge_logits(name, scale):
    w = inputs(name)
    with torch.no_grad():
        w.other.out.copy_(scale * torch.eye(K)[1:6])
        for k, f in enumerate(w.s if isinstance(w.s, list) else [w.s]):
            f.out.copy_(scale * torch.eye(K)[:5].roll(k, 0))
            for x in tensors(f.extra):
                if x.shape == f.out.shape:
                    x.copy_(-scale * torch.eye(K)[:5])
        if w.t:
            w.t.out.copy_(-scale * torch.eye(K)[:5].flip(1))
    healthy(name, w)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ROWS)
def test_half_precision_and_autocast(name, dtype):
    """Half inputs inside autocast give the value of the same numbers in float32, to rounding of nothing."""
    w, v = inputs(name, dtype=dtype), inputs(name, dtype=dtype)
    if not METHODS[name].own.once_per_batch:  # there the graph from image to logits must stay
        relay(v, lambda x: x.float())
    with torch.autocast('cpu', dtype=dtype):
        loss = healthy(name, w)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, healthy(name, v), rtol=1e-2 if 'coarse' in EXCEPTIONS[name] else 1e-5, atol=1e-7
    )


@pytest.mark.parametrize('name', [name for name in ROWS if not METHODS[name].own.once_per_batch])
def test_memory_layout_does_not_matter(name):
    expected = healthy(name, inputs(name))
    assert not strided(torch.zeros(2, 2)).is_contiguous()
    for change in (channels_last, strided):
        w = inputs(name)
        relay(w, change)
        torch.testing.assert_close(healthy(name, w), expected, rtol=1e-5, atol=1e-7)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def strided(x):
    return torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize('name', rows_but('gradient_not_of_value'))
def test_gradcheck(name):
    w = inputs(
        name, n=4, dtype=torch.float64, number=3, relu=False
    )  # a pixel of zeros is a kink of an adapter
    kd = build(name, w)
    call(name, kd, w).backward()
    used = [x for x in tensors([w.s, w.other, w.b.img]) if x.is_leaf and x.grad is not None]
    assert used

    def f(*_):  # the tensors are perturbed in place by gradcheck
        if METHODS[name].own.once_per_batch:
            connect(name, w)
        return call(name, copy.deepcopy(kd), w)

    assert torch.autograd.gradcheck(f, used, eps=1e-6, atol=1e-6, rtol=1e-4, nondet_tol=0, fast_mode=True)


@pytest.mark.parametrize('name', rows_but('not_compiled'))
def test_compiles_without_a_graph_break(name):
    w, v = inputs(name), inputs(name)
    kd = build(name, w)
    w.b.generator = None  # a generator object cannot be traced: draw from the global one, seeded by call
    expected = healthy(name, w, copy.deepcopy(kd))
    torch._dynamo.reset()
    backend = 'aot_eager' if name in KINDS else 'eager'  # with its gradients traced: twice as slow
    compiled = torch.compile(lambda s, t, b: METHODS[name].feed(kd, s, t, b), fullgraph=True, backend=backend)
    b = SimpleNamespace(**{**vars(v.b), 'generator': None})
    seed(0)
    loss = compiled(v.s, v.t, b)
    loss.backward()
    if 'redraws_when_compiled' in EXCEPTIONS[name]:
        assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in learning(v))
        return
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for g, h in zip(learning(v), learning(w), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ['st', 'dkd', 'rkd', 'at', 'mgd', 'tekap', 'crd', 'nst'])
def test_compiled_for_a_last_batch_that_is_smaller(name):
    """The second size of a batch is traced as a symbol; a draw is handed no generator that is None."""
    w, last = inputs(name), inputs(name, n=3)
    kd = build(name, w)
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, t, b: METHODS[name].feed(kd, s, t, b), backend='aot_eager')
    for v in (w, last):
        loss = compiled(v.s, v.t, SimpleNamespace(**{**vars(v.b), 'generator': None}))
        loss.backward()
        assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in learning(v))


@pytest.mark.parametrize('name', ['dist', 'distplus', 'lskd', 'rld'])
@pytest.mark.parametrize('K', [10, 20, 1000])
def test_equal_logits_have_no_direction(name, K):
    """The mean of equal float32 numbers is off by a rounding, which is no direction to learn."""
    w = inputs(name, n=4)
    out = torch.full((4, K), 0.1, requires_grad=True)
    s, t = w.s._replace(out=out), w.t._replace(out=torch.randn(4, K))
    METHODS[name].feed(build(name, w), s, t, w.b).backward()
    assert out.grad.abs().max() < 10


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
    w = inputs(name)
    kd = build(name, w)
    with NoReadBack():
        call(name, kd, w).backward()


def test_the_read_back_guard_can_fail():
    with pytest.raises(AssertionError), NoReadBack():
        torch.ones(3)[torch.ones(3) > 0].sum().item()


@pytest.mark.parametrize('name', ROWS)
def test_state_survives(name):
    w = inputs(name)
    kd = build(name, w)
    healthy(name, w, kd)
    with torch.no_grad():
        for p in kd.parameters():
            if p.grad is not None:
                p += 0.1 * p.grad
    buffer = io.BytesIO()
    torch.save(kd.state_dict(), buffer)
    buffer.seek(0)
    reloaded = build(name, inputs(name, number=9))
    reloaded.load_state_dict(torch.load(buffer, weights_only=True))
    copies = [reloaded, copy.deepcopy(kd)] + (
        [] if 'no_pickle' in EXCEPTIONS[name] else [pickle.loads(pickle.dumps(kd))]
    )
    w = inputs(name, number=4)
    expected = call(name, kd, w)
    for other in copies:
        assert torch.equal(call(name, other, w), expected)


@pytest.mark.parametrize('name', ROWS)
def test_wrong_shapes_are_named(name):
    """Another batch size, a missing axis: the message says which argument, the shape got, the one wanted."""
    w = inputs(name)
    kd = build(name, w)
    calls = []
    losses = kd if isinstance(kd, nn.ModuleList) else [kd]
    for loss in losses:
        loss.register_forward_pre_hook(lambda module, args: calls.append((module, args)))
    call(name, kd, w)
    if not calls:  # the feed calls a part of the loss only
        calls = [(kd, own(name, 'arguments')(w))]
    module, args = calls[0]
    names = list(inspect.signature(module.forward).parameters)
    for i in [i for i, arg in enumerate(args) if isinstance(arg, (list, torch.Tensor))]:
        for wrong in spoiled(args[i])['any_length' in EXCEPTIONS[name] and isinstance(args[i], list) :]:
            changed = [wrong if j == i else a for j, a in enumerate(args)]
            with pytest.raises(ValueError) as caught:
                module.forward(*changed)
            said = str(caught.value)
            assert METHODS[name].loss.__name__ in said and any(n in said for n in names)
            given = [x for a in changed if isinstance(a, (list, torch.Tensor)) for x in tensors(a)]
            shapes = [str(tuple(x.shape)) for x in given]
            assert any(shape in said for shape in shapes) or re.search(r'got (\d|\[)', said), said


def spoiled(arg) -> list:
    """The argument with a sample or an axis missing; of a list, its first tensor, and its last left out."""
    if isinstance(arg, list):
        if isinstance(arg[0], list):
            return [arg[:-1], *([wrong, *arg[1:]] for wrong in spoiled(arg[0])[1:])]
        return [arg[:-1], [arg[0][:-1], *arg[1:]], [arg[0][0, 0], *arg[1:]]]
    return [arg[:-1], arg[0, 0] if arg.dim() > 1 else arg[None]]


@pytest.mark.parametrize('name', ROWS)
def test_repr_and_modes(name):
    kd = build(name, inputs(name))
    assert repr(kd)
    kd.eval()
    healthy(name, inputs(name), kd)


# ------------------------------------------------------------------------- what public bug reports stumble on


def outcome(name, kd, w):
    """The loss from a fresh copy of its state, and where it differs from that."""
    return call(name, copy.deepcopy(kd), w)


def leaves(w) -> dict:
    """Every tensor the loss may see, by its place."""
    sides = {'s': w.s, 't': w.t, 'other': w.other, 'prepared': getattr(w.b, 'from_teacher', None)}
    if METHODS[w.name].needs.image_gradient:
        sides['img'] = w.b.img
    return {f'{side}[{i}]': x for side, f in sides.items() for i, x in enumerate(tensors(f))}


def prepared_inputs(name, **kw):
    w = inputs(name, **kw)
    w.name = name
    return w


def changed(name, kd, w, place, change):
    """The loss where one tensor is changed in place; afterwards it is as it was."""
    x = leaves(w)[place]
    kept = x.detach().clone()
    with torch.no_grad():
        change(x)
    if METHODS[name].own.once_per_batch:
        connect(name, w)
    loss = outcome(name, kd, w)
    with torch.no_grad():
        x.copy_(kept)
    return loss


@pytest.mark.parametrize('name', ROWS)
def test_what_is_not_finite_shows(name):
    """One bad entry in anything that the loss looks at, on either side: the value itself must tell."""
    w = prepared_inputs(name)
    kd = build(name, w)
    clean, seen = outcome(name, kd, w), []
    for place, x in leaves(w).items():
        if torch.equal(changed(name, kd, w, place, lambda x: x.copy_(-2 * x.flip(0) - 1)), clean):
            continue  # not looked at
        seen.append(place)
        # infinite images are shown to a network, which may well saturate
        bads = [torch.nan] if place.startswith('img') else [torch.nan, torch.inf]
        for bad, entry in itertools.product(bads, (0, x.numel() // 2, x.numel() - 1)):
            loss = changed(name, kd, w, place, lambda x, i=entry, bad=bad: x.view(-1)[i].fill_(bad))
            assert not torch.isfinite(loss), f'{bad} in entry {entry} of {place} gives {loss}'
    assert seen
    if METHODS[name].own.once_per_batch:
        connect(name, w)
    assert torch.equal(outcome(name, kd, w), clean), 'something of a changed tensor is left'


@pytest.mark.parametrize('name', ROWS)
def test_nan_shows_beside_equal_numbers(name):
    """One side holds zeros, which have no direction; what the other side holds must not be lost with it."""
    w = prepared_inputs(name)
    kd, found = build(name, w), leaves(w)
    seen = [place for place in found if place[:2] in ('s[', 't[') and not changed(
        name, kd, w, place, lambda x: x.view(-1)[0].fill_(torch.nan)).isfinite()]  # fmt: skip
    assert seen or METHODS[name].needs.image_gradient  # which looks at gradients of the images
    for side in ('s[', 't['):
        kept = {place: x.detach().clone() for place, x in found.items() if place.startswith(side)}
        with torch.no_grad():
            [found[place].zero_() for place in kept]
        for place in seen:
            if not place.startswith(side):
                loss = changed(name, kd, w, place, lambda x: x.view(-1)[0].fill_(torch.nan))
                assert torch.isnan(loss), f'nan in {place} beside zeros gives {loss}'
        with torch.no_grad():
            [found[place].copy_(x) for place, x in kept.items()]


@pytest.mark.parametrize('name', [name for name in ROWS if 'masked_class' in EXCEPTIONS[name]])
def test_a_masked_class_of_the_teacher_is_legal(name):
    """-inf is probability 0 where a divergence is weighed by the teacher's probabilities."""
    w = inputs(name)
    with torch.no_grad():
        w.t.out[:, K - 1] = -torch.inf
    healthy(name, w)


def one_class(arg):
    """The same with one class instead of K."""
    if isinstance(arg, list):
        return [one_class(x) for x in arg]
    if not isinstance(arg, torch.Tensor) or not arg.is_floating_point() or arg.dim() < 2:
        return arg
    return arg.narrow(1, 0, arg.shape[1] // K)


def calls_of(name):
    """(module, arguments) of the first call of the row's loss."""
    w = inputs(name)
    kd, calls = build(name, w), []
    for loss in kd if isinstance(kd, nn.ModuleList) else [kd]:
        loss.register_forward_pre_hook(lambda module, args: calls.append((module, list(args))))
    call(name, kd, w)
    return calls[0] if calls else (kd, list(own(name, 'arguments')(w)))


@pytest.mark.parametrize('name', rows_but('one_logit'))
def test_one_logit_is_refused(name):
    module, args = calls_of(name)
    names = list(inspect.signature(module.forward).parameters)
    logits = [i for i, key in enumerate(names[: len(args)]) if re.search('out|peers|patch', key)]
    if not logits:
        return
    with pytest.raises(ValueError) as caught:
        module.forward(*[one_class(arg) if i in logits else arg for i, arg in enumerate(args)])
    if 'num_classes' in inspect.signature(METHODS[name].loss).parameters:  # known before
        with pytest.raises(ValueError) as caught:
            METHODS[name].loss(4, 1)
    assert 'torch.cat([torch.zeros_like(z), z], 1)' in str(caught.value)


def labelled(name) -> bool:
    """Whether the row's loss reads labels: an illegal one is noticed."""
    if 'no_labels' in EXCEPTIONS[name]:
        return False
    return (
        'target' in inspect.signature(METHODS[name].loss.forward).parameters
        or 'labels_in_feed' in EXCEPTIONS[name]
    )


LABELLED = [name for name in ROWS if labelled(name)]


@pytest.mark.parametrize('label', [-1, K, 255])
@pytest.mark.parametrize('name', LABELLED)
def test_illegal_labels_are_named(name, label):
    if 'open_labels' in EXCEPTIONS[name] and label > 0:
        return
    w = inputs(name)
    kd = build(name, w)
    w.b.target = w.b.target.clone()
    w.b.target[2] = label
    with pytest.raises(ValueError, match=f'target must be .* got {label}'):
        call(name, kd, w)


@pytest.mark.parametrize('dtype', [torch.int32, torch.uint8])
@pytest.mark.parametrize('name', LABELLED)
def test_other_integers_are_labels_too(name, dtype):
    w, v = inputs(name), inputs(name)
    kd = build(name, w)
    v.b.target, v.b.index = v.b.target.to(dtype), v.b.index.int()
    assert torch.equal(outcome(name, kd, v), outcome(name, kd, w))


def part_of(w, rows) -> None:
    """Keep some samples of a batch of five; copies of a sample are neighbours."""
    relay(w, lambda x: x.unflatten(0, (5, -1))[rows].flatten(0, 1))
    w.b.target, w.b.index = w.b.target[rows], w.b.index[rows]
    w.b.img = w.b.img.detach()[rows].requires_grad_(w.b.img.requires_grad)
    w.b.views = {view: x[rows] for view, x in w.b.views.items()}


@pytest.mark.parametrize(
    'name', [name for name in rows_but('unlabelled_counts', 'labels_in_part') if labelled(name)]
)
def test_rows_without_a_label_are_left_out(name):
    """Two rows of -100: value and gradient are those of the other three, as F.cross_entropy has it."""
    rows = torch.tensor([0, 2, 4])
    w, v = inputs(name, dtype=torch.float64), inputs(name, dtype=torch.float64)
    kd = build(name, w).eval()
    w.b.target = w.b.target.clone()
    w.b.target[[1, 3]] = -100
    if METHODS[name].own.once_per_batch:
        for x in (w, v):
            if x is v:
                part_of(x, rows)
            connect(name, x)
            x.b.from_teacher = METHODS[name].own.once_per_batch(x.b.net_t, x.t, x.b)
    else:
        part_of(v, rows)
    loss, expected = outcome(name, kd, w), outcome(name, kd, v)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    loss.backward()
    expected.backward()
    sides = [[x.s] if METHODS[name].own.peers else [x.s, x.other, x.b.img] for x in (w, v)]
    for g, h in zip(*map(grads, sides), strict=True):
        g = g.unflatten(0, (5, -1))
        torch.testing.assert_close(g[rows].flatten(0, 1), h, rtol=1e-9, atol=1e-12)
        assert not g[[1, 3]].any(), 'a row that is left out learns'


@pytest.mark.parametrize('name', [name for name in LABELLED if 'labels_in_part' not in EXCEPTIONS[name]])
def test_no_label_at_all_is_zero(name):
    w = inputs(name)
    kd = build(name, w)
    w.b.target = torch.full_like(w.b.target, -100)
    if METHODS[name].own.once_per_batch:
        connect(name, w)
        w.b.from_teacher = METHODS[name].own.once_per_batch(w.b.net_t, w.t, w.b)
    loss = outcome(name, kd, w)
    loss.backward()
    assert loss == 0 and not any(g.any() for g in learning(w))


@pytest.mark.parametrize('name', ROWS)
def test_who_reads_labels_is_known(name):
    """So that the tests above ask all of them, and without any label the loss is finite, the rest of it."""
    w = inputs(name)
    kd = build(name, w)
    before, target = outcome(name, kd, w), w.b.target
    w.b.target = target.flip(0)
    if METHODS[name].own.once_per_batch:
        connect(name, w)
        w.b.from_teacher = METHODS[name].own.once_per_batch(w.b.net_t, w.t, w.b)
    reads = not torch.equal(outcome(name, kd, w), before)
    in_part = EXCEPTIONS[name].keys() & {'labels_in_part', 'unlabelled_counts'}
    assert not reads or labelled(name) or in_part, 'labels reach the loss: labels_in_feed or labels_in_part'
    if reads:
        w.b.target = torch.full_like(target, -100)
        if METHODS[name].own.once_per_batch:
            connect(name, w)
            w.b.from_teacher = METHODS[name].own.once_per_batch(w.b.net_t, w.t, w.b)
        healthy(name, w, kd)


@pytest.mark.parametrize('name', ROWS)
def test_teacher_under_inference_mode_gives_the_same(name):
    def again(f):
        if f is None or isinstance(f, torch.Tensor):
            return None if f is None else f.detach().clone()
        return Feats(*map(again, f)) if isinstance(f, Feats) else [again(x) for x in f]

    w, v = inputs(name), inputs(name)
    kd = build(name, w)
    with torch.inference_mode():
        v.t = again(v.t)
        v.b.all_t = [v.t, v.t]
        v.b.target, v.b.index = v.b.target.clone(), v.b.index.clone()  # pseudo-labels, say
        if METHODS[name].own.once_per_batch:
            v.b.from_teacher = again(v.b.from_teacher)
    assert all(x.is_inference() for x in tensors(v.t))
    expected, loss = outcome(name, kd, w), outcome(name, kd, v)
    assert torch.equal(loss, expected)
    expected.backward()
    loss.backward()
    assert all(torch.equal(g, h) for g, h in zip(learning(v), learning(w), strict=True))


def cast(f, dtype):
    if f is None or isinstance(f, torch.Tensor):
        return None if f is None else f.detach().to(dtype).requires_grad_()
    return Feats(*(cast(x, dtype) for x in f)) if isinstance(f, Feats) else [cast(x, dtype) for x in f]


@pytest.mark.parametrize('name', ROWS)
def test_a_float64_teacher(name):
    """Cached by NumPy, say: the loss is the student's, float32."""
    w, v = inputs(name), inputs(name)
    kd = build(name, w)
    v.t = cast(v.t, torch.float64)
    v.b.all_t = [v.t, v.t]
    if METHODS[name].own.once_per_batch:
        v.b.from_teacher = v.b.from_teacher.double()
    loss = healthy(name, v, copy.deepcopy(kd))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, outcome(name, kd, w))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('name', ROWS)
def test_the_loss_in_another_precision(name, dtype):
    """half(), bfloat16() or double() for the loss's own parameters: still computed as the student's are."""
    w = inputs(name)
    kd = build(name, w).to(dtype)
    rounded = copy.deepcopy(kd).float()
    if hasattr(kd, 'attack'):
        kd.attacker = rounded.attacker
    expected = healthy(name, inputs(name), rounded)
    loss = healthy(name, w, kd)
    assert loss.dtype == torch.float32 and all(p.dtype == dtype for p in kd.parameters())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for mine, other in zip(kd.buffers(), rounded.buffers()):  # running statistics and memories go on
        torch.testing.assert_close(mine.float(), other.float(), rtol=1e-2, atol=1e-2)


def test_a_loss_whose_norms_alone_are_float32():
    """As mixed-precision tools leave it: running statistics must not be written onto themselves."""
    seen = []
    for name in ROWS:
        w = inputs(name)
        kd = build(name, w)
        norms = [m for m in kd.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        if norms and not any(p.dtype != torch.float32 for p in kd.parameters()):
            kd.bfloat16()
            for norm in norms:
                norm.float()
            healthy(name, w, kd)
            seen.append(name)
    assert 'simkd' in seen and len(seen) > 5


@pytest.mark.parametrize(
    'name', [name for name in rows_but('coarse') if not METHODS[name].own.once_per_batch]
)
def test_a_float64_student_with_a_float32_loss(name):
    w = inputs(name, dtype=torch.float64)
    kd = build(name, w).float()
    loss = healthy(name, w, copy.deepcopy(kd))
    assert loss.dtype == torch.float64
    torch.testing.assert_close(
        loss, outcome(name, kd.double(), inputs(name, dtype=torch.float64)), rtol=1e-5, atol=1e-7
    )


class Rounding(TorchDispatchMode):
    """Matrix products of float32 as TF32 or bf16 make them: with three digits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ('mm', 'bmm', 'addmm', 'baddbmm'):
            args = [
                x.bfloat16().float() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
                for x in args
            ]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def lower_precision():
    torch.set_float32_matmul_precision('medium')
    yield
    torch.set_float32_matmul_precision('highest')


@pytest.mark.parametrize('name', rows_but('layers'))
def test_products_are_exact(name, lower_precision):
    """Whatever precision the user allows float32 products: those that decide a loss keep theirs."""
    w, v = inputs(name), inputs(name)
    kd = build(name, w)
    torch.set_float32_matmul_precision('highest')
    expected = outcome(name, kd, w)
    expected.backward()
    torch.set_float32_matmul_precision('medium')
    with Rounding():
        loss = outcome(name, kd, v)
        loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=1e-7)
    for g, h in zip(learning(v), learning(w), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-4 * float(h.abs().max()) + 1e-9)


@pytest.mark.parametrize('name', rows_but('class_by_class'))
def test_memory_is_linear_in_the_classes(name, monkeypatch):
    """100,000 classes are legal: no tensor has an entry for every two of them."""
    many = 211
    monkeypatch.setattr('tests.test_contract.K', many)
    monkeypatch.setattr(TrainSet, 'targets', torch.arange(40) % many)
    w = inputs(name)
    kd = build(name, w)
    with Grown(many, 2) as grown:
        call(name, kd, w).backward()
    assert not grown.made


@pytest.mark.parametrize('name', rows_but('of_triples'))
def test_memory_is_at_most_quadratic_in_the_batch(name):
    w = inputs(name, n=31)
    kd = build(name, w)
    with Grown(31, 3) as grown:
        call(name, kd, w).backward()
    assert not grown.made


@pytest.mark.parametrize('name', ROWS)
def test_an_empty_batch_is_refused(name):
    w = inputs(name)
    kd = build(name, w)
    relay(w, lambda x: x[:0])
    w.b.target, w.b.index, w.b.img = w.b.target[:0], w.b.index[:0], w.b.img.detach()[:0]
    w.b.views = {view: x[:0] for view, x in w.b.views.items()}
    if METHODS[name].own.once_per_batch:
        w.b.from_teacher = w.b.from_teacher[:0]
        connect(name, w)
    with pytest.raises(ValueError, match=r'\(0, .*: leave an empty batch out'):
        call(name, kd, w)


@pytest.mark.parametrize('name', rows_but('not_compiled'))
def test_functional_gradients(name):
    """torch.func.grad gives what backward gives."""
    module, args = calls_of(name)
    module.eval()
    nested = isinstance(args[0], list)
    first = tensors(args[0])[0]

    def f(x):
        seed(0)
        return copy.deepcopy(module).forward(put_first(args[0], x) if nested else x, *args[1:])

    plain = first.detach().clone().requires_grad_()
    f(plain).backward()
    torch.testing.assert_close(torch.func.grad(f)(first.detach()), plain.grad)


def put_first(arg, x):
    """x in the place of the first tensor of nested lists."""
    return [put_first(arg[0], x), *arg[1:]] if isinstance(arg, list) else x


@pytest.mark.parametrize('name', rows_but('no_meta'))
def test_meta_tensors(name):
    """Shapes only: what planning tools ask for."""
    w = inputs(name)
    kd = build(name, w).to('meta')
    relay(w, lambda x: x.to('meta'))
    w.b.target, w.b.index = w.b.target.to('meta'), w.b.index.to('meta')
    w.b.net_s.to('meta')
    w.b.net_t.to('meta')
    loss = call(name, kd, w)
    assert loss.device.type == 'meta' and loss.shape == ()
    loss.backward()


@pytest.mark.parametrize('name', ROWS)
def test_shape_messages_name_the_remedy(name):
    """Wanted, got, and what to do about it; for text, sequences and volumes in particular."""
    module, args = calls_of(name)
    names = list(inspect.signature(module.forward).parameters)
    for i, arg in enumerate(args):
        if not isinstance(arg, (list, torch.Tensor)):
            continue
        for wrong in [
            *spoiled(arg)['any_length' in EXCEPTIONS[name] and isinstance(arg, list) :],
            *foreign(names[i % len(names)], arg),
        ]:
            with pytest.raises(ValueError) as caught:
                module.forward(*[wrong if j == i else a for j, a in enumerate(args)])
            assert re.search(r'must .*, got .*: \w.*\w', str(caught.value)), str(caught.value)
    first = args[0]
    if isinstance(first, torch.Tensor) and names[0] in ('out', 'out_s', 'out_1', 'out_a', 'patch_s'):
        with pytest.raises(ValueError, match='flatten'):
            module.forward(torch.randn(2, 3, 4, 5, 6), *args[1:])
    if isinstance(first, torch.Tensor) and names[0] in ('fm_s', 'fm') and 'any_rank' not in EXCEPTIONS[name]:
        for shape, remedy in (((2, 4, 9), r'x\[..., None\]'), ((2, 4, 3, 3, 3), r'flatten\(3\)')):
            with pytest.raises(ValueError, match=remedy):
                module.forward(torch.randn(shape), *args[1:])


def foreign(key: str, arg) -> list:
    """Logits with an axis more."""
    return (
        [arg[:, None]] if re.search('out', key) and isinstance(arg, torch.Tensor) and arg.dim() == 2 else []
    )
