"""The commands of docs/several-teachers.md run as they stand there, on small data and small networks."""

import json
import re
import shlex

import pytest
import torch

from models import build, load_weights
from tests.conftest import ROOT

PAGE = (ROOT / 'docs' / 'several-teachers.md').read_text()
BLOCKS = re.findall(r'## (.*?)\n(.*?)(?=\n## |\Z)', PAGE, re.S)
SMALL = ('--data_name', 'shapes:96', '--batch_size', '48')


def commands(title: str) -> list[list[str]]:
    """The words of every command below this title."""
    (text,) = [text for name, text in BLOCKS if name == title]
    blocks = re.findall(r'```bash\n(.*?)```', text, re.S)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    return [shlex.split(line) for line in lines if line]


def small(words: list[str], save) -> list[str]:
    """The same command for a hundredth of the epochs, with resnet8 (and resnet14 for the assistant)."""
    nets = {'resnet110': 'resnet8x4', 'resnet56': 'resnet14', 'resnet20': 'resnet8'}
    made = []
    for word in words:
        word = nets.get(word, re.sub(r'^save/', f'{save}/', word))
        made.append(re.sub(r'(epoch)(\d+)(\.pt)', lambda m: f'{m[1]}{int(m[2]) // 100}{m[3]}', word))
    for flag, least in (('--epochs', 1), ('--keep', 1), ('--kd_stop', 1)):
        if flag in made:
            at = made.index(flag) + 1
            made[at] = str(max(int(made[at]) // 100, least))
    if '--epochs' not in made:  # epochs that are kept have names
        made += ['--epochs', '2' if '--keep' in made else '1']
    at = made.index('--data_name')
    return made[:at] + made[at + 2 :] + list(SMALL)


@pytest.mark.parametrize('title', [title for title, text in BLOCKS if '```bash' in text])
def test_the_commands_train(script, tmp_path, title):
    lines = commands(title)
    assert len(lines) >= 2
    for python, name, *words in lines:
        assert python == 'python'
        done = script(name.removesuffix('.py'), *small(words, tmp_path))
        assert done.code == 0, done.err
    note = lines[-1][lines[-1].index('--note') + 1]
    results = [json.loads(path.read_text()) for path in (tmp_path / note).rglob('results.json')]
    assert results and all(len(result['curve']) in (1, 2) for result in results)


def test_a_route_goes_on_from_the_last_anchor(script, tmp_path):
    """The second student starts from the first, not from the seed."""
    for _, name, *words in commands('A route'):
        words = small(words, tmp_path)
        if '--s_init' in words:
            words += ['--lr', '1e-30']  # so it stays where it began
        assert script(name.removesuffix('.py'), *words).code == 0
    nets = [build('resnet8', 10) for _ in range(2)]
    for net, note in zip(nets, ('route100', 'route200')):
        load_weights(net, tmp_path / note / 'st' / 'student.pt')
    first, last = (dict(net.named_parameters()) for net in nets)
    assert all(torch.equal(p, last[name]) for name, p in first.items())
