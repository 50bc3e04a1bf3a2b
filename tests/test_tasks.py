"""A listener teaches a reader (libs, c2kd), a graph network a smaller one (lsp): data, networks, scripts."""

import argparse
import json
from unittest import mock

import pytest
import torch

import engine.record
from dataset.digits import END, digits
from dataset.graphs import CLASSES, graphs
from kd_losses.libs import LIBS
from models.gat import GAT
from models.seq2seq import Seq2Seq
from tests.conftest import Killed
from tools import sequences
from tools.graphs import hide_labels
from tools.sequences import TAUGHT

# ------------------------------------------------------------------------------------------------------ data


def test_digits_are_reproducible_and_have_one_timing():
    a, again, other = digits(12, 3), digits(12, 3), digits(12, 4)
    assert torch.equal(a.video, again.video) and torch.equal(a.sound, again.sound)
    assert not torch.equal(a.text, other.text)
    assert a.video.shape[2] == 64 and a.sound.shape[2] == 16 and torch.equal(a.sound_len, 2 * a.video_len)
    for k in range(12):
        string = [c for c in a.text[k].tolist() if c >= 0]
        count = len(string) - 1
        assert string[-1] == END and 4 <= count <= 7 and END not in string[:-1]
        assert 2 * count <= a.video_len[k] <= 4 * count
        assert not a.video[k, a.video_len[k] :].any() and not a.sound[k, a.sound_len[k] :].any()
        assert a.video[k, : a.video_len[k]].abs().sum(1).min() > 0


def test_sound_tells_the_digits_apart():
    """Frames of one digit are nearer to each other's mean than to another digit's."""
    a = digits(60, 0)
    single = [(a.sound[k, 0], int(a.text[k, 0])) for k in range(60)]
    means = {d: torch.stack([x for x, y in single if y == d]).mean(0) for _, d in single}
    right = sum(min(means, key=lambda d: float((x - means[d]).square().sum())) == y for x, y in single)
    assert right >= 54


def test_neighbours_tell_what_a_node_does_not():
    """The nearest community's mean, of the node's own features, and of those averaged over two steps."""
    data = graphs(6, 0)
    u, v = data.edge_index
    pairs = set(map(tuple, data.edge_index.T.tolist()))
    assert all((b, a) in pairs for a, b in pairs) and len(pairs) == data.edge_index.shape[1]
    assert all((k, k) in pairs for k in range(len(data.feat))) and torch.equal(data.part[u], data.part[v])

    def found(feat):
        means = torch.stack([feat[data.target == c].mean(0) for c in range(CLASSES)])
        return float((torch.cdist(feat, means).argmin(1) == data.target).float().mean())

    feat, degree = data.feat, torch.bincount(v).float()[:, None]
    for _ in range(2):
        feat = torch.zeros_like(feat).index_add(0, v, feat[u]) / degree
    assert found(feat) > found(data.feat) + 0.1


def test_some_graphs_are_cut_out_whole():
    data = graphs(4, 1, nodes=20)
    some = data.some(torch.tensor([3, 1]))
    assert some.count == 2 and torch.equal(some.feat, torch.cat([data.feat[20:40], data.feat[60:]]))
    inside = (data.part[data.edge_index[0]] % 2 == 1).sum()
    assert some.edge_index.shape[1] == inside and int(some.edge_index.max()) == 39
    assert torch.equal(some.target[some.edge_index[0, :9]], data.target[20 + some.edge_index[0, :9]])


# -------------------------------------------------------------------------------------------------- networks


def test_the_reader_sees_no_padding_and_no_future():
    torch.manual_seed(0)
    net = Seq2Seq(5, 11, width=8)
    frames, length, given = torch.randn(3, 9, 5), torch.tensor([9, 4, 6]), torch.randint(10, (3, 6))
    a = net(frames, length, given)
    assert a.out.shape == (3, 6, 11) and a.ctx.shape == (3, 6, 8) and a.enc[0].shape == (3, 4, 9, 9)
    for attention in (*a.enc, *a.dec, *a.cross):
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    other, later = frames.clone(), given.clone()
    other[1, 4:] += 9
    later[:, 4:] = 10 - later[:, 4:]
    b = net(other, length, later)
    torch.testing.assert_close(b.out[:, :4], a.out[:, :4])
    torch.testing.assert_close(b.seq, a.seq)
    assert not torch.equal(b.out[:, 4:], a.out[:, 4:])


def test_greedy_is_the_likeliest_after_what_was_written():
    torch.manual_seed(1)
    net = Seq2Seq(5, 4, width=8)
    frames, length = torch.randn(20, 6, 5), torch.full((20,), 6)
    said = net.greedy(frames, length, 5)
    begin = torch.full((20, 1), 3)
    out = net(frames, length, torch.cat([begin, said[:, :-1].clamp(min=0)], 1)).out.argmax(2)
    assert torch.equal(torch.where(said < 0, -1, out), said)
    ended = (said == 3).cumsum(1) - (said == 3).long() > 0
    assert torch.equal(said < 0, ended)
    with pytest.raises(ValueError, match='width must be even and a multiple of 4 heads, got 6'):
        Seq2Seq(5, 4, width=6)


def test_graph_attention_is_the_plain_sum():
    torch.manual_seed(2)
    layer = GAT(3, 2, width=4, heads=2, layers=1).layers[0]
    feat, edges = torch.randn(4, 3), torch.tensor([[0, 1, 2, 3, 0, 2], [0, 0, 0, 1, 2, 2]])
    got, h = layer(feat, edges), layer.linear(feat).unflatten(1, (2, 4))
    for v in range(4):
        wanted = layer.skip(feat[v]).unflatten(0, (2, 4))
        near = [int(a) for a, b in edges.T.tolist() if b == v]
        for k in range(2):
            score = torch.stack([h[u, k] @ layer.source[k] + h[v, k] @ layer.end[k] for u in near or [v]])
            share = torch.nn.functional.leaky_relu(score, 0.2).softmax(0) * bool(near)
            wanted = wanted.index_add(0, torch.tensor([k]), (share[:, None] * h[near or [v], k]).sum(0)[None])
        torch.testing.assert_close(got[v], wanted.flatten())


# --------------------------------------------------------------------------------------------------- scripts


def test_errors_are_counted_as_edits():
    kitten, sitting = 'kitten', 'sitting'
    assert sequences.edits(list(kitten), list(sitting)) == 3 and sequences.edits([], [1, 2]) == 2
    text = torch.tensor([[1, 2, 3, END, -1], [4, 5, 6, 7, END]])
    said = torch.tensor([[1, 3, END, -1, -1], [4, 5, 6, 7, END]])
    assert sequences.right(text, text) == 100 and sequences.right(said, text) == pytest.approx(600 / 7)
    assert sequences.whole(said, text) == 50
    assert sequences.shifted(text).tolist() == [[END, 1, 2, 3, END], [END, 4, 5, 6, 7]]


def test_strings_and_nodes_without_labels():
    args = argparse.Namespace(train=50, labels=8, batch_size=6)
    order = torch.randperm(50).split(6)
    known = sequences.labelled(order, args, torch.Generator())
    assert [len(index) for index in known] == [6] * len(order)
    often = torch.cat(known).bincount(minlength=50)
    assert not often[8:].any() and often[:8].max() - often[:8].min() <= 1
    args.labels = 50
    assert sequences.labelled(order, args, None) is order

    data, again, other = graphs(3, 1, nodes=40), graphs(3, 1, nodes=40), graphs(3, 1, nodes=40)
    true = data.target.clone()
    for some, seed in ((data, 5), (again, 5), (other, 6)):
        hide_labels(some, 0.1, seed)
    left = data.target >= 0
    assert data.part[left].bincount().tolist() == [4, 4, 4] and torch.equal(data.target[left], true[left])
    assert torch.equal(data.target, again.target) and not torch.equal(data.target, other.target)
    assert (data.target[~left] == -100).all()


def test_nothing_is_learnt_from_texts_that_a_student_does_not_have(monkeypatch):
    """Cross-entropy of a batch, and its gradient, whatever stands where no text is known."""
    torch.manual_seed(3)
    args = sequences.parse_args(['--kd_mode', 'libs', '--train', '6', '--labels', '2', '--lambda_kd', '0'])
    data, kd, seen = digits(6, 0), LIBS(8, 8), []
    net, teacher = (Seq2Seq(n, END + 1, 8) for n in (64, 16))
    for change in (0, 3):
        data.text[2:] = torch.where(data.text[2:] >= 0, (data.text[2:] + change) % 10, -1)
        heard = data.text
        run = mock.Mock(
            sense='video', net=net, kd=kd, taught=sequences.watch(teacher, data, heard, TAUGHT['libs'])
        )
        run.name = 'libs'
        run.meter.add = lambda out, target, **terms: seen.append(
            (target, terms['ce'].item(), terms['libs'].item())
        )
        sequences.train_step(run, data, torch.arange(6), heard, args)
    assert torch.equal(seen[0][0], seen[1][0]) and (seen[0][0][2:] == -1).all()
    assert seen[0][1] == pytest.approx(seen[1][1], rel=1e-6) and seen[0][2] != seen[1][2]


def test_what_a_teacher_did_is_what_it_does():
    torch.manual_seed(4)
    net, data = Seq2Seq(16, END + 1, 8), digits(5, 0)
    index, names = torch.tensor([3, 0]), ('out', 'seq', 'ctx', 'enc', 'cross')
    kept = sequences.watch(net, data, data.text, names).part(index)
    few = data.part(index)
    now = net(few.sound, few.sound_len, sequences.shifted(few.text))
    for name in names:
        torch.testing.assert_close(getattr(kept, name), getattr(now, name))
    assert kept.dec is None and sequences.watch(net, data, data.text, ()) is None


def dies():
    """write_atomic that fails at the second last.pt."""
    real, count = engine.record.write_atomic, []

    def write(path, content):
        count.append(path.name)
        if count.count('last.pt') == 2:
            raise Killed
        real(path, content)

    return mock.patch.object(engine.record, 'write_atomic', write)


TASKS = {
    'sequences': (('audio',), ('alone', 'transcripts', 'libs', 'c2kd'), ('--train', 48, '--labels', 20,
                  '--test', 12, '--t_width', 16, '--s_width', 8, '--batch_size', 16), 'right'),
    'graphs': (('teacher',), ('alone', 'lsp'), ('--train', 3, '--labels', 0.2, '--test', 2, '--nodes', 30,
               '--batch_size', 2, '--t_width', 4), 'top1'),
}  # fmt: skip


@pytest.mark.parametrize('name', TASKS)
def test_a_task_is_trained_resumed_and_drawn(script, tmp_path, name):
    first, modes, small, key = TASKS[name]
    words = (*small, '--epochs', 2, '--threads', 1, '--save_root', tmp_path, '--kd_mode')
    done = script(f'tools.{name}', *words, *first, '--note', 't')
    assert done.code == 0, done.err
    words += modes + ('--t_model', tmp_path / 't' / first[0] / 'net.pt')
    done = script(f'tools.{name}', *words, '--note', 'whole')
    assert done.code == 0, done.err
    with dies(), pytest.raises(Killed):
        script(f'tools.{name}', *words, '--note', 'cut')
    assert script(f'tools.{name}', *words, '--note', 'cut', '--resume', 'auto').code == 0
    for mode in modes:
        whole, cut = (torch.load(tmp_path / note / mode / 'net.pt') for note in ('whole', 'cut'))
        assert all(torch.equal(whole[k], cut[k]) for k in whole)
        result = json.loads((tmp_path / 'whole' / mode / 'results.json').read_text())
        assert len(result['curve']) == 2 and key in result['last'] and result['command'] and result['machine']
        assert ('teacher_weights' in result) == (mode != 'alone')
    nets = [torch.load(tmp_path / 'whole' / mode / 'net.pt') for mode in modes]
    for net in nets[1:]:
        assert any(not torch.equal(nets[0][k], net[k]) for k in net), 'distillation changes nothing'
    done = script('report.tasks', tmp_path / 'whole')
    assert done.code == 0 and all(f'| {mode} (labels ' in done.out for mode in modes), done.err
    assert (tmp_path / 'whole' / 'curves.png').stat().st_size > 5000


@pytest.mark.parametrize(
    'words,said',
    [
        ('sequences --kd_mode libs', 'libs: a teacher is needed, --t_model FILE of --kd_mode audio'),
        ('sequences --kd_mode c2kd --t_model README.md', 'README.md'),
        ('sequences --kd_mode alone --s_width 30', 'width must be even and a multiple of 4 heads, got 30'),
        ('sequences --kd_mode alone alone', 'something is named twice'),
        ('sequences --kd_mode dsa', "invalid choice: 'dsa'"),
        ('graphs --kd_mode lsp', 'lsp: a teacher is needed, --t_model FILE of --kd_mode teacher'),
        ('graphs --kd_mode lsp --t_model none.pt', 'none.pt: no such'),
        ('sequences --kd_mode alone --labels 13', '--labels 13: more than the training strings, --train 12'),
        ('graphs --kd_mode alone --labels 1.5', '--labels 1.5: a share of the nodes is wanted, at most 1'),
        ('graphs --kd_mode lsp --gamma 0', 'expected a number > 0'),
        ('report.tasks docs', 'no result of tools/sequences.py or tools/graphs.py'),
    ],
)
def test_mistakes(script, tmp_path, words, said):
    name, *words = words.split()
    more = () if name.startswith('report') else ('--save_root', tmp_path, '--train', 12, '--test', 4)
    done = script(name if '.' in name else f'tools.{name}', *words, *more)
    assert done.code == 2 and said in done.err and done.err.count('\n') == 1, done.err
