"""Features that work by themselves, together: flags beside rows, a resume beside a changed flag."""

import csv
import json
from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dataset
import engine.data
import models
from benchmarks import cuda
from dataset.resident import Resident
from dfkd_losses import fastdfkd
from engine import build, dense_setting, side_by_side
from engine.batch import Batch
from engine.dfkd_source import Source
from engine.errors import UserError
from engine.ka_tools import check_places
from engine.recipe import load_checkpoint
from ka_losses import concat_kd
from ka_settings.attributes import Attributes
from kd_losses import deit, tdd
from methods import schedules

TINY = ('--data_name', 'shapes:96', '--batch_size', 32)


def rows(folder) -> list[dict]:
    with open(folder / 'metrics.csv') as file:
        return list(csv.DictReader(file))


def images(n: int, side: int = 32, mean: float = 0.5) -> Resident:
    pixels = torch.zeros(n, side, side, 3, dtype=torch.uint8)
    return Resident(pixels, torch.arange(n) % 4, 4, (mean,) * 3, (0.5,) * 3, torch.device('cpu'))


def test_groups_of_classes_come_from_images_with_labels():
    """Unlabelled neighbours counted as another class's: every layer had one group, and the loss was 0."""
    g = torch.Generator().manual_seed(0)
    target = torch.arange(4).repeat(50)
    points = torch.eye(4)[target] * 20 + torch.randn(200, 4, generator=g)
    known = torch.where(torch.rand(200, generator=g) < 0.2, target, -100)

    def groups(target):
        batches = [(points[:, :, None, None], target)]
        fms = [points[:2, :, None, None]] * 2
        probe = SimpleNamespace(
            net_t=lambda img, feats: SimpleNamespace(fms=[img, img]), s=SimpleNamespace(fms=fms),
            t=SimpleNamespace(fms=fms), batch_size=8, num_classes=4,
            train_set=SimpleNamespace(test_batches=lambda n: batches),
        )  # fmt: skip
        return tdd.build(lambda groups, channels: groups, probe, k=5)

    assert len(groups(known)[0].unique()) == len(groups(target)[0].unique()) == 4
    with pytest.raises(ValueError, match='no image of the training set has a label'):
        groups(torch.full_like(target, -100))


def test_a_ramp_is_as_long_as_the_flag_says_beside_phases(train_kd, monkeypatch):
    """--phases inside makes the training proper shorter; a ramp of 2 epochs stays one of 2."""
    seen = {}

    def look(run, *_):
        seen[run.name] = [term.ramp for term in run.terms if term.ramp], run.epochs

    monkeypatch.setattr(build, 'try_once', look)
    words = ('--epochs', 4, *TINY, '--pretrain_epochs', 1, '--phases', 'inside', '--ramp_epochs', 2)
    assert train_kd('ft+dkd', *words, '--note', 'x').code == 0
    ((ramp,), epochs) = seen['ft+dkd']
    assert isinstance(ramp, schedules.linear) and epochs == 3
    assert [ramp(epoch, epochs) for epoch in range(3)] == [0.5, 1, 1]


@pytest.mark.parametrize(
    'words,said',
    [
        (('dot+pld',), 'dot sets the loss against cross-entropy, whose weight is 0'),
        (('dot', '--lambda_ce', 0), 'whose weight is 0'),
        (('dot+cd_edt',), 'whose weight is 0 at first'),
        (('dot', '--optim', 'adamw'), '--optim adamw: dot has an optimiser of its own'),
        (('lwm', '--compile'), '--compile: lwm: it takes gradients of gradients'),
        (('st', 'sobolev', '--compile'), '--compile: sobolev: it takes gradients of gradients'),
    ],
)
def test_what_a_row_would_not_read_is_refused(train_kd, words, said):
    done = train_kd(*words, '--note', 'x')
    assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err


def test_a_replaced_schedule_of_cross_entropy_is_another_recipe(train_kd):
    words = ('cd_edt', '--epochs', 1, *TINY, '--note', 'x')
    assert train_kd(*words).code == 0
    done = train_kd(*words, '--lambda_ce', 1, '--resume', 'auto')
    assert done.code == 2 and 'ce_scheduled was True, is False' in done.err, done.err


def test_a_loss_that_rests_has_no_value(train_kd, tmp_path):
    """0 would be perfect imitation; a resumed run has nothing there, either."""
    assert train_kd('st', '--epochs', 2, *TINY, '--kd_stop', 1, '--note', 'x').code == 0
    first, second = rows(tmp_path / 'x' / 'st')
    assert float(first['st']) > 0 and second['st'] == ''


def test_deit_beside_a_student_with_other_things_in_extra():
    """Joint logits of sla, a wide map of norm: no heads."""
    out, out_t, target = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5), torch.arange(4)
    kd, batch, t = deit.DeiT(), SimpleNamespace(target=target), SimpleNamespace(out=out_t)
    wanted = kd(out, out, out_t, target)
    for extra in (None, torch.randn(16, 20), torch.randn(2, 8, 4, 4), ([out], [out])):
        assert torch.equal(deit.feed(kd, SimpleNamespace(out=out, extra=extra), t, batch), wanted)
    other = torch.randn(4, 5)
    two = deit.feed(kd, SimpleNamespace(out=out, extra=[out, other]), t, batch)
    assert torch.equal(two, kd(out, other, out_t, target))


def test_how_images_are_normalised_is_part_of_the_recipe(monkeypatch):
    args = Namespace(
        data_name='arrays',
        img_root='.',
        image_size=32,
        workers=0,
        convert_rgb=False,
        pad='reflect',
        val_split=0,
        labelled=None,
        batch_size=2,
    )
    names = []
    for mean in (0.5, 0.4):
        both = images(4, mean=mean), images(4)
        monkeypatch.setattr(engine.data, 'read_data', lambda *_, both=both: both)
        engine.data.load_data(args, torch.device('cpu'))
        names.append((args.own_images, args.own_scale))
    assert names[0][0] == names[1][0] and names[0][1] != names[1][1]


def test_images_of_another_size_cannot_stand_for_others():
    with pytest.raises(ValueError, match=r'images of \(16, 16\) pixels cannot stand for those of \(32, 32\)'):
        images(8).pictures(images(8, side=16))


@pytest.mark.parametrize('key,value', [('labels', 200), ('w_frame', 1)])
def test_a_flag_that_went_back_to_its_default_is_another_recipe(tmp_path, key, value):
    torch.save({'args': {'epochs': 3, key: value}, 'epoch': 1}, tmp_path / 'last.pt')
    with pytest.raises(UserError, match=f'{key} was {value}, is'):
        load_checkpoint(tmp_path / 'last.pt', {'epochs': 3})


def test_resume_never_forgets_all_networks_of_a_tool_at_once(tmp_path):
    """A kill in the first would leave the others of an older run, which auto then took for this one's."""
    for name in 'ab':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'last.pt').touch()
    check_places(Namespace(resume='never'), tmp_path, (name for name in 'ab'))
    assert not list(tmp_path.glob('*/last.pt'))


def test_the_surest_source_is_chosen_for_every_attribute():
    """Sources of two attributes: one sure of the first, the other of the second."""
    setting = object.__new__(Attributes)
    first, second = torch.tensor([[0.0, 8, 0, 1]]), torch.tensor([[1.0, 0, 8, 0]])
    outs = iter([(first, torch.tensor([[1, 0]])), (second, torch.tensor([[1, 0]]))])
    setting.nets, setting.test, setting.alike = [1, 2], None, True
    setting.columns = [torch.arange(4)] * 2
    setting.attributes = ['a', 'b']
    setting._outputs = lambda net, test: next(outs)
    read = []
    setting._read = lambda out, target: read.append(out) or {}
    found = setting.ensembles()
    assert read[-1].tolist() == [[0, 8, 8, 0]] and found['source 1']['surest_of'] == 50


def test_a_part_of_one_class_is_refused():
    probe = SimpleNamespace(all_t=[SimpleNamespace(out=torch.zeros(2, n)) for n in (3, 1)])
    with pytest.raises(ValueError, match='a part of one class teaches nothing'):
        concat_kd.build_parts(concat_kd.ConcatKD, probe)


def test_the_lasting_generator_obeys_rate_and_clip():
    net = nn.Linear(2, 2)
    opt = torch.optim.SGD(net.parameters(), 1.0)
    opt.param_groups[0]['full'] = 0.8
    for p in net.parameters():
        p.grad = torch.full_like(p, 100.0)
    source = SimpleNamespace(options={'meta': 'fomaml'}, slow=opt, rate=0.5, recipe=SimpleNamespace(clip=3.0),
                             generator=net)  # fmt: skip
    source.step = partial(Source.step, source)
    before = [p.detach().clone() for p in net.parameters()]
    fastdfkd.end(SimpleNamespace(momentum=0), source, None, None)
    moved = float(torch.cat([(p - q).detach().flatten() for p, q in zip(net.parameters(), before)]).norm())
    assert opt.param_groups[0]['lr'] == 0.4 and moved == pytest.approx(0.4 * 3.0, rel=1e-3)


def test_a_kept_teacher_of_rooms_does_not_depend_on_the_seed(monkeypatch):
    seeds = []

    def pictures(setting, step, parts):
        seeds.append(setting.seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(dense_setting.parts, 'StepPictures', pictures)
    setting = dense_setting.Setting(None, 2, torch.device('cpu'), None, 7, 1, None, 1)
    with pytest.raises(KeyboardInterrupt):
        args = Namespace(t_steps=1)
        dense_setting.learn_from_labels(args, setting, nn.Linear(1, 1), [{}], lambda line: None)
    assert seeds == [0]


def test_the_student_of_a_federation_is_the_one_that_was_measured(train, tool, script, img_root, tmp_path):
    for part in (0, 1):
        words = ('--save_root', tmp_path, '--net_name', 'resnet8', *TINY, '--epochs', 1)
        train('train_base', *words, '--num_parts', 2, '--part', part, '--note', f'part{part}')
    files = [tmp_path / f'part{part}' / 'net.pt' for part in (0, 1)]
    words = ('--t_name', 'resnet8', '--t_model', *files, '--s_name', 'resnet8', *TINY, '--probe', 2)
    once = ('--epochs', 1, '--local_epochs', 1, '--adapt_epochs', 3, '--topk', 1, '--note', 'x')
    done = tool('fedka', *words, *once)
    assert done.code == 0, done.err
    wanted = json.loads((tmp_path / 'x' / 'results.json').read_text())['last']['top1']
    net = models.load_student(tmp_path / 'x' / 'student.pt', 'resnet8', 10).eval()
    test, hits = dataset.load_test('shapes:96', img_root), []
    with torch.no_grad():
        for img, target, _ in test.test_batches(64):
            hits.append(net(img).argmax(dim=1) == target)
    assert 100 * float(torch.cat(hits).double().mean()) == pytest.approx(wanted, abs=0.01)


def test_a_recording_goes_with_the_look_that_it_reads(monkeypatch):
    """The teachers rest from here on, what they had said is freed: steps that read it are recorded anew."""
    captured = []

    def capture(stream, generators, counters=()):
        def record(work):
            captured.append(work)
            return cuda.stand_in()(work)

        return record

    class Look:
        nets, resting = [1], False

        def __call__(self, img, target, index, views):
            return Batch(img, target, index, views)

    class Run:
        name, usual_only, generators, counters = 'ab', '', (), ()

        def decided(self):
            return 'always the same'

    monkeypatch.setattr(side_by_side, 'cuda_capture', capture)
    monkeypatch.setattr(
        side_by_side.Graphs, '_apart', lambda self, runs: nullcontext(lambda run: nullcontext())
    )
    how, look, run, steps = side_by_side.Graphs(torch.device('cpu')), Look(), Run(), []
    batch = torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), {}
    for resting in (False, True):
        look.resting = resting
        for seen in how.looks(look, [batch] * 6):
            how.train(lambda run, seen: steps.append(seen), [run], seen)
    of_run = [work for work in captured if work.func is not side_by_side._settled]
    assert len(of_run) == 2


def test_convolutions_of_losses_are_float32_on_a_gpu(script):
    torch.backends.cudnn.allow_tf32 = True
    assert script('train_base', '--net_name', 'resnet8', *TINY, '--epochs', 1, '--note', 'x').code == 0
    assert not torch.backends.cudnn.allow_tf32


def test_the_replay_benchmark_runs():
    said = []
    cuda.replay(torch.device('cpu'), 1, lambda *words: said.append(words[-1]()))
    assert said[0]['usual_ms'] > 0
