"""Pictures: equal to the golden vector, drawn by the real command, and black where nothing is known."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import pictures
from report import ka
from tests.conftest import ROOT
from tools.figures import (
    agreement,
    attention,
    cam,
    chosen,
    class_means,
    difference,
    grad_cam,
    looks,
    stretched,
)


@pytest.fixture(scope='module')
def z():
    with np.load(ROOT / 'tests/golden/callbacks_visual.npz') as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def test_matrices_are_the_golden_ones(z):
    (out_s, out_t), target, K = (z['in_out_s'], z['in_out_t']), z['in_target'], z['in_out_s'].shape[1]
    m_s, m_t = class_means(out_s, target, K), class_means(out_t, target, K)
    d, most, mean = difference(m_s, m_t, float(z['hp_max_diff']))
    for x, key in ((m_s, 'matrix_s'), (m_t, 'matrix_t'), (d, 'difference')):
        torch.testing.assert_close(x, z[f'out_{key}'], rtol=1e-9, atol=0)
    assert most == pytest.approx(float(z['out_max']), rel=1e-9)
    assert mean == pytest.approx(float(z['out_mean']), rel=1e-9)
    without = class_means(out_s, torch.where(target == 3, -100, target), K)
    assert without[3].abs().sum() == 0 and torch.equal(without[4], m_s[4])
    same = agreement(out_t, out_t)
    assert same == {'same_class': 100.0, 'kl': pytest.approx(0), 'logit_difference': 0}


def test_activation_maps_are_the_golden_ones(z):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(*z['param_fc_w'].T.shape).double()
            self.fc.load_state_dict({'weight': z['param_fc_w'], 'bias': z['param_fc_b']})

        def forward(self, img, _):
            fm = F.conv2d(img, z['param_conv_w'], z['param_conv_b'], padding=1).relu()
            return type('F', (), {'out': self.fc(fm.mean(dim=(2, 3))), 'fms': [fm]})

    net, classes = Net(), z['in_cam_class']
    f = net(z['in_img'].clone().requires_grad_(), True)
    fm, logit = f.fms[0], f.out.gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(fm, z['out_fm'], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cam(fm, net.fc.weight, classes), z['out_cam_raw'], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(attention(fm), z['out_attention'], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(stretched(grad_cam(fm, logit)), z['out_gradcam'], rtol=1e-9, atol=1e-12)
    seen, way = looks(net, z['in_img'], classes)
    assert way == 'CAM' and torch.equal(seen, cam(fm, net.fc.weight, classes))
    assert stretched(torch.ones(1, 2, 2)).sum() == 0


def test_unknown_is_black():
    assert pictures.segmentation(np.array([[-1, 2]]), 6).tolist() == [[[0, 0, 0], [236, 236, 228]]]
    assert len(np.unique(pictures.class_colours(21), axis=0)) == 21
    assert pictures.class_colours(21)[1].tolist() == [128, 0, 0]
    shown = pictures.depth(np.array([[0, np.nan, 2.0, 9.0]]), 2.0)
    assert shown[0].tolist() == [[0, 0, 0], [0, 0, 0], [253, 231, 37], [253, 231, 37]]
    n = np.zeros((3, 1, 3))
    n[:, 0, 1], n[2, 0, 2] = np.inf, -7.0
    assert pictures.normals(n)[0].tolist() == [[0, 0, 0], [0, 0, 0], [128, 128, 255]]
    sheet = pictures.grid([{'a': np.full((2, 2, 3), 7, np.uint8)}] * 2, ['one', 'two'])
    assert sheet.shape == (pictures.TITLE + 2 * (144 + pictures.GAP), 144 + pictures.GAP, 3)
    assert (sheet[pictures.TITLE + 143, :144] == 7).all()


@pytest.mark.parametrize('K,n,last', [(30, 20, 28), (100, 20, 95), (10, 20, 9)])
def test_classes_of_a_map_are_spread_over_all(K, n, last):
    of = chosen(torch.arange(K).repeat(2), n, 1)
    assert len(of) == min(n, K) and of[0] == 0 and of[-1] == last


def test_figures_of_two_networks(script, teacher, tmp_path, monkeypatch):
    words = ('--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8', '--data_name', 'shapes:96')
    out = tmp_path / 'out'
    call = ('tools.figures', *words, '--s_model', teacher, '--images', 3, '--out', out)
    done = script(*call)
    assert done.code == 0, done.err
    assert done.out.count('figure: ') == 4
    for name in ('correlation', 'tsne', 'cam', 'attention'):
        assert (out / f'{name}.png').stat().st_size > 5000 and (out / f'{name}.npz').exists()
    facts = json.loads((out / 'figures.json').read_text())
    (student,) = facts['students']
    assert student['max'] == 0 and student['same_class'] == 100 and 'command' in facts
    with np.load(out / 'tsne.npz') as file:
        assert file['points'].shape == (2, len(file['label']), 2)
        assert np.array_equal(*file['points']), 'equal networks, equal pictures'
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'matplotlib', None)
        done = script(*call[:-1], tmp_path / 'bare')
    assert done.code == 0 and done.out.count('figure: ') == 2 and 'pip install matplotlib' in done.out
    assert {path.name for path in (tmp_path / 'bare').iterdir()} == {
        *('cam.png', 'attention.png', 'figures.json'),
        *(f'{name}.npz' for name in ('correlation', 'tsne', 'cam', 'attention')),
    }
    done = script(*call[:-4], '--images', 1, '--classes', 2, '--out', out)
    assert done.code == 2 and done.err.count('\n') == 1 and 'needs 10 or more' in done.err
    done = script(*call[:-4], teacher, '--s_name', 'resnet8', 'resnet8', 'resnet8', '--out', out)
    assert done.code == 2 and done.err.count('\n') == 1
    done = script('tools.figures', '--help')
    assert done.code == 0 and 'mean logit' in done.out


def test_routing_is_drawn(script, teacher, tmp_path):
    words = ('--num_parts', 2, '--data_name', 'shapes:96', '--batch_size', 32, '--epochs', 1)
    for part in (0, 1):
        assert (
            script('train_base', '--net_name', 'resnet8', *words, '--part', part, '--note', f'p{part}').code
            == 0
        )
    files = [tmp_path / f'p{part}' / 'net.pt' for part in (0, 1)]
    words = ('--t_name', 'resnet8', '--t_model', *files, '--s_name', 'resnet8', *words[2:], '--note', 'run')
    done = script('train_ka', '--ka_mode', 'concat', *words, '--draw')
    assert done.code == 0, done.err
    with np.load(tmp_path / 'run/concat/draw/epoch_0001.npz') as file:
        routing = file['routing']
    result = json.loads((tmp_path / 'run/concat/results.json').read_text())
    assert routing.tolist() == [result['routing']]
    assert (tmp_path / 'run/concat/draw/curves.png').stat().st_size > 5000


def test_nothing_to_draw_is_one_line(script):
    words = ('--data_name', 'faces:48', '--attributes', 'Smiling', '--s_name', 'resnet8', '--epochs', 1)
    done = script('train_ka', '--ka_mode', 'scratch', *words, '--draw')
    assert done.code == 2 and done.err.count('\n') == 1 and '--draw: there is no picture' in done.err


def test_a_table_tells_runs_with_the_view_from_those_without():
    run = {'script': 'train_ka', 'method': 'scratch', 'data': 'scenes', 'teacher': None, 'experiment': 'a'}
    run |= {'tasks': ['seg', 'depth'], 'branch_points': [0, 0], 'parameters': 7, 'epochs': 2}
    runs = [run | {'last': {'miou': miou}, 'seed': seed} for seed, miou in enumerate((50.0, 52.0))]
    seen = run | {'last': {'miou': 60.0}, 'seed': 0, 'augment': {'zoom': 0.5}}
    _, one, two = ka.dense_table([*runs, seen])
    assert one[:2] == ['one network, labels (branches at 0, 0)', '51.0 +- 1.4'] and one[-1] == 2
    assert two[:2] == ['one network, labels, --augment (branches at 0, 0)', '60.0'] and two[-1] == 1
