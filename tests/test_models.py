"""The networks against the originals: layouts, sizes, logits and every feature, and the checkpoint loader."""

import copy
import importlib
import inspect
import json
import os
import pickle
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from torchvision.models import VisionTransformer

import dataset
import models
import models.dense
import models.lm
from engine.device import autocast
from engine.teachers import Teachers, load_teachers
from kd_losses.simkd import SimKD
from methods import METHODS
from models.branching import JointNet
from models.changed import NORMNetwork, SimKDNetwork
from models.checkpoint import head_names, load_weights, read_checkpoint
from models.detector import Detector
from models.generators import PatchDiscriminator, TransposedGenerator, UpsamplingGenerator
from models.grafting import Grafted
from models.hooks import Tap, last_axis, tap_torchvision, tokens
from models.kdexplainer import KDExplainer
from models.segmentation import DeepLabV3Plus, LinkNet, SegNet
from models.streams import StreamNet

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
OTHERS += ('vit_128_6', 'vit_192_6', 'deit_128_6')


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


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_names_of_imagenet_are_no_narrow_networks(depth, tmp_path):
    """50 and 152 are 6n + 2; and a file of torchvision's is recognised."""
    name = f'resnet{depth}'
    with pytest.raises(ValueError, match=f'^{name} is a network for ImageNet: torchvision:{name}'):
        models.build(name)
    if depth == 18:
        torch.save(models.build(f'torchvision:{name}', 7).state_dict(), tmp_path / 'net.pt')
        with pytest.raises(ValueError, match=f'it looks like torchvision:{name} with 7 classes'):
            models.load_weights(models.build('ResNet18', 7), tmp_path / 'net.pt')


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


CONTAINERS = (
    'model net snet state_dict student net1 model_state_dict weights state_dict_ema model_ema teacher'
)
PREFIXES = ['', 'module.', '_orig_mod.', 'model.', 'net.', 'backbone.', 'module._orig_mod.', 'student.',
            '_orig_mod.module.', 'model.backbone.', 'module.model.net.', 'learner.encoder_q.']  # fmt: skip


def loads(name: str, content, path: Path, **options) -> tuple[torch.nn.Module, str]:
    torch.save(content, path)
    net = models.build(name, 10)
    return net, load_weights(net, path, **options)


def equal_states(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('key', CONTAINERS.split())
def test_loader_knows_the_container(key, tmp_path):
    state = containers()[0]
    net, said = loads('resnet8', {'epoch': 3, 'accuracy': torch.tensor(69.0), key: state}, tmp_path / 'c.pt')
    assert equal_states(net.state_dict(), state) and f"['{key}']" in said and 'accuracy 69.00' in said
    net, said = loads('resnet8', {key: {'state_dict': state}, 'x': 1}, tmp_path / 'c.pt')
    assert equal_states(net.state_dict(), state) and f"['{key}.state_dict']" in said


def test_loader_takes_the_trained_weights_and_names_their_average(tmp_path):
    state = containers()[0]
    other = models.build('resnet8', 10).state_dict()
    content = {'state_dict_ema': other, 'state_dict': state, 'teacher': other}
    net, said = loads('resnet8', content, tmp_path / 'c.pt')
    assert equal_states(net.state_dict(), state) and 'also in the file: state_dict_ema, teacher' in said
    assert equal_states(loads('resnet8', content, tmp_path / 'c.pt', part='teacher')[0].state_dict(), other)


@pytest.mark.parametrize('name', ['resnet8', 'MobileNetV1', 'torchvision:shufflenet_v2_x0_5'])
@pytest.mark.parametrize('prefix', PREFIXES)
def test_loader_strips_prefixes_in_any_nesting(prefix, name, tmp_path):
    """Also of a network that has names like them itself, and beside a loss with weights of its own."""
    state = models.build(name, 10).state_dict()
    wrapped = {prefix + key: value for key, value in state.items()}
    net, said = loads(name, wrapped, tmp_path / 'c.pt')
    assert equal_states(net.state_dict(), state) and (f'without the prefix {prefix}' in said) == (
        prefix != ''
    )
    if prefix:
        wrapped |= {f'teacher.{prefix}{key}': torch.zeros_like(value) for key, value in state.items()}
        wrapped = {'criterion.weight': torch.ones(3), **wrapped}
        net, said = loads(name, {'state_dict': wrapped}, tmp_path / 'c.pt')
        assert equal_states(net.state_dict(), state) and 'left out: criterion.weight' in said


@pytest.mark.parametrize('outer', ['', 'module.', 'model.'])
@pytest.mark.parametrize('wrapper', ['module.', '_orig_mod.', '_fsdp_wrapped_module.'])
def test_loader_strips_wrappers_inside_of_names(wrapper, outer, tmp_path):
    """Of a network a part of which was compiled or parallel: layer1.module.0.conv1.weight."""
    state = containers()[0]
    inner = {outer + key.replace('layer1.', f'layer1.{wrapper}'): value for key, value in state.items()}
    net, said = loads('resnet8', inner, tmp_path / 'c.pt')
    assert equal_states(net.state_dict(), state) and 'left out' not in said


def test_loader_takes_a_container_that_it_does_not_know(tmp_path):
    state = containers()[0]
    content = {'epoch': 3, 'centre': {'x': torch.ones(2)}, 'what_i_call_it': state}
    net, said = loads('resnet8', content, tmp_path / 'c.pt')
    assert equal_states(net.state_dict(), state) and "['what_i_call_it'], also in the file: centre" in said


@pytest.mark.parametrize('other', ['teacher.', 'net_t.', 'ema.', 'momentum_encoder.', 'module.model_t.'])
def test_loader_takes_the_student_of_two_alike(other, tmp_path):
    state = containers()[0]
    both = {other + key: torch.zeros_like(value) for key, value in state.items()}
    both |= {f'mine.{key}': value for key, value in state.items()}
    assert equal_states(loads('resnet8', both, tmp_path / 'c.pt')[0].state_dict(), state)


TWO_KEYS = (
    'teacher student_state_dict', 'teacher student_model', 'state_dict_ema net_state', 'model_ema generator',
    'model_t model_s', 't s', 'teacher_state student_state', 'ema params', 'params_ema params',
    'ema_state_dict model_weights', 'model_ema model', 'swa_model what_i_call_it', 'tnet mine',
)  # fmt: skip
TWO_PREFIXES = (
    't_model. s_model.', 'ema_model. model.', 'ema_net. net.', 'swa_model. model.', 'averaged_model. model.',
    'target_network. online_network.', 'frozen. net.', 'ref_model. model.', 't. s.',
)  # fmt: skip


@pytest.mark.parametrize('keys', TWO_KEYS)
def test_loader_takes_no_teacher_and_no_average_for_the_student(keys, tmp_path):
    """In either order, beside a loss of few entries; alone in a file each of them is read."""
    other, mine = keys.split()
    states = {other: models.build('resnet8', 10).state_dict(), mine: containers()[0]}
    for order in ((other, mine), (mine, other)):
        content = {'epoch': 3, 'kd': {'centre': torch.ones(2)}, **{key: states[key] for key in order}}
        net, said = loads('resnet8', content, tmp_path / 'c.pt')
        assert equal_states(net.state_dict(), states[mine])
        assert f"['{mine}'], also in the file: " in said and other in said
    if other != 'tnet':  # which must be asked for
        net, said = loads('resnet8', {'kd': {'x': torch.ones(2)}, other: states[other]}, tmp_path / 'c.pt')
        assert equal_states(net.state_dict(), states[other]) and f"['{other}']" in said


@pytest.mark.parametrize('prefixes', TWO_PREFIXES)
def test_loader_takes_the_student_of_two_prefixes(prefixes, tmp_path):
    other, mine = prefixes.split()
    state = containers()[0]
    theirs = {other + key: torch.zeros_like(value) for key, value in state.items()}
    ours = {mine + key: value for key, value in state.items()}
    for both in (theirs | ours, ours | theirs):
        net, said = loads('resnet8', both, tmp_path / 'c.pt')
        assert equal_states(net.state_dict(), state) and f'left out: {other}' in said
    assert f'without the prefix {other}' in loads('resnet8', theirs, tmp_path / 'c.pt')[1]


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_loader_leaves_out_what_lies_beside_a_whole_network(prefix, tmp_path):
    """Also where the network has no prefix, or theirs: a projector, an auxiliary classifier."""
    state = containers()[0]
    beside = {**state, 'projector.weight': torch.ones(128, 64), 'aux_classifier.0.bias': torch.ones(2)}
    beside = {prefix + key: value for key, value in beside.items()}
    net, said = loads('resnet8', beside, tmp_path / 'c.pt')
    assert equal_states(net.state_dict(), state)
    assert f'left out: {prefix}projector.weight, {prefix}aux_classifier.0.bias' in said
    with pytest.raises(ValueError, match='unexpected: layer1.9.weight') as caught:  # a part of the network
        loads('resnet8', {**state, 'layer1.9.weight': torch.ones(1)}, tmp_path / 'c.pt')
    assert 'classifier differs' not in str(caught.value)
    with pytest.raises(ValueError, match='missing: conv1.weight'):
        less = {key: value for key, value in beside.items() if 'conv1.weight' not in key}
        loads('resnet8', less, tmp_path / 'c.pt')
    with pytest.raises(ValueError, match='norm has added layers; models.load_student'):
        loads('resnet8', {**state, 'transform.expand.0.weight': torch.ones(8, 4)}, tmp_path / 'c.pt')


def test_a_part_that_must_be_asked_for_is_named_with_its_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"load_weights\(net, '.*c.pt', part='tnet'\), then save"):
        loads('resnet8', {'tnet': containers()[0]}, tmp_path / 'c.pt')


def test_loader_leaves_out_what_is_no_tensor(tmp_path):
    state = containers()[0]
    net, said = loads('resnet8', {**state, 'epoch': 3, 'arch': 'resnet8'}, tmp_path / 'c.pt')
    assert equal_states(net.state_dict(), state) and 'left out: epoch, arch' in said
    plain = torch.load(tmp_path / 'c.pt')
    plain['fc.bias'] = None
    with pytest.raises(ValueError, match='fc.bias is None, wanted'):
        loads('resnet8', plain, tmp_path / 'c.pt')


def test_loader_reads_the_names_of_older_torchvisions(tmp_path):
    new, old = small_vit(), {}
    for key, value in new.state_dict().items():
        old[key.replace('mlp.0.', 'mlp.linear_1.').replace('mlp.3.', 'mlp.linear_2.')] = value
    assert any('linear_2' in key for key in old)
    for prefix in ('', 'module.'):
        torch.save({prefix + key: value for key, value in old.items()}, tmp_path / 'vit.pt')
        net = small_vit()
        load_weights(net, tmp_path / 'vit.pt')
        assert equal_states(net.state_dict(), new.state_dict())
    net = small_vit()
    net.heads = torch.nn.Linear(32, 7)
    load_weights(net, tmp_path / 'vit.pt', new_head=True)
    with pytest.raises(ValueError, match='missing: .*mlp.0.weight'):
        torch.save({k: v for k, v in old.items() if 'linear_2' not in k}, tmp_path / 'vit.pt')
        load_weights(small_vit(), tmp_path / 'vit.pt')

    state = models.build('torchvision:densenet121', 10).state_dict()
    old = {key.replace('norm1.', 'norm.1.').replace('norm2.', 'norm.2.').replace('conv1.', 'conv.1.')
           .replace('conv2.', 'conv.2.'): value for key, value in state.items()}  # fmt: skip
    assert 'features.denseblock1.denselayer1.norm.1.weight' in old
    assert equal_states(loads('torchvision:densenet121', old, tmp_path / 'd.pt')[0].state_dict(), state)


def test_a_body_with_a_head_of_its_own(tmp_path):
    """new_head: everything but the classifier, and a word about what was left."""
    torch.manual_seed(0)
    state = models.build('resnet8', 100).state_dict()
    body = {key: value for key, value in state.items() if not key.startswith('fc.')}
    contrastive = {**body, 'head.0.weight': torch.ones(4, 64), 'head.2.weight': torch.ones(4, 4)}
    for content, left in ((state, 'fc.weight, fc.bias'), (body, 'nothing'), (contrastive, 'head.0.weight')):
        net, said = loads('resnet8', content, tmp_path / 'c.pt', new_head=True)
        assert f'a new classifier, left out: {left}' in said
        assert equal_states({key: net.state_dict()[key] for key in body}, body) and len(net.fc.weight) == 10
    for content in (state, body, contrastive):
        with pytest.raises(ValueError, match='only the classifier differs: .* --new_head'):
            loads('resnet8', content, tmp_path / 'c.pt', head='--s_init FILE --new_head keeps the rest')
        with pytest.raises(ValueError, match='only the classifier differs$'):  # such flags are not everywhere
            loads('resnet8', content, tmp_path / 'c.pt')
    deeper = models.build('resnet20', 100).state_dict()
    for wrong in (deeper, {**body, 'conv1.weight': torch.ones(16, 1, 3, 3)}, dict(list(body.items())[:20])):
        with pytest.raises(ValueError, match='does not fit the network') as caught:
            loads('resnet8', wrong, tmp_path / 'c.pt', new_head=True)
        assert '--new_head' not in str(caught.value)


@pytest.mark.parametrize('name', [*models.MODELS, 'torchvision:vgg11_bn', 'torchvision:vit_b_32'])
def test_every_network_tells_its_head(name):
    net = models.build(name, 7)
    state = net.state_dict()
    shapes = {tuple(state[key].flatten(1).shape if state[key].dim() > 1 else [7]) for key in head_names(net)}
    assert shapes == {(7, net.classifier_layer().in_features), (7,)}


@pytest.mark.parametrize('name', ['resnet8', 'MobileNetV1', 'MobileNetV2Tiny', 'vit_128_6'])
def test_the_classifier_is_a_part_of_its_network(name):
    """What is done to classifier_layer() is done to the network: no copy is handed out."""
    net = models.build(name, 5)
    layer = net.classifier_layer()
    assert any(layer is module for module in net.modules()) and layer is net.classifier_layer()
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert layer.weight.shape == (5, layer.in_features) and layer.weight.grad is not None


def test_a_classifier_that_is_a_convolution_in_files():
    """Of mdistiller's shape in files, a linear layer in use; a dict that is loaded stays as it is."""
    net, x = models.build('MobileNetV2Tiny', 5).eval(), torch.randn(2, 3, 32, 32)
    whole = torch.nn.ModuleList([net])
    state = whole.state_dict()
    assert state['0.conv2.weight'].shape == (5, 1280, 1, 1)
    other = torch.nn.ModuleList([models.build('MobileNetV2Tiny', 5).eval()])
    for given in (state, {**state, **dict(whole.named_parameters())}):
        before = {key: value.shape for key, value in given.items()}
        other.load_state_dict(given, strict=True)
        assert before == {key: value.shape for key, value in given.items()}
        assert torch.equal(other[0](x), net(x))
    with pytest.raises(RuntimeError, match='size mismatch for conv2.weight'):
        models.build('MobileNetV2Tiny', 6).load_state_dict(net.state_dict())
    with pytest.raises(RuntimeError, match='Missing.*conv2.weight'):
        net.load_state_dict({key: x for key, x in net.state_dict().items() if key != 'conv2.weight'})
    assert torch.equal(torch.func.functional_call(net, net.state_dict(), (x,)), net(x))
    with torch.no_grad():
        torch.testing.assert_close(models.folded(net, x)(x), net(x))


def test_loader_reads_safetensors(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    state = containers()[0]
    safetensors.save_file(
        {f'model.{k}': v.contiguous() for k, v in state.items()}, tmp_path / 'x.safetensors'
    )
    net = models.build('resnet8', 10)
    load_weights(net, tmp_path / 'x.safetensors')
    assert equal_states(net.state_dict(), state)
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'x.safetensors').read_bytes()[:5000])
    with pytest.raises(ValueError, match='truncated or not a safetensors file') as caught:
        load_weights(net, tmp_path / 'cut.safetensors')
    assert '\n' not in str(caught.value)


def test_without_safetensors_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    (tmp_path / 'x.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match='pip install safetensors'):
        load_weights(models.build('resnet8', 10), tmp_path / 'x.safetensors')


@pytest.mark.parametrize('method', [name for name, row in METHODS.items() if row.own.student])
def test_changed_students_load(method, tmp_path):
    """Whatever a method makes of its student: what is kept of it loads by name, and is the same network."""
    torch.manual_seed(0)
    row, img = METHODS[method], torch.randn(2, 3, 32, 32)
    net_s, net_t = models.build('resnet8', 10).eval(), models.build('wrn_16_2', 10).eval()
    data = SimpleNamespace(mean=(0.5,) * 3, std=(0.2,) * 3, test_batches=lambda n: iter([(img[:n],)]))
    e = SimpleNamespace(s=net_s(img, True), t=net_t(img, True), net_s=net_s, net_t=net_t, num_classes=10,
                        train_set=data, another_net=copy.deepcopy)  # fmt: skip
    loss = row.build(row.loss, e)
    trained = row.own.student(net_s, loss, e).train()
    trained(img, True)  # running statistics of its own
    kept = trained.eval().deployed() if hasattr(trained, 'deployed') else trained.eval()
    for content in (kept.state_dict(), {'net': trained.state_dict(), 'kd': loss.state_dict(), 'epoch': 1}):
        torch.save(content, tmp_path / 'student.pt')
        net = models.load_student(tmp_path / 'student.pt', 'resnet8', 10)
        twin = pickle.loads(pickle.dumps(net))
        assert torch.equal(net(img), kept(img)) and torch.equal(twin(img, True).feat, kept(img, True).feat)
        assert net.classifier_layer().out_features == 10 and len(net.bn_before_relu()) == 3
    if type(net) is not type(net_s):
        with pytest.raises(ValueError, match=rf'{method} has added layers; models.load_student'):
            load_weights(models.build('resnet8', 10), tmp_path / 'student.pt')


def test_class_names_travel_with_plain_weights(tmp_path):
    net = models.build('resnet8', 2)
    torch.save(models.named_weights(net, ['ape', 'bee']), tmp_path / 'net.pt')
    (tmp_path / 'net.pt').rename(tmp_path / 'copy.pt')
    state = torch.load(tmp_path / 'copy.pt', weights_only=True)
    assert state.class_names == ['ape', 'bee'] and equal_states(state, net.state_dict())
    net.load_state_dict(state)
    load_weights(net, tmp_path / 'copy.pt', class_names=['ape', 'bee'])
    before = copy.deepcopy(net.state_dict())
    for names in (['bee', 'ape'], ['ape', 'cat']):
        with pytest.raises(ValueError, match='copy.pt: was trained for other classes') as caught:
            load_weights(net, tmp_path / 'copy.pt', class_names=names)
        assert '\n' not in str(caught.value) and equal_states(net.state_dict(), before)
    load_weights(net, tmp_path / 'copy.pt', class_names=['bee', 'ape'], new_head=True)


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


@pytest.mark.parametrize('size', [32, 40, 63, 64, 65, 71, 72, 80])
def test_the_rest_of_a_vgg_at_any_height(size):
    """Of 64 to 71 pixels the map of block 3 is 8 high, and is pooled once more; forward and rest agree."""
    torch.manual_seed(0)
    net = models.build('vgg8', 5).eval()
    with torch.no_grad():
        f = net(torch.randn(1, 3, size, 32), True)
        assert f.fms[4].shape[2] == (size // 8 // 2 if 64 <= size < 72 else size // 8)
        for k, fm in enumerate(f.fms):
            assert torch.equal(net.after(k, fm).out, f.out)


@pytest.mark.parametrize('name, params', [('vit_64_3', 157_895), ('deit_64_3', 158_478)])
def test_a_vision_transformer(name, params):
    """Written out by hand, with the positions of another grid; every block's tokens, and both heads."""
    torch.manual_seed(0)
    net, x = models.build(name, 7).eval(), torch.randn(2, 3, 32, 24)
    assert sum(p.numel() for p in net.parameters()) == params
    n = 1 + (name == 'deit_64_3')
    with torch.no_grad():
        f = net(x, True)
        front, grid = net.pos_embed[:, :n], net.pos_embed[:, n:].mT.unflatten(2, (8, 8))
        at = F.interpolate(grid, (8, 6), mode='bicubic').flatten(2).mT
        y = torch.cat([net.cls_token, net.dist_token], 1) if n == 2 else net.cls_token
        y = torch.cat([y.expand(2, -1, -1) + front, net.patch_embed['proj'](x).flatten(2).mT + at], 1)
        torch.testing.assert_close(f.fms[0].flatten(2).mT, y[:, n:])
        for i, block in enumerate(net.blocks):
            qkv = F.linear(block.norm1(y), block.attn['qkv'].weight, block.attn['qkv'].bias)
            q, k, v = qkv.chunk(3, dim=2)
            y = y + block.attn['proj']((q @ k.mT / 8).softmax(2) @ v)  # one head of 64
            y = y + block.mlp['fc2'](F.gelu(block.mlp['fc1'](block.norm2(y))))
            if i == 2:
                y = net.norm(y)
            torch.testing.assert_close(f.tokens[i], y[:, n:])
            torch.testing.assert_close(f.fms[i + 1].flatten(2).mT, y[:, n:])
        torch.testing.assert_close(f.feat, y[:, 0])
        heads = [net.head(y[:, 0])] + ([net.head_dist(y[:, 1])] if n == 2 else [])
        torch.testing.assert_close(f.out, sum(heads) / n)
        assert (f.extra is None) == (n == 1)
        for got, wanted in zip(f.extra or (), heads):
            torch.testing.assert_close(got, wanted)
    for message, call in (('multiples of 4', lambda: net(x[:, :, :30])),
                          ('no batch norm', net.bn_before_relu),
                          ('from the middle', lambda: net.after(1, f.fms[1])),
                          ('multiple of 64', lambda: models.build('vit_100_6'))):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_a_teacher_of_other_statistics(tmp_path):
    """Its images are renormalised: in copies, in its folded form, where its accuracy is measured."""
    torch.manual_seed(0)
    mean, std, data = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], dataset.load('shapes:16', tmp_path)[1]
    net = models.build('resnet8', 10).eval()
    torch.save(net.state_dict(), tmp_path / 'net.pt')
    x = next(data.test_batches(8))[0]
    pixels = x * torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]
    wanted = net((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None], True)
    args = SimpleNamespace(t_name=['resnet8'], t_model=[tmp_path / 'net.pt'])
    amp = autocast(torch.device('cpu'), 'off')
    (teacher,), _ = load_teachers(args, 10, data, amp, print, mean, std)
    seen = Teachers([teacher], amp, [], x)(x, torch.zeros(len(x)), None, {}).all_t[0]
    for f in (teacher(x, True), copy.deepcopy(teacher)(x, True), seen):
        torch.testing.assert_close(f.out, wanted.out, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(net(x), wanted.out, rtol=1e-2, atol=1e-2)
    assert equal_states(teacher.state_dict(), net.state_dict())
    assert models.trained_on(net, (data.mean, data.std), (data.mean, data.std)) is net
    assert not hasattr(net, 'input_scale'), 'nothing to do'
    with pytest.raises(ValueError, match='deviations must be > 0'):
        models.trained_on(net, (mean, [0, 1, 1]), (mean, std))


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
FAMILIES += ' densenet121 efficientnet_b0 efficientnet_v2_s mobilenet_v3_large mobilenet_v3_small'
FAMILIES = f'{FAMILIES} swin_t swin_v2_t'.split()
# every class of networks with every kind of block, once: what is asked of them does not depend on the depth
ONCE = 'resnet8 resnet8x4 ResNet18 ResNet50 wrn_16_2 vgg8 MobileNetV2 ShuffleV1 ShuffleV2 MobileNetV1'
ONCE = f'{ONCE} MobileNetV2Tiny vit_128_6 deit_128_6'.split()
TWINS = {'wide_resnet50_2', 'vgg11_bn', 'efficientnet_v2_s', 'mobilenet_v3_large', 'swin_v2_t'}
ONE_OF_A_KIND = [*ONCE, *(f'torchvision:{name}' for name in FAMILIES if name not in TWINS)]


@pytest.mark.parametrize('name', ONE_OF_A_KIND)
def test_every_network_is_saved_copied_and_called_like_any_module(name, tmp_path):
    """As a part of others, at any depth: names of parameters, of files and of functional calls agree."""
    torch.manual_seed(0)
    net, x = models.build(name, 5).eval().requires_grad_(False), torch.randn(1, 3, 32, 32)
    whole = torch.nn.ModuleDict({'part': torch.nn.Sequential(net)})
    state, wanted = whole.state_dict(), net(x, True)
    assert {key for key, _ in whole.named_parameters()} <= state.keys()
    assert equal_states(
        {key.removeprefix('part.0.'): value for key, value in state.items()}, net.state_dict()
    )
    twin = copy.deepcopy(whole)
    for value in [*twin.parameters(), *twin.buffers()]:
        value.zero_()
    assert not torch.equal(twin['part'][0](x, True).feat, wanted.feat), 'copies share nothing'
    twin.load_state_dict(state)
    average = torch.optim.swa_utils.AveragedModel(net)
    average.load_state_dict(copy.deepcopy(average.state_dict()))
    for other in (twin['part'][0], pickle.loads(pickle.dumps(whole))['part'][0], average.module):
        other.eval()
        got = other(x, True)
        assert torch.equal(got.out, wanted.out) and torch.equal(got.feat, wanted.feat)
        assert all(
            torch.equal(a, b) for a, b in zip(got.fms + got.pres, wanted.fms + wanted.pres, strict=True)
        )
    assert torch.equal(torch.func.functional_call(average.module, net.state_dict(), (x,)), wanted.out)
    assert torch.equal(net(x), wanted.out)


IMAGES = (2, 3, 32, 32)
HALF, TENTHS = ((0.5,) * 3, (0.2,) * 3), ((0.5,) * 3, (0.3,) * 3)  # of pixels: means, deviations


def pair(name='resnet8'):
    return [models.build(name, 5) for _ in range(2)]


def changed(method):
    """As train_kd.py leaves a student that a method has changed."""
    if method == 'simkd':
        return SimKDNetwork(models.build('resnet8', 5), SimKD(64, 32), torch.nn.Linear(32, 5), (8, 8))
    return NORMNetwork(models.build('resnet8', 5), 64, 64, 2)


# networks without a name of MODELS: how they are built, and what they are called with
OTHERS = {
    'segmenter': (
        lambda: models.dense.build('segmentation', 'lraspp:mobilenet_v3_small@0.5', 4), (2, 3, 64, 64)
    ),
    'detector': (lambda: models.dense.build('detection', 'retinanet:resnet10', 4), (2, 3, 64, 64)),
    'SegNet': (lambda: SegNet(3), IMAGES), 'LinkNet': (lambda: LinkNet(3), IMAGES),
    'DeepLabV3Plus': (lambda: DeepLabV3Plus(3), (2, 3, 64, 64)),
    'JointNet': (lambda: JointNet([SegNet(3), SegNet(1)]), IMAGES),
    'StreamNet': (lambda: StreamNet(pair()), IMAGES),
    'KDExplainer': (lambda: KDExplainer(5, (2, 2), 8, 4), IMAGES),
    'Grafted': (lambda: Grafted(*pair()), IMAGES),
    'simkd': (lambda: changed('simkd'), IMAGES), 'norm': (lambda: changed('norm'), IMAGES),
    'Decoder of texts': (lambda: models.lm.build('student', 5), torch.arange(10).reshape(2, 5) % 5),
    'Detector': (lambda: Detector(3), (2, 3, 48, 48)),
    'UpsamplingGenerator': (lambda: UpsamplingGenerator(8), (2, 8)),
    'TransposedGenerator': (lambda: TransposedGenerator(8, 32), (2, 8)),
    'PatchDiscriminator': (PatchDiscriminator, IMAGES),
    'renormalised': (lambda: models.trained_on(models.build('resnet8', 5), HALF, TENTHS), IMAGES),
    'folded': (lambda: models.folded(models.build('resnet8', 5), torch.randn(IMAGES)), IMAGES),
}  # fmt: skip


# parts and bases of those, and networks of graphs and of strings, which test_tasks.py trains and saves
PARTS = {'Tap', 'Leaving', 'Block', 'Stage', 'Head', 'Graft', 'Layer', 'Attention', 'Oracle'}
PARTS |= {'GAT', 'Seq2Seq', 'LabelGenerator'}


def test_every_network_is_in_one_of_the_lists():
    made, once = ({getattr(models.MODELS[name], 'func', models.MODELS[name]) for name in names}
                  for names in (models.MODELS, ONCE))  # fmt: skip
    assert made == once
    known = {make.__name__ for make in made} | {'ResNet', 'WRN'} | PARTS
    known |= {type(m).__name__ for build, _ in OTHERS.values() for m in build().modules()}
    for path in Path(models.__file__).parent.glob('*.py'):
        module = importlib.import_module(f'models.{path.stem}')
        for name, cls in vars(module).items():
            if (
                inspect.isclass(cls)
                and issubclass(cls, torch.nn.Module)
                and cls.__module__ == module.__name__
            ):
                assert name in known or name.startswith('_'), f'{name} of {path.name}: add it to OTHERS'


@pytest.mark.parametrize('name', OTHERS)
def test_other_networks_are_copied_and_pickled(name):
    """Also in the middle of a training, after a pass and its gradients."""
    torch.manual_seed(0)
    build, x = OTHERS[name]
    net = build()
    x = torch.randn(x) if isinstance(x, tuple) else x

    def said(net):
        torch.manual_seed(0)
        if name == 'detector':
            return flat(net.backbone(x))
        return flat(net(x))

    for y in said(net)[:1]:
        if y.requires_grad:
            y.float().sum().backward()
    net.eval()
    wanted = said(net)
    whole = torch.nn.ModuleDict({'part': torch.nn.ModuleList([net])})
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        twin.load_state_dict(whole.state_dict())
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
        assert all(torch.equal(a, b) for a, b in zip(said(twin['part'][0]), wanted, strict=True))


def flat(y) -> list:
    if isinstance(y, torch.Tensor):
        return [y]
    if y is None or isinstance(y, (int, float, str)):
        return []
    return [x for part in (y.values() if isinstance(y, dict) else y) for x in flat(part)]


@pytest.mark.parametrize('name', ONE_OF_A_KIND)
def test_every_map_of_a_network_in_training_has_a_gradient_and_stays(name):
    torch.manual_seed(0)
    net, x = models.build(name, 5).train(), torch.randn(2, 3, 32, 32)
    f = net(x, True)
    maps = [f.feat, *f.fms, *f.pres]
    assert all(fm.requires_grad for fm in maps)
    before = [fm.detach().clone() for fm in maps]
    (f.out.sum() + sum(fm.mean() for fm in maps)).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, maps))
    with torch.no_grad():
        assert not net(x, True).feat.requires_grad
    frozen = net.requires_grad_(False)(x, True)  # a teacher that somebody left in training mode
    assert not frozen.feat.requires_grad


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
    net, x = small_vit().eval(), torch.randn(2, 3, 32, 32)
    f = Tap(net, ['encoder.layers.encoder_layer_1'], to_map=tokens,
            tokens=['encoder.layers.encoder_layer_0', 'encoder.ln'])(x, True)  # fmt: skip
    front = torch.cat([net.class_token.expand(2, -1, -1), net._process_input(x)], dim=1)
    first = net.encoder.layers[0](front + net.encoder.pos_embedding)
    last = net.encoder.ln(net.encoder.layers[1](first))
    for got, wanted in zip(f.tokens, (first, last), strict=True):
        torch.testing.assert_close(got, wanted[:, 1:])


@pytest.mark.parametrize('prefix', [0, 1, 2, 5])
@pytest.mark.parametrize('side', [4, 7, 14, 16])
def test_tokens_in_front(prefix, side):
    """A class token, a distilled DeiT's two, registers, or none: what is left are the patches, row by row."""
    patches = torch.randn(2, 3, side, side)
    x = torch.cat([torch.full((2, prefix, 3), 9.0), patches.flatten(2).transpose(1, 2)], dim=1)
    for options in ({}, {'prefix': prefix}, {'size': (side, side)}, {'prefix': prefix, 'size': (side, side)}):
        assert torch.equal(tokens(x, **options), patches)


def test_tokens_of_other_shapes():
    patches = torch.randn(2, 3, 4, 5)
    x = torch.cat([torch.zeros(2, 3, 3), patches.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(tokens(x, prefix=3, size=(4, 5)), patches)
    for options in ({}, {'prefix': 1}, {'size': (5, 5)}):
        with pytest.raises(ValueError, match='got 23 tokens, expected .* say prefix and size'):
            tokens(x, **options)
    with pytest.raises(ValueError, match=r'expected \(N, L, D\), got \(2, 3, 4, 5\)'):
        tokens(patches)


@pytest.mark.parametrize(
    'make,said',
    [
        (lambda: Tap(small_vit(), ['encoder.layer_0']), 'the closest are'),
        (lambda: Tap(torch.nn.Conv2d(3, 4, 1), ['']), 'no linear layer'),
        (lambda: models.build('torchvision:resnet19'), 'the closest are'),
        (lambda: models.build('torchvision:alexnet'), 'models.hooks.Tap'),
        (lambda: tap_torchvision('mobilenet_v2', 5).bn_before_relu(), 'bn_before_relu='),
        (lambda: tap_torchvision('resnet18', 5).after(1, None), 'from the middle'),
        (lambda: Tap(small_net(), [('0', 'input')]), r"got \('0', 'input'\)"),
        (lambda: Tap(small_net(), ['0'], [('0', 'out', 2)]), "a path, .path, 'in'. or .path, 'out'."),
        (lambda: Tap(small_net(), ['0'], feat=3), 'got 3'),
    ],
)
def test_mistakes_with_taps(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def small_net(*middle: torch.nn.Module, forward=None) -> torch.nn.Module:
    """conv 0, batch norm 1, middle ..., pooling, flatten, linear; or another forward with these layers."""
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), *middle]
    end = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2)]
    net = torch.nn.Sequential(*layers, *end)
    if forward:
        net.forward = lambda x: net[-1](net[-2](net[-3](forward(net, x))))
    return net


def adds(net, x):
    x = net[1](net[0](x))
    x += 1
    return x


IN_PLACE = {
    'functional': (small_net(forward=lambda net, x: torch.relu_(net[1](net[0](x)))), '1'),
    'sum': (small_net(forward=adds), '1'),
    'view': (
        small_net(forward=lambda net, x: net[1](net[0](x)).flatten(1).mul_(2).unflatten(1, (4, 6, 6))),
        '1',
    ),
    'input': (small_net(forward=lambda net, x: net[1](net[0](x.mul_(2)))), ('0', 'in')),
    'shortcut': (torchvision.models.resnet18(num_classes=2), 'layer1.1.bn2'),
}


@pytest.mark.parametrize('kind', IN_PLACE)
def test_a_map_that_is_changed_afterwards_is_refused(kind):
    net, layer = IN_PLACE[kind]
    path = layer if isinstance(layer, str) else layer[0]
    if kind == 'input':  # the change must come after the reading
        net.forward = lambda x: net[1](net[0](x)).sum(dim=(2, 3)) @ torch.ones(4, 2) + x.mul_(2).sum()
    with pytest.raises(RuntimeError, match=rf'{re.escape(path)} is changed in place.* without in-place'):
        Tap(net, [layer])(torch.randn(2, 3, 8, 8), True)
    with pytest.raises(ValueError), torch.no_grad():
        Tap(net, [layer]).eval()(torch.randn(2, 3, 8, 8), True)
    with torch.inference_mode():  # where changes are not counted, the map is a copy
        f = Tap(net, [layer], feat=layer)
        assert f.eval()(torch.randn(2, 3, 8, 8), True).fms[0].isfinite().all()


class Pair(torch.nn.Module):
    def forward(self, x):
        return {'maps': (x, 2 * x)}


def test_a_map_inside_a_tuple_is_watched_too():
    net = small_net(Pair(), forward=lambda net, x: net[2](net[0](x))['maps'][1].mul_(3))
    tap = Tap(net, ['2'], to_map=lambda value: value['maps'][0] if isinstance(value, dict) else value)
    with pytest.raises(RuntimeError, match='2 is changed in place'):
        tap(torch.randn(2, 3, 8, 8), True)
    with torch.inference_mode():  # a copy
        seen = tap.eval()(x := torch.randn(2, 3, 8, 8), True).fms[0]
        assert torch.equal(seen, net[0](x))


def test_a_compiled_tap_keeps_what_was_read():
    """There changes cannot be counted: the map is a copy."""
    net = small_net(forward=lambda net, x: torch.relu_(net[0](x)))
    tap, x = Tap(net, ['0']), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(lambda x: tap(x, True), backend='aot_eager')
    torch.testing.assert_close(compiled(x).fms[0], net[0](x))


@pytest.mark.parametrize(
    'module',
    [torch.nn.ReLU, torch.nn.SELU, torch.nn.CELU, torch.nn.Hardtanh, torch.nn.Mish, torch.nn.Dropout,
     torch.nn.Dropout2d, torch.nn.RReLU, torch.nn.AlphaDropout],
)  # fmt: skip
def test_modules_that_work_in_place_are_switched(module):
    torch.manual_seed(0)
    net = small_net(module(inplace=True))
    f = Tap(net, ['2'], ['1'])(torch.randn(2, 3, 8, 8), True)
    assert not torch.equal(f.pres[0], f.fms[0]) and abs(f.pres[0].mean()) < 1e-5, 'the norm before it'


@pytest.mark.parametrize('name', ['mobilenet_v2', 'vgg11_bn', 'efficientnet_b0', 'mobilenet_v3_small'])
def test_the_embedding_is_taken_before_the_dropout(name):
    """With the noise of a dropout in it, a student's embedding could not meet its teacher's."""
    torch.manual_seed(0)
    tap, x = models.build(f'torchvision:{name}', 5).train(), torch.randn(2, 3, 64, 64)
    for m in tap.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.eval()
    for m in tap.modules():
        if 'StochasticDepth' in type(m).__name__ or (name == 'vgg11_bn' and m is tap.wrapped.classifier[2]):
            m.eval()
    first, second = tap(x, True), tap(x, True)
    assert torch.equal(first.feat, second.feat) and not torch.equal(first.out, second.out)
    assert (first.feat == 0).float().mean() < 0.9 and torch.equal(tap.eval()(x, True).feat, first.feat)
    with torch.no_grad():
        torch.testing.assert_close(tap.classifier_layer()(first.feat), tap(x))


class Checkpointed(torch.nn.Module):
    """Three convolutions, the middle one (or another module) under activation checkpointing."""

    def __init__(self, use_reentrant: bool, middle: torch.nn.Module | None = None):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(i, 4, 3) for i in (3, 4, 4))
        self.d, self.fc, self.use_reentrant = middle, torch.nn.Linear(4, 2), use_reentrant

    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.d or self.b, self.a(x), use_reentrant=self.use_reentrant)
        return self.fc(self.c(x).mean(dim=(2, 3)))


def test_maps_without_gradient_are_refused():
    """Reentrant checkpointing runs its part without a graph: distillation would silently stop there."""
    x = torch.randn(2, 3, 16, 16)
    good = Tap(Checkpointed(False), ['a', 'b', 'c'])
    sum(fm.sum() for fm in good(x, True).fms).backward()
    assert all(p.grad is not None for m in (good.a, good.b, good.c) for p in m.parameters())
    warnings.filterwarnings('ignore', 'None of the inputs have requires_grad')
    bad = Tap(Checkpointed(True), ['a', 'b', 'c'])
    with pytest.raises(RuntimeError, match='Checkpointed: b has no gradient .*use_reentrant=False'):
        bad(x, True)
    bad.b.requires_grad_(False)  # what comes before it still wants a gradient
    with pytest.raises(RuntimeError, match='b has no gradient'):
        bad(x, True)
    for layer in ('c', 'd.0', 'd.1'):  # deep inside, where no input tells
        inner = Tap(
            Checkpointed(True, torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.ReLU())), [layer]
        )
        if layer != 'c':
            with pytest.raises(RuntimeError, match=f'{layer} has no gradient'):
                inner(x, True)
            for module in (inner.a, inner.b, inner.c, inner.d):
                module.requires_grad_(False)
        inner(x, True)
    with torch.no_grad():
        bad(x, True)
    bad.eval()(x, True)
    bad.train().a.requires_grad_(False)
    assert [fm.requires_grad for fm in bad(x, True).fms] == [False, False, True], 'frozen parts are allowed'
    bad.requires_grad_(False)(x, True)
    net = small_net(forward=lambda net, x: net[1](net[0](x)).detach())
    Tap(net, ['0', '1'])(x, True)
    with pytest.raises(RuntimeError, match='2 has no gradient'):
        Tap(small_net(Detached()), ['2'])(x, True)


class Detached(torch.nn.Module):
    def forward(self, x):
        return x.detach()


def test_data_parallel_is_named():
    tap = Tap(small_net(), ['0'])
    replica = tap._replicate_for_data_parallel()
    for feats in (False, True):
        with pytest.raises(RuntimeError, match='nn.DataParallel.* DistributedDataParallel'):
            replica(torch.randn(2, 3, 8, 8), feats)
    inside = Tap(torch.nn.DataParallel(small_net()), ['module.0'])
    inside.wrapped.module[0]._is_replica = True  # as the copies of the threads are marked
    with pytest.raises(RuntimeError, match='nn.DataParallel'):
        inside(torch.randn(2, 3, 8, 8), True)


def test_a_tap_keeps_its_ways_when_copied():
    """Mode, closed hooks and a shared network; hooks of a copy report to the copy."""
    net = small_net()
    tap = Tap(net, ['0', '1'], to_map=None).eval()
    both = torch.nn.ModuleList([net, tap])
    twin_net, twin = copy.deepcopy(both)
    assert not twin.training and twin.wrapped is twin_net
    assert twin.get_submodule('0') is twin_net[0] is not net[0]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(twin(x, True).fms[1], tap(x, True).fms[1])
    twin.train()
    assert twin_net.training and not net.training
    assert [len(m._forward_hooks) for m in twin_net] == [len(m._forward_hooks) for m in net]
    tap.close()
    for closed in (tap, copy.deepcopy(tap)):
        with pytest.raises(RuntimeError, match='was not called'):
            closed(x, True)
    assert twin(x, True).fms[0].shape == (2, 4, 6, 6)
    tap.half()
    assert net[0].weight.dtype == torch.float16 and twin_net[0].weight.dtype == torch.float32


def test_a_network_with_a_child_called_net_and_parameters_of_its_own():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = small_net(), torch.nn.Parameter(torch.ones(()))
            self.register_buffer('seen', torch.zeros(()), persistent=False)

        def forward(self, x):
            return self.net(self.scale * x)

    tap = Tap(Own(), ['net.0'])
    assert tap.state_dict().keys() == Own().state_dict().keys() and 'scale' in tap.state_dict()
    double = {key: 2 * value for key, value in tap.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    out = torch.func.functional_call(tap.eval(), {'scale': double['scale']}, (x,))
    tap.load_state_dict({**tap.state_dict(), 'scale': double['scale']})
    assert torch.equal(tap(x), out) and tap.wrapped.scale == 2
    assert copy.deepcopy(tap).wrapped.scale is not tap.wrapped.scale


def test_a_layer_without_a_tensor_is_named():
    class Twice(torch.nn.Module):
        def forward(self, x):
            return x, x

    net = small_net(Twice(), forward=lambda net, x: net[2](x=net[1](input=net[0](x)))[0])
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match='2 is a tuple, not a tensor'):
        Tap(net, ['2'])(x, True)
    f = Tap(net, ['2'], [('2', 'in')], to_map=lambda x: x[0] if isinstance(x, tuple) else x)(x, True)
    assert torch.equal(f.fms[0], f.pres[0]), 'an input that is given by name is read, too'


def test_a_layer_that_is_not_called_is_named():
    pool = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), *pool, torch.nn.Linear(4, 2))
    net.spare = torch.nn.Identity()
    net.forward = lambda x: net[3](net[2](net[1](net[0](x))))
    with pytest.raises(RuntimeError, match='spare was not called; if it was replaced, make the Tap after'):
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


def test_a_tap_in_several_threads():
    """Students side by side ask one teacher at the same time: each gets the maps of its own images."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    met = threading.Barrier(2)

    class Meets(torch.nn.Module):
        def forward(self, x):
            met.wait(timeout=20)  # both passes are under way here
            return x

    conv = torch.nn.Conv2d(3, 4, 3)
    net = torch.nn.Sequential(
        conv, Meets(), torch.nn.ReLU(), Meets(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    )
    tap = Tap(net.eval(), fms=['0', '2'])
    images = [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8)]
    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(lambda img: tap(img, True), images))
    for img, f in zip(images, seen):
        assert torch.equal(f.fms[0], conv(img)) and len(f.out) == len(img)


def test_a_loss_of_maps_before_the_relu_wants_them_named():
    """A Tap without `pres` repeats the maps after it, in which AB would find no boundary."""
    from methods import METHODS

    row, x = METHODS['ab'], torch.randn(2, 3, 32, 32)
    named = tap_torchvision('resnet18', 10).eval()
    seen = named(x, True)
    assert len(row.build(row.loss, SimpleNamespace(s=seen, t=seen))) == 4
    after = Tap(torchvision.models.resnet18(num_classes=10), fms=['relu', 'layer1', 'layer2']).eval()(x, True)
    for s, t, side in ((after, seen, 'student'), (seen, after, 'teacher')):
        with pytest.raises(ValueError, match=f'the {side} must give maps from before the ReLU'):
            row.build(row.loss, SimpleNamespace(s=s, t=t))
