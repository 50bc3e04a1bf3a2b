"""Runs of each kind, killed with SIGKILL at random moments and resumed, equal undisturbed ones, bit by bit.

KILLS=10 bash run_tests.sh tests/test_kills.py     ten kills of every kind; the default is one of three kinds
"""

import os
import random
import signal
import subprocess
import time

import pytest
import torch

from tests import fresh
from tests.conftest import TINY
from tests.test_train import rows, same

KILLS = int(os.environ.get('KILLS', 1))
KINDS = {
    'plain': ['st'],
    'adapters': ['vid'],
    'memory bank': ['crd', '--kd_args', 'nce_n=16'],
    'memory of predictions': ['pskd'],
    'memory of a batch': ['dlb'],
    'two phases': ['ab', '--init_epochs', '2'],
    'pretraining': ['ft', '--pretrain_epochs', '2'],
    'vocabulary': ['quest', '--kd_args', 'num_words=20'],
    'two momenta': ['dot'],
    'peers': ['dml'],
    'peers and adversaries': ['onadvfd'],
    'many at once': ['at', 'rkd', 'pkt+st', 'ab', 'sla'],
    'amalgamation': ['cfl', 'soka', 'customize_target'],
    'data-free': ['dafl', 'cmi', 'fastdfkd'],
}


def command(kind, words, teacher, img_root, root, note):
    data = ['--data_name', 'shapes:160', '--batch_size', '32', '--epochs', '5', '--resume', 'auto']
    place = ['--img_root', str(img_root), '--save_root', str(root), '--threads', '1', '--note', note]
    if kind.startswith('peers'):
        nets = ['--net_names', 'resnet8', 'resnet8']
        return ['train_dml.py', '--kd_mode', *words, *nets, *data, *place]
    if kind == 'amalgamation':
        halves = [str(root / f'half{part}' / 'net.pt') for part in (0, 1)]
        pair = ['--t_name', 'resnet8', '--t_model', *halves]
        return ['train_ka.py', '--ka_mode', *words, *pair, *data, *place]
    pair = ['--t_name', 'resnet8', '--t_model', str(teacher), '--s_name', 'resnet8']
    if kind == 'data-free':
        small = '--ep_steps 4 --kd_steps 2 --g_steps 2 --synth_batch_size 16 --width 4 --warmup 1'.split()
        return ['train_dfkd.py', '--kd_mode', *words, *pair, *data, *place, *small]
    return ['train_kd.py', '--kd_mode', *words, *pair, *data, *place]


def run(words, seconds=300):
    """The exit code and what was said; after so many seconds the process is killed."""
    process = fresh.Popen(*words, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try:
        said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        said = process.communicate()
    return process.returncode, ''.join(said)


@pytest.mark.parametrize('kind', KINDS if 'KILLS' in os.environ else ('memory bank', 'peers', 'amalgamation'))
def test_killed_at_random_moments(kind, teacher, script, img_root, tmp_path):
    words = KINDS[kind]
    if kind == 'amalgamation':
        for part in (0, 1):
            flags = ('--num_parts', 2, '--part', part, '--note', f'half{part}')
            assert script('train_base', '--net_name', 'resnet8', *TINY, *flags).code == 0
    fresh.run('-c', 'pass')  # what the others are forked from starts here, which takes longer than they do
    start = time.time()
    code, out = run(command(kind, words, teacher, img_root, tmp_path, 'whole'))
    assert code == 0, out
    length, moments = time.time() - start, random.Random(kind)
    kills, notes = 0, ['cut0']
    while kills < KILLS:
        assert len(notes) < 10 * KILLS, f'only {kills} kills in {len(notes)} runs'
        seconds, start = moments.uniform(0.4, 0.95) * length, time.time()
        code, out = run(command(kind, words, teacher, img_root, tmp_path, notes[-1]), seconds)
        assert code in (0, -signal.SIGKILL), out
        kills += code == -signal.SIGKILL
        if code == 0 and kills < KILLS:  # it was faster
            length = time.time() - start
            notes.append(f'cut{len(notes)}')
    for note in notes:
        code, out = run(command(kind, words, teacher, img_root, tmp_path, note))
        assert code == 0, out
        found = sorted((tmp_path / 'whole').rglob('last.pt'))
        assert found
        for path in found:
            other = tmp_path / note / path.relative_to(tmp_path / 'whole')
            a, b = (torch.load(p, weights_only=True) for p in (path, other))
            for part in a.keys() - {'args', 'origin', 'history', 'epoch'}:
                assert same(plain(a[part]), plain(b[part])), f'{kind}: {part} differs'
            assert rows(path.parent) == rows(other.parent)


def plain(state):
    """Nested containers as dicts of tensors and numbers, for same()."""
    if isinstance(state, (list, tuple)):
        return {str(i): plain(x) for i, x in enumerate(state)}
    if isinstance(state, dict):
        return {str(k): plain(v) for k, v in state.items() if not isinstance(v, (str, type(None)))}
    return state
