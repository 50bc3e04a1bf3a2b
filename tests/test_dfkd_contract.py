"""What holds for every loss of dfkd_losses: numbers, precisions, refusals.

As for other losses, but for this: the gradient of an image source's loss reaches images through the teacher.

The cases are texts of tests/methods/dfkd: m is the loss's module, S(*shape) a tensor that a gradient must
reach, T(*shape) one that none may reach, C(*shape) a constant. They set `loss`, `inputs`, and `call` where it
is not the loss's forward.
"""

import copy
import importlib
import io

import pytest
import torch

from tests import methods
from tests.methods.shared import Grown, seed
from tests.test_ka_contract import (
    AWKWARD,
    check_another_precision,
    check_exact_products,
    check_same_gradients,
    one_class,
    places,
    spoil,
    tensor_at,
    tree,
)

MODULES = {file.removeprefix('dfkd/'): methods.of(file) for file in methods.files('dfkd_losses')}
CASES = {case: text for module in MODULES.values() for case, text in module.cases.items()}
FILE = {case: file for file, module in MODULES.items() for case in module.cases}
EXCEPTIONS = {case: methods.exceptions(f'dfkd/{FILE[case]}', case) for case in CASES}
every_case = pytest.mark.parametrize('name', CASES)


def cases_but(kind: str):
    return pytest.mark.parametrize('name', [name for name in CASES if kind not in EXCEPTIONS[name]])


class Made:
    """A loss with inputs."""

    def __init__(self, name: str, n: int = 6, dtype=torch.float32, change=lambda x: x, K: int = 7) -> None:
        self.name, self.learning, self.teachers = name, [], []
        generator = torch.Generator().manual_seed(7)

        def tensor(shape, into=None):
            x = change(torch.randn(shape, generator=generator)).to(dtype).detach()
            if into is not None:
                into.append(x.requires_grad_())
            return x

        seed(0)
        scope = {
            'm': importlib.import_module(f'dfkd_losses.{FILE[name]}'),
            'n': n,
            'K': K,
            'torch': torch,
            'S': lambda *shape: tensor(shape, self.learning),
            'T': lambda *shape: tensor(shape, self.teachers),
            'C': lambda *shape: tensor(shape),
        }
        exec(CASES[name], scope)
        self.loss, self.inputs = scope['loss'], scope['inputs']
        self.call = scope.get('call', self.loss)
        if dtype == torch.float64:
            self.loss.double()

    def __call__(self):
        return self.call(**self.inputs)

    def check(self, value) -> None:
        """Finite value, finite gradients where they belong, none where they do not."""
        assert value.shape == () and torch.isfinite(value)
        value.backward()
        assert all(x.grad is not None for x in self.learning if x.numel()), 'no gradient reaches an argument'
        assert all(torch.isfinite(x.grad).all() for x in self.learning)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in self.loss.parameters())
        assert all(x.grad is None for x in self.teachers), 'a gradient reaches what is a constant'


@every_case
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['f32', 'f64'])
def test_value_and_gradients(name, dtype):
    made = Made(name, dtype=dtype)
    value = made()
    assert value.dtype == dtype
    made.check(value)


@every_case
def test_batch_of_one(name):
    made = Made(name, n=1)
    made.check(made())


@every_case
@pytest.mark.parametrize('kind', AWKWARD)
def test_awkward_inputs(name, kind):
    made = Made(name, change=AWKWARD[kind])
    made.check(made())


@every_case
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_half_precision_and_autocast(name, dtype):
    """Tensors as autocast leaves them; the loss itself is worked out in float32."""
    wanted = Made(name, change=lambda x: x.to(dtype).float())()
    made = Made(name, dtype=dtype)
    with torch.autocast('cpu', dtype):
        value = made()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=2e-3, atol=2e-3)
    made.check(value)


@every_case
def test_float64_constants(name):
    """What comes from elsewhere in float64, statistics of a teacher say, changes nothing."""
    made = Made(name)
    constants = {id(x) for x in made.teachers}

    def double(x):
        return x.detach().double() if id(x) in constants else x

    made.inputs = {key: tree(value, double) for key, value in made.inputs.items()}
    value = made()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, Made(name)())


@every_case
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_the_loss_in_another_precision(name, dtype):
    """half(), bfloat16() or double() for the loss's own parameters: still computed as the images are."""
    check_another_precision(Made(name), Made(name), dtype)


@every_case
def test_memory_layout_does_not_matter(name):
    made = Made(name)
    made.inputs = {
        key: tree(value, lambda x: torch.stack([x, x], dim=-1)[..., 0]) for key, value in made.inputs.items()
    }
    torch.testing.assert_close(made(), Made(name)())


@cases_but('no_gradcheck')
def test_gradcheck(name):
    made = Made(name, n=3, dtype=torch.float64)
    for x in made.teachers:
        x.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *_: made(), made.learning, atol=1e-6)


@cases_but('not_compiled')
def test_compiles_without_a_graph_break(name):
    made = Made(name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: made.call(**x), fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(made.inputs), made(), rtol=1e-5, atol=1e-6)


@every_case
def test_state_survives(name):
    made = Made(name)
    file = io.BytesIO()
    torch.save(made.loss, file)
    file.seek(0)
    for other in (copy.deepcopy(made.loss), torch.load(file, weights_only=False)):
        call = getattr(other, made.call.__name__) if hasattr(made.call, '__self__') else other
        if made.call is made.loss or hasattr(made.call, '__self__'):
            assert torch.equal(call(**made.inputs), made())


@every_case
def test_wrong_shapes_are_named(name):
    """A tensor of another size anywhere: a ValueError that names an argument, what it got and a remedy."""
    for argument in Made(name).inputs:
        for path in places(Made(name).inputs[argument]):
            for change in (
                lambda x: torch.cat([x, x], dim=-1) if x.dim() else x[None],
                lambda x: x[..., None],
            ):
                made, widened = Made(name), 'cat' in change.__code__.co_names
                if argument in EXCEPTIONS[name].get('any_size' if widened else 'any_rank', {}):
                    continue
                spoil(made, argument, path, change)
                with pytest.raises(ValueError, match=r'(?s)must .*got .*: \w.*\w') as caught:
                    made()
                assert any(key in str(caught.value) for key in made.inputs), caught.value


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
@every_case
def test_what_is_not_finite_shows(name, bad):
    """One bad entry in any argument: the value itself must tell."""
    for argument in Made(name).inputs:
        for path in places(Made(name).inputs[argument]):
            for where in (0, 0.5, 1):

                def poison(x, where=where):
                    if x.is_floating_point():
                        x.view(-1)[int(where * (x.numel() - 1))] = bad
                    return x

                made = Made(name)
                if not all(x.is_floating_point() for x in flat(made.inputs[argument])):
                    continue
                spoil(made, argument, path, poison)
                value = made()
                assert not torch.isfinite(value), f'{bad} in {argument}{list(path)} gives {value}'


def flat(value) -> list:
    return [y for x in value for y in flat(x)] if isinstance(value, list) else [value]


@cases_but('layers')
def test_products_are_exact(name):
    made, exact = Made(name), Made(name)
    check_exact_products(made, exact)
    check_same_gradients(made.learning, exact.learning)


@pytest.mark.parametrize('name', CASES)
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


@pytest.mark.parametrize('name', [name for name in CASES if 'not_compiled' not in EXCEPTIONS[name]])
def test_functional_gradients(name):
    """torch.func.grad gives what backward gives."""
    made = Made(name)
    learns = made.learning
    given = [key for key, x in made.inputs.items() if any(x is y for y in learns)]
    for key in given[:1]:
        fresh = [Made(name), Made(name)]  # a loss may remember what it has seen
        for other in fresh:
            other.loss.eval()  # torch.func forbids running statistics to change

        def f(x, key=key, fresh=fresh):
            seed(0)
            return fresh.pop().call(**{**made.inputs, key: x})

        plain = made.inputs[key].detach().clone().requires_grad_()
        f(plain).backward()
        torch.testing.assert_close(torch.func.grad(f)(plain.detach()), plain.grad)


@every_case
def test_an_empty_batch_is_refused(name):
    made = Made(name, n=0)
    with pytest.raises(ValueError, match='leave an empty batch out|all of one batch'):
        made()


@cases_but('one_logit')
def test_one_logit_is_refused(name):
    made = Made(name)
    if name in MODULES and hasattr(MODULES[name], 'one_logit'):
        made.inputs = MODULES[name].one_logit(made.inputs)
    elif not any(key.startswith('out') for key in made.inputs):
        return
    else:
        made.inputs = {key: one_class(x) if key.startswith('out') else x for key, x in made.inputs.items()}
    with pytest.raises(ValueError, match=r'torch\.cat'):
        made()


@pytest.mark.parametrize('label', [-1, 255])
@every_case
def test_illegal_labels_are_named(name, label):
    for argument, x in Made(name).inputs.items():
        if isinstance(x, torch.Tensor) and x.dtype == torch.int64:
            made = Made(name)
            made.inputs[argument] = x.clone()
            made.inputs[argument][-1] = label
            with pytest.raises(ValueError, match=f'must be in .* got {label}'):
                made()


@every_case
def test_constants_under_inference_mode_give_the_same(name):
    """What no gradient goes through: a frozen teacher's part, labels."""
    made = Made(name)
    learnt = {id(x) for x in made.learning}

    def frozen(x):
        with torch.inference_mode():
            return x if id(x) in learnt else x.detach().clone()

    made.inputs = {key: tree(value, frozen) for key, value in made.inputs.items()}
    value = made()
    assert torch.equal(value, Made(name)())
    made.check(value)


@pytest.mark.parametrize('name', ['deepinversion', 'kegnet'])
def test_rows_without_a_label_are_left_out(name):
    """-100 for two images is the value of the others."""
    made, fewer = Made(name), Made(name)
    label = 'target' if name == 'deepinversion' else 'label'
    made.inputs[label] = made.inputs[label].clone().index_fill_(0, torch.tensor([1, 4]), -100)
    kept = torch.tensor([0, 2, 3, 5])
    fewer.inputs = {key: x[kept] if x.dim() and key != 'x' else x for key, x in fewer.inputs.items()}
    if name == 'deepinversion':  # images have no labels: theirs stay
        a, x = made.loss.terms(**made.inputs), fewer.inputs
        b = fewer.loss.terms(x['x'][kept], x['out_t'], x['target'], x['bn_loss'], x['out_s'])
        for term in ('ce', 'compete'):
            torch.testing.assert_close(a[term], b[term])
    else:
        torch.testing.assert_close(made(), fewer())
    made.inputs[label] = torch.full_like(made.inputs[label], 99)
    with pytest.raises(ValueError, match='must be in'):
        made()


def test_wrong_options_are_named():
    from dfkd_losses import CMI, DeepInversion, KegNet, MomentumBNStatistics

    plain, tracked = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)
    bad = [
        lambda: DeepInversion(T=0), lambda: CMI(4, T=0), lambda: KegNet(metric='l3'),
        lambda: MomentumBNStatistics(tracked, 1.0), lambda: MomentumBNStatistics(plain),
        lambda: MomentumBNStatistics(tracked).loss(), lambda: MomentumBNStatistics(tracked).update(),
    ]  # fmt: skip
    for build in bad:
        with pytest.raises(ValueError, match='got'):
            build()
