"""What every loss on next-token logits promises: the rules that they share, whatever the formula.

test_contract.py asks rows that see images; these take (N, L, K) logits, targets with -100, texts
of two kinds.
"""

import copy
import importlib
import pickle

import pytest
import torch

from kd_losses.abkd import ABKD
from kd_losses.akl import AKL
from kd_losses.distillm import DistiLLM, SampleSchedule
from kd_losses.distillm2 import DistiLLM2
from kd_losses.dskd import DSKD, DSKDCMA
from kd_losses.fdistill import FDistill
from kd_losses.gkd import GKD
from kd_losses.minillm import MiniLLM, ReverseKL, lm_term, rollout
from kd_losses.taid import TAID
from kd_losses.uld import ULD
from methods import LM
from tests.methods.shared import seed
from tests.test_contract import NoReadBack

K, N, L = 7, 3, 5

# losses of two logits and, if wanted, a target; any of them works on images as well
PLAIN = {
    'jsd': lambda: GKD(0.3),
    'gkd, forward': lambda: GKD(0.0, temperature=2.0),
    'gkd, reverse': lambda: GKD(1.0),
    'skew': DistiLLM,
    'skew, reverse': lambda: DistiLLM(reverse=True),
    'skew 0': lambda: DistiLLM(0.0),
    'abkd': lambda: ABKD(0.2, 0.7),
    'abkd, negative': lambda: ABKD(-0.5, 0.2),
    'abkd, limit 0': lambda: ABKD(0, 0),
    'abkd, limit a': lambda: ABKD(0, 0.7),
    'abkd, limit b': lambda: ABKD(0.2, 0),
    'abkd, limit sum': lambda: ABKD(0.3, -0.3, T=2.0),
    'akl': AKL,
    'taid': TAID,
    'tvd': FDistill,
    'js': lambda: FDistill('js', beta=0.3),
    'reverse': ReverseKL,
}


class Both:
    """fdistill and distillm2 on one batch twice."""

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, out_s, out_t, target):
        return self.loss(out_s, out_t, target, out_s, out_t, target)


class Answers:
    """minillm on tokens that were sampled long ago."""

    def __call__(self, out_s, out_t, target):
        tokens, mask = target.clamp(min=0), target != -100
        old = torch.zeros_like(out_s)
        sampled = rollout(old, out_t, tokens, mask)
        return MiniLLM()(out_s, out_t, tokens, mask, *sampled)


class Other:
    """uld, the teacher's vocabulary cut and its positions turned round, so that it differs."""

    def __call__(self, out_s, out_t, target):
        return ULD()(out_s, out_t[..., :-1], target, target.clamp(max=out_t.shape[-1] - 2))


class Spaces:
    """dskd and its form for different tokens, with hidden states that are functions of the logits."""

    def __init__(self, kind):
        seed(3)
        self.loss = kind(3, 4)
        # a few digits, which bf16 has as well
        self.heads = tuple((8 * torch.randn(K, dim)).round() / 8 for dim in (3, 4))

    def __call__(self, out_s, out_t, target):
        if out_s.dtype == torch.float64:
            self.loss.double()
        hid_s, hid_t = out_s[..., :3], out_t[..., :4]
        head_s, head_t = (x.to(out_s.dtype) for x in self.heads)
        if isinstance(self.loss, DSKD):
            return self.loss(out_s, hid_s, head_s, out_t, hid_t, head_t, target)
        # hidden states at ignored positions do count there, see the page
        fill = (target != -100)[..., None]
        hid_s, hid_t = torch.where(fill, hid_s, 0), torch.where(fill, hid_t, 0)
        ids = target.clamp(min=0)
        return self.loss(out_s, hid_s, head_s, head_s, ids, out_t, hid_t, head_t, head_t, ids, target, target)


MORE = {
    'f-distill, tvd': lambda: Both(FDistill()),
    'f-distill, js': lambda: Both(FDistill('js')),
    'f-distill, rkl': lambda: Both(FDistill('rkl')),
    'distillm2': lambda: Both(DistiLLM2()),
    'distillm2, curriculum': lambda: Both(DistiLLM2(anchor_t=0.05, anchor_s=0.02)),
    'minillm': Answers,
    'lm_term': lambda: lm_term,
    'uld': Other,
    'dskd': lambda: Spaces(DSKD),
    'dskd_cma': lambda: Spaces(DSKDCMA),
}
ALL = {**PLAIN, **MORE}
FILES = {
    file: importlib.import_module(f'kd_losses.{file}')
    for file in 'gkd distillm distillm2 abkd akl taid fdistill uld minillm dskd'.split()
}


def batch(dtype=torch.float32, number=0, scale=2.0):
    seed(number)
    out_s, out_t = (scale * torch.randn(N, L, K, dtype=torch.float64) for _ in 'st')
    target = torch.randint(K, (N, L))
    target[0, :2] = target[1, 3:] = -100
    return out_s.to(dtype).requires_grad_(), out_t.to(dtype).requires_grad_(), target


def healthy(loss, out_s, out_t, target):
    value = loss(out_s, out_t, target)
    assert value.shape == () and torch.isfinite(value)
    (grad,) = torch.autograd.grad(value, out_s)
    assert torch.isfinite(grad).all()
    return value.detach(), grad


@pytest.mark.parametrize('name', ALL)
def test_value_and_gradient(name):
    for dtype in (torch.float32, torch.float64):
        out_s, out_t, target = batch(dtype)
        value = ALL[name]()(out_s, out_t, target)
        value.backward()
        assert value.dtype == dtype and torch.isfinite(value) and out_s.grad.abs().max() > 0
        assert out_t.grad is None, 'a gradient reached the teacher'
        assert not out_s.grad[target == -100].any(), 'a position that is left out learns'


@pytest.mark.parametrize('name', PLAIN)
def test_shapes_and_masks_agree(name):
    """(N, L, K) is its flattened (N, K); -100 is leaving the position out; without a target all count."""
    out_s, out_t, target = batch(torch.float64)
    loss = PLAIN[name]
    value, grad = healthy(loss(), out_s, out_t, target)
    flat, flat_grad = healthy(loss(), out_s.flatten(0, 1), out_t.flatten(0, 1), target.flatten().int())
    assert torch.equal(value, flat) and torch.equal(grad.flatten(0, 1), flat_grad)
    kept = target != -100
    fewer, fewer_grad = healthy(loss(), out_s[kept], out_t[kept], None)
    torch.testing.assert_close(value, fewer, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad[kept], fewer_grad, rtol=1e-10, atol=1e-14)
    every = healthy(loss(), out_s, out_t, torch.zeros_like(target))
    for x, y in zip(every, healthy(loss(), out_s, out_t, None)):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('name', ALL)
def test_what_is_ignored_is_not_looked_at(name):
    out_s, out_t, target = batch()
    expected = healthy(ALL[name](), out_s, out_t, target)
    for bad in (torch.nan, torch.inf, -torch.inf, 1e30):
        s, t = (
            torch.where((target == -100)[..., None], bad, x).detach().requires_grad_() for x in (out_s, out_t)
        )
        value, grad = healthy(ALL[name](), s, t, target)
        assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])


@pytest.mark.parametrize('name', ALL)
def test_no_position_at_all_is_zero(name):
    out_s, out_t, target = batch()
    value = ALL[name]()(out_s, out_t, torch.full_like(target, -100))
    value.backward()
    assert value == 0 and not out_s.grad.any()


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
@pytest.mark.parametrize('name', ALL)
def test_what_is_not_finite_shows(name, bad):
    for side in (0, 1):
        for place in ((0, 2, 0), (1, 1, 3), (2, 3, K - 2)):
            tensors = [x.detach().clone() for x in batch()]
            tensors[side][place] = bad
            tensors[0].requires_grad_()
            assert not torch.isfinite(ALL[name]()(*tensors)), f'{bad} in {"st"[side]}{place} is hidden'


@pytest.mark.parametrize('name', [name for name in ALL if 'dskd' not in name])
def test_a_forbidden_class_is_legal(name):
    """-inf in one network or both, on the same class or on different ones."""
    for s_gone, t_gone in (((), (0,)), ((0,), ()), ((0,), (0,)), ((0, 3), (1,)), ((0,), (0, 1, 2))):
        out_s, out_t, target = (x.detach().clone() for x in batch())
        target[target >= 0] = 5  # what is to be said is never forbidden
        out_s[..., list(s_gone)] = out_t[..., list(t_gone)] = -torch.inf
        healthy(ALL[name](), out_s.requires_grad_(), out_t, target)


@pytest.mark.parametrize('name', ALL)
def test_awkward_logits(name):
    """Zeros, equal networks, far apart, one class alone: finite."""
    out_s, out_t, target = batch()
    eye = 1e4 * torch.eye(K)[target.clamp(min=0)]
    zero = torch.zeros_like(out_s)
    for s, t in (
        (zero, zero),
        (out_t, out_t),
        (eye, -eye),
        (-eye, eye),
        (eye, eye.flip(2)),
        (zero - 200 * (eye > 0), zero),
    ):
        healthy(ALL[name](), s.detach().requires_grad_(), t.detach(), target)
    healthy(ALL[name](), *(x[:1, 2:3] for x in (out_s, out_t, target)))  # one text, one position


@pytest.mark.parametrize('name', [name for name in PLAIN if name != 'taid'])
def test_equal_networks_have_nothing_to_learn(name):
    _, out_t, target = batch()
    value, grad = healthy(PLAIN[name](), out_t.detach().clone().requires_grad_(), out_t, target)
    assert abs(value) < 1e-5 and grad.abs().max() < 1e-6


@pytest.mark.parametrize('name', ALL)
def test_in_chunks_it_is_the_same(name, monkeypatch):
    """Large inputs go through in chunks of positions: same value and gradient, the logits' own precision."""
    whole = healthy(ALL[name](), *batch(torch.float64))
    half = healthy(ALL[name](), *batch(torch.bfloat16))
    for module in FILES.values():
        monkeypatch.setattr(module, 'CHUNK', 2 * K + 1)
    for x, y in zip(whole, healthy(ALL[name](), *batch(torch.float64))):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
    value, grad = healthy(ALL[name](), *batch(torch.bfloat16))
    assert value.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, half[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, half[1], rtol=2e-2, atol=1e-3 * float(half[1].abs().max()))
    out_s, out_t, target = batch()
    with torch.inference_mode():
        frozen = out_t.detach().clone()
    value = ALL[name]()(out_s, frozen, target)  # backward may be repeated, and called late
    grads = [torch.autograd.grad(value, out_s, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ALL)
def test_half_precision_and_autocast(name, dtype):
    out_s, out_t, target = batch(dtype)
    with torch.autocast('cpu', dtype=dtype):
        value, _ = healthy(ALL[name](), out_s, out_t, target)
    assert value.dtype == torch.float32
    expected = healthy(ALL[name](), out_s.detach().float().requires_grad_(), out_t.float(), target)[0]
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ALL)
def test_a_float64_teacher(name):
    out_s, out_t, target = batch()
    value, _ = healthy(ALL[name](), out_s, out_t.double(), target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, healthy(ALL[name](), out_s, out_t, target)[0])


@pytest.mark.parametrize('name', [name for name in ALL if name not in ('tvd', 'f-distill, tvd', 'uld')])
def test_gradcheck(name):
    out_s, out_t, target = (
        x.detach()[:2, 1:4, :4] if x.dim() == 3 else x[:2, 1:4] % 4 for x in batch(torch.float64)
    )
    if 'dskd' in name or name.startswith(('minillm', 'akl', 'distillm2')):
        return  # constants by definition; their gradients are those of the golden vector
    loss = ALL[name]()
    if name == 'taid':
        loss = loss.eval()
        fixed = ((1 - loss.t) * out_s + loss.t * out_t).softmax(-1)
        plain = out_s.requires_grad_()
        (g,) = torch.autograd.grad(loss(plain, out_t, None), plain)
        torch.testing.assert_close(g, (plain.softmax(-1) - fixed) / 6)
        return
    target = target % 4
    assert torch.autograd.gradcheck(lambda s: loss(s, out_t, target), out_s.requires_grad_())


@pytest.mark.parametrize('name', ALL)
def test_no_read_back(name):
    out_s, out_t, target = batch()
    loss = ALL[name]()
    with NoReadBack():
        loss(out_s, out_t, target).backward()


@pytest.mark.parametrize('name', PLAIN)
def test_meta_tensors(name):
    loss = PLAIN[name]().to('meta')
    out_s, out_t, target = (x.detach().to('meta') for x in batch())
    out_s.requires_grad_()
    value = loss(out_s, out_t, target)
    assert value.device.type == 'meta' and value.shape == ()
    value.backward()


@pytest.mark.parametrize('name', PLAIN)
def test_functional_gradients_and_copies(name):
    out_s, out_t, target = batch()
    loss = PLAIN[name]().eval()
    expected = healthy(loss, out_s, out_t, target)[1]
    torch.testing.assert_close(torch.func.grad(lambda s: loss(s, out_t, target))(out_s.detach()), expected)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss).half()):
        assert torch.equal(healthy(other, out_s, out_t, target)[1], expected) and repr(other)


WRONG = {
    'another K': lambda s, t, y: (s, t[..., :-1], y),
    'another L': lambda s, t, y: (s, t[:, :-1], y),
    'a text less': lambda s, t, y: (s, t[:-1], y),
    'target too short': lambda s, t, y: (s, t, y[:, :-1]),
    'target of numbers': lambda s, t, y: (s, t, y.float()),
    'target of (N,)': lambda s, t, y: (s, t, y[:, 0]),
    'one class': lambda s, t, y: (s[..., :1], t[..., :1], y.clamp(max=0)),
    'no text': lambda s, t, y: (s[:0], t[:0], y[:0]),
    'no position': lambda s, t, y: (s[:, :0], t[:, :0], y[:, :0]),
    'an axis more': lambda s, t, y: (s[None], t[None], y[None]),
    'an axis less': lambda s, t, y: (s[0, 0], t[0, 0], y[0, 0]),
}


@pytest.mark.parametrize('wrong', WRONG)
@pytest.mark.parametrize('name', PLAIN)
def test_wrong_shapes_are_named(name, wrong):
    with pytest.raises(ValueError, match=r'must .*, got .*: \w.*\w'):
        PLAIN[name]()(*WRONG[wrong](*batch()))


@pytest.mark.parametrize('wrong', ['another K', 'a text less', 'target too short', 'one class', 'no text'])
@pytest.mark.parametrize('name', ['f-distill, js', 'distillm2', 'lm_term', 'uld'])
def test_wrong_shapes_are_named_elsewhere(name, wrong):
    if name == 'uld' and wrong == 'another K':
        return
    with pytest.raises(ValueError, match=r'must .*, got .*: \w.*\w'):
        ALL[name]()(*WRONG[wrong](*batch()))


class Output:
    """What a network of transformers returns, as far as a loss can tell."""


@pytest.mark.parametrize('name', [name for name in ALL if 'dskd' not in name])
def test_a_mask_is_no_target_and_an_output_no_logits(name):
    out_s, out_t, target = batch()
    if name not in ('minillm', 'uld'):
        with pytest.raises(ValueError, match=r'target(_gen)? must be integers, got torch.bool: a mask is no'):
            ALL[name]()(out_s, out_t, target != -100)
    if name == 'uld':
        with pytest.raises(ValueError, match=r'target_t must be integers, got torch.bool: a mask is no'):
            ULD()(out_s, out_t, target, target != -100)
        for logits in ((Output(), out_t), (out_s, Output())):
            with pytest.raises(ValueError, match=r'must be a tensor, got Output: .* give out.logits'):
                ULD()(*logits, target, target)
    if name in PLAIN:
        for logits in ((Output(), out_t), (out_s, Output())):
            with pytest.raises(ValueError, match=r'must be a tensor, got Output: .* give out.logits'):
                ALL[name]()(*logits, target)


@pytest.mark.parametrize('kind', [DSKD, DSKDCMA])
def test_what_is_given_of_two_networks(kind):
    """Outputs, tuples of hidden states, and tables that are longer than logits that were cut."""
    loss, given = other_arguments()['dskd' if kind is DSKD else 'dskd_cma']
    assert torch.isfinite(loss(**given))
    for side in 'st':
        with pytest.raises(ValueError, match=f'out_{side} must be a tensor, got Output: '):
            loss(**given | {f'out_{side}': Output()})
        with pytest.raises(ValueError, match=f'hid_{side} must be a tensor, got tuple: .*hidden_states.-1.'):
            loss(**given | {f'hid_{side}': (given[f'hid_{side}'],)})
        for name in [name for name in (f'head_{side}', f'emb_{side}') if name in given]:
            longer = torch.cat([given[name], given[name][:2]])
            with pytest.raises(
                ValueError, match=rf'{name} must be .* cut it as the logits are, {name}\[:{K}\]'
            ):
                loss(**given | {name: longer})
    with pytest.raises(ValueError, match='target must be integers, got torch.bool'):
        loss(**given | {'target': given['target'] != -100})


READING = ('distillm2', 'minillm', 'lm_term', 'dskd')  # losses whose value depends on the ids


@pytest.mark.parametrize('label', [K, 255])
@pytest.mark.parametrize('name', [name for name in ALL if not name.startswith(READING)])
def test_any_id_counts_where_none_is_read(name, label):
    """The logits of a vocabulary that was cut, or the ids of another tokenizer."""
    out_s, out_t, target = batch()
    same = target.clone()
    target[2, 2] = label
    torch.testing.assert_close(
        ALL[name]()(out_s, out_t, target), ALL[name]()(out_s, out_t, same), rtol=0, atol=0
    )


@pytest.mark.parametrize('label', [-1, K, 255])
@pytest.mark.parametrize('name', ALL)
def test_illegal_ids_are_named(name, label):
    if name == 'minillm' and label < 0:
        return  # Answers clamps it
    if label >= K and not name.startswith(READING):
        return
    out_s, out_t, target = batch()
    target[2, 2] = label
    loss = ALL[name]()
    with pytest.raises(ValueError, match=f'must be (in 0..{K - 1}|ids from 0 up), or -100.* got {label}'):
        if name == 'dskd_cma':
            ids, hid = torch.zeros_like(target), out_s[..., :3]
            loss.loss(out_s, hid, loss.heads[0], loss.heads[0], ids, out_t, out_t[..., :4], loss.heads[1],
                      loss.heads[1], ids, target, ids)  # fmt: skip
        loss(out_s, out_t, target)


@pytest.mark.parametrize(
    'make',
    [
        lambda: GKD(1.1), lambda: GKD(-0.1), lambda: GKD(temperature=0), lambda: GKD(reduction='sums'),
        lambda: DistiLLM(1.0), lambda: DistiLLM(-0.1), lambda: ABKD(T=0), lambda: ABKD(float('nan')),
        lambda: AKL(0), lambda: TAID(0.8, 0.5), lambda: FDistill('nonsense'), lambda: FDistill('js', 1.0),
        lambda: FDistill(T=-1), lambda: ULD(T_s=0), lambda: DistiLLM2(0), lambda: DistiLLM2(1),
        lambda: ReverseKL(0), lambda: MiniLLM(clip=0), lambda: DSKD(3, 4, T=0), lambda: DSKDCMA(3, 4, T_t=0),
    ],
)  # fmt: skip
def test_arguments_out_of_range(make):
    with pytest.raises(ValueError, match='must be .*, got'):
        make()


def other_arguments() -> dict:
    """Losses that are given more tensors of numbers than two logits: {name: (loss, arguments)}"""
    (out_s, out_t, target), _ = (x.detach() for x in batch()), seed(1)
    ids, mask = target.clamp(min=0), torch.ones(N, L)
    hidden = {'hid_s': torch.randn(N, L, 3), 'hid_t': torch.randn(N, L, 4)}
    heads = {'head_s': torch.randn(K, 3), 'head_t': torch.randn(K, 4)}
    spaces = {'out_s': out_s, 'out_t': out_t, 'target': target, **hidden, **heads}
    sampled = dict(zip(('logp_old', 'reward', 'weight'), rollout(out_s, out_t, ids, mask)))
    texts = {'input_s': ids, 'input_t': ids, 'target_t': target}
    tables = {'emb_s': torch.randn(K, 3), 'emb_t': torch.randn(K, 4)}
    return {
        'dskd': (DSKD(3, 4), spaces),
        'dskd_cma': (DSKDCMA(3, 4), {**spaces, **texts, **tables}),
        'minillm': (MiniLLM(), {'out_s': out_s, 'out_t': out_t, 'tokens': ids, 'mask': mask, **sampled}),
        'minillm, sampled': (
            MiniLLM(single_step=False),
            {'out_s': out_s, 'out_t': out_t.clone(), 'tokens': ids, 'mask': mask, **sampled},
        ),
    }


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
@pytest.mark.parametrize('name', other_arguments())
def test_what_is_not_finite_shows_in_every_argument(name, bad):
    loss, inputs = other_arguments()[name]
    assert torch.isfinite(loss(**inputs))
    for argument, x in inputs.items():
        if not x.is_floating_point() or argument == 'mask':
            continue
        if name == 'minillm, sampled' and argument == 'out_t':  # the single step alone looks at it
            continue
        for place in (0, -1) if x.dim() == 2 and len(x) == K else ((2, 2), (2, 4)):
            spoiled = x.clone()
            spoiled[place] = bad
            assert not torch.isfinite(loss(**{**inputs, argument: spoiled})), f'{bad} in {argument}{place}'


def test_every_loss_of_the_table_is_here():
    for name, row in LM.items():
        assert row.loss.__module__.split('.')[-1] in FILES or name == 'ce', f'{name} has no contract'


def near(a, b, rtol=1e-9):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=rtol, atol=1e-12)


def test_losses_that_are_one():
    """The same number by two files, as their pages say."""
    args = batch(torch.float64)
    with torch.no_grad():
        near(FDistill('js', beta=0.3)(*args, *args), GKD(0.7)(*args), 1e-7)  # its 1e-10
        near(DistiLLM(0.0, reverse=True)(*args), ReverseKL()(*args))
        near(ABKD(1, 0)(*args), GKD(0.0)(*args))
        near(ABKD(0, 1)(*args), GKD(1.0)(*args))
        near(FDistill('kl')(*args), GKD(0.0)(*args))
        near(FDistill('rkl')(*args, *args), GKD(1.0)(*args))
        kept = args[2] != -100
        q, p = (x[kept].softmax(-1) for x in args[:2])
        near(ABKD()(*args), 4 * (1 - (p * q).sqrt().sum(-1)).mean())
        near(FDistill()(*args), 0.5 * (p - q).abs().sum(-1).mean())
        near(GKD(0.5)(*args) * 2, sum((x * (x / (p + q) * 2).log()).sum(-1).mean() for x in (p, q)))
        near(ABKD(2e-4, 0.7)(*args), ABKD(0, 0.7)(*args), 2e-2)  # the limits are limits
        near(ABKD(0.3, -0.3 + 2e-4)(*args), ABKD(0.3, -0.3)(*args), 2e-2)


def test_gkd_of_several_batches_adds_up():
    """num_items: micro-batches of different lengths give the gradient of the whole."""
    out_s, out_t, target = batch(torch.float64)
    whole = GKD()(out_s, out_t, target)
    n = (target != -100).sum()
    parts = sum(GKD()(out_s[i : i + 1], out_t[i : i + 1], target[i : i + 1], num_items=n) for i in range(N))
    near(parts, whole.item())
    assert GKD()(out_s, out_t, target, num_items=0) == 0
    each = GKD(reduction='none')(out_s, out_t, target)
    assert each.shape == (N, L) and not each[target == -100].any()
    with pytest.raises(ValueError, match='num_items'):
        GKD(reduction='none')(out_s, out_t, target, num_items=3)


def test_the_head_of_akl():
    """By counting, and the same when only the top classes are looked at first."""
    seed(0)
    for scale in (0.5, 3.0):  # most of 5000 classes are in the head; few are
        out_s, out_t = (scale * torch.randn(4, 5000, dtype=torch.float64) for _ in 'st')
        ratio = AKL(0.5).head_ratio(out_s, out_t)
        for row, w in zip(zip(out_s.softmax(1), out_t.softmax(1)), ratio):
            q, p = row
            mass, head, rest = 0.0, 0.0, 0.0
            for j, k in enumerate(p.argsort(descending=True).tolist()):
                mass += float(p[k])
                gap = abs(float(p[k] - q[k]))
                head, rest = (head + gap, rest) if j == 0 or mass <= 0.5 else (head, rest + gap)
            near(w, head / (head + rest), 1e-6)


def test_taid_moves_only_in_training_and_never_on_nan():
    args = batch()
    loss = TAID(alpha=0.1)
    loss.eval()
    loss(*args)
    assert loss.prev_loss == torch.inf
    loss.train()
    loss(*args)
    assert loss.t == 0.4 and loss.prev_loss < torch.inf
    loss(*args, progress=0.5)
    assert loss.t >= 0.7
    before = {name: x.clone() for name, x in loss.named_buffers()}
    loss(args[0] * torch.nan, *args[1:], progress=0.9)
    loss(*args[:2], torch.full_like(args[2], -100), progress=0.9)
    assert all(torch.equal(x, before[name]) for name, x in loss.named_buffers())
    again = TAID(alpha=0.1)
    again.load_state_dict(loss.state_dict())
    assert again.half().t == loss.t and again.t.dtype == torch.float64
    for t in (0.0, 1.0):  # exactly one network: an infinite logit of the other is not multiplied by 0
        loss = TAID(t, 1.0)
        out_t = args[1].detach().clone()
        out_t[..., 0] = -torch.inf
        assert torch.isfinite(loss(args[0], out_t, args[2]))
        for bad in (torch.nan, torch.inf):
            assert TAID(t, 1.0)(args[0], out_t.index_fill(2, torch.tensor([1]), bad), args[2]).isnan()


def test_the_schedule_of_samples():
    schedule = SampleSchedule(capacity=2)
    assert schedule.source(0.0, 0.0, 0) == 'data'  # nothing before a loss has risen
    assert [schedule.update(x) for x in (2.0, 2.05, 2.1, 1.0, 2.1, 2.2)] == [0.0, 0.0, 0.1, 0.1, 0.1, 0.2]
    assert [schedule.source(0.15, p, n) for p, n in ((0.1, 9), (0.5, 9), (0.5, 1))] == [
        'student',
        'buffer',
        'student',
    ]
    again = SampleSchedule()
    again.load_state_dict(schedule.state_dict())
    assert (again.threshold, again.reference) == (0.2, 2.2)


def test_the_curriculum_of_distillm2():
    six = Both(DistiLLM2(anchor_t=0.1))
    with pytest.raises(ValueError, match='anchor_s'):
        six(*batch())
    args = batch(torch.float64)
    loss = DistiLLM2(anchor_t=0.0, anchor_s=0.0)  # 0 / 0 where the networks are equal
    for a in loss.skews(args[1], args[1], args[2], *args):
        assert (a == 0.1).all()
    # the mean is over texts first: a text of one position weighs as much as one of five
    out_s, out_t, target = args
    target = target.clone()
    target[1, 1:] = -100
    per_text = [DistiLLM2().terms(*[x[i : i + 1] for x in (out_s, out_t, target)] * 2)[0] for i in range(N)]
    near(DistiLLM2().terms(out_s, out_t, target, out_s, out_t, target)[0], sum(per_text).item() / N)


def test_uld_pairs_positions_of_the_answers():
    """Answers that begin at different places and have different lengths; the surplus is ignored."""
    seed(0)
    out_s, out_t = torch.randn(1, 6, 4), torch.randn(1, 5, 9)
    target, target_t = torch.tensor([[-100, -100, 1, 1, 1, 1]]), torch.tensor([[-100, 1, 1, -100, -100]])
    q = out_s.softmax(-1).sort(-1, descending=True).values[0, 2:4]
    p = out_t.softmax(-1).sort(-1, descending=True).values[0, 1:3]
    q = torch.cat([q, torch.zeros(2, 5)], 1)
    near(ULD()(out_s, out_t, target, target_t), float((q - p).abs().sum(1).mean()), 1e-5)
    short = torch.tensor([[-100, -100, -100, -100, -100, 1]])
    assert ULD()(out_s, out_t, short, target_t) == 0  # nothing is left without its end
    assert ULD(skip_eos_s=False)(out_s, out_t, short, target_t) > 0


def test_minillm_ignores_padding():
    out_s, out_t, target = batch()
    mask = (target != -100).int()
    values = []
    for fill in (0, 3):
        tokens = target.masked_fill(mask == 0, fill)
        sampled = rollout(out_t, out_t, tokens, mask)
        assert torch.equal(sampled[2], torch.ones(N, L)) and not sampled[1].any()  # student = teacher
        values.append(MiniLLM()(out_s, out_t, tokens, mask, *sampled))
    assert torch.equal(*values)
    poisoned = out_t.detach().clone()
    poisoned[2, 2] = torch.nan
    assert not torch.isfinite(MiniLLM()(out_s, out_t, tokens, mask, *rollout(out_s, poisoned, tokens, mask)))


def test_equals_of_akl_come_in_the_order_of_their_numbers():
    """Also where the top classes alone are sorted: logits of bfloat16 have many equals."""
    seed(1)
    out_s, out_t = ((3 * torch.randn(6, 5000)).bfloat16().double() for _ in 'st')
    gap, p = (out_t.softmax(1) - out_s.softmax(1)).abs(), out_t.softmax(1)
    top, index = p.sort(dim=1, descending=True, stable=True)
    head = top.cumsum(dim=1) <= 0.5
    head[:, 0] = True
    near(AKL(0.5).head_ratio(out_s, out_t), (gap.gather(1, index) * head).sum(1) / gap.sum(1))


def test_an_anchor_of_zero_concerns_its_own_text():
    args = batch(torch.float64)
    both, none, one = (DistiLLM2(anchor_t=a, anchor_s=b).skews(*args, *args)
                       for a, b in ((0.05, 0.05), (0.0, 0.0), (0.05, 0.0)))  # fmt: skip
    assert torch.equal(one[0], both[0]) and torch.equal(one[1], none[1]) and (none[1] == 0.1).all()
    assert not torch.equal(both[0], none[0])
