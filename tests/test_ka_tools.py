"""The tools for single amalgamation losses: tiny runs, resumes, refusals; detectors; token students."""

import importlib
import json

import numpy as np
import pytest
import torch

import engine.record
from dataset.boxes import KINDS, load_boxes
from dataset.patterns import CLASSES
from engine.detection import average_precision
from ka_losses.recombination import combine_models
from models import build
from models.detector import Detector, position_code
from report import ka_claims, ka_rows
from report.ka import read_results
from tests.conftest import Killed
from tests.test_train import rows, same, weights
from tools.recombination import Recombined, count, inner, least, prune

DATA = ('--data_name', 'patterns:80', '--batch_size', '20')


@pytest.fixture
def halves(tmp_path):
    """Two resnet8 of half of the classes each, with statistics of their own; they need not know anything."""
    for part in (0, 1):
        torch.manual_seed(part)
        net = build('resnet8', 5).train()
        for _ in range(20):
            net(torch.randn(8, 3, 16, 16))
        torch.save(net.state_dict(), tmp_path / f'half{part}.pt')
    return [tmp_path / f'half{part}.pt' for part in (0, 1)]


def table_of(folder) -> dict:
    rows = result_of(folder)['table']
    return {row.pop('row'): row for row in rows}


def result_of(folder) -> dict:
    return json.loads((folder / 'results.json').read_text())


def told_apart(result: dict, **other) -> list[str]:
    """How the report calls this run, and one of another seed whose flags differ in these."""
    another = result | {'seed': 99, 'recipe': result['recipe'] | other}
    return [title.removeprefix(ka_rows.title_of(result)) for title, _ in ka_rows.tables([result, another])]


def killed_at(monkeypatch, count: int):
    """Die when the count-th checkpoint is due."""
    real, wrote = engine.record.write_atomic, []

    def dies(path, content):
        wrote.append(path.name)
        if wrote.count('last.pt') == count:
            raise Killed
        real(path, content)

    monkeypatch.setattr(engine.record, 'write_atomic', dies)
    return real


def resumed_equals_undisturbed(tool, monkeypatch, tmp_path, words, count, networks):
    with monkeypatch.context() as patch:
        killed_at(patch, count)
        with pytest.raises(Killed):
            tool(*words, '--note', 'cut')
    done = tool(*words, '--note', 'cut', '--resume', 'auto')
    assert done.code == 0, done.err
    for name in networks:
        assert same(weights(tmp_path / 'whole' / name)['net'], weights(tmp_path / 'cut' / name)['net']), name
        assert rows(tmp_path / 'whole' / name) == rows(tmp_path / 'cut' / name)
    assert table_of(tmp_path / 'whole') == table_of(tmp_path / 'cut')


def test_unlearning_and_its_attack(tool, monkeypatch, tmp_path):
    torch.save(build('resnet8', 10).state_dict(), tmp_path / 't.pt')
    words = ('subtask', '--t_name', 'resnet8', '--t_model', tmp_path / 't.pt', '--s_name', 'resnet8', *DATA,
             '--sub', '0-3', '--epochs', 2, '--attack_epochs', 1, '--attack_share', 0.5,
             '--lambda_adv', 0, 1)  # fmt: skip
    done = tool(*words, '--note', 'whole')
    assert done.code == 0, done.err
    table = table_of(tmp_path / 'whole')
    assert set(table) == {'teacher resnet8', 'random weights', 'student, lambda 0', 'student, lambda 1'}
    assert {'kept', 'recovered, new classifier', 'recovered, whole network', 'divergence of the head'} == set(
        table['student, lambda 1']
    )
    assert 'divergence of the head' not in table['student, lambda 0'], 'its head has learnt nothing'
    one, other = (weights(tmp_path / 'whole' / f'lambda-{lam}') for lam in (0, 1))
    assert one['net']['fc.weight'].shape[0] == 4 and one['head']['weight'].shape[0] == 6
    assert one['origin']['class_names'] == list(CLASSES[:4]), 'of the classes that it keeps'
    torch.manual_seed(2)  # with lambda 0 the head's loss is 0: only weight decay moves it, as the student's
    assert not same(one['net'], other['net']) and not same(one['head'], other['head'])
    resumed_equals_undisturbed(tool, monkeypatch, tmp_path, words, 3, ['lambda-0', 'lambda-1'])
    attack = {'attack_share': 0.5, 'attack_epochs': 1, 'attack_lr': 0.02}
    made = result_of(tmp_path / 'whole')
    for key, value in attack.items():
        assert told_apart(made, **{key: 9}) == [f', {key} {value}', f', {key} 9'], 'these are no seeds'
    student = result_of(tmp_path / 'whole' / 'lambda-0')
    assert not attack.keys() & student['recipe'].keys(), 'a student goes on, whoever attacks it'
    done = tool(*words, '--s_init', tmp_path / 't.pt', '--lambda_adv', 0, '--lr', '1e-9', '--weight_decay', 0,
                '--note', 'begun')  # fmt: skip
    assert done.code == 0, done.err
    net, teacher = (torch.load(path, weights_only=True) for path in
                    (tmp_path / 'begun' / 'lambda-0' / 'student.pt', tmp_path / 't.pt'))  # fmt: skip
    torch.testing.assert_close(net['conv1.weight'], teacher['conv1.weight'], rtol=0, atol=1e-6)
    assert net['fc.weight'].shape[0] == 4


def test_what_unlearning_refuses(tool, tmp_path):
    torch.save(build('resnet8', 10).state_dict(), tmp_path / 't.pt')
    words = ('subtask', '--t_name', 'resnet8', '--t_model', tmp_path / 't.pt', '--s_name', 'resnet8', *DATA)
    for more, said in (
        (('--sub', '0'), 'sub_classes must be two or more'),
        (('--sub', '0-12'), 'classes must be distinct'),
        (('--sub', '0-4', '--lambda_adv', 1, 1), 'named twice'),
        (('--sub', '0-4', '--attack_share', 0.01), 'less than two'),
        (('--sub', '0-4', '--s_name', 'resnet9'), '6n + 2'),
        (('--sub', '0-4', '--schedule', 'onecycle'), '--schedule: not for this tool'),
        (('--sub', '0-4', '--no_nesterov'), '--no_nesterov: not for this tool'),
        (('--sub', '0-4', '--amp', 'fp16'), 'scales no gradients'),
    ):
        done = tool(*words, *more)
        assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err


def test_pruning_takes_the_smallest_filters():
    torch.manual_seed(0)
    net = Recombined(combine_models([build('resnet8', k) for k in (5, 3)]), 2)
    groups, costs = inner(net)
    with torch.no_grad():
        net.body.layer1[0].conv1.weight[3] *= 1e-3
        net.body.layer3[0].conv1.weight[[5, 70]] *= 1e-3
    full, gone = count(net), costs[0] + 2 * costs[2]
    small = prune(net, full - gone)
    assert count(small) == full - gone
    assert small.body.layer1[0].conv1.weight.shape[0] == 31
    kept = [k for k in range(128) if k not in (5, 70)]
    assert torch.equal(small.body.layer3[0].conv1.weight, net.body.layer3[0].conv1.weight[kept])
    assert torch.equal(small.body.layer3[0].conv2.weight, net.body.layer3[0].conv2.weight[:, kept])
    x = torch.randn(2, 3, 16, 16)
    assert small.eval()(x).shape == (2, 8)
    smallest = prune(net, 0)
    assert count(smallest) == least(net)
    assert all(len(smallest.body.get_submodule(group.convs[0]).weight) == 1 for group in groups)


def test_recombination(tool, halves, monkeypatch, tmp_path):
    """Joined, the teachers say what they said; pruned and retrained to the size of one of them."""
    words = ('recombination', '--t_name', 'resnet8', '--t_model', *halves, *DATA, '--rounds', 2, '--epochs',
             1, '--gamma', 2)  # fmt: skip
    done = tool(*words, '--note', 'whole')
    assert done.code == 0, done.err
    table = table_of(tmp_path / 'whole')
    first, second, one, two, fresh = table.values()
    assert first['joint top-1'] == second['joint top-1'] and second['parameters'] > first['parameters']
    assert (
        second['parameters'] > one['parameters'] > two['parameters'] and two['epochs'] == fresh['epochs'] == 2
    )
    assert two['parameters'] <= fresh['parameters'] == count(build('resnet8', 10))
    resumed_equals_undisturbed(tool, monkeypatch, tmp_path, words, 2, ['round1', 'round2', 'fresh'])
    wrn = build('wrn_16_1', 5)
    torch.save(wrn.state_dict(), tmp_path / 'w.pt')
    for more, said in (
        (('--target', 10), '--target 10: must be from'),
        (('--target', 10**9), 'to less than'),
        (('--gamma', -1), 'gamma must be >= 0'),
        (('--t_model', halves[0]), 'two teachers or more'),
        (('--t_name', 'wrn_16_1', '--t_model', tmp_path / 'w.pt', tmp_path / 'w.pt'), 'must be a resnet'),
    ):
        done = tool(*words, *more)
        assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err


def test_amalgamation_without_data(tool, halves, monkeypatch, tmp_path):
    words = ('ood_ka', '--t_name', 'resnet8', '--t_model', *halves, '--s_name', 'resnet8', *DATA, '--ood',
             'scenes:25', '--epochs', 2, '--width', 4, '--nz', 8, '--s_steps', 2)  # fmt: skip
    done = tool(*words, '--note', 'whole')
    assert done.code == 0, done.err
    assert len(table_of(tmp_path / 'whole')) == 4
    assert (tmp_path / 'whole' / 'images.png').stat().st_size > 500
    made = rows(tmp_path / 'whole' / 'made')[0]
    assert {'g_adv', 'g_bn', 'g_sim', 'loss_d', 'kd', 'amal', 'recons'} <= made.keys()
    states = {name: weights(tmp_path / 'whole' / name) for name in ('made', 'ood', 'own')}
    assert not same(states['own']['net'], states['ood']['net'])
    assert not same(states['made']['generator'], states['ood']['generator'])  # it was trained there only
    assert same(states['own']['generator'], states['ood']['generator'])
    words = (*words, '--images', 'made')
    assert tool(*words, '--note', 'whole', '--resume', 'auto').code == 0
    resumed_equals_undisturbed(tool, monkeypatch, tmp_path, words, 2, ['made'])
    for more, said in (
        (('--ood', 'svhn'), "no data set is called 'svhn'"),
        (('--ood', 'shapes:40'), 'its images have 32 pixels a side, wanted 16'),
        (('--batch_size', 80), '--batch_size 80: half of it must be from 2 to 25'),
        (('--images', 'made', 'made'), '--images made made: something is named twice'),
    ):
        done = tool(*words, *more)
        assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err


def test_who_is_drawn_in_a_federation(tool, halves, monkeypatch, tmp_path):
    fedka = importlib.import_module('tools.fedka')
    saliency_of = fedka.saliency_of
    words = ('fedka', '--t_name', 'resnet8', '--t_model', *halves, '--s_name', 'resnet8', *DATA, '--epochs',
             2, '--local_epochs', 1, '--adapt_every', 1, '--adapt_epochs', 1)  # fmt: skip
    draws = ('--select_every', 1, '--topk', 3)
    for how, more in (('all', ()), ('uniform', draws)):
        done = tool(*words, '--select', how, *more, '--note', how)
        assert done.code == 0, done.err
    done = tool(*words, '--select', 'all', '--topk', 3, '--note', 'none')
    assert done.code == 2 and '--topk: --select all draws no clients' in done.err, done.err
    looked = []
    monkeypatch.setattr(fedka, 'saliency_of', lambda net, img: looked.append(net) or saliency_of(net, img))
    done = tool(*words, *draws, '--select', 'saliency', '--note', 'saliency')
    assert done.code == 0, done.err
    torch.manual_seed(2)
    untrained = build('resnet8', 10).fc.weight
    assert len(looked) == 6 and not torch.allclose(looked[0].fc.weight.cpu(), untrained), (
        'its own never learns'
    )
    drawn = [[json.loads(row['clients']) for row in rows(tmp_path / how)] for how in ('all', 'uniform')]
    assert drawn[0] == [[0, 1], [0, 1]] and all(len(clients) == 3 for clients in drawn[1])
    table = table_of(tmp_path / 'all')
    assert {'round 1', 'round 2', 'top-1 at the end'} == set(table['all clients every round'])
    done = tool(*words, '--select', 'all', '--note', 'uniform', '--resume', 'auto')
    assert done.code == 2 and "select was 'uniform', is" in done.err, done.err


# ----------------------------------------------------------------------------------------------- detectors


def test_detectors_are_amalgamated_by_the_tool(tool, monkeypatch, tmp_path):
    words = ('transformer_ka', '--data_name', 'scenes:12', '--size', 32, '--batch_size', 6, '--epochs', 2)
    done = tool(*words, '--note', 'whole')
    assert done.code == 0, done.err
    table = table_of(tmp_path / 'whole')
    assert list(table)[0] == 'the teachers, each its kinds' and len(table) == 5
    assert all({f'AP50 {kind}' for kind in KINDS} <= row.keys() for row in table.values())
    made = result_of(tmp_path / 'whole')
    for key, value in {'norm': 'channel', 'threshold': 0.1, 'T': 4.0}.items():
        assert told_apart(made, **{key: 'x'}) == [f', {key} {value}', f', {key} x']
    sa, ta = (weights(tmp_path / 'whole' / name) for name in ('sa_ta', 'ta'))
    assert len(sa['more']) == 6 and not ta['more']  # scale and shift of three levels
    for less in (('sa_ta',), ('agg_ta', 'labels')):  # the others are done
        assert tool(*words, '--students', *less, '--note', 'whole', '--resume', 'auto').code == 0
    assert list(table_of(tmp_path / 'whole'))[1:] == ['agg_ta (no labels)', 'labels (reads labels)']
    words = (*words, '--students', 'sa_ta')
    assert tool(*words, '--note', 'whole', '--resume', 'auto').code == 0
    resumed_equals_undisturbed(tool, monkeypatch, tmp_path, words, 6, ['teacher1', 'teacher2', 'sa_ta'])
    for more, said in (
        (('--kinds', 'box'), 'two words or more'),
        (('--kinds', 'box', 'box,sphere'), 'different kinds'),
        (('--kinds', 'box', 'cone'), 'different kinds of box, sphere, cylinder'),
        (('--size', 40), 'multiples of 16'),
        (('--device', 'cuda'), 'run on the CPU'),
        (('--data_name', 'shapes'), 'there are scenes'),
        (('--students', 'ta', 'ta'), '--students ta ta: something is named twice'),
    ):
        done = tool(*words, *more)
        assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err


def test_students_of_detectors_see_no_label(tool, monkeypatch, tmp_path):
    from tools import transformer_ka

    words = ('transformer_ka', '--data_name', 'scenes:12', '--size', 32, '--batch_size', 6, '--epochs', 1,
             '--students', 'sa_ta')  # fmt: skip
    assert tool(*words, '--note', 'with').code == 0

    def without(n, size):
        labelled, plain, test = load_boxes(n, size)
        plain.kinds, plain.boxes = [None] * n, [box * float('nan') for box in plain.boxes]
        return labelled, plain, test

    monkeypatch.setattr(transformer_ka, 'load_boxes', without)
    assert tool(*words, '--note', 'without').code == 0
    assert same(weights(tmp_path / 'with' / 'sa_ta')['net'], weights(tmp_path / 'without' / 'sa_ta')['net'])


def test_a_detector_and_its_sequences():
    torch.manual_seed(0)
    net = Detector(3, chunks=2, dim=16, queries=5).eval()
    found, sequences = net(torch.randn(2, 3, 32, 48))
    assert [tuple(s.shape) for s in sequences] == [(48, 2, 16)] * 3  # two chunks of 4 x 6 places
    assert found[0]['logits'].shape == (2, 5, 4) and found[1]['boxes'].shape == (2, 5, 4)
    assert sum(p.numel() for p in Detector(3).parameters()) in range(240_000, 260_000)
    code = position_code(4, 6, 16)
    assert code.shape == (24, 16) and len(code.unique(dim=0)) == 24


def test_a_detector_learns_a_handful_of_rooms():
    """Few rooms, many steps: it finds them again, by the loss with labels and by average precision."""
    from engine.detection import WithLabels, ap_of_kinds

    torch.manual_seed(0)
    labelled, _, _ = load_boxes(4, 32)
    net, loss = Detector(3), WithLabels(3)
    opt = torch.optim.AdamW(net.parameters(), 2e-3)
    img, kinds, boxes = next(labelled.test_batches(4))
    before = ap_of_kinds(net, labelled, list(KINDS))['AP50']
    for step in range(160):
        net.train()
        value, _ = loss(net(img)[0], kinds, boxes)
        opt.param_groups[0]['lr'] = 2e-3 * (1 if step < 120 else 0.1)
        opt.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
    assert before < 30 < 60 < ap_of_kinds(net, labelled, list(KINDS))['AP50']


def test_average_precision_by_hand():
    box = torch.tensor([0.5, 0.5, 0.2, 0.2])
    far = torch.tensor([0.1, 0.1, 0.1, 0.1])
    truth = [torch.stack([box, far]), far[None]]
    boxes = torch.stack([torch.stack([box, box, far]), torch.stack([box, far, box])])
    p = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.6, 0.05]])
    # found, found again, missed, found, found: precision 1, 1/2, 1/3, 2/4, 3/5 at recall 1/3, 2/3, 1
    assert average_precision(p, boxes, truth) == pytest.approx(100 * (1 + 0.6 + 0.6) / 3)
    assert np.isnan(average_precision(p, boxes, [box[:0].reshape(0, 4)] * 2))
    nothing = torch.zeros_like(boxes) + 1e-3
    assert average_precision(p, nothing, truth) == 0


def test_rooms_of_some_kinds():
    labelled, plain, test = load_boxes(10, 32)
    assert len(labelled) == len(plain) == 10 and not torch.equal(labelled.images, plain.images)
    some = labelled.of([2, 0])
    for kind, box, kept, kept_box in zip(labelled.kinds, labelled.boxes, some.kinds, some.boxes):
        assert torch.equal(torch.tensor([2, 0])[kept], kind[kind != 1])
        assert torch.equal(kept_box, box[kind != 1])
    plainly = {tuple(img.flatten()[:50].tolist()): b for img, _, b in labelled.test_batches(1)}
    mirrored = 0
    for seed in range(4):
        for img, _, boxes in labelled.train_batches(5, seed, 0):
            key = tuple(img[0].flatten()[:50].tolist())
            if key not in plainly:
                img, mirrored = img.flip(3), mirrored + 1
                boxes = [torch.cat([1 - b[:, :1], b[:, 1:]], dim=1) for b in boxes]
                key = tuple(img[0].flatten()[:50].tolist())
            torch.testing.assert_close(boxes[0], plainly[key][0])
    assert 0 < mirrored < 8


# -------------------------------------------------------------------------------------------- token students


def test_a_transformer_of_more_tokens():
    """The patches twice, by a linear map along the sequence; levels are what ka_vit compares."""
    torch.manual_seed(0)
    net, x = build('vit_64_3x2', 10).eval(), torch.randn(2, 3, 32, 32)
    f = net(x, True)
    assert [tuple(level.shape) for level in f.levels] == [(2, 128, 64)] * 4
    assert f.out.shape == (2, 10) and f.fms[1].shape == (2, 64, 16, 8)
    teacher = build('vit_64_3', 5).eval()
    t = teacher(x, True)
    assert [tuple(level.shape) for level in t.levels] == [(2, 64, 64)] * 4
    torch.testing.assert_close(t.levels[0], teacher.patch_embed['proj'](x).flatten(2).mT)
    torch.testing.assert_close(t.tokens[0], t.levels[1])
    torch.testing.assert_close(t.tokens[-1], teacher.norm(t.levels[-1]))
    with torch.no_grad():
        net.expand.linear.weight.copy_(torch.eye(64).repeat(2, 1))
    first, second = net(x, True).levels[0].chunk(2, dim=1)
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match='must have 32 pixels a side'):
        net(torch.randn(1, 3, 16, 16))
    assert build('vit_64_3x3_16', 10)(torch.randn(1, 3, 16, 16), True).levels[0].shape == (1, 48, 64)


def test_tokens_are_amalgamated(script, tmp_path):
    data = ('--data_name', 'shapes:40', '--batch_size', 20, '--epochs', 1)
    for part in (0, 1):
        torch.manual_seed(part)
        torch.save(build('vit_64_3', 5).state_dict(), tmp_path / f't{part}.pt')
    words = ('--t_name', 'vit_64_3', '--t_model', tmp_path / 't0.pt', tmp_path / 't1.pt', *data)
    done = script('train_ka', '--ka_mode', 'ka_vit', *words, '--s_name', 'vit_64_3x2', '--note', 'a')
    assert done.code == 0, done.err
    (row,) = rows(tmp_path / 'a' / 'ka_vit')
    levels = [float(row[f'level{k}']) for k in range(4)]
    assert all(level > 0 for level in levels) and float(row['loss']) == pytest.approx(
        sum(levels) + float(row['kd']), rel=1e-4
    )
    for student, said in (
        ('resnet8', 'vit_64_3x2'),
        ('vit_64_3', 'one of 2 times as many tokens, e.g. vit_64_3x2, as deep'),
        (
            'vit_64_3x3',
            'got 3 blocks, 192 tokens of 64 numbers, of the teachers [3, 3], [64, 64] of [64, 64]',
        ),
        ('vit_64_4x2', 'as deep and as wide as the teachers; got 4 blocks'),
        ('vit_128_3x2', 'as deep and as wide as the teachers; got 3 blocks'),
    ):
        done = script('train_ka', '--ka_mode', 'ka_vit', *words, '--s_name', student, '--note', 'b')
        assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err


# --------------------------------------------------------------------------------------------------- tables


def test_rows_of_seeds_are_joined():
    def run(seed, alone, mine, name):
        table = [{'row': 'alone', 'top-1': alone}, {'row': name, 'top-1': mine, 'size': 1000}]
        return {'script': 'x', 'data': 'd', 'title': 't', 'seed': seed, 'table': table}

    runs = [run(1, 10.0, 20.0, 'a'), run(1, 10.0, 5.0, 'b'), run(2, 12.0, 22.0, 'a')]
    ((title, rows),) = ka_rows.tables([*runs, {'script': 'train_ka'}])
    assert title == 'x, d: t' and rows[0] == ['', 'top-1', 'size', 'seeds']
    assert rows[1] == ['alone', '11.00 +- 1.41', '', 2] and rows[2] == ['a', '21.00 +- 1.41', '1,000', 2]
    assert rows[3] == ['b', '5.00', '1,000', 1]


def test_the_report_reads_the_tools(tool, script, tmp_path):
    place = tmp_path / 'run'
    place.mkdir()
    result = {'script': 'fedka', 'data': 'shapes', 'title': 'clients', 'seed': 1, 'teacher': 'r'}
    (place / 'results.json').write_text(json.dumps(result | {'table': [{'row': 'alone', 'top-1': 50.0}]}))
    done = script('report.ka', place, '--out', tmp_path / 'table')
    assert done.code == 0, done.err
    text = (tmp_path / 'table' / 'table.md').read_text()
    assert '**fedka, shapes: clients**' in text and '| alone | 50.00 | 1 |' in text
    assert not (tmp_path / 'table' / 'rounds.png').exists()
    rounds = {'row': 'all clients', 'round 2': 50.0, 'round 4': 60.0, 'top-1 at the end': 60.0}
    (place / 'results.json').write_text(json.dumps(result | {'table': [rounds]}))
    assert script('report.ka', place, '--out', tmp_path / 'table').code == 0
    assert (tmp_path / 'table' / 'rounds.png').stat().st_size > 5000


def test_settings_stand_side_by_side(tmp_path):
    def run(setting, method, seed, joint, part):
        last = {'top1': joint, 'part1': part, 'part2': part + 2}
        made = {'experiment': setting, 'method': method, 'seed': seed, 'parts': [[0], [1]], 'last': last}
        return made if method != 'ensemble' else made | {'ensembles': {'A': last}}

    runs = [run('halves', 'concat', seed, 70.0 + seed, 80.0) for seed in (1, 2)]
    assert ka_claims.tables(runs) == [] and not ka_claims.figure(runs, tmp_path / 'x.png')
    runs += [run('quarters', 'concat', seed, 50.0 + seed, 80.0) for seed in (1, 2)]
    runs += [run('halves', 'cfl', 1, 73.0, 81.0), run('halves', 'cfl', 2, 71.0, 81.0)]
    runs += [run('quarters', 'ensemble', 1, 40.0, 90.0), run('quarters', 'mse', 3, 60.0, 70.0)]
    joint, part = ka_claims.tables([*runs, {'experiment': 'rooms', 'method': 'sbm', 'seed': 1}])
    assert joint[1] == [
        ['', 'halves', 'quarters'],
        ['the teachers, raw logits', '', '40.00 (-11.0)'],
        ['concat', '71.50 +- 0.71', '51.50 +- 0.71'],
        ['cfl', '72.00 +- 1.41 (+0.5 +- 2.1)', ''],
        ['mse', '', '60.00'],  # a seed that concat has not
    ]
    assert part[1][3] == ['cfl', '82.00 +- 0.00 (+1.0 +- 0.0)', '']
    assert ka_claims.figure(runs, tmp_path / 'x.png') and (tmp_path / 'x.png').stat().st_size > 5000


def test_runs_of_several_seeds_are_one_experiment(tmp_path):
    for place in ('halves-s1', 'halves-s2', 'quarters-s1', 'component-a'):
        (tmp_path / place / 'concat').mkdir(parents=True)
        (tmp_path / place / 'concat' / 'results.json').write_text(json.dumps({'script': 'train_ka'}))
    found = [r['experiment'] for r in read_results([str(tmp_path)])]
    assert found == ['component-a', 'halves', 'halves', 'quarters']
