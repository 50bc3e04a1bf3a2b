"""train_lm.py and what it is made of: texts, decoder, sampler, steps, resume, mistakes."""

import json
import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_lm
from dataset import text as texts
from engine import lm_setting
from engine.lm_setting import continued, draw
from kd_losses import abkd, akl, distillm, gkd, minillm, taid
from methods import LM
from models import lm
from report import lm as report_lm
from tests.conftest import ROOT

QUICK = ('--data_name', 'markov', '--init_steps', 0)
WHOLE = texts.SIZE


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A shorter chain, fewer texts that networks write before a training, and fewer for gen_nll."""
    monkeypatch.setattr(texts, 'SIZE', 20_000)
    monkeypatch.setattr(lm_setting, 'WRITTEN', 24)
    monkeypatch.setattr(lm_setting, 'PROMPTS', 6)


@pytest.fixture
def fails(script):
    """One line that says so, and exit code 2."""

    def call(*words, said):
        done = script('train_lm', *words)
        assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err + done.out

    return call


def run(script, *words):
    done = script('train_lm', *QUICK, *words)
    assert done.code == 0, done.err
    return done.out


def results(folder) -> dict:
    return json.loads((folder / 'results.json').read_text())


def weights(folder) -> dict:
    return torch.load(folder / 'student.pt', weights_only=True)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[key]) for key, x in a.items())


# ------------------------------------------------------------------------------------------------------ texts


def test_the_chain_and_its_oracle(monkeypatch):
    monkeypatch.setattr(texts, 'SIZE', WHOLE)
    text = texts.load('markov')
    assert text.entropy == pytest.approx(0.803, abs=1e-3) and len(text.ids) == 200_000
    x = text.held_out()
    out = text.oracle(x[:, :-1])
    torch.testing.assert_close(out[:, 1:].exp().sum(2), torch.ones(len(x), 63))
    loss = nn.functional.cross_entropy(out[:, 1:].flatten(0, 1), x[:, 2:].flatten())
    assert loss.item() == pytest.approx(text.entropy, abs=0.03)  # 20,000 symbols: standard deviation 0.007
    again = texts.load('markov:8')
    assert again.digest == text.digest != texts.load('markov:3').digest


def test_texts_of_characters(tmp_path):
    pydoc = texts.load('pydoc')
    assert 300_000 < len(pydoc.ids) < 2_000_000 and 85 <= len(pydoc.symbols) <= 96
    assert len(pydoc.train) == len(pydoc.ids) * 9 // 10 and len(pydoc.train) + len(pydoc.val) == len(
        pydoc.ids
    )
    x = pydoc.held_out()
    assert torch.equal(x[:-1, -1], x[1:, 0])  # the last symbol said is the first that the next window reads
    file = tmp_path / 'a.txt'
    file.write_text('Grün\tis not ASCII.\n' * 60)
    text = texts.load(str(file))
    assert text.show(text.ids[:10]) == 'Gr n is no' and '\n' in text.symbols
    windows = [text.windows(5, draw(1, 2, step)) for step in (0, 0, 1)]
    assert torch.equal(windows[0], windows[1]) and not torch.equal(windows[0], windows[2])
    assert text.show(windows[0][0]) in text.show(text.train)


def test_pairs_are_read_from_the_left():
    text = texts.of_characters('t', 'abab' * 200 + 'ba' * 5 + 'c' * 90)
    pairs = texts.Pairs(text)
    spoken = {number: text.show(pair) for pair, number in pairs.numbers.items()}
    assert spoken[3] == 'ab' and pairs.K == 3 + len(spoken)
    tokens = pairs.encode([0, 1, 0, 1, 2])
    assert ''.join(spoken.get(i, text.symbols[i % 3]) for i in tokens) == 'ababc' and len(tokens) == 3
    x, target = pairs.batch(torch.tensor([[0, 1, 0, 1, 0], [2, 2, 1, 0, 2]]))
    assert x.shape == target.shape and torch.equal(
        target == -100, torch.arange(x.shape[1]) >= torch.tensor([[2], [2]])
    )


# ------------------------------------------------------------------------------------------ decoder, sampling


def test_the_decoder_is_causal_and_of_its_size():
    assert [sum(p.numel() for p in lm.build(size, 94).parameters()) for size in lm.SIZES] == [350_880, 17_824]
    torch.manual_seed(0)
    net = lm.build('student', 5)
    x = torch.randint(5, (2, 20))
    y = x.clone()
    y[:, 12:] = 4 - y[:, 12:]
    out, hid = net(x, True)
    torch.testing.assert_close(out[:, :12], net(y)[:, :12])
    assert not torch.equal(out[:, 12:], net(y)[:, 12:])
    torch.testing.assert_close(hid @ net.head().T, out)
    assert same(lm.from_state(net.state_dict()).state_dict(), net.state_dict())


def test_samples_are_drawn_from_the_mixture():
    class Always(nn.Module):
        def __init__(self, *p):
            super().__init__()
            self.log_p = torch.tensor(p).log()

        def forward(self, x):
            return self.log_p.expand(*x.shape, -1)

    generator = torch.Generator().manual_seed(0)
    prompt = torch.zeros(500, 3, dtype=torch.int64)
    drawn = lm.sample(Always(0.9, 0.1), prompt, 8, generator, Always(0.1, 0.9), 0.25)
    assert drawn.shape == (500, 11) and not drawn[:, :3].any()
    assert drawn[:, 3:].float().mean() == pytest.approx(0.3, abs=0.03)


def test_what_is_asked_of_a_continuation():
    """With a prompt of P the first position that counts is P - 1, and nothing before it moves the loss."""
    whole = torch.randint(8, (2, 65))
    x, target = continued(whole)
    assert x.shape == target.shape == (2, 64) and (target[:, :31] == -100).all()
    assert torch.equal(target[:, 31:], whole[:, 32:]) and torch.equal(x, whole[:, :-1])
    out_s, out_t = torch.randn(2, 64, 8), torch.randn(2, 64, 8)
    for loss in (
        gkd.GKD(),
        distillm.DistiLLM(),
        akl.AKL(),
        abkd.ABKD(),
        minillm.ReverseKL(),
        taid.TAID().eval(),
    ):
        value = loss(out_s, out_t, target)
        for place, moves in ((30, False), (31, True), (63, True)):
            other = out_s.clone()
            other[:, place, 0] += 1
            assert torch.equal(loss(other, out_t, target), value) != moves


# ------------------------------------------------------------------------------------------------------ steps


def test_students_learn_and_forward_kl_learns_more(script, tmp_path):
    """Markov, from scratch; the oracle reaches the entropy."""
    out = run(script, '--kd_mode', 'ce', 'fkl', '--steps', 200, '--note', 'a')
    ce, fkl = (results(tmp_path / 'a' / name) for name in ('ce', 'fkl'))
    for key in ('loss', 'kl_ts'):
        assert fkl['last'][key] < ce['last'][key] < 1.8, (key, fkl['last'], ce['last'])
    # 2,000 symbols
    assert fkl['teacher']['loss'] == pytest.approx(fkl['entropy'], abs=0.1)
    assert fkl['teacher']['perplexity'] == pytest.approx(math.exp(fkl['teacher']['loss']))
    assert fkl['teacher']['agreement'] == 1 and abs(fkl['teacher']['kl_ts']) < 1e-6
    assert set(fkl['last']) == {'loss', 'perplexity', 'agreement', 'kl_ts', 'kl_st', 'gen_nll', 'step'}
    assert (
        fkl['best']['selected_on'] == 'held-out text'
        and fkl['command']
        and 'commit' in fkl
        and fkl['machine']
    )
    assert len(re.findall(r'^\w+ writes: ', out, re.M)) == 2 and len(fkl['sample']) == 65
    assert f'weights: {tmp_path / "a" / "ce" / "student.pt"}; models.lm.from_state(torch.load(path))' in out
    assert "dataset.text.load('markov:8').symbols" in out


def test_alone_or_beside_others_it_is_the_same(script, tmp_path):
    every = ('gkd', 'taid', 'distillm2', 'minillm', 'uld')
    small = ('--steps', 3, '--t_steps', 2)
    run(script, '--kd_mode', *every, *small, '--note', 'all')
    for name in ('taid', 'minillm'):
        run(script, '--kd_mode', name, '--steps', 3, '--note', 'one')  # one vocabulary, its teacher is known
        assert same(weights(tmp_path / 'one' / name), weights(tmp_path / 'all' / name)), name


def test_a_killed_run_goes_on_as_if_nothing_had_happened(script, tmp_path, monkeypatch):
    """taid's state, the schedule of samples with its buffer, generators, a round that is not over."""
    modes = {'a': ('taid', 'minillm', 'fdistill'), 'b': ('gkd', '--lmbda', 'adaptive')}
    monkeypatch.setattr(distillm.SampleSchedule, 'update', lambda self, loss: setattr(self, 'threshold', 0.7))
    step = train_lm.train_student
    for note, mode in modes.items():
        words = ('--kd_mode', *mode, '--steps', 8, '--eval_every', 3)
        run(script, *words, '--note', note)

        def killed(student, seen):
            if seen.step == 5:
                raise MemoryError
            step(student, seen)

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(train_lm, 'train_student', killed)
            run(script, *words, '--note', f'{note}2')
        out = run(script, *words, '--note', f'{note}2', '--resume', 'auto')
        assert '3 of 8 steps done' in out
        for name in [word for word in mode if word in LM]:
            assert same(weights(tmp_path / note / name), weights(tmp_path / f'{note}2' / name)), name
            first, second = (results(tmp_path / x / name) for x in (note, f'{note}2'))
            assert first['last'] == second['last'] and first['curve'] == second['curve']
    again = run(script, *words, '--note', 'b2', '--resume', 'auto')
    assert '8 of 8 steps done' in again


def test_a_student_that_is_its_teacher_has_nothing_to_learn(script, tmp_path):
    names = ('fkl', 'rkl', 'gkd', 'distillm', 'distillm_r', 'akl', 'tvd', 'abkd')
    run(script, '--kd_mode', 'ce', '--steps', 1, '--note', 'first')
    (start,) = tmp_path.glob('lm_start_*')
    run(script, '--kd_mode', *names, '--steps', 1, '--t_model', start, '--note', 'second')
    for name in names:
        row = (tmp_path / 'second' / name / 'metrics.csv').read_text().splitlines()
        loss = dict(zip(row[0].split(','), row[1].split(',')))['kd']
        assert abs(float(loss)) < 1e-5, (name, loss)


def test_a_file_and_its_teachers(script, tmp_path):
    """dskd with one vocabulary, uld and dskd_cma with two; the teachers are kept for the next run."""
    file = tmp_path / 'a.txt'
    file.write_text((ROOT / 'README.md').read_text() * 2)
    words = ('--data_name', file, '--t_steps', 2, '--steps', 2)
    out = run(script, '--kd_mode', 'dskd', 'uld', 'dskd_cma', 'fdistill', *words, '--lmbda', 0, '--note', 'a')
    assert 'teacher: trained' in out and 'second vocabulary: trained' in out
    for name in ('dskd', 'uld', 'dskd_cma'):
        assert results(tmp_path / 'a' / name)['recipe']['ce'] == 0.5
    out = run(script, '--kd_mode', 'gkd', *words, '--lmbda', 1, '--lambda_ce', 1, '--note', 'b')
    assert 'trained' not in out and results(tmp_path / 'b' / 'gkd')['corpus'] in out


def test_a_teacher_of_another_alphabet(script, fails, tmp_path):
    """As many symbols, but others: every file that is written here names them. Older ones are taken."""
    for name, letters in (('a', 'abcd'), ('b', 'abcz')):
        (tmp_path / f'{name}.txt').write_text(letters * 300)
    few = ('--init_steps', 0, '--steps', 1)
    done = script(
        'train_lm',
        '--kd_mode',
        'gkd',
        'uld',
        '--data_name',
        tmp_path / 'a.txt',
        '--t_steps',
        1,
        *few,
        '--note',
        'a',
    )
    assert done.code == 0, done.err
    files = [*tmp_path.glob('lm_*.pt'), tmp_path / 'a' / 'gkd' / 'student.pt']
    assert len(files) == 4
    for file in files:
        state = torch.load(file, weights_only=True)
        names = state.class_names
        assert names[:4] == list('abcd') and len(names) == len(state['embed.weight']), file
    small = [file for file in files if 'pairs' not in file.name]
    words = ('--kd_mode', 'gkd', *few, '--data_name', tmp_path / 'b.txt', '--note', 'b', '--t_model')
    for file in small:
        fails(*words, file, said="b.txt: 'd' where that has 'z'; a teacher and its students need one text")
    torch.save(dict(torch.load(small[0], weights_only=True)), tmp_path / 'old.pt')
    assert script('train_lm', *words, tmp_path / 'old.pt').code == 0


def test_what_was_written_belongs_to_its_text(script, tmp_path):
    """The same untrained student and teacher, another text: its prompts are others."""
    for name, letters in (('a', 'abcd'), ('b', 'dcba')):
        (tmp_path / f'{name}.txt').write_text(letters * 300)
    torch.save(lm.build('student', 4).state_dict(), tmp_path / 'teacher.pt')
    words = ('--kd_mode', 'distillm2', '--t_model', tmp_path / 'teacher.pt', '--init_steps', 0, '--steps', 1)
    for name in 'ab':
        done = script('train_lm', *words, '--data_name', tmp_path / f'{name}.txt', '--note', name)
        assert done.code == 0, done.err
    written = [torch.load(path, weights_only=True) for path in tmp_path.glob('lm_written_*.pt')]
    assert len(written) == 2 and not torch.equal(*(made['teacher'] for made in written))


def test_what_is_not_finite_stops(script, fails, tmp_path):
    """A teacher before the training; a loss before the update, and the others go on."""
    net = lm.build('student', 8)
    net.norm.weight.data[0] = torch.nan
    torch.save(net.state_dict(), tmp_path / 'bad.pt')
    fails(
        *QUICK, '--kd_mode', 'gkd', '--t_model', tmp_path / 'bad.pt', said='teacher gives non-finite logits'
    )
    words = ('--kd_mode', 'gkd', 'fkl', '--lambda_kd', 'gkd=1e999', '--steps', 2, '--note', 'a')
    done = script('train_lm', *QUICK, *words)
    assert done.code == 1 and 'gkd: the loss is not finite before evaluation 1, step 1' in done.err
    assert (tmp_path / 'a' / 'fkl' / 'results.json').exists()
    assert not (tmp_path / 'a' / 'gkd' / 'student.pt').exists()


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    'words,said',
    [
        ('--kd_mode nonsense', "no method is called 'nonsense'; there are abkd"),
        ('--kd_mode gkd gkd', 'named twice'),
        ('--kd_mode gkd --data_name nowhere.txt', 'nowhere.txt: No such file'),
        ('--kd_mode gkd --data_name markov:1', '2 to 64 symbols'),
        ('--kd_mode gkd --lmbda 1.5', 'from 0 to 1, or adaptive'),
        ('--kd_mode gkd minillm --lmbda 0.5', '--lmbda: minillm has texts of its own: leave --lmbda out'),
        (
            '--kd_mode uld --lmbda 0.5',
            '--lmbda: uld reads texts of the data alone, in two vocabularies: leave --lmbda out',
        ),
        ('--kd_mode ce --lmbda 0.5', '--lmbda: ce has no teacher'),
        ('--kd_mode dskd', 'no hidden states; give --t_model'),
        ('--kd_mode gkd --kd_args beta=2', 'beta must be from 0 to 1'),
        ('--kd_mode gkd --kd_args nonsense=2', "no argument 'nonsense'"),
        ('--kd_mode gkd --lambda_kd rkl=2', "'rkl' is not among"),
        ('--kd_mode gkd --t_model nowhere.pt', 'nowhere.pt: no such checkpoint'),
        ('--kd_mode gkd --amp fp16', 'use bf16'),
        ('--kd_mode gkd --steps 0', 'a whole number > 0'),
        ('--kd_mode ce --lambda_kd 1', 'ce has no teacher'),
        ('--kd_mode gkd --kd_args reduction=none', 'must be one number'),
    ],
)
def test_mistakes(fails, words, said):
    fails(*QUICK, *words.split(), said=said)


def test_more_mistakes(fails, script, tmp_path):
    (tmp_path / 'short.txt').write_text('ab' * 200)
    fails('--kd_mode', 'ce', '--data_name', tmp_path / 'short.txt', said='at least 660 are needed')
    (tmp_path / 'latin.txt').write_bytes('ü'.encode('latin-1') * 900)
    fails('--kd_mode', 'ce', '--data_name', tmp_path / 'latin.txt', said='is not UTF-8')
    torch.save(lm.build('student', 9).state_dict(), tmp_path / 'nine.pt')
    said = 'knows 9 symbols, markov:8 has 8; a teacher and its students need one text: leave --t_model out'
    fails(*QUICK, '--kd_mode', 'gkd', '--t_model', tmp_path / 'nine.pt', said=said)
    torch.save({'fc.weight': torch.zeros(2)}, tmp_path / 'image.pt')
    fails(
        *QUICK,
        '--kd_mode',
        'gkd',
        '--t_model',
        tmp_path / 'image.pt',
        said='not the weights of a decoder',
    )
    run(script, '--kd_mode', 'ce', '--steps', 1, '--note', 'x')
    fails(*QUICK, '--kd_mode', 'ce', '--steps', 1, '--note', 'x', said='already holds a run')
    words = ('--kd_mode', 'ce', '--steps', 2, '--note', 'x', '--resume', 'auto')
    why = 'steps was 1, is 2; this run is finished, and its learning rates belong to its length; --note NAME'
    fails(*QUICK, *words, said=why)


def test_dskd_learns_from_what_its_student_writes(script, tmp_path):
    (tmp_path / 'a.txt').write_text('abcd' * 300)
    words = ('--kd_mode', 'dskd', '--data_name', tmp_path / 'a.txt', '--t_steps', 1, '--init_steps', 0)
    for share in (0, 1):
        done = script('train_lm', *words, '--steps', 2, '--lmbda', share, '--note', share)
        assert done.code == 0, done.err
    assert not same(*(weights(tmp_path / note / 'dskd') for note in ('0', '1'))), 'it had other texts'


def test_list_and_dry_run(script, tmp_path):
    done = script('train_lm', '--kd_mode', 'list')
    assert done.code == 0 and all(re.search(rf'^{name} ', done.out, re.M) for name in LM)
    assert re.search(r'^abkd .*\n?.*alpha=0.2, beta=0.7', done.out, re.M)
    done = script('train_lm', '--kd_mode', 'uld', 'ce', '--dry-run')
    assert done.code == 0 and 'uld          weight 0.5, cross-entropy 0.5' in done.out
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ other people's networks


def test_ten_lines_for_any_causal_language_model():
    """The block of docs/language-models.md with stand-ins of the same signatures, padded left or right."""
    block, _ = re.findall(r'```py\n(.*?)```', (ROOT / 'docs' / 'language-models.md').read_text(), re.S)
    assert len(block.strip().splitlines()) <= 12 and 'transformers' not in block

    class Model(nn.Module):
        def __init__(self, K):
            super().__init__()
            self.table = nn.Embedding(K, K)

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=self.table(input_ids))

    class Encoding(dict):
        def to(self, device):
            return self

        def __getattr__(self, name):
            return self[name]

    def tok(side, texts, return_tensors, padding):
        rows = [torch.tensor([ord(c) % 20 for c in text]) for text in texts]
        ids, mask = (
            nn.utils.rnn.pad_sequence(x, True, padding_side=side) for x in (rows, [x * 0 + 1 for x in rows])
        )
        return Encoding(input_ids=ids, attention_mask=mask)

    torch.manual_seed(0)
    scope = {'texts': ['a text', 'another one'], 'device': 'cpu', 'torch': torch, 'GKD': gkd.GKD}
    scope |= {'student': Model(20), 'teacher': Model(24)}  # a padded table
    losses = []
    for side in ('right', 'left'):
        scope['tok'] = partial(tok, side)
        exec(block, scope)
        losses.append(scope['loss'].item())
    grad = scope['student'].table.weight.grad
    assert grad.abs().sum() > 0 and scope['teacher'].table.weight.grad is None
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_student_writes(tmp_path, monkeypatch, capsys):
    """The second block, on a network that has learnt nothing."""
    _, block = re.findall(r'```py\n(.*?)```', (ROOT / 'docs' / 'language-models.md').read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / re.search(r"'(save/.*?)'", block)[1]
    path.parent.mkdir(parents=True)
    torch.save(lm.build('student', len(texts.load('pydoc').symbols)).state_dict(), path)
    exec(block, {})
    said = capsys.readouterr().out
    assert said.startswith('The expression ') and len(said) == 15 + 200 + 1


def test_no_text_is_written_for_a_weight_of_0(script):
    run(script, '--kd_mode', 'ce', 'gkd', '--lmbda', 1, '--steps', 2, '--note', 'x')
    done = script('train_lm', *QUICK, '--kd_mode', 'gkd', '--lambda_kd', 0, '--note', 'y')
    assert done.code == 2 and 'nothing to learn' in done.err and done.err.count('\n') == 1, done.err


def test_a_generator_of_another_device(script, tmp_path):
    """Its state has another size: the numbers go on from the seed."""
    words = ('--kd_mode', 'gkd', '--lmbda', 1, '--eval_every', 2)
    run(script, *words, '--steps', 4, '--note', 'x')
    path = tmp_path / 'x' / 'gkd' / 'last.pt'
    state = torch.load(path, weights_only=True)
    state['memory']['generator'] = torch.zeros(16, dtype=torch.uint8)
    torch.save(state, path)
    run(script, *words, '--steps', 4, '--note', 'x', '--resume', 'auto')


def test_settings_of_a_method_are_rows_of_their_own(tmp_path):
    """In the table that `python -m report refresh` makes."""
    figures = dict.fromkeys(report_lm.FIGURES, 1.0)
    for i, (method, lmbda, options) in enumerate(
        [('ce', 0, {}), ('gkd', 0, {}), ('gkd', 0.5, {}), ('gkd', 0, {'beta': 0.9})]
    ):
        result = {'script': 'train_lm', 'method': method, 'seed': 1, 'steps': 2, 'curve': [], 'best': {}}
        result |= {'last': {key: 1 - i / 8 for key in figures} | {'agreement': i / 8}, 'teacher': figures}
        result['recipe'] = {'lmbda': lmbda, 'options': options}
        (tmp_path / f'{i}.json').write_text(json.dumps(result))
    text = report_lm.text_of(tmp_path)
    assert re.findall(r'^\| (`.*?`) ', text, re.M) == ['`gkd beta=0.9`', '`gkd --lmbda 0.5`', '`gkd`', '`ce`']
    assert 'in every figure: `gkd`, `gkd --lmbda 0.5`, `gkd beta=0.9`.' in text


def test_a_claim_is_over_equal_seeds_and_one_recipe(tmp_path):
    def text(*runs):
        for i, (method, seed, lr, x) in enumerate(runs):
            figures = dict.fromkeys(report_lm.FIGURES, x) | {'agreement': 1 - x}
            result = {
                'script': 'train_lm',
                'method': method,
                'seed': seed,
                'steps': 2,
                'curve': [],
                'best': {},
            }
            result |= {'last': figures, 'teacher': figures}
            result['recipe'] = {'lmbda': 0, 'options': {}, 'lr': lr}
            (tmp_path / f'{i}.json').write_text(json.dumps(result))
        return report_lm.text_of(tmp_path)

    alone = [('ce', 1, 0.1, 0.5), ('ce', 2, 0.1, 0.6)]
    said = text(
        *alone, ('gkd', 1, 0.1, 0.4), ('gkd', 2, 0.1, 0.5), ('rkl', 1, 0.1, 0.1), ('fkl', 3, 0.1, 0.1)
    )
    assert 'in every figure with every seed: `gkd`.' in said
    said = text(
        *alone, ('gkd', 1, 0.2, 0.4), ('gkd', 2, 0.2, 0.5), ('rkl', 1, 0.1, 0.1), ('rkl', 2, 0.1, 0.2)
    )
    assert 'in every figure with every seed: `rkl (lr 0.1)`.' in said and '| `gkd (lr 0.2)` |' in said
