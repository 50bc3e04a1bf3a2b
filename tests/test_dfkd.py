"""Data-free distillation: generators, image sources, the trainer."""

import copy
import importlib
import inspect
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dataset
import models
from dataset.cifar import read_cifar
from dfkd_losses import CMI, DFAD, DFQ, ZSKT, BatchNormDistance, BNStatistics, Embedding, MemoryBank
from dfkd_losses.deepinversion import js_divergence
from engine.dfkd_build import Run
from engine.dfkd_kinds import SOURCES
from engine.dfkd_source import Setting
from engine.record import fingerprint
from methods.dfkd import DFKD, Recipe
from models import Feats
from models.generators import (
    Decoder,
    LabelGenerator,
    PatchDiscriminator,
    TransposedGenerator,
    UpsamplingGenerator,
    crop_and_flip,
    resized_crop_and_flip,
)
from report.dfkd import table
from tests import methods
from tests.test_resume import Killed, killed_after
from tests.test_train import rows, same, weights

LARGE = (256, 128, 64)
COUNTS = [
    (UpsamplingGenerator(1000), 8_423_939), (UpsamplingGenerator(256), 2_329_091),
    (UpsamplingGenerator(256, end='pixels'), 2_328_899),
    (UpsamplingGenerator(256, 32, LARGE, 'pixels'), 4_581_955),
    (UpsamplingGenerator(100, 32, LARGE, 'pixels'), 2_026_051),
    (PatchDiscriminator(), 531_328), (LabelGenerator(), 187_880), (Decoder(), 414_490),
]  # fmt: skip


# ------------------------------------------------------------------------------------------- networks, data


@pytest.mark.parametrize('net,count', COUNTS)
def test_parameter_counts(net, count):
    assert sum(p.numel() for p in net.parameters()) == count


def test_generators_make_images():
    for net, size in ((UpsamplingGenerator(8, 16, (8, 8, 4)), 16), (TransposedGenerator(8, 64, 4), 64)):
        x = net(torch.randn(6, 8))
        assert x.shape == (6, 3, size, size) and not net.pixels
        torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    x = UpsamplingGenerator(8, 16, (8, 8, 4), 'pixels')(torch.randn(6, 8))
    assert 0 <= x.min() and x.max() <= 1
    for size in (8, 16, 32):
        x = LabelGenerator(5, 7, size)(torch.randn(4, 5), torch.eye(7)[:4])
        assert x.shape == (4, 3, size, size)
        torch.testing.assert_close(x.std(dim=(2, 3)), torch.ones(4, 3))
    assert PatchDiscriminator(4)(torch.randn(2, 3, 32, 32)).shape == (2, 1, 8, 8)
    for bad in (
        lambda: UpsamplingGenerator(8, 30),
        lambda: LabelGenerator(size=64),
        lambda: TransposedGenerator(size=40),
    ):
        with pytest.raises(ValueError, match='size must be'):
            bad()


def test_views_that_a_gradient_passes_through():
    x = torch.rand(5, 3, 8, 6, dtype=torch.float64, requires_grad=True)
    y = crop_and_flip(x, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    dy, dx = torch.randint(3, (2, 5, 1), generator=generator)
    flip = torch.randint(2, (5, 1), generator=generator).bool()
    padded = F.pad(x, (1, 1, 1, 1))
    for n in range(5):
        crop = padded[n, :, dy[n] : dy[n] + 8, dx[n] : dx[n] + 6]
        assert torch.equal(y[n], crop.flip(2) if flip[n] else crop)
    y.sum().backward()
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}
    x = torch.rand(5, 3, 16, 16, requires_grad=True)
    y = resized_crop_and_flip(x, torch.Generator().manual_seed(1))
    assert y.shape == x.shape and x.min() <= y.min() and y.max() <= x.max()
    whole = resized_crop_and_flip(torch.ones(5, 3, 16, 16), torch.Generator().manual_seed(1))
    torch.testing.assert_close(whole, torch.ones(5, 3, 16, 16))  # no crop looks beyond the image


def only_seed_1(real):
    """Embedded data that renders its test half only."""

    def call(*args, seed):
        assert seed == 1, 'training images are asked for'
        return real(*args, seed=seed)

    return call


def test_the_test_half_alone(tmp_path, monkeypatch):
    """It is the same as beside the training half, and needs nothing of that."""
    for name, function in (('shapes:60', 'cached_shapes'), ('patterns:60', 'patterns')):
        module = importlib.import_module(f'dataset.{name.partition(":")[0]}')
        both, real = dataset.load(name, tmp_path)[1], getattr(module, function)
        monkeypatch.setattr(module, function, only_seed_1(real))
        alone = dataset.load_test(name, tmp_path)
        assert torch.equal(alone.images, both.images) and torch.equal(alone.targets, both.targets)
        with pytest.raises(AssertionError):
            dataset.load(name, tmp_path)
        monkeypatch.undo()
    folder = tmp_path / 'cifar-100-binary'
    folder.mkdir()
    records = np.random.default_rng(0).integers(0, 100, (10000, 3074), dtype=np.uint8)
    records.tofile(folder / 'test.bin')
    with pytest.raises(ValueError, match='train.bin: missing'):
        read_cifar('cifar100', tmp_path)
    test = dataset.load_test('cifar100', tmp_path)
    assert len(test) == 10000 and torch.equal(test.targets, torch.from_numpy(records[:, 1]).long())
    with pytest.raises(ValueError, match='no cifar10 test set'):
        dataset.load_test('cifar10', tmp_path)


def test_pictures_of_another_domain(tmp_path):
    assert dataset.pictures('scenes:10', tmp_path, 16).shape == (10, 16, 16, 3)
    assert dataset.pictures('patterns:20', tmp_path, 16).shape == (20, 16, 16, 3)
    with pytest.raises(ValueError, match='16 pixels a side, wanted 32'):
        dataset.pictures('patterns:20', tmp_path, 32)


# --------------------------------------------------------------------------------------------------- losses


def test_variants_against_their_formulas():
    torch.manual_seed(0)
    out_s, out_t = torch.randn(6, 5).double(), torch.randn(6, 5).double()
    fms_s, fms_t = [torch.randn(6, 3, 4, 4).double()], [torch.randn(6, 2, 4, 4).double()]
    kl = F.kl_div(F.log_softmax(out_s, 1), F.softmax(out_t, 1), reduction='none')
    attention = [F.normalize(fm[0].pow(2).mean(1).flatten(1)) for fm in (fms_s, fms_t)]
    wanted = kl.mean() + 250 * (attention[0] - attention[1]).pow(2).mean()
    torch.testing.assert_close(ZSKT()(out_s, out_t, fms_s, fms_t), wanted)
    torch.testing.assert_close(ZSKT().generator_loss(out_s, out_t), -kl.mean())
    p = F.softmax(out_t, 1).mean(0)
    bn = torch.tensor(3.0).double()
    wanted = 2 * bn + F.cross_entropy(out_t, out_t.argmax(1)) + 20 * (p * p.log()).sum() - kl.sum() / 6
    torch.testing.assert_close(DFQ(bn=2)(out_s, out_t, bn), wanted)
    p, q = F.softmax(out_s, 1), F.softmax(out_t, 1)
    m = (p + q) / 2
    js = ((p * (p / m).log() + q * (q / m).log()) / 2).sum() / 6
    torch.testing.assert_close(js_divergence(out_s, out_t, 1.0, exact=True), js, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('hook', [BatchNormDistance, BNStatistics, Embedding])
def test_hooks_on_batch_norms(hook):
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().requires_grad_(False)
    net[0].running_mean.normal_()
    before, x = copy.deepcopy(net.state_dict()), torch.randn(5, 3, 6, 6, requires_grad=True)
    seen = hook(net)
    net(x)
    inputs = [x, net[1](net[0](x))]
    norms = [net[0], net[2]]
    wanted = sum(
        (m.running_mean - a.mean((0, 2, 3))).norm()
        + (m.running_var - a.var((0, 2, 3), unbiased=False)).norm()
        for m, a in zip(norms, inputs)
    )
    net(x)
    if hook is Embedding:
        torch.testing.assert_close(seen.instances(), torch.cat([a.mean((2, 3)) for a in inputs], 1))
        assert seen.dim == 7
    value = seen.loss()
    torch.testing.assert_close(value, wanted)
    value.backward()
    assert x.grad.norm() > 0 and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    seen.remove()
    net(x)
    with pytest.raises(
        ValueError, match='needs a forward pass of the teacher, got 0 of 2 .*: call the teacher'
    ):
        seen.loss()
    for bad in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)):
        with pytest.raises(ValueError, match='running statistics'):
            hook(bad)


HOOKS = [
    cls
    for file in methods.files('dfkd_losses')
    for cls in vars(importlib.import_module(f'dfkd_losses.{file.split("/")[-1]}')).values()
    if inspect.isclass(cls) and hasattr(cls, '_see')
]


class Halves(nn.Module):
    """A teacher of which some is checkpointed, in the way that runs it without a graph."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.a = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        x = checkpoint(self.a, x, use_reentrant=True) if self.whole else self.a(x)
        return checkpoint(self.b, x, use_reentrant=True)


@pytest.mark.parametrize('hook', HOOKS)
def test_statistics_without_a_gradient_are_refused(hook):
    for whole in (True, False):
        net, x = Halves(whole).eval(), torch.randn(4, 3, 9, 9, requires_grad=True)
        seen = hook(net)
        net(x)
        with pytest.raises(ValueError, match='use_reentrant=False'):
            seen.loss()
        with torch.no_grad():  # nothing is learnt
            assert seen.loss() > 0


@pytest.mark.parametrize('hook', HOOKS)
def test_a_teacher_that_is_listened_to_is_copied_and_pickled(hook):
    """Also after a pass whose maps nobody asked for; a copy of both hears the copy."""
    net, x = Halves(True).eval(), torch.randn(4, 3, 9, 9, requires_grad=True)
    seen = hook(net)
    net.b(net.a(x))
    for other in (copy.deepcopy((net, seen)), pickle.loads(pickle.dumps((net, seen)))):
        twin, heard = other
        with pytest.raises(ValueError, match='got 0 of 2'):
            heard.loss()
        with torch.no_grad():
            twin.b(twin.a(x))
            net.b(net.a(x))
            torch.testing.assert_close(heard.loss(), seen.loss())
            assert all(m in set(twin.modules()) for m in heard.norms)
        net.b(net.a(x))


def test_memory_bank_is_a_ring():
    bank = MemoryBank(5, 2)
    assert bank.draw(3).shape == (0, 2)
    for first in (0, 3, 6):
        bank.add(torch.arange(first, first + 3.0)[:, None].expand(-1, 2))
    assert sorted(bank.rows[:, 0].tolist()) == [4, 5, 6, 7, 8]
    other = MemoryBank(5, 2)
    other.load_state_dict(bank.state_dict())
    for b in (bank, other):
        b.add(torch.tensor([[9.0, 9.0]]))
    assert torch.equal(bank.rows, other.rows) and 4 not in bank.rows
    drawn = bank.draw(4, torch.Generator().manual_seed(0))
    assert len(drawn[:, 0].unique()) == 4
    assert CMI(1, 4)(torch.randn(3, 1), torch.randn(3, 1), bank.draw(2)).isfinite()
    with pytest.raises(ValueError, match='rows must be'):
        bank.add(torch.zeros(2, 3))


# -------------------------------------------------------------------------------------------------- sources


class Small(nn.Module):
    """A network for 8x8 images, with batch norm or without."""

    def __init__(self, width=4, num_classes=5, norm=True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.bn1, self.bn2 = (nn.BatchNorm2d(width) if norm else nn.Identity() for _ in range(2))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x, feats=False):
        a = self.bn1(self.conv1(x))
        b = self.bn2(self.conv2(a.relu()))
        feat = b.relu().mean(dim=(2, 3))
        out = self.fc(feat)
        return Feats(out, feat, [a.relu(), b.relu()], [a, b]) if feats else out


def source_of(name, **changes):
    """The image source of a row at the smallest size, with its networks."""
    row, options = DFKD[name], changes.pop('options', {})
    recipe = row.recipe.__dict__ | {'nz': 6, 'width': 4, 'batch_size': 8, 'synth_batch_size': 8} | changes
    recipe, options = Recipe(**recipe), row.options | options
    torch.manual_seed(0)
    setting = Setting(torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25), 8, 5, torch.device('cpu'),
                      lambda: torch.autocast('cpu', enabled=False))  # fmt: skip
    net_t, net_s = Small(6).eval().requires_grad_(False), Small(4)
    kd = row.build(row.loss, SimpleNamespace(net_t=net_t), row.weights, options)
    source = SOURCES[row.images.kind](name, row, recipe, row.weights, options, kd, net_t, net_s, setting)
    source.begin_epoch(1, 0)
    return source


def test_one_meta_step_is_the_plain_gradient():
    """FOMAML with one inner step: the generator's gradient is that of its own weights."""
    meta, plain = (source_of('fastdfkd', g_steps=1, options={'meta': kind}) for kind in ('fomaml', 'none'))
    before = [p.detach().clone() for p in meta.generator.parameters()]
    for source in (meta, plain):
        source.synthesize()
    for p, q, old in zip(meta.generator.parameters(), plain.generator.parameters(), before):
        torch.testing.assert_close(p.grad, q.grad)  # `plain` has made its step with this gradient
        torch.testing.assert_close(p, q)  # Adam at the same rate, lr_g * 1
        assert not torch.equal(p, old)


def test_meta_none_is_adam_on_the_generator():
    source, again = (source_of('fastdfkd', g_steps=3, options={'meta': 'none'}) for _ in range(2))
    source.synthesize()
    again.calls += 1
    target = torch.randint(5, (8,), generator=again.rng).sort().values
    z = again.noise(8).requires_grad_()
    groups = [{'params': again.generator.parameters()}, {'params': [z], 'lr': again.recipe.lr_z}]
    opt = torch.optim.Adam(groups, again.recipe.lr_g, again.recipe.betas)
    for _ in range(3):
        out = again.net_t((crop_and_flip(again.generator(z), again.rng) - 0.5) / 0.25)
        loss = 10 * again.kd.loss() + 0.4 * F.cross_entropy(out, target)  # the student rests: warm-up
        opt.zero_grad()
        loss.backward()
        opt.step()
    for p, q in zip(source.generator.parameters(), again.generator.parameters()):
        torch.testing.assert_close(p, q)


def test_reptile_and_the_new_first_layer():
    source = source_of('fastdfkd', g_steps=2, options={'meta': 'reptile'})
    old = source.generator.linear.weight.detach().clone()
    source.synthesize()
    assert not torch.equal(source.generator.linear.weight, old)
    source.calls = source.recipe.warmup + 119
    source.synthesize()
    assert source.generator.linear.weight.std() < 0.05 and source.generator.body[0].weight.abs().max() < 0.2


def test_the_two_players_of_dfad():
    """At small rates the generator raises the difference on its noise, the student lowers it."""
    source = source_of('dfad', lr_g=1e-4)
    z = torch.randn(8, 6)

    def difference():
        with torch.no_grad():
            x = source.generator(z)
            return float(DFAD()(source.net_s(x), source.net_t(x)))

    source.noise = lambda n: z
    before = difference()
    source.synthesize()
    assert difference() > before
    before, opt = difference(), torch.optim.SGD(source.net_s.parameters(), 1e-3)
    x = source.sample()
    DFAD()(source.net_s(x), source.net_t(x)).backward()
    opt.step()
    assert difference() < before


@pytest.mark.parametrize('name', ['deepinv', 'cmi', 'fastdfkd'])
def test_a_pool_keeps_the_best_images(name):
    source = source_of(name, g_steps=3, pool_max=20)
    seen = []
    real = source.loss

    def loss(made):
        value, terms = real(made)
        seen.append((float(value.detach()), made.images.detach().clone()))
        return value, terms

    source.loss = loss
    for calls in (1, 2, 3):
        source.synthesize()
        assert len(source.pool) == min(8 * calls, 20)
    best = min(seen[-3:], key=lambda pair: pair[0])[1]
    best = source.setting.pixels(best) if source.generator is None else best
    assert torch.equal(source.pool.images[-8:], (255 * best).byte().permute(0, 2, 3, 1))
    drawn = torch.cat([source.sample() for _ in range(3)])  # a pass: 8, 8, 4
    assert drawn.shape == (20, 3, 8, 8) and not source.net_t.training and source.net_s.training


def test_a_changed_teacher_is_noticed():
    net = Small().requires_grad_(False)
    run = SimpleNamespace(name='x', net_t=net, untouched=fingerprint(net))
    Run.check_teacher(run)
    net.bn1.running_mean += 1e-6
    with pytest.raises(RuntimeError, match='has changed its teacher'):
        Run.check_teacher(run)


# -------------------------------------------------------------------------------------------------- trainer

SMALL = ('--data_name', 'patterns:40', '--s_name', 'resnet8', '--t_name', 'resnet8')
FEW = ('--epochs', 3, '--ep_steps', 4, '--kd_steps', 2, '--g_steps', 2, '--batch_size', 8,
       '--synth_batch_size', 8, '--width', 4, '--nz', 6, '--warmup', 1)  # fmt: skip
OOD = ('--ood_name', 'scenes:40')
MAKING = [name for name in DFKD if name != 'kd_pool']
CHEAP = ('--kd_args', 'kegnet.n_gen=2', 'kegnet.n_set=12', 'cmi.head_dim=8')


@pytest.fixture
def random_teacher(tmp_path):
    torch.manual_seed(0)
    torch.save(models.build('resnet8', 10).state_dict(), tmp_path / 'teacher.pt')
    return tmp_path / 'teacher.pt'


@pytest.fixture
def dfkd(script, random_teacher):
    return lambda *words: script('train_dfkd', *SMALL, '--t_model', random_teacher, '--kd_mode', *words)


def test_every_method_runs_without_a_training_image(script, tmp_path, monkeypatch):
    """Also with a random teacher, and what is written says what was measured."""
    monkeypatch.setattr(dataset, 'load', lambda *_: pytest.fail('the training half was asked for'))
    module = importlib.import_module('dataset.patterns')
    monkeypatch.setattr(module, 'patterns', only_seed_1(module.patterns))
    done = script('train_dfkd', *SMALL, *OOD, '--kd_mode', *MAKING, '--dry_run', '--width', 4, '--log_images',
                  '--note', 'x', *CHEAP)  # fmt: skip
    assert done.code == 0, done.err
    for name in MAKING:
        folder = tmp_path / 'x-dry' / name
        result = json.loads((folder / 'results.json').read_text())
        assert 0 <= result['last']['agreement'] <= 100 and result['method'] == name, name
        assert (folder / 'images' / 'epoch0001.png').stat().st_size > 1000
        row = rows(folder)[-1]
        assert float(row['kd']) >= 0 and float(row['confidence']) >= 0.1
        assert sum(map(int, row['classes'].split('/'))) > 0
    assert not (tmp_path / 'x').exists(), 'that of the real run stays free'
    state = weights(tmp_path / 'x-dry' / 'dafl')['source']
    fresh = UpsamplingGenerator(1000, 16, (8, 8, 4), bn_eps=0.8).state_dict()
    assert {k: v.shape for k, v in state['generator'].items()} == {k: v.shape for k, v in fresh.items()}


def test_killed_and_resumed(dfkd, tmp_path, monkeypatch):
    """Generator, pool, bank, momenta, decoders, discriminator: all goes on as if nothing had happened."""
    words = (*MAKING, *FEW, *OOD, *CHEAP)
    done = dfkd(*words, '--note', 'whole')
    assert done.code == 0, done.err
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(2, patch)
        dfkd(*words, '--note', 'cut')
    done = dfkd(*words, '--note', 'cut', '--resume', 'auto')
    assert done.code == 0, done.err
    alone = dfkd('cmi', *FEW, '--kd_args', 'head_dim=8', '--note', 'alone')
    assert alone.code == 0, alone.err
    pairs = [(tmp_path / 'whole' / name, tmp_path / 'cut' / name) for name in MAKING]
    for a, b in (*pairs, (tmp_path / 'whole' / 'cmi', tmp_path / 'alone' / 'cmi')):
        x, y = (flat(weights(folder)) for folder in (a, b))
        assert same(x, y) and rows(a) == rows(b), f'{a} {b}'
    done = dfkd('dafl', *FEW, '--note', 'cut', '--resume', 'auto', '--oh', '1')
    assert done.code == 2 and 'weights was' in done.err


def flat(state) -> dict:
    """What a checkpoint holds, by path, without where it comes from."""

    def walk(value, path):
        if isinstance(value, dict):
            for key, x in value.items():
                yield from walk(x, (*path, str(key)))
        elif isinstance(value, (list, tuple)):
            for key, x in enumerate(value):
                yield from walk(x, (*path, str(key)))
        elif not isinstance(value, (str, type(None))):
            yield '.'.join(path), value

    return dict(walk({part: state[part] for part in ('net', 'opt', 'source')}, ()))


def test_a_pool_is_kept_and_used(dfkd, tmp_path):
    pool = tmp_path / 'pool.pt'
    words = ('--epochs', 1, '--ep_steps', 2, '--kd_steps', 2, '--batch_size', 8)
    done = dfkd('fastdfkd', *words, '--g_steps', 1, '--warmup', 0, '--width', 4, '--pool_save', pool)
    assert done.code == 0, done.err
    images = torch.load(pool, weights_only=True)['pool']
    assert images.shape == (8, 16, 16, 3) and images.dtype == torch.uint8
    done = dfkd('kd_pool', *words, '--pool_init', pool, '--note', 'p')
    assert done.code == 0, done.err
    assert rows(tmp_path / 'p' / 'kd_pool')[-1]['pool'] == '8'
    done = dfkd('kd_pool', *words, '--pool_init', pool, '--pool_max', 3, '--note', 'q')
    assert done.code == 0, done.err
    assert rows(tmp_path / 'q' / 'kd_pool')[-1]['pool'] == '3', 'of a given pool, too'
    last = torch.load(tmp_path / 'q' / 'kd_pool' / 'last.pt', weights_only=True)
    assert torch.equal(last['source']['pool'], images[-3:]), 'the newest'
    assert dfkd('kd_pool', *words, '--pool_init', tmp_path / 'teacher.pt').code == 2


def test_a_teacher_without_batch_norm(script, monkeypatch):
    monkeypatch.setitem(models.MODELS, 'plain', lambda num_classes: Small(4, num_classes, norm=False))
    words = (
        '--data_name',
        'patterns:40',
        '--t_name',
        'plain',
        '--s_name',
        'resnet8',
        '--dry_run',
    )
    for name, row in DFKD.items():
        if row.needs.statistics:
            done = script('train_dfkd', '--kd_mode', name, *words, '--note', name)
            assert done.code == 2 and 'running statistics' in done.err and done.err.count('\n') == 1, name
    done = script('train_dfkd', '--kd_mode', 'dfad', *words, '--width', 4, '--note', 'dfad')
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    'words,said',
    [
        (['dafi'], "no method is called 'dafi'"),
        (['dafl', 'dafl'], 'named twice'),
        (['mosaickd'], '--ood_name: mosaickd needs it'),
        (['kd_pool'], '--pool_init: kd_pool needs it'),
        (['dafl', '--pool_init', 'x'], '--pool_init: dafl would not read it'),
        (['dafl', 'cmi', '--ood_name', 'scenes:20'], '--ood_name: dafl cmi would not read it'),
        (['dafl', '--g_steps', '0'], '--g_steps 0: dafl has no image then'),
        (['cmi', '--g_steps', '0'], '--g_steps 0: cmi has no image then'),
        (['dafl', '--cr', '1'], '--cr: is a weight of cmi, not of dafl'),
        (['dafl', '--kd_args', 'bn=1'], "dafl has no 'bn'; it has bn_eps"),
        (['cmi', '--kd_args', 'cr_T=cold'], 'wrong type'),
        (['cmi', 'dafl', '--kd_args', 'cr_T=1'], 'say METHOD.cr_T=VALUE'),
        (['cmi', '--kd_args', 'dafl.bn_eps=1'], "'dafl' is not among"),
        (['fastdfkd', '--epochs', '20'], '20 of warm-up'),
        (['dfad', '--ep_steps', '3'], '5 --kd_steps a round'),
        (['dfad', '--ep_steps', '12'], '--ep_steps 12: dfad has 5 --kd_steps a round: take a multiple'),
        (['cmi', '--sched', 'steps'], '--sched steps: cmi has no milestones of its own'),
        (['dafl', '--synth_batch_size', '8'], 'student of dafl learns from the batch that the generator'),
        (['zskt', '--synth_batch_size', '8', '--batch_size', '9'], '--batch_size is 9: take the same number'),
        (['dafl', '--amp', 'fp16'], 'use bf16'),
        (['dafl', '--new_head'], '--new_head: goes with --s_init'),
        (['dafl', 'dfad', '--pool_save', 'x'], 'a file is for one method'),
        (['mosaickd', '--ood_name', 'scenes:10'], 'has 10 images only'),
        (['cmi', '--kd_args', 'cr_T=-1.0', '--width', '4'], 'T must be > 0, got -1.0'),
    ],
)
def test_mistakes_are_one_line(dfkd, words, said):
    done = dfkd(*words)
    assert done.code == 2 and said in done.err and done.err.count('\n') == 1, done.err


def test_no_teacher_and_several_processes(script, dfkd, monkeypatch):
    done = script('train_dfkd', *SMALL, '--kd_mode', 'dafl')
    assert done.code == 2 and '--t_name and --t_model are needed' in done.err
    monkeypatch.setenv('WORLD_SIZE', '2')
    for name in DFKD:
        done = dfkd(name, *OOD, '--pool_init', 'x')
        assert done.code == 2 and f'{name} runs in one process only: every process would' in done.err


def test_networks_that_zskt_cannot_compare(script, random_teacher):
    words = (
        '--data_name',
        'shapes:40',
        '--t_name',
        'resnet8',
        '--t_model',
        random_teacher,
        '--s_name',
        'vgg8',
    )
    done = script('train_dfkd', '--kd_mode', 'zskt', *words, '--dry_run', '--width', 4)
    assert done.code == 2 and 'as many stages' in done.err and done.err.count('\n') == 1, done.err


def test_a_source_without_any_weight(dfkd):
    done = dfkd('dfad', '--adv', 0, '--dry_run')
    assert done.code == 2 and 'nothing is left' in done.err and done.err.count('\n') == 1, done.err


@pytest.mark.parametrize(
    'words,unread',
    [
        ('dfad zskt', '--T 2'),
        ('deepinv', '--nz 8'),
        ('deepinv kegnet', '--width 8'),
        ('kegnet', '--sched_g student'),
        *(
            ('kd_pool --pool_init x', flag)
            for flag in ('--lr_g 1', '--synth_batch_size 8', '--sched_g student')
        ),
    ],
)
def test_flags_that_nothing_reads(dfkd, words, unread):
    done = dfkd(*words.split(), *unread.split())
    said = f'{unread.split()[0]}: {words.split(" --")[0]} would not read it'
    assert done.code == 2 and said in done.err and done.err.count('\n') == 1, done.err


def test_updates_of_a_run_are_those_of_whole_rounds():
    """Of runs before unlike numbers were refused: 12 steps in rounds of 5 were 10 updates an epoch."""
    recipe = {'epochs': 4, 'warmup': 1, 'ep_steps': 12, 'kd_steps': 5, 'g_steps': 2}
    run = {'script': 'train_dfkd', 'data': 'd', 'teacher': 't', 'student': 's', 'method': 'cmi', 'seed': 1}
    run |= {'teacher_top1': 90.0, 'last': {'agreement': 1.0, 'top1': 1.0}, 'best': {'top1': 1.0}}
    text = table([run | {'recipe': recipe, 'seconds': 3600, 'hours_synth': 0.5}])
    assert '| `cmi` | 1.0 | 1.0 | 1.0 | 30 | 16 | 50 % | 1 |' in text
