"""What the scripts feed a loss, how they build it and what part of a training it gets."""

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import models
import train_dense
from dataset import annotated, folder
from dataset.boxes import load_boxes
from dataset.parts import ClassParts
from dataset.resident import Resident
from dataset.scenes import load_scenes
from dataset.views import View
from engine.batch import Probe
from engine.data import first_images
from engine.dense_build import rows_for
from engine.errors import UserError
from engine.peers import build_step
from engine.teachers import Teachers
from ka_losses.concat_kd import ConcatKD
from kd_losses import (
    adain,
    bss,
    camkd,
    catkd,
    cd,
    deep_geometric_graphs,
    fcfd,
    fitnet,
    norm,
    quest,
    sdb,
    sdd,
    simkd,
    srrl,
)
from kd_losses.one import Branches
from methods import KD, PEERS, shared
from methods.dense import DENSE
from models.dense import build as dense_net
from models.feats import Feats
from tools.subtask import attack
from tools.transformer_ka import Amalgamation


def net_of(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = models.build(name, 10)
    with torch.no_grad():
        for m in net.modules():  # or all maps are alike, and every network ends as any other
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5), m.bias.uniform_(-1, 1)
    return net.eval()


def feats(net: nn.Module, n: int = 4):
    with torch.no_grad():
        return net(torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1)), True)


def probe_of(s: str, t: str) -> Probe:
    net_s, net_t = net_of(s), net_of(t, 1)
    return Probe(
        feats(net_s), feats(net_t), net_s, net_t, None, 4, 10, 10, all_t=[feats(net_t), feats(net_t)]
    )


def test_the_vocabulary_knows_all_classes_of_sorted_images():
    """A folder's images lie class by class: words of the first images would be words of the first classes."""
    labels = torch.arange(8).repeat_interleave(50)
    images = (labels * 30).to(torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3).contiguous()
    data = Resident(images, labels, 8, (0.0,) * 3, (1.0,) * 3, torch.device('cpu'))

    def teacher(img):
        return SimpleNamespace(pres=[img])

    fm = torch.zeros(2, 3, 4, 4)
    probe = SimpleNamespace(
        s=SimpleNamespace(pres=[fm]), t=SimpleNamespace(pres=[fm]), train_set=data, batch_size=7
    )
    kd = quest.QuEST(3, 3, num_words=3)  # 48 of the 400 images
    shared.vocabulary(kd, teacher, probe)
    assert kd.centroids[:, 0].max() - kd.centroids[:, 0].min() > 60 / 255  # of at least three classes


@pytest.mark.parametrize('name', ['resnet8', 'wrn_10_1', 'vgg8'])
def test_evidence_of_networks_that_end_in_an_average(name):
    probe = probe_of('resnet8', name)
    catkd.build(catkd.CATKD, probe)
    kd = adain.build(adain.AdaINKD, probe)
    batch = SimpleNamespace(net_t=probe.net_t)
    fed = []
    adain.feed(lambda s, t, out_t, rest: fed.append((rest(t), out_t)), probe.s, probe.t, batch)
    torch.testing.assert_close(*fed[0], rtol=1e-4, atol=1e-4)
    assert kd


@pytest.mark.parametrize('name', ['deit_64_3', 'MobileNetV2', 'ShuffleV2'])
def test_evidence_of_others_is_refused(name):
    """A transformer reads a token, others a map that is not handed out."""
    probe = probe_of('resnet8', name)
    for build, loss in ((catkd.build, catkd.CATKD), (adain.build, adain.AdaINKD)):
        with pytest.raises(
            ValueError, match='teacher must end in ReLU, average over positions and classifier'
        ):
            build(loss, probe)
    with pytest.raises(ValueError, match='the student must end in ReLU'):
        catkd.build(catkd.CATKD, probe_of(name, 'resnet8'))
    with pytest.raises(ValueError, match='SDD: the student must end in ReLU'):
        sdd.build(sdd.SDD, probe_of(name, 'resnet8'))


@pytest.mark.parametrize('name', ['deit_64_3', 'vit_64_3'])
def test_a_classifier_that_does_not_read_the_last_map_is_not_used_on_it(name):
    """A transformer's reads its token."""
    probe = probe_of('resnet8', name)
    kd = shared.last_channels(simkd.SimKD, probe)
    for ask in (
        lambda: simkd.student(probe.net_s, kd, probe),
        lambda: srrl.build(srrl.SRRL, probe),
        lambda: sdd.build(sdd.SDD, probe),
    ):
        with pytest.raises(ValueError, match='the teacher must end in ReLU, average over positions'):
            ask()


def test_maps_of_wide_networks_are_fed_after_the_relu():
    """Theirs are sums, with negatives; the ReLU comes with the batch norm that follows."""
    t = feats(net_of('wrn_10_1'))
    assert min(fm.min() for fm in t.fms[1:]) < 0
    kd = norm.build(norm.NORM, probe_of('resnet8', 'wrn_10_1'))
    kd.forward = lambda s, t: t
    fed = norm.feed(kd, SimpleNamespace(extra=None), t, None)
    assert fed.min() == 0 and fed.max() > 0
    kd = deep_geometric_graphs.build(deep_geometric_graphs.GraphKD, probe_of('wrn_10_1', 'wrn_10_1'))
    kd.forward = lambda s, t, target: (s, t)
    for maps in deep_geometric_graphs.feed(kd, t, t, SimpleNamespace(target=None)):
        assert all(fm.min() == 0 for fm in maps[:-1])


@pytest.mark.parametrize('name', ['MobileNetV2', 'deit_64_3', 'resnet8', 'vgg8', 'ShuffleV1'])
def test_maps_of_others_are_fed_as_they_are(name):
    """After their ReLU, or without one: half of a linear bottleneck would become 0."""
    t = feats(net_of(name))
    kd = norm.build(norm.NORM, SimpleNamespace(t=t))
    kd.forward = lambda s, t: t
    assert norm.feed(kd, SimpleNamespace(extra=None), t, None) is t.fms[-1]


def test_camkd_asks_the_teachers_classifier_as_the_teacher_does():
    """A student whose map is the teacher's has the teacher's logits there, wide networks included."""
    probe = probe_of('wrn_10_1', 'wrn_10_1')
    net_t = probe.net_t
    asked = []

    class Recording(camkd.CAMKD):
        def feature_loss(self, fms_s, fms_t, outs_feat, target):
            asked.append((fms_s, fms_t, outs_feat))
            return 0.0

    kd = camkd.build(Recording, probe)
    kd.adapters.forward = lambda fm, sizes: [fm, fm]
    t = probe.t
    batch = SimpleNamespace(all_t=[t, t], nets_t=[net_t, net_t], target=torch.arange(4), inner=1.0)
    camkd.feed(kd, t, None, batch)
    (fms_s, fms_t, outs) = asked[0]
    torch.testing.assert_close(outs[0], t.out, rtol=1e-4, atol=1e-4)
    assert torch.equal(fms_s[0], fms_t[0])


@pytest.mark.parametrize(
    's,t,ends',
    [('resnet8', 'resnet8', (1, 1)), ('wrn_10_1', 'resnet8', (0, 1)), ('resnet8', 'wrn_10_1', (1, 0))],
)
def test_bridges_of_fcfd_to_sums_make_negative_values(s, t, ends):
    """(to the student, to the teacher): a leaky ReLU at the end only where the other network has a ReLU."""
    kd = fcfd.build(fcfd.FCFD, probe_of(s, t))
    for bridges, wanted in zip((kd.bridges_s, kd.bridges_t), ends):
        assert {int(isinstance(bridge[-1], nn.LeakyReLU)) for bridge in bridges} == {wanted}


@pytest.mark.parametrize('teacher,ends', [('resnet20', 1), ('wrn_10_2', 0), ('MobileNetV2', 0)])
def test_regressors_to_maps_before_a_relu_make_negative_values(teacher, ends):
    probe = probe_of('vgg8', teacher)
    regressors = [fitnet.build(fitnet.FitNet, probe).regressor]
    regressors += [kd.connector for kd in cd.build(cd.CD, probe)][-1:]
    assert [isinstance(regressor[-1], nn.ReLU) for regressor in regressors] == [ends, ends]
    assert isinstance(fitnet.build(fitnet.FitNet, probe, relu=True).regressor[-1], nn.ReLU)


def test_an_attack_stays_in_the_range_of_the_data():
    """Normalised pixels of CIFAR lie within the authors' clip, those of dark drawings do not."""
    cifar, dark = (SimpleNamespace(mean=(m,) * 3, std=(s,) * 3) for m, s in ((0.48, 0.25), (0.1, 0.2)))
    for data, wanted in ((cifar, (-2.5, 2.5)), (dark, (-2.5, 4.5))):
        assert bss.build(bss.BSS, SimpleNamespace(train_set=data)).attacker.clip == wanted


@pytest.mark.parametrize('name', ['resnet8', 'MobileNetV1', 'MobileNetV2', 'MobileNetV2Tiny', 'vgg8'])
def test_a_branch_of_one_is_the_network_that_is_saved(name):
    nets = [models.build(name, 5).eval() for _ in range(2)]
    for net in nets:
        for bn in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.normal_(bn.running_mean)
    img = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        branches = Branches(nets, nets[0](img, True)).eval()
        outs = branches(img)
        for k, branch in enumerate(outs):
            saved = models.build(name, 5).eval()
            saved.load_state_dict(branches.weights(k))
            assert torch.equal(saved(img), branch.out)
    assert not torch.equal(outs[0].out, outs[1].out)
    assert sum(p.requires_grad for p in nets[1].parameters()) < sum(1 for _ in nets[0].parameters())


def test_heads_of_dcm_start_as_none_of_the_networks():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
    data = Resident(images, torch.arange(16) % 10, 10, (0.5,) * 3, (0.5,) * 3, torch.device('cpu'))
    args = Namespace(batch_size=8, seed=3, net_names=['resnet8', 'resnet8'], epochs=2, kd_mode=['dcm'])
    nets = []
    for k in range(2):  # as train_dml.py draws them
        torch.manual_seed(args.seed + k)
        nets.append(models.build('resnet8', 10))
    step = build_step(args, PEERS['dcm'], {}, nets, data, nullcontext, torch.device('cpu'))
    weights = [p for key, p in step.peers.named_parameters() if key.endswith('fc.weight')]
    assert len(weights) == 6  # of two networks with two heads each
    assert all(not torch.equal(a, b) for k, a in enumerate(weights) for b in weights[:k])


def test_the_untrained_network_of_sdb_is_not_the_boxs_start():
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    data = Resident(images, torch.arange(4), 10, (0.5,) * 3, (0.5,) * 3, torch.device('cpu'))
    torch.manual_seed(2)
    net = models.build('resnet8', 10)
    probe = SimpleNamespace(train_set=data, net_s=net, another_net=lambda _: models.build('resnet8', 10))
    torch.manual_seed(2)  # as before every student
    kd = sdb.build(sdb.SDB, probe)
    assert not torch.equal(kd.random.net.fc.weight, net.fc.weight)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(1), drawn)  # nothing else has changed


def test_bss_without_a_candidate_shows_different_images():
    """The student's batch norm would move towards a single image otherwise."""
    out = torch.zeros(6, 3)
    out[:, 0] = 1
    img = torch.arange(6.0)[:, None, None, None].expand(6, 3, 2, 2)
    attacked, valid = bss.BSS(attack_size=4).attack(
        lambda x: out[: len(x)] + 0 * x.mean(), img, out, out, torch.ones(6, dtype=torch.int64)
    )
    assert not valid.any() and len(attacked[:, 0, 0, 0].unique()) == 4


def test_losses_are_built_for_the_training_proper(train_kd, monkeypatch):
    """With --phases inside it is shorter than --epochs; pskd and taid reach their last share at its end."""
    seen, row = [], KD['st']

    def build(loss, probe, **options):
        seen.append(probe.epochs)
        return row.build(loss, probe, **options)

    monkeypatch.setitem(KD, 'st', replace(row, build=build))
    words = ('--epochs', 3, '--data_name', 'shapes:96', '--batch_size', 32, '--pretrain_epochs', 2)
    assert train_kd('ft+st', 'st', '--phases', 'inside', *words, '--note', 'x').code == 0
    assert seen == [1, 3]


def test_students_classes_lie_as_the_teachers_logits_do():
    """Losses join the teachers' logits; an order of --wanted of its own would set others beside them."""
    split = ClassParts([[0, 2, 4], [1, 3, 5]], wanted=[0, 1, 2, 3, 4, 5])
    assert split.classes == [0, 2, 4, 1, 3, 5] and split.blocks == [[0, 1, 2], [3, 4, 5]]
    cut = ClassParts([[0, 1, 2], [3, 4]], wanted=[4, 2, 0])
    assert cut.classes == [0, 2, 4] and cut.columns == [[0, 2], [1]] and cut.blocks == [[0, 1], [2]]
    known = torch.eye(6)[:, cut.classes]  # logits of images of the classes 0..5, as the student has them
    joined = torch.cat(
        [torch.eye(6)[:, [0, 1, 2]][:, cut.columns[0]], torch.eye(6)[:, [3, 4]][:, cut.columns[1]]], 1
    )
    assert torch.equal(known, joined) and ConcatKD()(known, [known[:, :2], known[:, 2:]]) == 0


def test_every_layer_of_a_decoder_learns_from_the_teachers_last():
    torch.manual_seed(0)

    def detections(n):
        return {'logits': torch.randn(2, 5, n), 'boxes': torch.rand(2, 5, 4) * 0.4 + 0.3}

    def teacher(img):
        unfinished = {key: torch.full_like(x, float('nan')) for key, x in detections(2).items()}
        return [unfinished, detections(2)], [torch.zeros(2, 1, 1)] * 3

    args = Namespace(threshold=0.1, T=4.0, norm='channel')
    amalgam = Amalgamation('ta', [[0], [1]], 2, 16, args)
    value, terms = amalgam.told_by([teacher, teacher])([detections(3), detections(3)], None, [torch.zeros(1)])
    assert torch.isfinite(value) and value > 0 and terms


def test_afdcd_clips_its_own_gradients(script, monkeypatch):
    """At 15, as its authors; nobody else's."""
    clipped = []
    monkeypatch.setattr(
        train_dense, 'clip_grad_norm_', lambda params, most: clipped.append((list(params), most))
    )
    done = script('train_dense', '--data_name', 'scenes:24', '--size', 32, '--labelled', 6, '--batch_size', 4,
                  '--t_steps', 1, '--kd_mode', 'afdcd', 'cwd', '--steps', 2, '--note', 'x')  # fmt: skip
    assert done.code == 0, done.err
    assert [most for _, most in clipped] == [15.0, 15.0] and all(params for params, _ in clipped)


def test_weights_by_kind_of_detector():
    heads = {
        'retinanet:resnet10': (7.0, 10.0),
        'fcos_resnet50_fpn': (10.0, 10.0),
        'fasterrcnn:resnet10': (1.0, 6.0),
    }
    for name, wanted in heads.items():
        rows = rows_for(DENSE, 'detection', name)
        assert (rows['maskd'].weight, rows['pkd'].weight) == wanted


@pytest.mark.parametrize('frozen', [False, True])
def test_batch_norms_of_a_detector_that_starts_from_weights(frozen):
    net = dense_net('detection', 'fasterrcnn_mobilenet_v2_fpn', 3, frozen=frozen)
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules()) != frozen


def test_a_strong_view_of_a_folder_is_drawn_apart_from_its_crop(monkeypatch):
    """One seed for both made large crops the strongly changed ones."""
    seeds = {'crop': [], 'change': []}
    monkeypatch.setattr(
        folder, 'view_called', lambda name: View('', change=lambda x, seed: seeds['change'].append(seed) or x)
    )

    class Images:
        def __getitem__(self, i):
            seeds['crop'].append(torch.default_generator.initial_seed())
            return torch.zeros(3, 2, 2), 0

    views = folder._Views(Images(), torch.zeros(8), ['strong'], 1, 2, 2)
    for i in range(8):
        views[i]
    assert len(set(seeds['change'])) == 8 and not set(seeds['change']) & set(seeds['crop'])


def test_views_of_an_epoch_beside_stored_answers_to_another():
    """The answers belong to the crops of the epoch that was stored; noise is to be new in every epoch."""
    torch.manual_seed(0)
    data = Resident(
        torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8), torch.arange(8), 8, (0.5,) * 3, (0.5,) * 3,
        torch.device('cpu'),
    )  # fmt: skip
    (a, _, _, old), (b, _, _, new) = (
        next(data.train_batches(8, 0, 1, ['strong'], views_epoch=of)) for of in (None, 7)
    )
    assert torch.equal(a, b) and not torch.equal(old['strong'], new['strong'])
    _, _, _, own = next(data.train_batches(8, 0, 1, ['strong'], views_epoch=1))
    assert torch.equal(own['strong'], old['strong'])


def test_rooms_of_teachers_students_and_the_test_do_not_meet():
    for load in (lambda: load_scenes(10001, 16, 'cpu', True), lambda: load_boxes(10001, 16)):
        with pytest.raises(ValueError, match='scenes:10001: at most 10000'):
            load()
    with pytest.raises(ValueError, match='at most 10000'):
        annotated.load('segmentation', 'scenes:10001', '.', 16)


def test_a_few_images_of_ones_own_are_of_all_classes():
    """They may lie class by class; those of CIFAR lie in random order, and the first ones are taken."""
    labels = torch.arange(4).repeat_interleave(25)
    data = Resident(torch.zeros(100, 4, 4, 3, dtype=torch.uint8), labels, 4, (0.5,) * 3, (0.5,) * 3,
                    torch.device('cpu'))  # fmt: skip
    assert first_images(data, 20, 'cifar10').targets.unique().tolist() == [0]
    assert first_images(data, 20, 'folder').targets.unique().tolist() == [0, 1, 2, 3]
    assert first_images(data, 100, 'folder') is data


def test_an_attack_on_layers_that_are_not_there_is_refused():
    """It would have attacked random weights, and called them the teacher's."""
    net = models.build('resnet8', 10)
    args = Namespace(seed=0)
    data = SimpleNamespace(num_classes=5, device='cpu')
    for other in (nn.ModuleDict({'net': net}), models.build('resnet14', 10)):
        with pytest.raises(UserError, match='its weights are not those of a plain resnet8'):
            attack(other, 'resnet8', data, data, args, nullcontext, True)


def test_bss_attacks_the_teacher_in_float32():
    kinds = []

    class Teacher(nn.Module):
        def forward(self, x, feats=False):
            kinds.append((x @ x.mT).dtype)
            out = x.mean(dim=(2, 3)) + torch.eye(3)[torch.arange(len(x)) % 3]
            return Feats(out, out, [x], [x])

    def amp():
        return torch.autocast('cpu', torch.bfloat16)

    img, target = torch.zeros(6, 3, 4, 4), torch.arange(6) % 3
    teachers = Teachers([Teacher()], amp, [], img)
    with amp():
        batch = teachers(img, target, torch.arange(6), {})
        kinds.clear()
        batch.student = lambda x: SimpleNamespace(out=x.mean(dim=(2, 3)))
        out = SimpleNamespace(out=torch.eye(3)[target])
        bss.BSS().attack(lambda x: batch.exact(x).out, img, out.out, out.out, target)
        assert kinds and set(kinds) == {torch.float32}
        kinds.clear()
        bss.feed(bss.BSS(), out, out, batch)
    assert kinds.count(torch.float32) >= 1 and kinds[-1] == torch.bfloat16  # what the student is told of them
