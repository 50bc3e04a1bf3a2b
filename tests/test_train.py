"""The scripts, end to end on the embedded data: every method, files, results, equality of runs."""

import csv
import importlib
import json
import sys
from dataclasses import replace

import pytest
import torch

import dataset
import engine.data
import engine.device
import engine.evaluate
import engine.meter
import engine.optimise
import engine.record
import engine.student
from methods import METHODS
from models import build, load_weights
from tests.conftest import TINY, TRANSFORMERS


def weights(folder) -> dict:
    return torch.load(folder / 'last.pt', weights_only=True)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        same(a[k], b[k])
        if isinstance(a[k], dict)
        else a[k] == b[k]
        if isinstance(a[k], tuple)
        else torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k]))
        for k in a
        if not isinstance(a[k], list)
    )


def rows(folder) -> list[dict]:
    with open(folder / 'metrics.csv') as file:
        return [{k: v for k, v in row.items() if not k.startswith('seconds')} for row in csv.DictReader(file)]


def test_base_writes_everything(script, tmp_path):
    done = script('train_base', '--net_name', 'resnet8', '--note', 'b', *TINY)
    assert done.code == 0, done.err
    folder = tmp_path / 'b'
    assert {p.name for p in folder.iterdir()} == {
        'args.json',
        'best.pt',
        'initial.pt',
        'last.pt',
        'log.txt',
        'metrics.csv',
        'net.pt',
        'results.json',
    }
    result = json.loads((folder / 'results.json').read_text())
    assert result['method'] == 'baseline' and len(result['curve']) == 2
    assert result['last']['top1'] == pytest.approx(result['curve'][-1], abs=1e-3)
    assert result['best']['top1'] == pytest.approx(max(result['curve']), abs=1e-3)
    assert result['best']['selected_on'] == 'test data' and 'selected on test data' in done.out
    assert (
        result['command'].startswith('python train_base.py')
        and result['machine']['torch'] == torch.__version__
    )
    assert 'commit' in result and result['recipe']['batch_size'] == 32
    assert [r['epoch'] for r in rows(folder)] == ['1', '2'] and float(rows(folder)[1]['lr']) == pytest.approx(
        0.01
    )
    net = build('resnet8', 10)
    load_weights(net, folder / 'initial.pt')
    torch.manual_seed(2)
    assert same(net.state_dict(), build('resnet8', 10).state_dict())
    load_weights(net, folder / 'net.pt')
    measured = engine.evaluate.evaluate(
        net, dataset.load('shapes:96', folder)[1], engine.device.autocast(torch.device('cpu'), 'off')
    )
    assert measured['top1'] == pytest.approx(result['last']['top1'])


STUDENTS = [name for name, m in METHODS.items() if not m.own.peers and name not in TRANSFORMERS]
PEERS = [name for name, m in METHODS.items() if m.own.peers]
# one of each kind of need: plain, adapters, maps before the ReLU, a sum, memory, a phase first, modules that
# learn first, a vocabulary, image gradients, map gradients, attacked images, a partner, two views, a strong
# view, a changed student, two backward passes, mixed paths, whole batches, past epochs, past batches, masks
KINDS = (
    'st vid ofd fitnet pkt+st rkd crd ab ft quest sobolev lwm bss cskd ddgsd mlkd_strong sla simkd norm dot'
)
KINDS = f'{KINDS} mhgd fcfd semckd pskd dlb mgd dgkd camkd aekd'.split()
SMALL = ('--kd_args', 'quest.num_words=50')
GENTLE = ('--lambda_kd', 'semckd=1')  # its weight is for larger batches of real images


def test_every_method_trains_and_alone_equals_together(train_kd, teacher, tmp_path):
    """All methods and a sum in one process, then one of each kind alone: equal bit for bit."""
    tokens = [*STUDENTS, 'pkt+st']
    two = ('--t_name', 'resnet8', 'resnet8', '--t_model', teacher, teacher)
    together = train_kd(*tokens, '--note', 'all', *SMALL, *GENTLE, *two)
    assert together.code == 0, together.err
    assert 'teacher resnet8: top-1' in together.out
    for token in tokens:
        folder = tmp_path / 'all' / token
        result = json.loads((folder / 'results.json').read_text())
        assert result['method'] == token and result['trained_with'] == tokens and len(result['curve']) == 2
        assert {p.name for p in folder.iterdir()} >= {'best.pt', 'last.pt', 'student.pt', 'metrics.csv'}
        if token not in ('norm', 'simkd'):  # their students are other networks
            load_weights(build('resnet8', 10), folder / 'student.pt')
        moved = [float(r.get(token.split('+')[0]) or 0) for r in rows(folder)]
        assert any(moved) or token in ('sad', 'bss')  # they begin later
    states = {token: weights(tmp_path / 'all' / token)['net'] for token in tokens}
    firsts = [next(w for k, w in net.items() if k.endswith('conv1.weight')) for net in states.values()]
    distinct = len({tuple(w.flatten().tolist()) for w in firsts})
    assert distinct == len(tokens), 'two methods gave one student'
    assert all(torch.isfinite(x).all() for net in states.values() for x in net.values())
    for token in KINDS:
        extra = [*(SMALL if token == 'quest' else ()), *(GENTLE if token == 'semckd' else ())]
        extra += two if token in METHODS and METHODS[token].needs.all_teachers else ()
        assert train_kd(token, '--note', 'alone', *extra).code == 0
        a, b = weights(tmp_path / 'all' / token), weights(tmp_path / 'alone' / token)
        for part in ('net', 'opt'):
            assert same(a[part], b[part]), f'{token}: {part}'
        assert {k for k in a['kd']} == {k for k in b['kd']} and same(tensors(a['kd']), tensors(b['kd'])), (
            token
        )
        assert rows(tmp_path / 'all' / token) == rows(tmp_path / 'alone' / token)


@pytest.mark.parametrize('name', sorted(TRANSFORMERS))
def test_transformers_teach_transformers(train_kd, script, tmp_path, name):
    """What compares tokens trains between transformers, and refuses other networks in one line."""
    teacher = ('--t_name', 'vit_64_3', '--t_model', tmp_path / 't' / 'net.pt')
    assert script('train_base', '--net_name', 'vit_64_3', '--note', 't', *TINY).code == 0
    vit = ('--s_name', 'vit_64_3')
    assert script('train_kd', '--kd_mode', name, *teacher, *vit, '--note', 'v', *TINY).code == 0
    assert all(float(row[name]) > 0 for row in rows(tmp_path / 'v' / name))
    done = script('train_kd', '--kd_mode', name, *teacher, '--s_name', 'resnet8', '--note', 'r', *TINY)
    assert done.code == 2 and done.err.count('\n') == 1 and 'vision transformer' in done.err


def tensors(state: dict) -> dict:
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def test_phases(train_kd, tmp_path):
    """The loss alone, or its own modules, before the training; scaled to the length of the run."""
    done = train_kd('ab', 'ft', 'st', '--note', 'p', '--init_epochs', '2', '--pretrain_epochs', '1')
    assert done.code == 0, done.err
    runs = {token: rows(tmp_path / 'p' / token) for token in ('ab', 'ft', 'st')}
    phases = {token: [(r['epoch'], r['phase']) for r in run] for token, run in runs.items()}
    train = [('1', 'train'), ('2', 'train')]
    assert phases['ab'] == [('-1', 'init'), ('0', 'init'), *train] and phases['st'] == train
    assert phases['ft'] == [('0', 'pretrain'), *train]
    first = rows(tmp_path / 'p' / 'ab')[0]
    assert first['ce'] == first['test_top1'] == '' and float(first['ab']) > 0 and float(first['lr']) == 0.01
    assert [r['ab'] for r in rows(tmp_path / 'p' / 'ab')[2:]] == ['', ''], 'afterwards the loss rests'
    result = json.loads((tmp_path / 'p' / 'ab' / 'results.json').read_text())
    assert len(result['curve']) == 2 and result['last']['epoch'] == 2
    assert result['recipe']['before'] == [0, 2]
    eight = ('--epochs', '8', '--data_name', 'shapes:96', '--batch_size', '32')
    assert train_kd('ab', '--note', 'q', *eight).code == 0
    phases = [r['phase'] for r in rows(tmp_path / 'q' / 'ab')]
    assert phases == ['init'] * 2 + ['train'] * 8, '50 of 200 epochs'


def test_phases_inside(train_kd, tmp_path):
    """No method of a table trains longer, and all follow one learning rate."""
    words = ('--epochs', '4', '--data_name', 'shapes:96', '--batch_size', '32', '--schedule', 'onecycle')
    words += ('--pretrain_epochs', '2', '--phases', 'inside')
    done = train_kd('ab', 'ft', 'ctkd', *words, '--init_epochs', '1', '--note', 'p')
    assert done.code == 0, done.err
    runs = {token: rows(tmp_path / 'p' / token) for token in ('ab', 'ft', 'ctkd')}
    phases = {token: [r['phase'] for r in run] for token, run in runs.items()}
    assert phases == {'ab': ['init'] + 3 * ['train'], 'ft': 2 * ['pretrain'] + 2 * ['train'],
                      'ctkd': 4 * ['train']}  # fmt: skip
    assert all([r['epoch'] for r in run] == ['1', '2', '3', '4'] for run in runs.values())
    rates = {token: [float(r['lr']) for r in run] for token, run in runs.items()}
    for token, run in rates.items():
        tenth = [1 if phase == 'train' else 10 for phase in phases[token]]
        assert [lr * k for lr, k in zip(run, tenth)] == pytest.approx(rates['ctkd'], rel=1e-4)
    assert rates['ctkd'] == pytest.approx([0, 0.1 * 0.75 / 0.8, 0.1 * 0.5 / 0.8, 0.1 * 0.25 / 0.8], rel=1e-4)
    shown = json.loads((tmp_path / 'p' / 'ft' / 'results.json').read_text())
    assert shown['recipe']['phases'] == 'inside' and shown['recipe']['schedule'] == 'onecycle'
    assert len(shown['curve']) == 2 and shown['last']['epoch'] == 4
    assert train_kd('ft', *words, '--note', 'alone').code == 0
    assert rows(tmp_path / 'alone' / 'ft') == runs['ft']
    words = ('--epochs', '2', *words[2:])
    done = train_kd('ft', *words, '--note', 'q')
    assert done.code == 2 and 'leaves none to train' in done.err


def test_one_cycle_moves_at_every_step(script, tmp_path, monkeypatch):
    seen = []
    real = engine.optimise.set_learning_rate
    noted = lambda opt, lr: (seen.append(lr), real(opt, lr))  # noqa: E731
    monkeypatch.setattr(engine.optimise, 'set_learning_rate', noted)
    words = ('--net_name', 'resnet8', '--data_name', 'shapes:96', '--batch_size', 24, '--epochs', 5)
    assert script('train_base', *words, '--schedule', 'onecycle', '--lr', 0.4).code == 0
    up = [0.4 * (k + 0.5) / 4 for k in range(4)]
    down = [0.4 * (1 - (k + 0.5) / 16) for k in range(16)]
    assert seen == pytest.approx(up + down)


def test_initialisation_leaves_the_classifier_alone(train_kd, tmp_path, monkeypatch):
    import train_kd as module

    seen = {}
    real = module.begin_epoch

    def spy(run, epoch, args):
        real(run, epoch, args)
        seen[epoch] = [x.clone() for x in (run.net.fc.weight, run.net.conv1.weight)]
        seen[f'momentum {epoch}'] = len(run.opt.state)

    monkeypatch.setattr(module, 'begin_epoch', spy)
    assert train_kd('fsp', '--note', 'p', '--init_epochs', '2').code == 0
    assert torch.equal(seen[-2][0], seen[0][0]) and not torch.equal(seen[-2][1], seen[0][1])
    assert not torch.equal(seen[0][0], seen[1][0])
    assert seen['momentum -1'] > 0 and seen['momentum 0'] == 0 and seen['momentum 1'] > 0


def test_every_epoch_draws_other_numbers(train_kd, monkeypatch):
    import train_kd as module

    drawn, real = [], module.begin_epoch

    def spy(run, epoch, args):
        real(run, epoch, args)
        drawn.append((run.generator.initial_seed(), run.rng.getstate(), run.seeds.getstate()))

    monkeypatch.setattr(module, 'begin_epoch', spy)
    assert train_kd('st', '--note', 'x').code == 0
    assert len(drawn) == 2 and all(first != second for first, second in zip(*drawn))


def test_the_rate_of_an_initialisation_falls_twice():
    """After 0.6 and 0.8 of it, from a tenth of --lr; the epochs of pretraining before have no falls."""
    from types import SimpleNamespace

    args = SimpleNamespace(lr=1.0, lr_decay=0.1, milestones=[0.5], epochs=20, schedule='steps')
    run = engine.student.Run('x', *[None] * 8, (2, 10), 1, 20, False, [])
    rates = [run.learning_rate(epoch + 0.5, args) for epoch in range(-12, 1)]
    assert rates == pytest.approx([0.1] * 8 + [0.01] * 2 + [0.001] * 2 + [1.0])


def test_weights_of_cross_entropy_are_multiplied():
    """Of methods on one student: what is trained with and what the recipe says."""
    from types import SimpleNamespace

    from engine.build import weight_of_ce

    methods = [METHODS['st'], METHODS['at']]
    terms = [
        engine.student.Term(f'm{k}', replace(method, when=replace(method.when, ce=ce)), 1.0, {})
        for k, (method, ce) in enumerate(zip(methods, (0.5, 0.4)))
    ]
    for term in terms:
        term.loss = torch.nn.Identity()
    student = engine.student.Student(torch.nn.Linear(1, 1), terms, None)
    assert student.weights('train', 0, 2)['ce'] == pytest.approx(0.2)
    assert weight_of_ce(terms, SimpleNamespace(lambda_ce=None)) == pytest.approx(0.2)


def test_several_teachers(train_kd, teacher, script, tmp_path):
    two = ('--t_name', 'resnet8', 'resnet8', '--t_model', teacher, teacher)
    words = ('train_kd', '--s_name', 'resnet8', *TINY, '--kd_args', 'drop=0', *two)
    assert script(*words, '--kd_mode', 'dgkd', '--note', 'two').code == 0
    assert train_kd('dgkd', '--note', 'one').code == 0
    a, b = rows(tmp_path / 'two' / 'dgkd')[0], rows(tmp_path / 'one' / 'dgkd')[0]
    assert float(a['dgkd']) > float(b['dgkd'])
    assert (
        json.loads((tmp_path / 'two' / 'dgkd' / 'results.json').read_text())['teacher'] == 'resnet8+resnet8'
    )


def test_no_teacher_is_needed_where_none_is_used(script, tmp_path):
    done = script(
        'train_kd', '--s_name', 'resnet8', *TINY, '--kd_mode', 'cskd', 'tfkd', 'sla', '--note', 'self'
    )
    assert done.code == 0, done.err
    assert json.loads((tmp_path / 'self' / 'sla' / 'results.json').read_text())['teacher'] is None


@pytest.mark.parametrize('method', PEERS)
def test_peers(script, tmp_path, method):
    nets = ('--net_names', 'resnet8', 'resnet8')
    done = script('train_dml', '--kd_mode', method, *nets, '--note', 'm', *TINY)
    assert done.code == 0, done.err
    folder = tmp_path / 'm'
    result = json.loads((folder / 'results.json').read_text())
    assert result['method'] == method and result['net1']['name'] == 'resnet8'
    last = rows(folder)[-1]
    assert result['last']['top1'] == pytest.approx((result['net1']['top1'] + result['net2']['top1']) / 2)
    measured = []
    for k in (1, 2):  # the saved networks are the measured ones, by themselves
        net = build('resnet8', 10)
        load_weights(net, folder / f'net{k}.pt')
        test = dataset.load('shapes:96', folder)[1]
        amp = engine.device.autocast(torch.device('cpu'), 'off')
        measured.append(engine.evaluate.evaluate(net, test, amp)['top1'])
        assert measured[-1] == pytest.approx(result[f'net{k}']['top1'])
        assert float(last[f'net{k}_test_top1']) == pytest.approx(measured[-1], abs=1e-3)
    assert 'ensemble' in done.out and 0 <= result['ensemble']['top1'] <= 100
    state = weights(folder)['net']
    firsts = [x for key, x in state.items() if key.endswith(('fc.weight', 'linear.weight'))]
    assert not torch.equal(firsts[0], firsts[1]), 'the networks must differ'


def test_peers_of_other_kinds(script, tmp_path):
    three = ('--net_names', 'resnet8', 'wrn_16_1', 'resnet14')
    for method, words in (('dml', ()), ('kdcl', ('--kd_args', 'mode=general', '--val_split', '0.2')),
                          ('onadvfd', ()), ('okddip', ())):  # fmt: skip
        done = script('train_dml', '--kd_mode', method, *three, '--note', method, *TINY, *words)
        assert done.code == 0, done.err
    result = json.loads((tmp_path / 'kdcl' / 'results.json').read_text())
    assert result['net3']['name'] == 'resnet14' and result['best']['selected_on'] == 'validation split'
    mistake = script(
        'train_dml', '--kd_mode', 'kdcl', *three, '--note', 'x', *TINY, '--kd_args', 'mode=general'
    )
    assert mistake.code == 2 and '--val_split' in mistake.err


def test_a_student_that_stops_distilling(script, train_kd, teacher, tmp_path, monkeypatch):
    """--kd_stop 0 is the baseline, a late stop changes nothing, and after the stop no teacher is asked."""
    import engine.teachers

    assert script('train_base', '--net_name', 'resnet8', '--note', 'b', *TINY).code == 0
    asked, real = [], engine.teachers.Teachers.teachers_on
    monkeypatch.setattr(
        engine.teachers.Teachers, 'teachers_on', lambda self, img: asked.append(len(img)) or real(self, img)
    )
    counts = {}
    for note, more in (('0', ['0']), ('1', ['1']), ('9', ['9']), ('never', [])):
        asked.clear()
        words = ['--kd_stop', *more] if more else []
        done = train_kd('st', 'vid', '--lambda_ce', '0.5', '--note', note, *words)
        assert done.code == 0, done.err
        counts[note] = len(asked)
    steps = 96 // 32
    start = counts['0']  # a look at a few images, before the training
    assert {note: count - start for note, count in counts.items()} == {
        '0': 0, '1': steps, '9': 2 * steps, 'never': 2 * steps
    }  # fmt: skip
    assert same(weights(tmp_path / '0' / 'st')['net'], weights(tmp_path / 'b')['net'])
    for token in ('st', 'vid'):
        states = {note: weights(tmp_path / note / token)['net'] for note in counts}
        assert same(states['9'], states['never']) and not same(states['1'], states['never'])
    result = json.loads((tmp_path / '1' / 'st' / 'results.json').read_text())
    assert result['kd_stop'] == 1 and 'kd_stop' not in json.loads(
        (tmp_path / 'never' / 'st' / 'results.json').read_text()
    )


def test_a_method_of_several_teachers_names_what_it_lacks(train_kd):
    done = train_kd('ebkd', '--note', 'one')
    assert done.code == 2 and 'outs_t must hold 2 or more tensors, got 1' in done.err


def test_weight_zero_is_the_baseline(script, train_kd, tmp_path):
    """train_kd with lambda 0 and train_base see the same initial weights and batches: equal bit for bit."""
    assert train_kd('st', '--lambda_kd', '0', '--note', 'k').code == 0
    assert script('train_base', '--net_name', 'resnet8', '--note', 'b', *TINY).code == 0
    assert same(weights(tmp_path / 'k' / 'st')['net'], weights(tmp_path / 'b')['net'])
    initial = tmp_path / 'b' / 'initial.pt'
    assert train_kd('st', '--lambda_kd', '0', '--note', 'i', '--s_init', initial).code == 0
    assert same(weights(tmp_path / 'i' / 'st')['net'], weights(tmp_path / 'b')['net'])
    assert train_kd('st', '--lambda_kd', '0', '--note', 'j', '--s_init', tmp_path / 'b' / 'net.pt').code == 0
    assert not same(weights(tmp_path / 'j' / 'st')['net'], weights(tmp_path / 'b')['net'])


def test_the_loss_falls(script, train_kd, tmp_path):
    """Twelve epochs on few images: the whole loss ends lower than it began, and so does what maps are fed."""
    few = ('--data_name', 'shapes:96', '--batch_size', '32', '--epochs', '12', '--lr', '0.05')
    plain = ['st', 'logits', 'at', 'sp', 'pkt', 'nst', 'cc', 'fitnet', 'vid', 'ofd', 'dkd']
    assert train_kd(*plain, '--note', 'fall', *few).code == 0
    for name in plain:
        first, *_, last = rows(tmp_path / 'fall' / name)
        weight = METHODS[name].weight
        before, after = (float(r['ce']) + weight * float(r[name]) for r in (first, last))
        assert after < before, name
        if name not in ('st', 'logits', 'dkd'):  # an untrained teacher's logits pull against the labels
            assert float(last[name]) < float(first[name]), name


def test_weights_and_arguments_reach_the_loss(train_kd, tmp_path):
    flags = ('--lambda_kd', 'st=0.5', 'at=10', '--kd_args', 'st.T=2', 'at.p=1')
    assert train_kd('st', 'at', 'at+st', '--note', 'w', *flags).code == 0
    methods = json.loads((tmp_path / 'w' / 'at+st' / 'results.json').read_text())['recipe']['methods']
    assert methods == [['at', 10.0, {'p': 1}], ['st', 0.5, {'T': 2}]]
    assert train_kd('st', '--note', 'v', '--lambda_kd', '0.5', '--kd_args', 'T=2').code == 0
    assert rows(tmp_path / 'v' / 'st') == rows(tmp_path / 'w' / 'st')
    assert train_kd('st', '--note', 'u', '--lambda_kd', '0.5', '--kd_args', 'T=3').code == 0
    assert rows(tmp_path / 'v' / 'st') != rows(tmp_path / 'u' / 'st')


def test_stages_are_chosen(train_kd, tmp_path):
    """Of the step: fm after fm by hand. Of the files: the stages stand there if they are not the row's."""
    from engine.batch import Batch, InFloat32, Probe
    from engine.stages import Stages
    from engine.student import Term

    torch.manual_seed(0)
    net_s, net_t, img = build('resnet8', 10), build('resnet20', 10).eval(), torch.randn(4, 3, 32, 32)
    s, t, b = net_s(img, True), net_t(img, True), Batch(img, torch.arange(4), torch.arange(4), {})

    def value(name, numbers, weights=()):
        torch.manual_seed(1)
        term = Term(name, METHODS[name], 1.0, {}, None, Stages(numbers, weights))
        term.build(Probe(s, t, net_s, net_t, None, 4, 1, 10))
        return term, term.method.feed(term.loss, *(term.stages.of(InFloat32(f)) for f in (s, t)), b)

    at, maps = METHODS['at'].loss(), list(zip(s.fms, t.fms))
    one, two, three = (at(*maps[k]) for k in (1, 2, 3))
    for numbers, weights, wanted in (
        ((), (), (one + two + three) / 3),
        ((2,), (), two),
        ((-3, -1), (), (one + three) / 2),
        ((1, 2, 3), (0.25, 0.5, 1.0), (one / 4 + two / 2 + three) / 3),
    ):
        term, got = value('at', numbers, weights)
        assert torch.allclose(got, wanted, rtol=1e-6) and (term.recipe[3:] == []) == (not numbers)
    nst = METHODS['nst'].loss()
    assert (
        torch.equal(value('nst', (-1,))[1], nst(*maps[3]))
        and Term('nst', METHODS['nst'], 1, {}).recipe[3:] == []
    )
    assert torch.allclose(value('nst', ())[1], sum(nst(*maps[k]) for k in (1, 2, 3)) / 3)
    assert torch.equal(value('fitnet', (2,))[1], (s.fms[2] - t.fms[2]).square().mean())
    ofd, got = value(
        'ofd', (2, 3), (0.5, 1.0)
    )  # of two networks of equal width: margins of the right batch norm
    bns = net_t.bn_before_relu()
    for loss, bn in zip(ofd.loss, bns[1:], strict=True):
        assert torch.equal(loss.loss.margin.flatten(), loss.loss.margin_from_bn(bn.weight, bn.bias))
    parts = [loss.loss(s.pres[k], t.pres[k]) for k, loss in zip((2, 3), ofd.loss)]
    assert torch.allclose(got, (parts[0] / 2 + parts[1]) / 2)

    flags = ('--kd_layers', 'ofd=1:0.25,2:0.5,3', 'nst=-1', 'ft=2', 'fsp=1,3', 'sp=-1', '--epochs', '1')
    flags += TINY[:4]
    done = train_kd('ofd', 'nst', 'ft', 'fsp', 'sp', '--note', 'k', *flags)
    assert done.code == 0, done.err
    said = {}
    for name in ('ofd', 'nst', 'ft', 'fsp', 'sp'):
        (entry,) = json.loads((tmp_path / 'k' / name / 'results.json').read_text())['recipe']['methods']
        said[name] = entry[3:]
    assert said == {'ofd': ['1:0.25,2:0.5,3'], 'nst': [], 'ft': ['2'], 'fsp': ['1,3'], 'sp': ['-1']}
    for again, code in ((flags, 0), (flags[6:], 2)):  # a resume with others is refused
        done = train_kd('ofd', 'nst', 'ft', 'fsp', 'sp', '--note', 'k', '--resume', 'auto', *again)
        assert done.code == code
    assert "stages of methods differ: was [['ofd', 0.5, {}, '1:0.25,2:0.5,3']]" in done.err


def test_the_ramp_follows_the_epochs():
    ramp = METHODS['dkd'].when.ramp
    assert [ramp(e, 240) for e in (0, 9, 19, 20, 239)] == [0.05, 0.5, 1, 1, 1]
    assert [ramp(e, 24) for e in (0, 1, 2)] == [0.5, 1, 1] and ramp(0, 2) == 1
    down = METHODS['wkd_feature'].when.ramp
    assert [down(e, 240) for e in (0, 150, 195)] == [1, 1, 0.5] and 0 < down(239, 240) < 0.001
    assert [down(e, 2) for e in (0, 1)] == [1, 1] and down(1, 1) == pytest.approx(0)


def test_validation_split(script, tmp_path):
    done = script('train_base', '--net_name', 'resnet8', '--note', 'v', *TINY, '--val_split', '0.25')
    assert done.code == 0, done.err
    result = json.loads((tmp_path / 'v' / 'results.json').read_text())
    assert result['best']['selected_on'] == 'validation split' and 'val_top1' in rows(tmp_path / 'v')[0]
    assert 'selected on test data' not in done.out
    assert '72 + ' in done.out, 'a quarter of 96 images is held out, and nobody trains on it'
    from types import SimpleNamespace

    words = SimpleNamespace(data_name='shapes:96', img_root='/nonexistent', image_size=224, workers=1, seed=2,
                            convert_rgb=False, pad='reflect', val_split=0.25, batch_size=32)  # fmt: skip
    train, val, _ = engine.data.load_data(words, torch.device('cpu'))
    halves = [{image.numpy().tobytes() for image in half.images} for half in (train, val)]
    assert [len(half) for half in halves] == [72, 24] and not halves[0] & halves[1]


@pytest.mark.parametrize('save', [True, False])
@pytest.mark.parametrize('half', ['val', 'test'])
def test_the_weights_of_the_best_epoch_are_kept(tmp_path, half, save):
    """best.pt, also where it is written in a later epoch; chosen by validation images if there are some."""
    net = torch.nn.Linear(1, 1)
    record = engine.record.Record(tmp_path, {'net': net}, {}, {'commit': 'x'}, half)
    figures = ((10.0, 50.0), (30.0, 20.0), (20.0, 90.0), (30.0, 90.0), (5.0, 5.0))
    for epoch, (val, test) in enumerate(figures, 1):
        with torch.no_grad():
            net.weight.fill_(epoch)
        row = {'epoch': epoch, 'test_top1': test, 'seconds': 0.0} | (
            {'val_top1': val} if half == 'val' else {}
        )
        record.epoch_done(row, save=save or epoch == len(figures))
    best = torch.load(tmp_path / 'best.pt', weights_only=True)
    epoch, top1 = {'val': (2, 20.0), 'test': (3, 90.0)}[half]
    assert best['epoch'] == epoch and float(best['net']['weight']) == epoch, 'of equals the first'
    record.finish('net.pt', {})
    result = json.loads((tmp_path / 'results.json').read_text())
    assert (result['best']['epoch'], result['best']['top1']) == (epoch, top1) and result['last'][
        'top1'
    ] == 5.0
    assert float(torch.load(tmp_path / 'net.pt', weights_only=True)['weight']) == len(figures)


@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_mixed_precision(train_kd, tmp_path, amp):
    done = train_kd('st', 'rkd', 'vid', '--note', amp, '--amp', amp)
    assert done.code == 0, done.err
    net = weights(tmp_path / amp / 'st')['net']
    assert all(v.dtype == torch.float32 for v in net.values() if v.is_floating_point())
    assert ('scale' in weights(tmp_path / amp / 'st')['scaler']) == (amp == 'fp16')


def test_seed_changes_and_repeats(script, tmp_path):
    for note, seed in (('a', 1), ('b', 1), ('c', 3)):
        assert script('train_base', '--net-name', 'resnet8', '--note', note, '--seed', seed, *TINY).code == 0
    assert rows(tmp_path / 'a') == rows(tmp_path / 'b') != rows(tmp_path / 'c')


def test_folder_data(script, tmp_path):
    from tests.test_data import write_folder

    data = ('--data_name', 'folder', '--img_root', write_folder(tmp_path / 'images'), '--image_size', '32')
    done = script(
        'train_base',
        '--net_name',
        'resnet8',
        '--note',
        'f',
        *data,
        '--epochs',
        '1',
        '--batch_size',
        '5',
        '--workers',
        '0',
    )
    assert done.code == 0, done.err
    assert weights(tmp_path / 'f')['net']['fc.weight'].shape == (3, 64)


def test_tensorboard(script, tmp_path):
    assert script('train_base', '--net_name', 'resnet8', '--note', 't', *TINY, '--tensorboard').code == 0
    assert list((tmp_path / 't').glob('events.out.tfevents.*'))


@pytest.mark.parametrize(
    'module,flag,said',
    [('tqdm', (), 'tqdm is not installed'), ('torch.utils.tensorboard', ('--tensorboard',), 'not installed')],
)
def test_optional_imports_are_optional(script, monkeypatch, module, flag, said):
    monkeypatch.setitem(sys.modules, module, None)
    done = script('train_base', '--net_name', 'resnet8', '--note', 'o', *TINY, *flag)
    assert said in done.out + done.err
    assert done.code == (2 if flag else 0)


def test_evaluate_is_exact():
    class Ranked(torch.nn.Module):  # logits that put class (index mod K) first, by the image's first pixel
        def forward(self, x):
            return -(torch.arange(4.0)[None] - x[:, 0, 0, 0, None].round() % 4).abs()

    data = dataset.load('shapes:1030', '/nonexistent-root')[1]
    data.images[:] = 0
    data._scale, data._shift = torch.ones(3), torch.zeros(3)
    data.images[:, 0, 0, 0] = (torch.arange(len(data)) % 4).byte()
    data.targets = torch.arange(len(data)) % 4
    data.targets[:10] += 1
    data.targets.clamp_(max=3)
    wrong = sum((i % 4) != min(i % 4 + 1, 3) for i in range(10))
    measured = engine.evaluate.evaluate(Ranked(), data, engine.device.autocast(torch.device('cpu'), 'off'))
    assert measured['top1'] == pytest.approx(100 * (len(data) - wrong) / len(data))
    assert measured['top5'] == 100 and measured['bad'] == 0

    class Eight(torch.nn.Module):  # the first of eight classes first, the last one last
        def forward(self, x):
            return -torch.arange(8.0).expand(len(x), 8)

    data.targets = torch.arange(len(data)) % 8
    measured = engine.evaluate.evaluate(Eight(), data, engine.device.autocast(torch.device('cpu'), 'off'))
    shares = [100 * float((data.targets < k).float().mean()) for k in (1, 5)]
    assert [measured['top1'], measured['top5']] == pytest.approx(shares)


def test_a_meters_means_are_over_images():
    """Batches of unequal size; a number counts as a tensor does; the next epoch begins at 0."""
    meter = engine.meter.Meter('x', 0, torch.device('cpu'))
    for _ in range(2):
        meter.add(torch.eye(3)[:2], torch.tensor([0, 1]), ce=torch.tensor(1.0), kd=4.0)
        meter.add(torch.eye(3)[[0] * 6], torch.tensor([0, 1, 1, 1, 1, 2]), ce=torch.tensor(3.0), kd=2.0)
        assert meter.read() == pytest.approx({'ce': 2.5, 'kd': 2.5, 'train_top1': 37.5})
        meter.reset(1)


def test_learning_rate_is_a_function_of_the_epoch():
    from types import SimpleNamespace

    args = SimpleNamespace(lr=0.1, lr_decay=0.1, milestones=[0.5, 0.75], epochs=200, schedule='steps')
    got = [engine.optimise.learning_rate(args, e) for e in (0, 99, 100, 149, 150, 199)]
    assert got == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    args = SimpleNamespace(lr=1.0, lr_decay=0.1, milestones=[0.55], epochs=100, schedule='steps')
    assert 0.55 * 100 > 55 and [engine.optimise.learning_rate(args, e) for e in (54, 55)] == [1.0, 0.1]


def test_table_and_figure(train_kd, script, tmp_path, monkeypatch, capsys):
    import report.table

    assert train_kd('st', 'at', '--note', 'kd').code == 0
    assert script('train_base', '--net_name', 'resnet8', '--note', 'base', *TINY).code == 0
    (tmp_path / 'R.md').write_text('before <!-- demo:begin -->\nold\n<!-- demo:end --> after')
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'table.py',
            str(tmp_path / 'kd'),
            str(tmp_path / 'base'),
            '--out',
            str(tmp_path / 'o'),
            '--readme',
            str(tmp_path / 'R.md'),
            '--name',
            'demo',
        ],
    )
    assert report.table.main() == 0
    text = (tmp_path / 'o' / 'table.md').read_text()
    result = json.loads((tmp_path / 'kd' / 'st' / 'results.json').read_text())
    alone = json.loads((tmp_path / 'base' / 'results.json').read_text())
    gain = result['last']['top1'] - alone['last']['top1']
    assert f'| st | resnet8 -> resnet8 | {result["last"]["top1"]:.2f} | 1 | {gain:+.2f} |' in text
    assert 'selected on test data' in text
    readme = (tmp_path / 'R.md').read_text()
    assert text in readme and readme.startswith('before') and readme.endswith('after') and 'old' not in readme
    from PIL import Image

    with Image.open(tmp_path / 'o' / 'accuracy.png') as image:
        assert min(image.size) > 400
    results = report.table.read_results([str(tmp_path / 'kd'), str(tmp_path / 'base')])
    (late,) = [r for r in results if r['method'] == 'at']
    late['curve'] = late['curve'][1:]  # a phase was inside
    fig = report.table.curves(report.table.group(results), importlib.import_module('matplotlib.pyplot'))
    assert sorted(list(line.get_xdata()) for line in fig.axes[0].lines) == [[1, 2], [1, 2], [2]]
    for r, top1 in zip(results, (80.0, 10.0, 81.0)):
        r['last']['top1'] = top1
    fig = report.table.last_epochs(report.table.group(results), importlib.import_module('matplotlib.pyplot'))
    assert fig.axes[0].get_xlim()[0] > 50, 'one that diverged does not push the others together'
    assert [text.get_text() for text in fig.axes[0].texts] == ['10.0']
    (tmp_path / 'empty').mkdir()
    monkeypatch.setattr(sys, 'argv', ['table.py', str(tmp_path / 'empty'), '--out', str(tmp_path / 'o')])
    with pytest.raises(engine.errors.UserError, match='no result of train_base.*; report ka reads train_ka'):
        report.table.main()


def test_table_over_seeds():
    import report.table

    def one(method, teacher, seed, top1):
        return {
            'method': method,
            'teacher': teacher,
            'student': 's',
            'data': 'd',
            'epochs': 2,
            'seed': seed,
            'last': {'top1': top1},
            'best': {'top1': top1 + 1, 'selected_on': 'test data'},
            'curve': [1, top1],
            'recipe': {'batch_size': 64, 'lr': 0.1, 'amp': 'bf16'},
            'machine': {'device': 'cpu'},
        }

    text = report.table.table(
        [
            one('baseline', None, 1, 50.0),
            one('baseline', None, 2, 52.0),
            one('st', 't', 1, 53.0),
            one('st', 't', 2, 55.0),
            one('at', 't', 1, 60.0),
        ]
    )
    lines = text.splitlines()
    lines_of = report.table.published(('cifar10', 'resnet110', 'resnet20', 'at', 200))
    assert lines_of == '93.21 (Knowledge-Distillation-Zoo, 200 epochs)'
    plain, labelled = (
        report.table.published(('cifar100', 'resnet56', 'resnet20', method, 240))
        for method in ('st', 'st (T=4.0, weight 0.9, ce 0.1)')
    )
    assert plain == labelled and 'mdistiller' in labelled, "the grid's recipes are those of the authors"
    assert not report.table.published(('cifar10', None, 'resnet20', 'baseline (start 2)', 2)), 'other weights'
    end = '| 2 epochs, batch 64, bf16 | cpu |  |'
    assert f'| baseline | s | 51.00 +- 1.41 | 2 |  | 52.00 +- 1.41 {end}' == lines[2]
    assert f'| at | t -> s | 60.00 | 1 | +10.00 | 61.00 {end}' == lines[3]
    assert f'| st | t -> s | 54.00 +- 1.41 | 2 | +3.00 | 55.00 +- 1.41 {end}' == lines[4]


def test_a_method_of_the_users_own(train_kd, tmp_path, monkeypatch):
    """The recipe of docs/extending.md: the class as printed there, one row, and the trainer knows it."""
    import re
    import textwrap

    from methods import KD, Method
    from methods.shared import embeddings
    from tests.conftest import ROOT

    blocks = re.findall(r'```python\n(.*?)^ *```', (ROOT / 'docs' / 'extending.md').read_text(), re.S | re.M)
    scope = {}
    exec(textwrap.dedent(next(block for block in blocks if 'class Mine' in block)), scope)
    monkeypatch.setitem(KD, 'mine', Method(scope['Mine'], 1.0, embeddings))
    done = train_kd('mine', 'mine+st', '--note', 'm')
    assert done.code == 0, done.err
    assert json.loads((tmp_path / 'm' / 'mine' / 'results.json').read_text())['recipe']['methods'] == [
        ['mine', 1.0, {}]
    ]


def test_compiled_networks_train_alike(script, teacher, tmp_path, monkeypatch):
    """--compile reaches every network; here with a backend that only traces, so the numbers stay."""
    real, compiled = torch.nn.Module.compile, []

    def traced(net):
        compiled.append(type(net).__name__)
        real(net, backend='eager')

    monkeypatch.setattr(torch.nn.Module, 'compile', traced)
    pair = ('--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8')
    for note, flags in (('plain', ()), ('compiled', ('--compile',))):
        words = ('--kd_mode', 'st', 'at', 'norm', *pair, *TINY, '--note', note, *flags)
        assert script('train_kd', *words).code == 0
    assert sorted(compiled) == ['NORMStudent', 'ResNet', 'ResNet', 'ResNet']
    for token in ('st', 'at', 'norm'):
        a, b = weights(tmp_path / 'plain' / token), weights(tmp_path / 'compiled' / token)
        assert a['net'].keys() == b['net'].keys()
        assert all(
            torch.allclose(x.double(), y.double(), atol=1e-5)
            for x, y in zip(a['net'].values(), b['net'].values())
        )
        assert b['args']['compile'] is True and 'compile' not in a['args']
    compiled.clear()
    assert script('train_base', '--net_name', 'resnet8', *TINY, '--note', 'base', '--compile').code == 0
    peers = ('--kd_mode', 'dml', '--net_names', 'resnet8', 'resnet8')
    assert script('train_dml', *peers, *TINY, '--note', 'peers', '--compile').code == 0
    assert compiled == ['ResNet'] * 3


def test_a_method_that_rests_takes_its_own_step_no_longer(train_kd, tmp_path):
    """--kd_stop with a method that has an update of its own; an epoch with nothing to learn."""
    for words in (('dot', '--kd_stop', 1), ('mhgd', '--kd_stop', 1, '--pretrain_epochs', 1)):
        done = train_kd(*words, '--note', words[0])
        assert done.code == 0, done.err
    done = train_kd('reviewkd', '--lambda_ce', 0, '--note', 'r')
    assert done.code == 0, done.err
    assert float(rows(tmp_path / 'r' / 'reviewkd')[-1]['reviewkd']) > 0
    nothing = ('--lambda_ce', 0, '--lambda_kd', 0)
    for words in (('st', *nothing), ('st', *nothing, '--kd_stop', 2), ('fsp', '--lambda_ce', 0)):
        done = train_kd(*words, '--note', 'n')
        assert done.code == 2 and 'nothing to learn' in done.err and done.err.count('\n') == 1, done.err
    assert train_kd('st', *nothing, '--kd_stop', 1, '--note', 'n').code == 0, 'cross-entropy learns later'
