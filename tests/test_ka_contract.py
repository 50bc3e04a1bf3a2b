"""What every amalgamation loss promises, and every loss without a row, on random and on awkward tensors."""

import copy
import importlib
import io
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests import methods
from tests.ka_cases import CASES, file_of, package_of
from tests.methods.shared import Grown, seed

OWN = {name: methods.of(file_of(name)) for name in CASES}
EXCEPTIONS = {name: methods.exceptions(file_of(name), name) for name in CASES}


def cases_but(kind: str) -> list[str]:
    """The cases that are no exception of this kind."""
    return [name for name in CASES if kind not in EXCEPTIONS[name]]


class Made:
    """A loss with inputs; all of them require grad, but none may reach the teachers."""

    def __init__(self, name: str, n: int = 6, dtype=torch.float32, change=lambda x: x, K: int = 7) -> None:
        self.name, self.students, self.teachers = name, [], []
        generator = torch.Generator().manual_seed(7)

        def leaf(shape, into):
            x = change(torch.randn(shape, generator=generator)).to(dtype).detach().requires_grad_()
            into.append(x)
            return x

        seed(0)
        scope = {
            'm': importlib.import_module(package_of(name)),
            'n': n,
            'K': K,
            'torch': torch,
            'S': lambda *shape: leaf(shape, self.students),
            'T': lambda *shape: leaf(shape, self.teachers),
        }
        exec(CASES[name], scope)
        self.loss, self.inputs = scope['loss'], scope['inputs']
        if dtype == torch.float64:
            self.loss.double()
            if hasattr(OWN[name], 'to_float64'):
                self.inputs = OWN[name].to_float64(self.inputs)

    def __call__(self, **options):
        return self.loss(**self.inputs, **options)

    def check(self, value) -> None:
        """Finite value, finite gradients for the student and the modules, none for the teachers."""
        assert value.shape == () and torch.isfinite(value)
        value.backward()
        learning = [x for x in self.students if x.grad is not None]
        assert learning, 'no gradient reaches the student'
        assert all(torch.isfinite(x.grad).all() for x in learning)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in self.loss.parameters())
        assert all(x.grad is None for x in self.teachers), 'a gradient reaches a teacher'


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['f32', 'f64'])
def test_value_and_gradients(name, dtype):
    made = Made(name, dtype=dtype)
    value = made()
    assert value.dtype == dtype
    made.check(value)


@pytest.mark.parametrize('name', [name for name in CASES if file_of(name).startswith('ka/')])
def test_terms_are_scalars_and_change_nothing(name):
    made = Made(name)
    value, terms = made(return_terms=True)
    assert torch.equal(value, Made(name)()) and terms
    assert all(isinstance(key, str) and term.shape == () for key, term in terms.items())


@pytest.mark.parametrize('name', CASES)
def test_batch_of_one(name):
    made = Made(name, n=1)
    made.check(made())


AWKWARD = {
    'zero': torch.zeros_like,
    'equal': torch.ones_like,
    'huge': lambda x: x * 1e4,
    'tiny': lambda x: x * 1e-20,
}


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('kind', AWKWARD)
def test_awkward_inputs(name, kind):
    made = Made(name, change=AWKWARD[kind])
    made.check(made())


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_half_precision_and_autocast(name, dtype):
    """Maps as autocast leaves them; the loss itself is worked out in float32."""
    exact = Made(name, change=lambda x: x.to(dtype).float())
    wanted = exact()
    made = Made(name, dtype=dtype)
    with torch.autocast('cpu', dtype):
        value = made()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=2e-2, atol=2e-2)
    made.check(value)


@pytest.mark.parametrize('name', CASES)
def test_memory_layout_does_not_matter(name):
    def strided(x):
        return torch.stack([x, x], dim=-1)[..., 0]

    made, plain = Made(name), Made(name)
    for key, value in made.inputs.items():
        made.inputs[key] = tree(value, strided)
    torch.testing.assert_close(made(), plain())


def tree(value, f):
    if isinstance(value, dict):
        return {key: tree(x, f) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(tree(x, f) for x in value)
    return f(value)


@pytest.mark.parametrize('name', cases_but('no_gradcheck'))
def test_gradcheck(name):
    made = Made(name, n=3, dtype=torch.float64)
    students = made.students
    constants = [x for x in made.teachers]
    for x in constants:
        x.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *_: made(), students, atol=1e-6)


@pytest.mark.parametrize('name', cases_but('not_compiled'))
def test_compiles_without_a_graph_break(name):
    made = Made(name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: made.loss(**x), fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(made.inputs), made(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', CASES)
def test_state_survives(name):
    """state_dict, deepcopy and pickle in the middle of training."""
    made = Made(name)
    opt = torch.optim.SGD([*made.loss.parameters(), *made.students], 0.01)
    made().backward()
    opt.step()
    wanted = made()
    fresh = Made(name).loss
    fresh.load_state_dict(made.loss.state_dict())
    file = io.BytesIO()
    torch.save(made.loss, file)
    file.seek(0)
    for other in (fresh, copy.deepcopy(made.loss), torch.load(file, weights_only=False)):
        assert torch.equal(other(**made.inputs), wanted)


def places(value, path=()):
    """The path of every tensor in an argument."""
    if isinstance(value, dict):
        return [p for key, x in value.items() for p in places(x, (*path, key))]
    if isinstance(value, (list, tuple)):
        return [p for key, x in enumerate(value) for p in places(x, (*path, key))]
    return [path]


def any_size(name) -> set:
    """The arguments of this case that may have another size."""
    return set(EXCEPTIONS[name].get('any_size', {}))


@pytest.mark.parametrize('name', CASES)
def test_wrong_shapes_are_named(name):
    """A tensor of another size anywhere: a ValueError that names an argument and says what it got."""
    for argument in Made(name).inputs:
        for path in places(Made(name).inputs[argument]):
            made = Made(name)
            holder, *keys = (made.inputs, argument, *path)
            for key in keys[:-1]:
                holder = list(holder[key]) if isinstance(holder[key], tuple) else holder[key]
            x = holder[keys[-1]]
            if {argument, f'{argument}.{path[-1] if path else ""}'} & any_size(name):
                continue
            axis = 1 if path[-1:] == ('boxes',) else x.dim() - 1  # more boxes, not more corners
            holder[keys[-1]] = torch.cat([x, x], dim=axis)
            with pytest.raises(ValueError) as caught:
                made()
            said = str(caught.value)
            assert any(key in said for key in made.inputs), said
            assert re.search(r'got .*\d', said) and type(made.loss).__name__ in said, said


@pytest.mark.parametrize('name', CASES)
def test_too_few_teachers_are_named(name):
    made = Made(name)
    lists = [key for key, value in made.inputs.items() if isinstance(value, list) and '_t' in key]
    for key in lists:
        if 'any_length' in EXCEPTIONS[name] or key in any_size(name):
            continue
        made = Made(name)
        made.inputs[key] = made.inputs[key][:-1]
        with pytest.raises(ValueError, match=r'got'):
            made()


def tensor_at(made, argument, path):
    value = made.inputs[argument]
    for key in path:
        value = value[key]
    return value


def spoil(made, argument, path, change):
    """Change one tensor of an argument, in its place."""
    holder, *keys = (made.inputs, argument, *path)
    for key in keys[:-1]:
        holder = holder[key]
    if isinstance(holder[keys[-1]], torch.Tensor):
        value = change(holder[keys[-1]].detach().clone())
        if isinstance(holder, tuple):  # of statistics
            with torch.no_grad():
                holder[keys[-1]].copy_(value)
        else:
            holder[keys[-1]] = value


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
@pytest.mark.parametrize('name', CASES)
def test_what_is_not_finite_shows(name, bad):
    """One bad entry in any argument, on either side: the value itself must tell."""

    for argument in Made(name).inputs:
        for path in places(Made(name).inputs[argument]):
            if not tensor_at(Made(name), argument, path).is_floating_point():
                continue  # labels and edges hold no such number
            for where in (0, 0.5, 1):

                def poison(x, where=where):
                    x.view(-1)[int(where * (x.numel() - 1))] = bad
                    return x

                made = Made(name)
                spoil(made, argument, path, poison)
                value = made()
                assert not torch.isfinite(value), f'{bad} in {argument}{list(path)} gives {value}'


@pytest.mark.parametrize('name', CASES)
def test_teachers_under_inference_mode_give_the_same(name):
    made = Made(name)
    expected = made()
    made.check(expected)
    made = Made(name)
    learnt = {id(x) for x in made.students}

    def frozen(x):  # also labels, masks and edges, which a teacher may have made
        with torch.inference_mode():
            return x if id(x) in learnt else x.clone()

    made.inputs = {key: tree(value, frozen) for key, value in made.inputs.items()}
    value = made()
    assert torch.equal(value, expected)
    made.check(value)


@pytest.mark.parametrize('name', CASES)
def test_float64_teachers(name):
    made = Made(name)
    for key in [key for key in made.inputs if '_t' in key]:
        made.inputs[key] = tree(made.inputs[key], lambda x: x.double() if x.is_floating_point() else x)
    value = made()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, Made(name)())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('name', CASES)
def test_the_loss_in_another_precision(name, dtype):
    """half(), bfloat16() or double() for the loss's own parameters: still computed as the student's are."""
    check_another_precision(Made(name), Made(name), dtype)


def check_another_precision(made, rounded, dtype) -> None:
    made.loss.to(dtype)
    rounded.loss.to(dtype).float()
    value = made()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, rounded(), rtol=1e-5, atol=1e-6)
    made.check(value)


class Rounding(TorchDispatchMode):
    """Matrix products of float32 as TF32 or bf16 make them: with three digits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ('mm', 'bmm', 'addmm', 'baddbmm'):
            args = [
                x.bfloat16().float() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
                for x in args
            ]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', cases_but('layers'))
def test_products_are_exact(name):
    """Whatever precision the user allows float32 products: those that decide a loss keep theirs."""
    made, exact = Made(name), Made(name)
    check_exact_products(made, exact)
    check_same_gradients(made.students, exact.students)


def check_exact_products(made, exact) -> None:
    """The value, and a backward pass of both."""
    expected = exact()
    expected.backward()
    try:
        torch.set_float32_matmul_precision('medium')
        with Rounding():
            value = made()
            value.backward()
    finally:
        torch.set_float32_matmul_precision('highest')
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=2e-5, atol=1e-7)


def check_same_gradients(some: list, others: list) -> None:
    for g, h in zip((x.grad for x in some), (x.grad for x in others), strict=True):
        assert (g is None) == (h is None)
        if h is not None and h.numel():
            torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-4 * float(h.abs().max()) + 1e-9)


@pytest.mark.parametrize('name', cases_but('class_by_class'))
def test_memory_is_linear_in_the_classes(name):
    """Where the text has K classes: no tensor has an entry for every two of them."""
    made = Made(name, K=211)
    with Grown(211, 2) as grown:
        made().backward()
    assert not grown.made


@pytest.mark.parametrize('name', CASES)
def test_other_integers_are_labels_too(name):
    """Of a uint8, -100 and class 156 are one number."""
    for argument in Made(name).inputs:
        for path in places(Made(name).inputs[argument]):
            for dtype in (torch.int32, torch.uint8):
                made, other = Made(name, K=200), Made(name, K=200)
                x = tensor_at(made, argument, path)
                if not isinstance(x, torch.Tensor) or x.is_floating_point() or x.dtype == torch.bool:
                    continue
                if 'K' in CASES[name] and argument.startswith(('target', 'tokens', 'label', 'input')):
                    for m in (made, other):
                        spoil(m, argument, path, lambda x: torch.where(x == 0, 156, x))
                elif dtype == torch.uint8:
                    continue
                if bool((tensor_at(made, argument, path) < 0).any()) and dtype == torch.uint8:
                    for m in (made, other):
                        spoil(m, argument, path, lambda x: x.abs() % 3 + 156)
                spoil(other, argument, path, lambda x, to=dtype: x.to(to))
                assert torch.equal(other(), made()), f'{argument} of {dtype}'


@pytest.mark.parametrize('name', cases_but('no_func_grad'))
def test_functional_gradients(name):
    """torch.func.grad gives what backward gives."""
    made = Made(name)
    learns = made.students
    given = [key for key, x in made.inputs.items() if any(x is y for y in learns)]
    for key in given[:1]:
        fresh = [Made(name), Made(name)]  # a loss may remember what it has seen
        for other in fresh:
            other.loss.eval()  # torch.func forbids running statistics to change

        def f(x, key=key, fresh=fresh):
            seed(0)
            return fresh.pop().loss(**{**made.inputs, key: x})

        plain = made.inputs[key].detach().clone().requires_grad_()
        f(plain).backward()
        torch.testing.assert_close(torch.func.grad(f)(plain.detach()), plain.grad)


@pytest.mark.parametrize('name', cases_but('empty_is_legal'))
def test_an_empty_batch_is_refused(name):
    made = Made(name, n=0)
    with pytest.raises(ValueError, match='leave an empty batch out'):
        made()


@pytest.mark.parametrize('name', CASES)
def test_shape_messages_name_the_remedy(name):
    for argument in Made(name).inputs:
        for path in places(Made(name).inputs[argument]):
            if argument in any_size(name):
                continue
            made = Made(name)
            spoil(made, argument, path, lambda x: x[..., None])
            with pytest.raises(ValueError, match=r'(?s)must .*got .*: \w.*\w'):
                made()


def one_class(value):
    """Logits, or lists of them, of one class instead of several; maps have their classes on axis 1."""
    if isinstance(value, (list, tuple)):
        return [one_class(x) for x in value]
    many = isinstance(value, torch.Tensor) and value.dim() > 1
    return value.narrow(1 if value.dim() == 4 else -1, 0, 1) if many else value


@pytest.mark.parametrize('name', cases_but('one_logit'))
def test_one_logit_is_refused(name):
    """By everything that is given logits; tests/methods may say how, or why not."""
    made = Made(name)
    if hasattr(OWN[name], 'one_logit') and name == file_of(name).split('/')[-1]:
        made.inputs = OWN[name].one_logit(made.inputs)
    elif not any(re.match(r'outs?_|logits', key) for key in made.inputs):
        return
    else:
        made.inputs = {
            key: one_class(x) if re.match(r'outs?_|logits', key) else x for key, x in made.inputs.items()
        }
    with pytest.raises(ValueError, match=r'torch\.cat'):
        made()


# of ids they read only whether they are -100; below 0 they are refused
UNREAD = ('abkd', 'akl', 'distillm_', 'fdistill', 'gkd', 'minillm_reverse', 'taid', 'uld')


@pytest.mark.parametrize('label', [-7, 10**6])
@pytest.mark.parametrize('name', CASES)
def test_illegal_labels_are_named(name, label):
    """Also numbers of nodes, steps and lengths: whatever is an integer."""
    for argument, x in Made(name).inputs.items():
        if isinstance(x, torch.Tensor) and x.dtype == torch.int64:
            made = Made(name)
            made.inputs[argument] = x.clone()
            made.inputs[argument].view(-1)[-1] = label
            if (
                label > 0
                and argument.startswith('target')
                and (name == 'distillm' or name.startswith(UNREAD))
            ):
                assert made().isfinite()
                continue
            with pytest.raises(ValueError, match=rf'must .*got .*{label}'):
                made()


def test_one_logit_is_refused_by_the_constructor_of_subtask():
    from ka_losses import SubTask

    with pytest.raises(ValueError, match='got'):
        SubTask([0], 6)


def test_detr_labels():
    """-100 is left out as F.cross_entropy does it, other strange labels are refused."""
    from ka_losses.transformer_ka import detr_ce

    seed(0)
    logits, labels = torch.randn(2, 3, 4), torch.tensor([[0, 3, -100], [1, -100, 0]])
    weight = torch.tensor([0.1, 1, 1, 1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight)
    torch.testing.assert_close(detr_ce(logits, labels), expected)
    assert detr_ce(logits, torch.full_like(labels, -100)) == 0
    with pytest.raises(ValueError, match='got 255'):
        detr_ce(logits, torch.full_like(labels, 255))


def test_wrong_options_are_named():
    from ka_losses import (
        CFL,
        SBM,
        ConcatKD,
        Customize,
        LayerwiseKA,
        SoftFocal,
        SOKAFeature,
        SubTask,
        TaskAmalgamation,  # fmt: skip
        TokenAmalgamation,
    )
    from ka_losses.recombination import RangeQuantizer, combine_convs
    from ka_losses.transformer_ka import SeqHint

    bad = [
        lambda: ConcatKD(T=0), lambda: ConcatKD(mode='mean'), lambda: ConcatKD(align='left'),
        lambda: LayerwiseKA(4, []), lambda: CFL(4, []), lambda: CFL(4, [4], block='rnn'),
        lambda: Customize([4], [4, 5], [2]), lambda: Customize([4], None, [2, 3]), lambda: SBM(('edges',)),
        lambda: SBM(seg='soft'), lambda: SBM(T=-1), lambda: SBM(weights=[1]), lambda: SOKAFeature(2, (4,)),
        lambda: SubTask([0, 0], 4), lambda: SubTask([0, 4], 4), lambda: SubTask([0, 1], 2),
        lambda: TokenAmalgamation('batch'), lambda: SeqHint(2, 4, 'batch'), lambda: SoftFocal(-1),
        lambda: TaskAmalgamation([[0], [3]], 3), lambda: RangeQuantizer(1),
        lambda: combine_convs([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)]),
        lambda: combine_convs([nn.Conv2d(4, 4, 3, groups=2)] * 2),
    ]  # fmt: skip
    for build in bad:
        with pytest.raises(ValueError, match='got|needs'):
            build()


def test_a_teacher_of_one_class_has_no_choice_to_teach():
    from ka_losses import ConcatKD

    out_s, outs_t = torch.randn(6, 3, requires_grad=True), [torch.randn(6, 1), torch.randn(6, 2)]
    only = ConcatKD(mode='parts')(out_s[:, 1:], outs_t[1:])
    torch.testing.assert_close(ConcatKD(mode='parts')(out_s, outs_t), only)
    assert ConcatKD(mode='parts')(out_s[:, :2], [torch.randn(6, 1)] * 2) == 0


def test_what_the_generator_of_ood_ka_is_told_must_meet():
    from ka_losses.ood_ka import disc_loss

    for key, wrong in {
        'd_fake': torch.randn(3, 1, 2, 2),
        'bn_stats': [(torch.randn(2, 4, 3, 3), torch.zeros(4), torch.ones(4))],
    }.items():
        made = Made('ood_ka')
        with pytest.raises(ValueError, match=key):
            made.loss(**made.inputs | {key: wrong})
    made = Made('ood_ka')
    x, mean, var = made.inputs['bn_stats'][0]
    with pytest.raises(ValueError, match=r'bn_stats\[0\]\[2\]'):
        made.loss(**made.inputs | {'bn_stats': [(x, mean, var[:-1])]})
    with pytest.raises(ValueError, match='d_fake'):
        disc_loss(torch.randn(4, 1, 2, 2), torch.randn(3, 1, 2, 2))


def test_a_teacher_may_exclude_classes():
    """Logits of -inf: such a class adds nothing, anywhere."""
    from ka_losses import ConcatKD, TaskAmalgamation
    from ka_losses.customize import entropies, select_teacher

    seed(0)
    outs = [torch.randn(4, 3) for _ in 'ab']
    sure = [out.clone() for out in outs]
    sure[0][:, 1:] = -torch.inf
    assert (entropies(sure)[:, 0] == 0).all() and (select_teacher(sure) == 0).all()
    out_s = torch.randn(4, 6, requires_grad=True)
    outs[0][:, 2] = -torch.inf
    loss = ConcatKD(align='center')(out_s, outs)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(out_s.grad).all()
    s = {'logits': torch.randn(2, 5, 4, requires_grad=True), 'boxes': torch.rand(2, 5, 4)}
    ts = [{'logits': torch.randn(2, 5, k), 'boxes': torch.rand(2, 5, 4)} for k in (2, 3)]
    ts[0]['logits'][:, :, 0] = -torch.inf
    loss = TaskAmalgamation([[0], [1, 2]], 3)(s, ts)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(s['logits'].grad).all()


def test_joined_channels_of_sequences_are_exact_under_autocast():
    from ka_losses.transformer_ka import SeqAgg

    seed(0)
    loss, s, ts = SeqAgg(2, 8), torch.randn(3, 2, 8), [torch.randn(3, 2, 8) for _ in 'ab']
    with torch.autocast('cpu', torch.bfloat16):
        inside = loss(s, ts)
    assert inside == loss(s, ts)
