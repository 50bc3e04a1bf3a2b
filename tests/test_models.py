"""The networks against the originals: layouts, sizes, logits and every feature, and the checkpoint loader."""

import copy
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models import VisionTransformer

import models
from models.checkpoint import load_weights, read_checkpoint
from models.hooks import Tap, last_axis, tap_torchvision, tokens
from models.segmentation import DeepLabV3Plus, LinkNet, SegNet

GOLDEN = Path(os.environ.get('GOLDEN_DIR') or Path(__file__).parent / 'golden') / 'models'
if not GOLDEN.is_dir():  # a folder with losses only
    GOLDEN = Path(__file__).parent / 'golden' / 'models'


def ours(stem: str) -> str | None:
    """The name here of a golden file's network; None: KamalEngine's, for segmentation."""
    source, name = stem.split('_', 1)
    if source == 'kamalengine':
        return None
    if source == 'mdistiller-tinyimagenet':
        return f'{name}Tiny'
    if source == 'mdistiller-imagenet' and name.startswith('ResNet'):
        return f'torchvision:{name.lower()}'
    return name.removesuffix('_c100').removesuffix('_c10')


FILES = sorted(p.stem for p in GOLDEN.glob('*.npz') if ours(p.stem))


def rule(k: int, n: int) -> np.ndarray:
    """The filling rule of the golden files: n pseudo-random numbers in (-1, 1) for the k-th tensor."""
    P, a, b, c, d = 1000003, 48271, 7919, 104729, 12345
    i = np.arange(n, dtype=np.int64) % P
    h = (a * (i * i % P) + ((b * (k + 1)) % P) * i + c * (k + 1) + d) % P
    return 2 * (h + 0.5) / P - 1


def filled(layout: dict[str, list[int]], gain: float) -> dict[str, torch.Tensor]:
    state = {}
    for k, key in enumerate(sorted(layout)):
        shape = layout[key]
        v = rule(k, int(np.prod(shape))).reshape(shape)
        if key.endswith('num_batches_tracked'):
            v = np.zeros((), np.int64)
        elif key.endswith('running_mean') or key.endswith('bias'):
            v = 0.2 * v
        elif key.endswith('running_var'):
            v = 1 + 0.5 * (v + 1) / 2
        elif len(shape) == 1:
            v = 0.75 + 0.5 * (v + 1) / 2
        else:
            v = v * np.sqrt(3 * gain / (v.size / shape[0]))
        state[key] = torch.from_numpy(np.asarray(v))
    return state


def test_the_filling_rule():
    h = (rule(0, 2) + 1) / 2 * 1000003 - 0.5
    np.testing.assert_allclose(h, [117074, 173264], atol=1e-6)


def close(got: torch.Tensor, wanted, scale: float, what: str) -> None:
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=0, atol=1e-10 * scale, err_msg=what)


SEGMENTATION = {
    'kamalengine_segnet_vgg16_bn': SegNet,
    'kamalengine_linknet_resnet18': LinkNet,
    'kamalengine_deeplabv3plus_resnet50': DeepLabV3Plus,
}


def load(stem):
    """Layout, expectations, weights by the rule, and the input by the rule."""
    layout = json.loads((GOLDEN / f'{stem}.json').read_text())
    with np.load(GOLDEN / f'{stem}.npz') as file:
        z = {key: file[key] for key in file.files}
    n, c, h, w = (int(i) for i in z['hp_input'])
    grid = np.meshgrid(np.arange(n), np.arange(c), np.arange(h), np.arange(w), indexing='ij')
    wave = np.sin(0.3 * (grid[0] + 1) * grid[2] + 0.2 * (grid[1] + 1) * grid[3] + grid[0])
    x = torch.from_numpy(0.5 * rule(9999, n * c * h * w).reshape(n, c, h, w) + wave)
    return layout, z, filled(layout, float(z['hp_gain'])), x


def check_statistics(z, group: str, i: int, fm) -> None:
    flat = fm.flatten()
    scale = max(float(z[f'{group}_std'][i]), 1e-12)
    probe = (flat * ((torch.arange(len(flat)) % 101) - 50)).mean()
    sample = flat[[m * len(flat) // 8 for m in range(8)]]
    assert tuple(fm.shape) == tuple(s for s in z[f'{group}_shape'][i] if s), f'{group}[{i}]'
    close(flat.mean(), z[f'{group}_mean'][i], scale, f'{group}[{i}] mean')
    close(flat.std(unbiased=False), z[f'{group}_std'][i], scale, f'{group}[{i}] std')
    close(flat.min(), z[f'{group}_min'][i], scale, f'{group}[{i}] min')
    close(probe, z[f'{group}_probe'][i], 100 * scale, f'{group}[{i}] probe')
    close(sample, z[f'{group}_sample'][i], scale, f'{group}[{i}] sample')


@pytest.mark.parametrize('stem', [stem for stem in SEGMENTATION if (GOLDEN / f'{stem}.npz').exists()])
def test_segmentation_network_equals_the_original(stem):
    layout, z, state, x = load(stem)
    net = SEGMENTATION[stem](int(z['hp_num_classes'])).double().eval()
    net.load_state_dict(state)
    with torch.no_grad():
        out, maps = net(x, True)
        assert torch.equal(net(x), out)
    close(out[:, :, ::4, ::4], z['logits_s4'], z['logits_s4'].std(), 'logits')
    check_statistics(z, 'out', 0, out)
    assert len(maps) == len(z['feats_mean'])
    for i, fm in enumerate(maps):
        check_statistics(z, 'feats', i, fm)


def test_small_segmentation_networks_train():
    net = SegNet(4, (8, 16, 16, 32, 32), (1, 1, 1, 1, 1))
    out = net(torch.randn(2, 3, 60, 44))
    assert out.shape == (2, 4, 60, 44)
    out.mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ValueError, match='32 divides'):
        LinkNet()(torch.zeros(1, 3, 240, 240))


@pytest.mark.parametrize('stem', FILES)
def test_network_equals_the_original(stem, tmp_path):
    name = ours(stem)
    layout, z, state, x = load(stem)
    net = models.build(name, int(z['hp_num_classes'])).double().eval()
    torch.save({'net': state}, tmp_path / 'x.pt')  # through the loader: it renames the Zoo's stages
    load_weights(net, tmp_path / 'x.pt')
    assert len(net.state_dict()) == len(layout)
    with torch.no_grad():
        feats = net(x, True)
        assert torch.equal(net(x), feats.out)
    close(feats.out, z['logits'], z['logits'].std(), 'logits')
    first = 0 if stem.startswith('knowledge') else 1  # only the Zoo's files have the true pres[0]
    # MobileNetV1 there hands out no stem, MobileNetV2Tiny no pre-activations
    shift = max(len(feats.fms) - len(z['feats_mean']), 0)
    first = 0 if shift else first
    groups = {'feats': (0, feats.fms[shift:]), 'preact': (first, feats.pres[shift:])}
    seen = 0
    for group, (start, maps) in groups.items():
        if f'{group}_std' not in z:  # mdistiller's MobileNetV2 hands out no pre-activations
            continue
        for i, fm in list(enumerate(maps))[start:]:
            check_statistics(z, group, i, fm)
            seen += 1
    seen += shift
    assert seen == len(feats.fms) + (len(feats.pres) - shift - first if 'preact_std' in z else 0)


def test_there_are_golden_networks():
    assert len(FILES) >= 20


OTHERS = ('ResNet34', 'MobileNetV1', 'MobileNetV2Tiny')  # without an entry of RepDistiller's


@pytest.mark.parametrize('name', [name for name in models.MODELS if name not in OTHERS])
def test_sizes(name):
    index = json.loads((GOLDEN / 'index.json').read_text())
    wanted = index.get(f'repdistiller_{name}') or index[f'mdistiller_{name}']
    net = models.build(name, wanted['num_classes'])
    assert sum(p.numel() for p in net.parameters()) == wanted['params']
    names = {id(m): n for n, m in net.named_modules()}
    if wanted['bn_before_relu'] is None:
        with pytest.raises(ValueError, match='no batch norm'):
            net.bn_before_relu()
    else:
        assert [names[id(bn)] for bn in net.bn_before_relu()] == wanted['bn_before_relu']
    assert {names[id(m)] for m in net.feat_modules()} == {
        m for m in wanted['feat_modules'] if not m.startswith(('relu', 'pool'))
    }
    assert net.classifier_layer().out_features == wanted['num_classes']


def test_shapes_modes_and_relu():
    net = models.build('resnet8', 7).train()
    x = torch.randn(3, 3, 40, 24, requires_grad=True)
    f = net(x, True)
    assert f.out.shape == (3, 7) and f.feat.shape == (3, 64) and len(f.fms) == len(f.pres) == 4
    for pre, fm in zip(f.pres, f.fms):
        assert torch.equal(pre.relu(), fm) and pre.min() < 0
    assert all(m.num_batches_tracked == 1 for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = [p.clone() for p in f.pres]
    f.out.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, f.pres))
    assert models.build('resnet20', 10).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert models.build('resnet26', 10)(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    last, nhwc = net.to(memory_format=torch.channels_last).eval(), torch.channels_last
    x = x.detach()
    torch.testing.assert_close(last(x.contiguous(memory_format=nhwc)), last(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['resnet9', 'resnet2', 'alexnet', 'resnet20x2', ''])
def test_unknown_names(name):
    with pytest.raises(ValueError, match='6n \\+ 2|no network'):
        models.build(name)


# ------------------------------------------------------------------------------------------------- the loader


def zoo_names(state: dict) -> dict:
    return {
        'module.' + k.replace('layer', 'res').replace('.downsample.', '.ds.'): v for k, v in state.items()
    }


def containers():
    torch.manual_seed(0)
    state = models.build('resnet8', 10).state_dict()
    other = models.build('resnet8', 10).state_dict()
    old = {k: v for k, v in state.items() if not k.endswith('num_batches_tracked')}
    full = {f'module.student.{k}': v for k, v in state.items()}
    full |= {f'module.teacher.{k}': v for k, v in other.items()} | {'module.other.conv.weight': torch.ones(1)}
    lr = np.float64(0.05) * 0.1 ** np.int64(2)
    return state, {
        'plain state dict': state,
        'without num_batches_tracked': old,
        'RepDistiller teacher': {'epoch': 240, 'model': old, 'accuracy': torch.tensor(69.06)},
        'RepDistiller teacher, NumPy lr': {'model': state, 'optimizer': {'param_groups': [{'lr': lr}]}},
        'mdistiller student': {'model': state},
        'mdistiller full state': {'epoch': 3, 'model': full, 'best_acc': 60.0},
        'Zoo base': {'epoch': 1, 'net': zoo_names(state), 'prec@1': 92.37, 'prec@5': 99.0},
        'Zoo student': {'epoch': 1, 'snet': zoo_names(state), 'tnet': zoo_names(other)},
        'Zoo DML': {'net1': zoo_names(state), 'net2': zoo_names(other)},
    }


@pytest.mark.parametrize('kind', containers()[1])
def test_loader_reads(kind, tmp_path):
    state, all_kinds = containers()
    torch.save(all_kinds[kind], tmp_path / 'c.pth')
    net = models.build('resnet8', 10)
    said = load_weights(net, tmp_path / 'c.pth')
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items() if 'tracked' not in k)
    assert ('92.37' in said) == (kind == 'Zoo base')


def test_loader_reads_the_old_numpy_name(tmp_path):
    """Before NumPy 2 a scalar was pickled as numpy.core.multiarray.scalar."""
    state, all_kinds = containers()
    path = tmp_path / 'old.pth'
    torch.save(all_kinds['RepDistiller teacher, NumPy lr'], path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    renamed = content.replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
    assert renamed != content
    path.write_bytes(renamed)
    load_weights(models.build('resnet8', 10), path)


def test_loader_takes_the_named_part(tmp_path):
    state, all_kinds = containers()
    torch.save(all_kinds['Zoo student'], tmp_path / 'c.pth')
    net = models.build('resnet8', 10)
    load_weights(net, tmp_path / 'c.pth', part='tnet')
    assert not torch.equal(net.conv1.weight, state['conv1.weight'])
    with pytest.raises(ValueError, match='nonsense'):
        load_weights(net, tmp_path / 'c.pth', part='nonsense')


class Bomb:
    def __reduce__(self):
        return (open, ('bomb-went-off', 'w'))


def test_loader_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, _ = containers()
    net = models.build('resnet8', 10)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.save(state, 'good.pth')
    good = Path('good.pth').read_bytes()

    def refused(path, message):
        with pytest.raises(ValueError, match=message) as caught:
            load_weights(net, path)
        assert '\n' not in str(caught.value) and str(path) in str(caught.value)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

    refused('absent.pth', 'no such')
    Path('empty.pth').write_bytes(b'')
    refused('empty.pth', 'truncated|not a PyTorch')
    Path('text.pth').write_text('hello world')
    refused('text.pth', 'truncated|not a PyTorch')
    for share in (0.1, 0.5, 0.9, 0.999):
        Path('cut.pth').write_bytes(good[: int(len(good) * share)])
        refused('cut.pth', 'truncated|not a PyTorch')
    for size in (10, 100, 1000):
        Path('cut.pth').write_bytes(good[:size])
        refused('cut.pth', 'truncated|not a PyTorch')
    torch.save(models.build('resnet20', 10).state_dict(), 'other.pth')
    refused('other.pth', 'looks like resnet20 with 10 classes')
    torch.save(models.build('resnet8', 100).state_dict(), 'classes.pth')
    refused('classes.pth', 'looks like resnet8 with 100 classes')
    torch.save({'epoch': 3}, 'none.pth')
    refused('none.pth', 'no weights')
    torch.save([1, 2], 'list.pth')
    refused('list.pth', 'list')
    Path('bomb.pth').write_bytes(pickle.dumps({'net': Bomb()}))
    refused('bomb.pth', 'code|not a PyTorch|truncated')
    torch.save({'net': state, 'extra': Bomb()}, 'bomb2.pth')
    refused('bomb2.pth', 'code')
    import argparse

    torch.save({'model': state, 'opt': argparse.Namespace(lr=0.1)}, 'x_last.pth')
    refused('x_last.pth', 'argparse.Namespace.*weights only')
    assert not Path('bomb-went-off').exists()
    assert read_checkpoint('good.pth').keys() == state.keys()


@pytest.mark.parametrize('size', [32, 64])
@pytest.mark.parametrize(
    'name', ['resnet8', 'ResNet18', 'wrn_16_1', 'vgg8', 'MobileNetV2', 'ShuffleV1', 'ShuffleV2']
)
def test_the_rest_of_a_network_goes_on_from_any_map(name, size):
    """after(k, fms[k]) gives the later maps and the logits of the whole network."""
    torch.manual_seed(0)
    net = models.build(name, 5).eval()
    with torch.no_grad():
        f = net(torch.randn(2, 3, size, size), True)
        for k, fm in enumerate(f.fms):
            rest = net.after(k, fm)
            assert len(rest.fms) == len(rest.pres) == len(f.fms) - 1 - k
            for a, b in zip((rest.out, rest.feat, *rest.fms), (f.out, f.feat, *f.fms[k + 1 :])):
                assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------ any backbone


def small_vit():
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )


def test_tapped_maps_are_those_of_the_network():
    """Against forward functions written out by hand, in training mode too."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=5)
    before = [(path, 'in') for path in ('relu', 'layer1.1.relu', 'layer4.1.relu')]
    tap = Tap(net, ['relu', 'layer1', 'layer4'], before)
    x = torch.randn(3, 3, 64, 64)
    for mode in (False, True):
        tap.train(mode)
        f = tap(x, True)
        assert f.feat.shape == (3, 512) and torch.equal(f.feat, f.fms[-1].mean(dim=(2, 3)))
        for fm, pre in zip(f.fms, f.pres):
            assert torch.equal(fm, pre.relu()) and pre.min() < 0, 'a pre-activation was overwritten in place'
        torch.testing.assert_close(f.out, net.fc(f.feat))
    assert torch.equal(tap.eval()(x), tap(x, True).out)
    tap.train()(x, True).fms[1].sum().backward()
    assert net.conv1.weight.grad.abs().max() > 0 and net.layer4[0].conv1.weight.grad is None


def test_tap_behaves_like_a_network_of_ours(tmp_path):
    torch.manual_seed(0)
    tap = tap_torchvision('resnet18', 5).eval()
    x = torch.randn(1, 3, 32, 32)
    twin = copy.deepcopy(tap)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
        assert twin(x, True).fms[1].abs().max() == 0 < tap(x, True).fms[1].abs().max(), 'copies share nothing'
    plain = torchvision.models.resnet18(num_classes=5)
    assert tap.state_dict().keys() == plain.state_dict().keys()
    torch.save(tap.state_dict(), tmp_path / 'x.pt')
    load_weights(plain, tmp_path / 'x.pt')
    load_weights(twin, tmp_path / 'x.pt')
    assert torch.equal(plain.eval()(x), tap(x)) and torch.equal(twin(x), tap(x))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert tap(x, True).out.dtype == torch.bfloat16
    compiled = torch.compile(lambda x: tap(x, True), backend='eager')
    torch.testing.assert_close(compiled(x).fms[2], tap(x, True).fms[2])
    hooks = [h for m in tap.close().modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks


FAMILIES = 'resnet50 wide_resnet50_2 vgg11_bn mobilenet_v2 shufflenet_v2_x0_5 convnext_tiny regnet_y_400mf'
FAMILIES = f'{FAMILIES} densenet121 efficientnet_b0'.split()


@pytest.mark.parametrize('name', FAMILIES)
def test_torchvision_families(name):
    tap = models.build(f'torchvision:{name}', 7)
    f = tap.eval()(torch.randn(2, 3, 64, 64), True)
    assert f.out.shape == (2, 7) and all(fm.dim() == 4 for fm in f.fms) and len(f.fms) >= 4
    sizes = [fm.shape[2] for fm in f.fms]
    assert sizes == sorted(sizes, reverse=True) and f.feat.shape[1] == tap.classifier_layer().in_features


def test_tokens_become_maps():
    f = Tap(small_vit(), ['encoder.layers.encoder_layer_0', 'encoder.layers.encoder_layer_1'], to_map=tokens)(
        torch.randn(2, 3, 32, 32), True)  # fmt: skip
    assert [fm.shape for fm in f.fms] == [(2, 32, 4, 4)] * 2 and f.feat.shape == (2, 32)
    assert last_axis(torch.zeros(2, 4, 5, 6)).shape == (2, 6, 4, 5)


@pytest.mark.parametrize(
    'make,said',
    [
        (lambda: Tap(small_vit(), ['encoder.layer_0']), 'the closest are'),
        (lambda: Tap(torch.nn.Conv2d(3, 4, 1), ['']), 'no linear layer'),
        (lambda: models.build('torchvision:resnet19'), 'the closest are'),
        (lambda: models.build('torchvision:alexnet'), 'models.hooks.Tap'),
        (lambda: tap_torchvision('mobilenet_v2', 5).bn_before_relu(), 'bn_before_relu='),
        (lambda: tap_torchvision('resnet18', 5).after(1, None), 'from the middle'),
    ],
)
def test_mistakes_with_taps(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_layer_that_is_not_called_is_named():
    pool = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), *pool, torch.nn.Linear(4, 2))
    net.spare = torch.nn.Identity()
    net.forward = lambda x: net[3](net[2](net[1](net[0](x))))
    with pytest.raises(RuntimeError, match='spare was not called'):
        Tap(net, ['0', 'spare'], classifier='3')(torch.randn(2, 3, 8, 8), True)


@pytest.mark.parametrize(
    'name, many', [('resnet8', 9), ('resnet8x4', 10), ('wrn_16_1', 6), ('vgg8', 5), ('ShuffleV2', 56),
                   ('MobileNetV2', 53), ('torchvision:resnet18', 20), ('torchvision:densenet121', 59)]
)  # fmt: skip
def test_folded_is_the_same_network(name, many):
    """Batch norms after a convolution vanish, but not where something else reads the convolution's output
    (wrn_16_1: the first convolution feeds a shortcut)."""
    torch.manual_seed(0)
    net, img = models.build(name, 10), torch.randn(2, 3, 64, 64)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for x, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                torch.nn.init.uniform_(x, low, low + 1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    net.train()
    fast = models.folded(net, img)
    assert net.training and all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    s, t = fast(img, True), net.eval()(img, True)
    for x, y in zip([s.out, s.feat, *s.fms, *s.pres], [t.out, t.feat, *t.fms, *t.pres], strict=True):
        assert (x - y).abs().max() < 1e-4 * y.abs().max()
    norms = [module for module in fast.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    ran = []
    for norm in norms:
        norm.register_forward_hook(lambda _, inputs, out: ran.append(inputs[0] is out))
    fast(img)
    assert sum(ran) == many


def test_folded_casts_once():
    net, img = models.build('resnet8', 10).eval(), torch.randn(2, 3, 32, 32)
    fast = models.folded(net, img, torch.bfloat16)
    assert fast.classifier_layer().weight.dtype == torch.bfloat16 != net.classifier_layer().weight.dtype
    with torch.autocast('cpu', torch.bfloat16):
        assert (fast(img) - net(img)).abs().max() < 0.02 * net(img).abs().max()


def test_folded_leaves_what_is_called_twice():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)

        def forward(self, x, _):
            x = self.bn(self.conv(self.bn(self.conv(x))))
            return models.Feats(x.mean(dim=(2, 3)), x.mean(dim=(2, 3)), [], [])

    torch.manual_seed(0)
    net, img = Twice(), torch.randn(2, 3, 8, 8)
    net(img, True)  # running statistics of its own
    fast = models.folded(net, img)
    torch.testing.assert_close(fast(img, True).out, net.eval()(img, True).out)
