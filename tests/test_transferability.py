"""The transferability metrics: authors' numbers, plain transcriptions, edges, errors, files that stand alone.

GOLDEN_DIR names another folder of vectors, as for tests/test_golden.py.
"""

import ast
import contextlib
import doctest
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import dataset
import models
import transferability as tr
import transferability.knowledge as kn
from tests import browser
from tests.conftest import ROOT

GOLDEN = Path(os.environ.get('GOLDEN_DIR') or ROOT / 'tests' / 'golden')
FILES = [p for p in sorted((ROOT / 'transferability').glob('*.py')) if p.stem != '__init__']


def vector(name: str, noise: float = 0.0) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f'{name}.npz', allow_pickle=False) as file:
        z = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    generator = torch.Generator().manual_seed(0)
    for key in [k for k in z if noise and k.startswith('in_') and z[k].is_floating_point()]:
        z[key] = z[key] * (1 + noise * torch.randn(z[key].shape, generator=generator, dtype=torch.float64))
    return z


def same(got, wanted, rtol=1e-9):
    got, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (got, wanted))
    scale = max(float(wanted.abs().max()), 1e-3)
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * scale)


# ----------------------------------------------------------------------------------------- authors' numbers


def golden_leep(z):
    same(tr.leep(z['in_prob_source'], z['in_label']), z['out_score'])


def golden_nce(z):
    same(tr.nce(z['in_source_label'], z['in_label']), z['out_score'])


def golden_logme(z):
    same(tr.logme(z['in_feat'], z['in_label']), z['out_score'])
    same(tr.logme(z['in_feat'], z['in_target_reg'], regression=True), z['out_score_reg'])
    _, alpha, beta = tr.log_evidence(z['in_feat'], z['in_label'])
    same(alpha, z['out_alpha'])
    same(beta, z['out_beta'])


def golden_hscore(z):
    same(tr.h_score(z['in_feat'], z['in_label']), z['out_score'])
    same(tr.h_score(z['in_feat'], z['in_label'], regularized=True), z['out_score_reg'])
    same(tr.shrinkage(z['in_feat']), z['out_shrinkage'])


def golden_depara(z):
    maps, feats, encoders = {}, {}, []
    for side in 'ab':
        layers = [
            nn.Conv2d(*z[f'param_{side}_{k}_weight'].shape[1::-1], 3, stride=stride, padding=1).double()
            for k, stride in ((0, 1), (2, 2))
        ]
        for k, layer in zip((0, 2), layers):
            layer.weight.data, layer.bias.data = z[f'param_{side}_{k}_weight'], z[f'param_{side}_{k}_bias']
        net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU())
        encoders.append(net)
        for output in ('sum', 'norm'):
            maps[output, side] = tr.attribution_map(net, z['in_x'], output=output)
            same(maps[output, side], z[f'out_attr_{output}_{side}'])
        with torch.no_grad():
            feats[side] = net(z['in_x']).mean(dim=(2, 3))
        same(feats[side], z[f'out_feat_{side}'])
        same(tr.edge_vector(feats[side], center=False), z[f'out_edge_{side}'])
    a, b = maps['sum', 'a'], maps['sum', 'b']
    same(tr.attribution_similarity(a, b), z['out_sim_attribution'])
    same(tr.attribution_similarity(a, b, channel=None), z['out_sim_kamal'])
    same(tr.affinity_matrix(encoders, z['in_x'])[0, 1], z['out_sim_attribution'])
    same(tr.affinity_matrix(encoders, [z['in_x']] * 2, channel=None)[1, 0], z['out_sim_kamal'])
    same(tr.node_similarity(a, b, channel='abs_mean'), z['out_sim_node_abs'])
    for center, key in ((False, 'out_sim_edge'), (True, 'out_sim_edge_centered')):
        same(tr.spearman(*(tr.edge_vector(feats[s], center) for s in 'ab')), z[key])
    same(tr.depara(a, feats['a'], b, feats['b'], lam=float(z['hp_lambda'])), z['out_sim_depara'])


def golden_quantify_knowledge(z):
    def features(img):
        return nn.functional.conv2d(img, z['param_conv_w'], z['param_conv_b'], stride=2, padding=1)

    img, noise = z['in_img'], z['in_noise']
    scale = kn.NoiseScale(tuple(z['in_sigma'].shape), dtype=torch.float64)
    with torch.no_grad():
        sigma_f = kn.layer_change(features, scale(img, noise)[0], img).mean()
    same(sigma_f, z['out_sigma_f'])
    scale.sigma.data = z['in_sigma'].clone()
    noisy, mean_entropy = scale(img, noise)
    same(scale.sigma.detach(), z['out_sigma_clamped'])
    feature = kn.layer_change(features, noisy, img).mean() / sigma_f
    loss = feature - z['hp_lambda'] * mean_entropy
    loss.backward()
    same(mean_entropy.detach(), z['out_entropy'])
    same(feature.detach(), z['loss_feature'])
    same(loss.detach(), z['loss'])
    same(scale.sigma.grad, z['grad_sigma'])
    found = kn.concepts(z['in_sigmas'], z['in_foreground'], float(z['hp_threshold']))
    same(found['background'], z['out_background_entropy'])
    made = kn.metrics(found, kn.distances(z['in_weight_diff'], z['in_checkpoints']))
    for where in ('fore', 'back'):
        same(made[f'{where}_mean'], z[f'out_{where}_max_mean'])
        same(made[f'{where}_var'], z[f'out_{where}_max_var'])
        same(made[f'{where}_slope'], z[f'out_{where}_slope'])
    for where in ('fore', 'back', 'total'):
        same(made[f'{where}_share'], z[f'out_{where}_share'])


VECTORS = {
    'leep': golden_leep,
    'nce': golden_nce,
    'logme': golden_logme,
    'hscore': golden_hscore,
    'depara': golden_depara,
    'quantify_knowledge': golden_quantify_knowledge,
}


@pytest.mark.parametrize('name', VECTORS)
def test_golden(name):
    VECTORS[name](vector(name))


@pytest.mark.parametrize('name', [name for name in VECTORS if name != 'nce'])  # nce reads integers alone
def test_the_comparison_can_fail(name):
    with pytest.raises(AssertionError):
        VECTORS[name](vector(name, noise=1e-5))


# ------------------------------------------------------------------------------------ plain transcriptions


def batch(n=60, d=7, classes=3, shift=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % classes
    centre = torch.randn(classes, d, generator=g, dtype=torch.float64)
    return torch.randn(n, d, generator=g, dtype=torch.float64) + shift * centre[label] + 0.7, label


def plain_logme(feat, label):
    """The page, line by line, with the whole SVD and all D terms."""
    f, scores = feat.numpy(), []
    n, d = f.shape
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    sigma = s**2
    for c in range(int(label.max()) + 1):
        y = (label.numpy() == c).astype(float)
        x = u.T @ y
        r0, a, b = y @ y - x @ x, 1.0, 1.0
        for _ in range(11):
            t = a / b
            gamma = (sigma / (sigma + t)).sum()
            m2, res = (sigma * x**2 / (t + sigma) ** 2).sum(), (x**2 / (1 + sigma / t) ** 2).sum() + r0
            a, b = gamma / (m2 + 1e-5), (n - gamma) / (res + 1e-5)
            if abs(a / b - t) / t <= 1e-3:
                break
        padded = np.concatenate([sigma, np.zeros(d - len(sigma))])
        logs = d / 2 * np.log(a) + n / 2 * np.log(b) - 0.5 * np.log(a + b * padded).sum()
        scores.append((logs - b / 2 * res - a / 2 * m2 - n / 2 * np.log(2 * np.pi)) / n)
    return np.mean(scores)


def plain_h_score(feat, label, regularized):
    f = feat.numpy()
    g = np.stack([f[label.numpy() == y].mean(axis=0) for y in label])
    if not regularized:
        return np.trace(np.linalg.pinv(np.cov(f.T), rcond=1e-15) @ np.cov(g.T))
    x = f - f.mean(axis=0)
    n, d = x.shape
    s = x.T @ x / n
    mu = np.trace(s) / d
    d2 = ((s - mu * np.eye(d)) ** 2).sum()
    b2 = min(d2, ((x**2).T @ (x**2) / n - s**2).sum() / n)
    al = b2 / d2
    return np.trace(np.linalg.pinv((1 - al) * s + al * mu * np.eye(d)) @ ((1 - al) * np.cov(g.T)))


def plain_transrate(feat, label, eps=1e-4):
    def rate(z):
        return 0.5 * np.linalg.slogdet(np.eye(z.shape[1]) + z.T @ z / (len(z) * eps))[1]

    z, y = feat.numpy() - feat.numpy().mean(axis=0), label.numpy()
    return rate(z) - sum((y == c).mean() * rate(z[y == c]) for c in np.unique(y))


def plain_gbc(feat, label, covariance):
    x = feat.numpy() - feat.numpy().mean(axis=0)
    x = x @ np.linalg.svd(x, full_matrices=False)[2][:5].T
    total = 0.0
    parts = [x[label.numpy() == c] for c in np.unique(label)]
    for i, a in enumerate(parts):
        for j, b in enumerate(parts):
            sa, sb = (np.diag(p.var(axis=0)) for p in (a, b))
            if covariance == 'spherical':
                sa, sb = (np.eye(5) * np.trace(s) / 5 for s in (sa, sb))
            s, m = (sa + sb) / 2, a.mean(axis=0) - b.mean(axis=0)
            log = np.log(np.linalg.det(s) / np.sqrt(np.linalg.det(sa) * np.linalg.det(sb)))
            total += (i != j) * np.exp(-m @ np.linalg.inv(s) @ m / 8 - log / 2)
    return -total


def plain_sfda(feat, label, a=5.0):
    """In the space of the projection U, as the paper writes it."""
    y, q = label.numpy(), np.bincount(label.numpy()) / len(label)

    def posterior(f, lam):
        means = np.stack([f[y == c].mean(axis=0) for c in range(len(q))])
        sw = (f - means[y]).T @ (f - means[y]) / len(f)
        lam = np.exp(-a * np.linalg.eigvalsh(sw)[-1]) if lam is None else lam
        sb = (means - f.mean(axis=0)).T @ np.diag(q) @ (means - f.mean(axis=0))
        _, u = scipy.linalg.eigh(sb, (1 - lam) * sw + lam * np.eye(f.shape[1]))
        u = u[:, -(len(q) - 1) :]
        delta = f @ u @ u.T @ means.T - 0.5 * np.diag(means @ u @ u.T @ means.T) + np.log(q)
        return delta - scipy.special.logsumexp(delta, axis=1, keepdims=True), lam

    f, rows = feat.numpy(), np.arange(len(y))
    log_p, lam = posterior(f, None)
    p = np.exp(log_p[rows, y])[:, None]
    others = np.stack([f[y != c].mean(axis=0) for c in range(len(q))])
    return posterior(p * f + (1 - p) * others[y], lam)[0][rows, y].mean()


@pytest.mark.parametrize('n,d', [(60, 7), (23, 31)])
def test_logme_has_all_terms(n, d):
    """Also for more dimensions than samples, where the authors' current solver leaves D - N terms out."""
    feat, label = batch(n, d)
    same(tr.logme(feat, label), plain_logme(feat, label))


def test_h_score_plain_and_regularized():
    for n, d in ((60, 7), (23, 31)):
        feat, label = batch(n, d)
        same(tr.h_score(feat, label, regularized=True), plain_h_score(feat, label, True))
    feat, label = batch()
    same(tr.h_score(feat, label), plain_h_score(feat, label, False))
    same(tr.h_score(feat * torch.logspace(-6, 6, 7).double(), label), tr.h_score(feat, label))


def test_those_of_a_formula_only():
    feat, label = batch(shift=0.6)
    same(tr.transrate(feat, label), plain_transrate(feat, label))
    for covariance in ('spherical', 'diagonal'):
        same(tr.gbc(feat, label, 5, covariance), plain_gbc(feat, label, covariance))
    same(tr.sfda(feat / 3, label), plain_sfda(feat / 3, label))
    wide, label = batch(24, 40, shift=0.6)
    same(tr.transrate(wide, label), plain_transrate(wide, label))


def test_nleep_finds_the_clusters():
    """Two far clusters per class are told by a mixture, not by one Gaussian per class; seeds agree."""
    g = torch.Generator().manual_seed(0)
    label = torch.arange(240) % 2
    centre = torch.tensor([[-9.0, 0], [0, 9], [9, 0], [0, -9]])[torch.arange(240) % 4]
    feat = torch.cat([torch.randn(240, 2, generator=g) * 0.5 + centre, torch.randn(240, 3, generator=g)], 1)
    assert tr.nleep(feat, label) > -0.02
    assert tr.nleep(feat, label) == tr.nleep(feat, label)
    assert abs(tr.nleep(feat, label) - tr.nleep(feat, label, seed=3)) < 0.02
    noise = torch.randn(240, 5, generator=g)
    assert tr.nleep(noise, label) < -0.4


def test_spearman_is_scipys():
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 50, generator=g, dtype=torch.float64)
    for a, b in ((u, v), (u.round(decimals=0), v), (u.round(), v.round())):
        same(tr.spearman(a, b), scipy.stats.spearmanr(a, b).statistic)
    rank = [torch.argsort(torch.argsort(x, descending=True)).double() for x in (u, v)]
    same(tr.spearman(u, v), 1 - 6 * (rank[0] - rank[1]).square().sum() / (50 * (50**2 - 1)))
    assert tr.spearman(torch.ones(5), torch.arange(5.0)) == 0


def test_better_features_rank_higher():
    """Every metric of features prefers the separated classes to the mixed ones."""
    for name in FEATURES:
        scores = [FEATURES[name](*batch(120, 8, shift=shift)) for shift in (0.0, 1.0, 3.0)]
        assert scores == sorted(scores) and scores[0] < scores[2], (name, scores)


# ------------------------------------------------------------------------------------------------- edges

FEATURES = {
    'logme': tr.logme,
    'h_score': tr.h_score,
    'h_score_reg': lambda feat, label: tr.h_score(feat, label, regularized=True),
    'nleep': tr.nleep,
    'transrate': tr.transrate,
    'gbc': tr.gbc,
    'sfda': tr.sfda,
}


@pytest.mark.parametrize('name', FEATURES)
def test_edges(name):
    score = FEATURES[name]
    feat, label = batch(24, 6)
    cases = {
        'equal features': (torch.full((24, 6), 0.1), label),
        'zeros': (torch.zeros(24, 6), label),
        'singular': (torch.cat([feat, feat, torch.ones(24, 1)], dim=1), label),
        'more dimensions than samples': (torch.randn(24, 50), label),
        'a class of one image': (feat, torch.cat([torch.tensor([3]), label[1:]])),
        'one class': (feat, torch.zeros(24).long()),
        'one image': (feat[:1], torch.zeros(1).long()),
        'tiny': (feat * 1e-12, label),
        'huge': (feat * 1e12, label),
        'half precision': (feat.half(), label),
        'a class missing': (feat, label * 2),
    }
    for case, (x, y) in cases.items():
        if name == 'logme' and case == 'a class missing':  # its column would be explained by nothing
            with pytest.raises(ValueError, match=r'every class of 0..4, got none of 1, 3: target.unique'):
                score(x, y)
            continue
        assert np.isfinite(score(x, y)), case
    assert np.isnan(score(torch.full((24, 6), torch.nan), label))
    bad = feat.clone()
    bad[3, 2] = torch.inf
    assert np.isnan(score(bad, label))
    out = torch.where(torch.arange(24) < 5, -100, label)
    same(score(feat, out), score(feat[5:], label[5:]), 1e-12)
    assert not feat.requires_grad and score(feat.requires_grad_(), label) == score(feat.detach(), label)
    for wrong in (
        (feat[0], label),
        (feat, label[:5]),
        (feat, label.float()),
        (feat, label - 2),
        (feat, None),
    ):
        with pytest.raises(ValueError, match=r'(?s)must .*got .*: '):
            score(*wrong)


def test_values_at_the_edges():
    feat, label = batch(24, 6)
    entropy = -np.log(3)
    flat = torch.full((24, 6), 0.1)
    assert tr.h_score(flat, label) == tr.h_score(flat, label, regularized=True) == 0
    same(tr.h_score(torch.randn(8, 50).double(), torch.arange(8) % 3), 2.0)  # whatever the features are
    same([tr.nleep(flat, label), tr.sfda(flat, label)], [entropy, entropy])
    same([tr.gbc(flat, label), tr.transrate(flat, label)], [-6.0, 0.0])
    same(tr.logme(torch.cat([feat, feat * 0], 1), label), plain_logme(torch.cat([feat, feat * 0], 1), label))
    same(tr.h_score(torch.cat([feat, feat[:, :2] * 3], 1), label), tr.h_score(feat, label), 1e-7)


def test_probabilities():
    label = torch.arange(6) % 2
    p = torch.full((6, 4), 0.5) * torch.tensor([1.0, 1, 0, 0])  # two source classes are never predicted
    same(tr.leep(p, label), -np.log(2))
    same(tr.leep(torch.eye(3)[torch.tensor([0, 0, 2, 2, 0, 2])], torch.tensor([0, 0, 3, 3, 0, 3])), 0.0)
    assert np.isnan(tr.leep(p * torch.nan, label))
    same(tr.leep(p, torch.tensor([0, 1, 0, 1, -100, -100])), tr.leep(p[:4], label[:4]))
    for wrong in (torch.randn(6, 4), p * 2, p[:, 0], p[:0]):
        with pytest.raises(ValueError, match='leep: prob_source must .*got .*: '):
            tr.leep(wrong, label)
    assert tr.nce(torch.tensor([7, 7, 2]), torch.tensor([0, 0, 5])) == 0
    same(tr.nce(torch.zeros(6).long(), label), -np.log(2))
    same(tr.nce(torch.tensor([0, 0, -100]), torch.tensor([0, 1, 1])), -np.log(2))
    for wrong in (((6,), 5), ((6, 1), 6), ((0,), 0)):
        with pytest.raises(ValueError, match='nce: .*must .*got .*: '):
            tr.nce(torch.zeros(wrong[0]).long(), torch.zeros(wrong[1]).long())
    with pytest.raises(ValueError, match='keep rows that have both'):
        tr.nce(torch.tensor([-100, 1]), torch.tensor([1, -100]))


def test_options_are_checked():
    feat, label = batch(24, 6)
    for call in (
        lambda: tr.nleep(feat, label, energy=0),
        lambda: tr.nleep(feat, label, steps=0),
        lambda: tr.transrate(feat, label, eps=0),
        lambda: tr.gbc(feat, label, covariance='full'),
        lambda: tr.gbc(feat, label, dim=0),
        lambda: tr.sfda(feat, label, a=0),
        lambda: tr.logme(feat, feat[:5], regression=True),
        lambda: tr.build_graph(['a'], torch.zeros(1, 1), topk=0),
        lambda: tr.build_graph(['a'], torch.zeros(2, 2)),
        lambda: tr.layout(torch.tensor([[0.0, torch.nan], [0.0, 0.0]])),
        lambda: tr.edge_vector(feat[:2]),
        lambda: tr.spearman(feat[0], feat[0, :3]),
    ):
        with pytest.raises(ValueError, match=r'(?s)must .*got .*: '):
            call()
    same(tr.logme(feat, feat[:, 0], regression=True), tr.logme(feat, feat[:, :1], regression=True))


# ------------------------------------------------------------------------------------------- attributions


def test_attribution_maps():
    x = torch.randn(4, 3, 8, 8)
    weight = torch.randn(3, 8, 8)
    map_ = tr.attribution_map(lambda img: (img * weight).flatten(1), x)
    same(map_, x * weight)
    same(tr.attribution_map(lambda img: img * weight, x, method='saliency'), weight.abs().expand(4, 3, 8, 8))
    assert not map_.requires_grad
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match='encoder.eval()'):
        tr.attribution_map(net, x)
    alone = tr.attribution_map(net.eval(), x[:1])
    with torch.inference_mode():
        same(tr.attribution_map(net, x)[:1], alone, 1e-5)
    assert all(p.grad is None for p in net.parameters())
    dead = tr.attribution_map(lambda img: (img - 99).relu(), x, output='norm')
    assert not dead.any() and tr.attribution_similarity(dead, map_) == 0
    assert not tr.attribution_map(lambda img: torch.ones(4, 2), x).any()
    for call in (
        lambda: tr.attribution_map(net, x[0]),
        lambda: tr.attribution_map(net, x, method='lrp'),
        lambda: tr.attribution_map(lambda img: img.sum(), x),
        lambda: tr.attribution_similarity(map_, map_[:2]),
        lambda: tr.attribution_similarity(map_, map_, channel='max'),
        lambda: tr.attribution_similarity(map_, map_[:, :2], channel=None),
        lambda: tr.affinity_matrix([net, net], [x]),
        lambda: tr.depara(map_, map_[:2], map_, map_),
    ):
        with pytest.raises(ValueError, match=r'(?s)must .*got .*: '):
            call()


def test_affinity_of_maps_of_unlike_sizes():
    maps = [torch.randn(5, 3, s, s) for s in (8, 8, 4)]
    made = tr.map_affinity(maps)
    assert torch.equal(made, made.T) and torch.equal(made.diagonal(), torch.ones(3).double())
    for i, j in ((0, 1), (0, 2), (1, 2)):
        same(made[i, j], tr.attribution_similarity(maps[i], maps[j]))
        same(made[i, j], tr.node_similarity(maps[i], maps[j]))


# -------------------------------------------------------------------------------------------------- graph

DIST = torch.tensor([[9, 1, 2, 4], [1, 9, 3, 3], [2, 3, 9, 6], [4, 5, 6, 9]]).double()


def test_graph_keeps_the_nearest():
    graph = tr.build_graph(['a', 'b', {'name': 'c', 'dataset': 'x'}, 'd'], DIST, topk=1, normalize=False)
    assert graph['edges'] == [[0, 1, 1.0], [1, 0, 1.0], [2, 0, 2.0], [3, 0, 4.0]]
    assert [n['name'] for n in graph['nodes']] == list('abcd')
    assert graph['nodes'][2] == {
        'index': 2,
        'name': 'c',
        'task': 'classification',
        'dataset': 'x',
        'url': None,
    }
    two = tr.build_graph(list('abcd'), DIST, topk=2, normalize=False)['edges']
    assert [1, 2, 3.0] not in two and [1, 0, 1.0] in two  # two edges of equal length at the limit: both go
    for topk in (3, 99):
        edges = tr.build_graph(list('abcd'), DIST, topk=topk)['edges']
        assert len(edges) == 12 and all(i != j for i, j, _ in edges)
        assert min(e[2] for e in edges) == pytest.approx(1e-8 / 5, rel=1e-6) and max(e[2] for e in edges) == 1
        assert [0, 1] in [e[:2] for e in edges]
    assert tr.build_graph(['a'], torch.zeros(1, 1))['edges'] == []


def test_layout_keeps_distances_of_a_plane():
    points = torch.randn(9, 2, dtype=torch.float64)
    got = tr.layout(torch.cdist(points, points))
    same(torch.cdist(got, got), torch.cdist(points, points), 1e-6)
    assert torch.equal(got, tr.layout(torch.cdist(points, points)))
    assert tr.layout(torch.zeros(1, 1)).shape == (1, 2) and torch.isfinite(tr.layout(DIST)).all()


# --------------------------------------------------------------------------------------------- the files


def test_files_stand_alone_and_explain_themselves(tmp_path):
    """Each file, copied alone, runs its own Use in a fresh process that cannot see the checkout."""
    program = 'import doctest, importlib, sys\n' + ''.join(
        f'sys.path.insert(0, {str(tmp_path / p.stem)!r})\n'
        f'm = importlib.import_module({p.stem!r})\n'
        'done = doctest.testmod(m)\n'
        'assert done.attempted >= 3 and not done.failed, m\n'
        'sys.path.pop(0)\n'
        for p in FILES
    )
    program += (
        "assert not [m for m in sys.modules if m.split('.')[0] in ('transferability', 'kd_losses', 'engine')]"
    )
    for path in FILES:
        (tmp_path / path.stem).mkdir()
        (tmp_path / path.stem / path.name).write_bytes(path.read_bytes())
        tree = ast.parse(path.read_text())
        doc = ast.get_docstring(tree)
        assert re.search(r'(19|20)\d\d', doc) and re.search(r'^Differences:', doc, re.M), path.stem
        assert re.search(r'^Source: (formula only|[\w-]+/[\w-]+, \w)', doc, re.M), path.stem
        assert len(doc.splitlines()) <= 45, path.stem
        assert (
            doctest.DocTestParser().get_examples(doc)[1].source
            == f'from {path.stem} import '
            + (doctest.DocTestParser().get_examples(doc)[1].source.split(' import ')[1])
        )
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {n.split('.')[0] for n in names} <= {'torch', 'math', 'collections'}, path.stem
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
                said = ast.get_docstring(node)
                assert node.name in tr.__all__ and said, node.name
                for argument in node.args.args if 'Args:' in said else ():
                    assert re.search(rf'\b{argument.arg}\b', said), f'{node.name}: {argument.arg}'
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_helpers_of_one_name_are_one_text():
    seen = {}
    for path in FILES:
        source = path.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith('_'):
                seen.setdefault(node.name, set()).add(ast.get_source_segment(source, node))
    assert {name for name, texts in seen.items() if len(texts) > 1} == set()


# --------------------------------------------------------------------------------------------- the tools


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    """Four untrained networks in folders as train_base.py leaves them, and a file without results.json."""
    root = tmp_path_factory.mktemp('networks')
    told = [('a', 'resnet8', list(range(5))), ('b', 'resnet8', list(range(5))), ('c', 'resnet14', None)]
    told += [('d', 'MobileNetV2', [5, 6, 7])]
    for seed, (name, net, classes) in enumerate(told):
        torch.manual_seed(seed)
        (root / name).mkdir()
        torch.save(models.build(net, len(classes or range(10))).state_dict(), root / name / 'net.pt')
        facts = {'student': net, 'data': 'shapes', 'classes': classes, 'seed': seed}
        (root / name / 'results.json').write_text(json.dumps(facts))
    torch.save(models.build('resnet8', 7).state_dict(), root / 'alone.pt')
    return root


def test_the_tool_ranks_and_compares(script, networks, img_root, tmp_path):
    words = (f'{networks}/[abcd]/net.pt', f'resnet8={networks}/alone.pt@cifar10', '--data_name', 'shapes:200')
    words += ('--classes', '5-8', '--img_root', img_root, '--threads', 1, '--images', 60, '--out', tmp_path)
    done = script(
        'tools.transferability', *words, '--train', 3, '--target', networks / 'd/net.pt', '--probes', 6
    )
    assert done.code == 0, done.err
    content = json.loads((tmp_path / 'ranking.json').read_text())
    rows = content['networks']
    assert [r['name'] for r in rows] == ['a', 'b', 'c', 'd', 'alone']
    assert [r['seen'] for r in rows] == [False, False, True, True, None]
    assert rows[4]['data'] == 'cifar10' and rows[4]['trained_on'] is None
    names = {*FEATURES, 'leep', 'nce', 'attribution', 'depara'}
    for r in rows:
        assert r['metrics'].keys() == names and all(v is not None for v in r['metrics'].values())
        assert 0 <= r['accuracy'] <= 100 and len(r['classes'] or []) in (0, 3, 5)
    for name in names:
        scores = [r['metrics'][name] for r in rows]
        assert [r['ranks'][name] for r in rows] == [1 + sum(x > s for x in scores) for s in scores]
    assert rows[3]['metrics']['attribution'] == pytest.approx(1)
    assert rows[3]['metrics']['depara'] == pytest.approx(1.25)
    found = content['correlation']['all networks']
    accuracy = [r['accuracy'] for r in rows]
    for name in names:
        tau = scipy.stats.kendalltau([r['metrics'][name] for r in rows], accuracy).statistic
        assert found[name]['kendall'] == pytest.approx(tau, nan_ok=True)
    assert (tmp_path / 'table.txt').read_text().strip() == done.out.strip()
    assert 'rank correlation' in done.out and content['command'].endswith('--probes 6')

    again = script('tools.transferability', *words, '--train', 1, '--tune', 'all', '--test_images', 20)
    assert again.code == 0, again.err
    assert [r['metrics'] for r in json.loads((tmp_path / 'ranking.json').read_text())['networks']] == [
        {k: v for k, v in r['metrics'].items() if k not in ('attribution', 'depara')} for r in rows
    ]


def test_mistakes_of_the_tools(script, networks, img_root, tmp_path):
    where = ('--data_name', 'shapes:40', '--img_root', img_root, '--threads', 1)
    (tmp_path / 'list.json').write_text('[{"net": "resnet8"}]')
    for words, said in (
        ((networks / 'alone.pt',), 'write NETWORK=FILE'),
        ((f'resnet14={networks}/alone.pt',), 'does not fit the network'),
        (('nothing/*.pt',), 'no file has such a name'),
        ((tmp_path / 'list.json',), 'wanted a list of'),
        ((f'resnet8={networks}/alone.pt@cifar', '--out', tmp_path), "no data set is called 'cifar'"),
        ((networks / 'a/net.pt', '--images', 3), 'classes are among them, take more --images'),
        ((networks / 'a/net.pt', '--classes', 5), '--classes 5: a task has two classes or more'),
        ((networks / 'a/net.pt', '--tune', 'all'), '--tune: nothing is trained or tested without --train'),
        ((networks / 'a/net.pt', '--tune_lr', 1), '--tune_lr: nothing is trained'),
        ((networks / 'a/net.pt', '--test_images', 9), '--test_images: nothing is trained'),
        ((networks / 'a/net.pt', '--probes', 9), '--probes: no maps are compared without --target'),
    ):
        done = script('tools.transferability', *words, *where)
        assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err
    done = script('tools.transferability_graph', networks / 'a/net.pt', *where, '--out', tmp_path)
    assert done.code == 2 and 'two networks' in done.err


def test_what_a_source_is(networks):
    """Its images have its own mean and std, its classes come from its file, and what it saw is known."""
    from engine import sources

    words = [f'resnet8={networks}/alone.pt@cifar10', networks / 'd/net.pt']
    alone, d = sources.read_sources([str(word) for word in words], 'shapes')
    pixel = torch.rand(2, 3, 4, 4)
    as_data = {
        name: [torch.tensor(x)[:, None, None] for x in dataset.mean_std(name)]
        for name in dataset.DATA
        if name != 'arrays'  # which says it in its files
    }
    with pytest.raises(ValueError, match='in their files'):
        dataset.mean_std('arrays')
    images = {name: (pixel - mean) / std for name, (mean, std) in as_data.items()}
    same(alone.seen_by(images['shapes'], 'shapes:40'), images['cifar10'], 1e-5)
    assert d.seen_by(images['shapes'], 'shapes') is images['shapes']
    assert alone.load(torch.device('cpu')).classifier_layer().out_features == 7
    assert d.load(torch.device('cpu')).classifier_layer().out_features == 3
    assert d.saw('shapes:99', [7, 8]) and d.saw('shapes', None) and not d.saw('shapes', [8, 9])
    assert d.saw('cifar10', [5]) is False and alone.saw('cifar10', None) is None
    assert [sources.written(c) for c in ([3], [0, 1], [0, 1, 2, 7], [5, 6, 7])] == [
        '3',
        '0,1',
        '0-2,7',
        '5-7',
    ]


def test_rank_correlations():
    from tools.transferability import agreement, ranks

    assert ranks([3.0, None, 5.0, 3.0]) == [2, None, 1, 2]
    assert agreement([1.0, 2.0, 3.0, None], [10.0, 20.0, 30.0, 0.0]) == {'kendall': 1.0, 'weighted': 1.0}
    assert agreement([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])['kendall'] is None  # a constant ranks nothing
    assert agreement([1.0, 2.0], [1.0, 2.0])['kendall'] is None


@pytest.fixture(scope='module')
def graph(networks, img_root, tmp_path_factory):
    """The graph of the networks, once; names in it try to break out of the page."""
    folder = tmp_path_factory.mktemp('graph')
    listed = [{'file': str(networks / k / 'net.pt'), 'name': f'{k}</script><b>'} for k in 'abcd']
    (folder / 'list.json').write_text(json.dumps(listed))
    words = [
        'graph.py',
        folder / 'list.json',
        '--data_name',
        'shapes:40',
        '--img_root',
        img_root,
        '--threads',
        1,
    ]
    words += ['--probes', 6, '--out', folder, '--topk', 2, '--title', 'A & B']
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, 'argv', [str(word) for word in words])
        main = importlib.import_module('tools.transferability_graph').main
        main()
        patch.setattr(tr, 'attribution_map', None)  # the second time the maps are there
        main()
    assert len(list((folder / 'maps').glob('*.pt'))) == 4
    return folder, said.getvalue()


def test_the_graph(graph):
    folder, said = graph
    content = json.loads((folder / 'graph.json').read_text())
    assert [n['index'] for n in content['nodes']] == [0, 1, 2, 3]
    assert content['nodes'][0].keys() >= {'name', 'task', 'dataset', 'url', 'index', 'position'}
    assert len(content['edges']) == 8 and all(i != j for i, j, _ in content['edges'])
    affinity = torch.tensor(content['affinity'])
    assert torch.equal(affinity, affinity.T) and torch.equal(affinity.diagonal(), torch.ones(4))
    likeness = content['likeness']['by training set']
    assert likeness['within'] == pytest.approx(float(affinity[0, 1]), abs=1e-4)
    assert likeness['between'] == pytest.approx(float(affinity.triu(1).sum() - affinity[0, 1]) / 5, abs=1e-4)
    alone = content['likeness']['by training set, one architecture']  # a and b are resnet8, c and d others
    assert (alone['pairs_within'], alone['pairs_between'], alone['nearest_in_group']) == (1, 0, 1.0)
    kinds = content['likeness']['by common classes']
    assert {kind: k['pairs'] for kind, k in kinds.items()} == {
        'the same classes': 1, 'some classes in common': 3, 'no class in common': 2,
    }  # fmt: skip
    assert 'within' in said and (folder / 'graph.png').stat().st_size > 10_000


def test_the_page_is_one_file(graph):
    """Nothing is fetched, names stay text, and what the keyboard and a screen reader need is there."""
    text = (graph[0] / 'graph.html').read_text()
    assert not re.search(r'(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest|import\(', text)
    assert set(re.findall(r'https?://[^\'"\s]+', text)) == {
        'http://www.w3.org/2000/svg'
    }  # a name, not a place
    assert '{{' not in text and '<title>A &amp; B</title>' in text and '</script><b>' not in text
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S)[1])
    assert data['nodes'][0]['name'] == 'a</script><b>' and len(data['affinity']) == 4
    for wanted in (
        'lang="en"',
        'prefers-color-scheme: dark',
        'aria-live',
        'tabindex',
        '<noscript>',
        'ArrowLeft',
    ):
        assert wanted in text, wanted


@pytest.mark.skipif(not shutil.which('node'), reason='the logic of the page needs node')
def test_the_logic_of_the_page(graph):
    logic = re.search(r'<script id="logic">(.*?)</script>', (graph[0] / 'graph.html').read_text(), re.S)[1]
    logic += """
    const assert = require('assert');
    assert.deepStrictEqual(Object.keys(module.exports), ['placed', 'nearest', 'lines', 'moved', 'kept']);
    const p = placed([{position: [0, 0]}, {position: [2, 1]}], 100, 100, 10);
    assert.deepStrictEqual(p, [{x: 10, y: 70}, {x: 90, y: 30}]);
    assert.deepStrictEqual(placed([{position: [3, 3]}], 100, 60, 10), [{x: 50, y: 30}]);
    assert.deepStrictEqual(nearest([[1, 0.2, 0.5], [0.2, 1, 0], [0.5, 0, 1]], 0, 5), [[2, 0.5], [1, 0.2]]);
    assert.deepStrictEqual(lines([[0, 1, 0.5], [1, 0, 0.3], [2, 1, 0.9]]), [[0, 1, 0.3], [1, 2, 0.9]]);
    assert.deepStrictEqual(moved({x: 1, y: 2}, 'ArrowUp', true), {x: 1, y: -38});
    assert.strictEqual(moved({x: 1, y: 2}, 'a', false), null);
    assert.deepStrictEqual(kept({x: -5, y: 700}, 100, 100), {x: 10, y: 90});
    """
    done = subprocess.run(['node', '-e', logic], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not browser.find(), reason='the page in a browser needs Chromium')
def test_the_page_in_a_browser(graph, tmp_path):
    """Hover, drag, arrow keys, Enter, a set hidden, dark mode; nothing fetched, nothing thrown."""
    url = (graph[0] / 'graph.html').as_uri()
    with browser.Browser(browser.find(), tmp_path) as page:
        page.open(url)

        def circle(i):
            return page.js(f'(() => {{ const d = document.querySelectorAll("circle.node")[{i}], '
                           'b = d.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2, '
                           '+d.getAttribute("cx"), +d.getAttribute("cy"), d.getAttribute("aria-pressed"), '
                           'getComputedStyle(d).display] })()')  # fmt: skip

        def about():
            return page.js('document.getElementById("about").innerText')

        assert page.js('document.querySelectorAll("circle.node").length') == 4
        assert 'Point at a network' in about()
        x, y, cx, cy, *_ = circle(1)
        page.mouse('mouseMoved', x, y)
        assert about().startswith('b</script><b>') and 'trained on shapes 0-4, seed 1' in about()
        others = [circle(i) for i in (0, 2, 3)]
        page.mouse('mousePressed', x, y, held=True)
        for step in (10, 20, 30):
            page.mouse('mouseMoved', x - step, y - step / 2, held=True)
        page.mouse('mouseReleased', x - 30, y - 15)
        x2, y2, cx2, cy2, *_ = circle(1)
        assert (x2, y2) == pytest.approx((x - 30, y - 15), abs=1.5) and (cx2, cy2) != (cx, cy)
        assert [circle(i) for i in (0, 2, 3)] == others
        ends = page.js(
            '[...document.querySelectorAll(".edge")].flatMap(l => [1, 2].map(k => ["x", "y"].map('
            'axis => +l.getAttribute(axis + k))))'
        )
        assert [cx2, cy2] in ends and [cx, cy] not in ends  # its edges have come along
        page.mouse('mouseMoved', 5, 5)
        page.mouse('mouseMoved', x2 + 100, y2)  # let go: it stays
        assert circle(1)[2:4] == [cx2, cy2]

        page.key('Tab')  # from the one that was clicked to the next
        assert page.js('document.activeElement.getAttribute("data-index")') == '2'
        assert about().startswith('c</script><b>')
        before = circle(2)
        page.key('ArrowDown')
        page.key('ArrowRight', shift=True)
        assert circle(2)[2:4] == pytest.approx([min(before[2] + 40, 990), min(before[3] + 10, 690)])
        page.key('Enter')
        assert circle(2)[4] == 'true'
        page.key('Tab')
        assert about().startswith('c</script><b>')  # kept while another one has the focus
        page.key('Escape')
        assert circle(2)[4] == 'false' and about().startswith('d</script><b>')

        page.js('document.querySelector("#sets input").click()')
        assert [circle(i)[5] for i in range(4)].count('none') == page.js(
            'JSON.parse(document.getElementById("data").textContent).nodes.filter(n => n.dataset === '
            'document.querySelector("#sets label").innerText).length'
        )
        page.js('document.getElementById("again").click()')
        assert circle(1)[2:4] == [cx, cy]

        ground = 'getComputedStyle(document.body).backgroundColor'
        light = page.js(ground)
        dark = [{'name': 'prefers-color-scheme', 'value': 'dark'}]
        page.call('Emulation.setEmulatedMedia', features=dark)
        assert (
            sum(map(int, re.findall(r'\d+', page.js(ground))))
            < 150
            < sum(map(int, re.findall(r'\d+', light)))
        )
        requests = [
            e['params']['request']['url']
            for e in page.events
            if e.get('method') == 'Network.requestWillBeSent'
        ]
        assert requests == [url]
        assert not [
            e for e in page.events if e.get('method') in ('Runtime.exceptionThrown', 'Log.entryAdded')
        ]
