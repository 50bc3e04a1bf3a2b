"""Stored soft labels: students learn from a folder what they would learn from the teacher."""

import json

import numpy as np
import pytest
import torch

from dataset.soft_labels import SAME, SoftLabelStore, write_epoch
from kd_losses.fkd_labels import SoftCE, quantise, recover
from tests.conftest import TINY
from tests.test_train import rows
from tools import missing


@pytest.fixture
def pseudo(script, img_root, monkeypatch):
    """The tool, called like a script."""
    import sys

    import tools.pseudo_labels

    monkeypatch.setitem(sys.modules, 'pseudo_labels', tools.pseudo_labels)
    return lambda *words: script('pseudo_labels', *words, '--img_root', img_root, '--threads', 1)


def stored(pseudo, teacher, folder, *more):
    words = ('--t_name', 'resnet8', '--t_model', teacher, '--data_name', 'shapes:96', '--out', folder)
    done = pseudo(*words, '--label_epochs', '2', *more)
    assert done.code == 0, done.err
    return folder


def test_students_learn_what_the_teacher_would_say(pseudo, script, train_kd, teacher, tmp_path):
    """All logits, in half precision: the same losses to rounding, with any batch size of the tool."""
    folder = stored(pseudo, teacher, tmp_path / 'labels', '--kind', 'logits', '--batch_size', '19')
    assert train_kd('st', 'fkd_labels', '--note', 'live').code == 0
    words = ('--s_name', 'resnet8', *TINY, '--kd_mode', 'st', 'fkd_labels', '--note', 'read')
    done = script('train_kd', *words, '--soft_labels', folder)
    assert done.code == 0, done.err
    for token in ('st', 'fkd_labels'):
        pairs = zip(rows(tmp_path / 'live' / token), rows(tmp_path / 'read' / token))
        for live, read in pairs:
            assert float(read[token]) == pytest.approx(float(live[token]), rel=2e-2)
    result = json.loads((tmp_path / 'read' / 'st' / 'results.json').read_text())
    assert result['teacher'] == 'resnet8 (logits labels)' and result['teacher_top1'] > 0
    recipes = [result['recipe'], result['recipe'] | {'teacher_weights': 'of another teacher, hard'}]
    asked = missing.wanted('train_kd.py', 'st', [*map(str, words[:-5]), '--soft_labels', str(folder)])
    assert [missing.done(asked, [recipe]) for recipe in recipes] == [True, False]


def test_a_black_box_teaches_with_its_answers_alone(pseudo, script, teacher, tmp_path):
    """Classes only, longer than they are stored; what needs maps or other crops is refused in one line."""
    folder = stored(pseudo, teacher, tmp_path / 'labels', '--kind', 'hard')
    assert {p.name for p in (folder / 'epoch_0001').iterdir()} == {'index.npy'}
    words = ('train_kd', '--s_name', 'resnet8', '--data_name', 'shapes:96', '--batch_size', '32')
    words += ('--soft_labels', folder)
    assert script(*words, '--kd_mode', 'fkd_labels', 'st', '--note', 'x', '--epochs', '3').code == 0
    for more, said in (
        (('--kd_mode', 'at'), 'there are logits only, and a method asks for fms'),
        (('--kd_mode', 'rkd'), 'there are logits only, and a method asks for feat'),
        (('--kd_mode', 'st', '--seed', '3'), 'labelled with --seed 2, this is 3: other crops'),
        (('--kd_mode', 'st', '--t_name', 'resnet8', '--t_model', teacher), 'leave out --t_name'),
    ):
        done = script(*words, *more, '--note', 'bad', '--epochs', '2')
        assert done.code == 2 and said in done.err and done.err.count('\n') == 1, done.err
    meta = json.loads((folder / 'meta.json').read_text())
    named = {}
    for more in ({'temp_t': 4}, {'kind': 'soft', 'temp_t': 4}, {'kind': 'soft', 'temp_t': 1}):
        store = SoftLabelStore(folder)
        store.meta |= more
        named[store.named(2), store.named(3)] = more
    assert list(named) == [
        ('hard', 'hard epochs=2'),
        ('soft temp_t=4', 'soft temp_t=4 epochs=2'),
        ('soft', 'soft epochs=2'),
    ]
    (folder / 'meta.json').write_text(json.dumps(meta | {'class_names': meta['class_names'][::-1]}))
    done = script(*words, '--kd_mode', 'st', '--note', 'other', '--epochs', '2')
    assert done.code == 2 and 'trained for other classes' in done.err and 'another order' in done.err
    (folder / 'meta.json').write_text(json.dumps(meta))
    index = folder / 'epoch_0001' / 'index.npy'
    index.write_bytes(b'')
    done = script(*words, '--kd_mode', 'st', '--note', 'damaged', '--epochs', '2')
    assert done.code == 2 and f'{index}: cannot be read' in done.err and done.err.count('\n') == 1
    index.unlink()  # not silently the epoch before
    done = script(*words, '--kd_mode', 'st', '--note', 'gone', '--epochs', '2')
    assert done.code == 2 and f'{index}: is missing' in done.err
    (folder / 'meta.json').write_text('[]')
    assert 'is no complete store' in script(*words, '--kd_mode', 'st', '--note', 'list', '--epochs', '2').err
    (folder / 'meta.json').unlink()
    done = script(*words, '--kd_mode', 'st', '--note', 'half', '--epochs', '2')
    assert done.code == 2 and 'is no complete store of soft labels' in done.err
    again = pseudo('--t_name', 'resnet8', '--t_model', teacher, '--data_name', 'shapes:96', '--out', folder,
                   '--kind', 'smooth50')  # fmt: skip
    assert again.code == 2 and 'kind smooth50 needs 50 classes, got 10' in again.err


def test_what_is_stored_is_small_and_comes_back(tmp_path):
    probs = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    out = probs.log()
    outs = [(torch.tensor([4, 0, 2]), out[[4, 0, 2]]), (torch.tensor([1, 3, 5]), out[[1, 3, 5]])]
    for kind in ('hard', 'smoothing', 'smooth3', 'renorm3', 'smooth12', 'logits'):
        write_epoch(tmp_path / kind, 0, 6, outs, kind, 1.0, 12)
        meta = dict.fromkeys((*SAME, 'images', 'teacher', 'teacher_weights', 'teacher_top1'), 0)
        meta |= {'kind': kind, 'num_classes': 12, 'epochs': 1}
        (tmp_path / kind / 'meta.json').write_text(json.dumps(meta))
        store = SoftLabelStore(tmp_path / kind)
        store.read(7)
        expected = probs
        if kind != 'logits':
            expected = recover(*quantise(probs, kind), kind, 12)
            torch.testing.assert_close(expected.sum(dim=1), torch.ones(6))
        got = store.rows(torch.arange(6)).softmax(dim=1)
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match='every image must be labelled, got 3 of 6'):
        write_epoch(tmp_path / 'x', 0, 6, outs[:1], 'hard', 1.0, 12)
    assert np.load(tmp_path / 'smooth3' / 'epoch_0000' / 'value.npy').dtype == np.float16


def test_soft_cross_entropy_with_one_hot_labels_is_cross_entropy():
    out = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    hot = torch.nn.functional.one_hot(torch.arange(5), 7).float()
    torch.testing.assert_close(SoftCE()(out, hot), torch.nn.functional.cross_entropy(out, torch.arange(5)))
