"""What the reports must not join, and what the tools and train_ka, _dfkd, _lm, _dense must refuse."""

import importlib
import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torchvision.io import ImageReadMode, read_image
from torchvision.utils import save_image

import dataset
import engine.ka_tools
import train_dfkd
from dataset.attributes import majority
from dataset.text import of_characters
from engine.dfkd_flags import read_methods
from engine.errors import NonFinite, UserError
from models import build, slimming
from report import dense, dfkd, ka, ka_rows, overview
from report.dense import SETTING

PATTERNS = ('--data_name', 'patterns:80', '--batch_size', '20')


def saved(path, name: str = 'resnet8', classes: int = 5):
    """The file of a network that need not know anything."""
    torch.manual_seed(0)
    net = build(name, classes).train()
    net(torch.randn(8, 3, 16, 16))
    torch.save(net.state_dict(), path)
    return path


def written(path, content: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------------- reports


def test_an_overview_compares_within_a_data_set():
    def run(script, method, data, top1, epochs=5, **more):
        last = {'last': {'top1': top1}, 'classes': None} | more
        return last | {'script': script, 'method': method, 'data': data, 'student': 'net', 'epochs': epochs}

    results = [run('train_base', 'baseline', 'a', 50.0), run('train_base', 'baseline', 'b', 90.0),
               run('train_base', 'baseline', 'a', 70.0, epochs=9)]  # fmt: skip
    results += [run('train_kd', 'st', 'a', 52.0), run('train_kd', 'st', 'b', 91.0)]
    for data, top1 in (('a', 40.0), ('b', 80.0)):
        for method, share in (('scratch', 1.0), ('concat', 0.5)):
            more = {'classes': [0, 1], 'experiment': 'halves'}
            results.append(run('train_ka', method, data, share * top1, **more))
    said = {name: compared for name, _, _, compared in overview.rows(results)}
    assert said['net with st, a'] == '+2.0 points' and said['net with st, b'] == '+1.0 points'
    assert {said['net with concat, a'], said['net with concat, b']} == {'50 % of the one with labels'}
    one = [r for r in results if r['data'] == 'b']
    assert [row[0] for row in overview.rows(one)][:2] == ['net alone', 'net with st']
    old = [{k: v for k, v in r.items() if k != 'classes'} for r in one if r['script'] != 'train_ka']
    assert overview.rows(old) == overview.rows([r for r in one if r['script'] != 'train_ka'])
    tried = {'batch_size': 32, 'lr': 0.1}
    for r in one:
        r |= {'recipe': tried, 'seed': 1}
    said = {name: compared for name, _, _, compared in overview.rows(one)}
    assert said['net with st'] == '+1.0 points' and said['net with concat'].startswith('50 %')
    for other in ({'recipe': tried | {'lr': 0.2}}, {'recipe': tried | {'optim': 'adamw'}}, {'seed': 2}):
        changed = [r | other if r['method'] in ('baseline', 'scratch') else r for r in one]
        said = {name: compared for name, _, _, compared in overview.rows(changed)}
        assert said['net with st'] == said['net with concat'] == '', other


def test_two_teachers_are_two_rows():
    def run(method, seed, miou, teacher):
        known = dict.fromkeys(SETTING, 'x') | {'task': 'segmentation', 'steps': 3, 'script': 'train_dense'}
        figures = {'miou': miou, 'accuracy': miou}
        known |= {'teacher': {'name': teacher, **figures}, 'recipe': {'teacher': teacher}}
        return known | {'method': method, 'seed': seed, 'last': figures}

    text = dense.text_of([run('st', 1, 50.0, 'weak'), run('st', 1, 60.0, 'good')])
    assert '| `st (teacher 1)` | 50.0 |' in text and '| `st (teacher 2)` | 60.0 |' in text
    assert 'weak or good teaches' in text and '| teacher 2 | 60.0 |' in text
    text = dense.text_of([run('st', 1, 50.0, 'one'), run('st', 2, 60.0, 'other')])
    assert '| `st` | 55.0 (50.0 to 60.0) |' in text, 'seeds may have a teacher each'
    assert '| teacher | 55.0 (50.0 to 60.0) |' in text, 'whose row is of all of them, too'


@pytest.mark.parametrize('name', ['losses', 'trainer'])
def test_a_benchmark_writes_its_whole_command(name, tmp_path, monkeypatch):
    """Figures of --quick must say so."""
    module = importlib.import_module(f'benchmarks.{name}')
    monkeypatch.setattr(module, 'data', lambda: None, raising=False)  # of trainings that are not asked for
    words = ['nothing', '--quick', '--out', str(tmp_path / 'x.json')]
    monkeypatch.setattr(sys, 'argv', [name, *words])
    module.main()
    command = json.loads((tmp_path / 'x.json').read_text())['command']
    assert command == ' '.join([f'python -m benchmarks.{name}', *words])


def test_results_count_once(tmp_path):
    result = {'script': 'train_ka', 'data': 'd', 'method': 'concat', 'seed': 1, 'recipe': {}}
    written(tmp_path / 'a' / 'halves-s1' / 'concat' / 'results.json', result)
    assert len(ka.read_results([str(tmp_path), str(tmp_path / 'a'), str(tmp_path)])) == 1
    written(tmp_path / 'b' / 'halves-s1' / 'concat' / 'results.json', result)
    with pytest.raises(UserError, match='halves: concat is there twice with seed 1'):
        ka.group(ka.read_results([str(tmp_path)]))


def test_tools_of_other_epochs_or_recipes_are_no_seeds(tmp_path):
    def run(seed, top1, **more):
        row = {'row': 'mine', 'round 1': top1, 'top-1': top1}
        known = {'script': 'x', 'data': 'd', 'title': 't', 'seed': seed, 'epochs': 2, 'table': [row]}
        return known | more

    runs = [run(1, 10.0), run(2, 20.0), run(3, 90.0, epochs=9)]
    (few, rows), (many, other) = ka_rows.tables(runs)
    assert (few, many) == ('x, d: t, epochs 2', 'x, d: t, epochs 9')
    assert rows[1][2:] == ['15.00 +- 7.07', 2] and other[1][2:] == ['90.00', 1]
    runs = [
        run(1, 10.0, recipe={'lr': 0.1, 'teacher': 'a'}),
        run(2, 20.0, recipe={'lr': 0.2, 'teacher': 'b'}),
    ]
    assert [title for title, _ in ka_rows.tables(runs)] == ['x, d: t, lr 0.1', 'x, d: t, lr 0.2']
    assert [title for title, _ in ka_rows.tables(runs[:1])] == ['x, d: t']
    assert ka_rows.figure(runs, tmp_path / 'x.png')


def test_strips_of_few_images_and_of_several_data_sets(tmp_path, img_root):
    few = torch.rand(5, 3, 16, 16)
    save_image(few, tmp_path / 'few.png', nrow=8)
    cut = dfkd.cut(read_image(str(tmp_path / 'few.png'), ImageReadMode.RGB), 16)
    assert cut.shape == (5, 3, 16, 16) and (cut / 255 - few).abs().max() < 0.01
    for data, side, n in (('patterns:80', 16, 20), ('shapes:96', 32, 5)):
        place = tmp_path / data.partition(':')[0] / 'dafl'
        written(place / 'results.json', {'data': data, 'recipe': {}})
        (place / 'images').mkdir()
        save_image(torch.rand(n, 3, side, side), place / 'images' / 'epoch0001.png', nrow=8)
    folders = [tmp_path / 'patterns', tmp_path / 'shapes']
    assert dfkd.figure(folders, img_root, tmp_path / 'x.png') == ['dafl', 'real', 'dafl', 'real']
    assert read_image(str(tmp_path / 'x.png')).shape[1:] == (4 * 66 + 2, 16 * 66 + 2)


def test_parameters_of_teachers_are_written_and_read(script, tmp_path):
    files = [saved(tmp_path / f'{k}.pt') for k in range(2)]
    words = ('--t_name', 'resnet8', '--t_model', *files, *PATTERNS, '--note', 'x')
    assert script('train_ka', '--ka_mode', 'ensemble', *words).code == 0
    teacher = json.loads((tmp_path / 'x' / 'ensemble' / 'results.json').read_text())['teachers'][0]
    plain = {'name': 'resnet8'}
    assert ka._size(teacher, 5) == ka._size(plain, 5) and ka._size(plain | {'parameters': 1234}, 5) == '1,234'


# --------------------------------------------------------------------------------------------------- tools


@pytest.mark.parametrize('words', [
    'fedka --t_name resnet8 --t_model x --s_name resnet8',
    'knowledge --t_name resnet8 --t_model x --s_name resnet8',
])  # fmt: skip
def test_tools_of_one_process(tool, monkeypatch, words):
    monkeypatch.setattr(engine.ka_tools, 'processes', lambda: 2)
    done = tool(*words.split())
    assert done.code == 2 and 'in one process only' in done.err and done.err.count('\n') == 1, done.err


@pytest.mark.parametrize('name,last,words', [
    ('subtask', 'lambda-1', '--t_name resnet8 --t_model 10.pt --s_name resnet8 --sub 0-3 --lambda_adv 0 1'),
    ('recombination', 'fresh', '--t_name resnet8 --t_model 5.pt 5.pt --rounds 1'),
    ('ood_ka', 'own', '--t_name resnet8 --t_model 5.pt 5.pt --s_name resnet8 --ood scenes:25'),
    ('transformer_ka', 'labels', '--data_name scenes:12 --size 32'),
])  # fmt: skip
def test_a_folder_with_a_run_is_refused_before_anything_is_written(tool, tmp_path, name, last, words):
    for classes in (5, 10):
        saved(tmp_path / f'{classes}.pt', classes=classes)
    words = [tmp_path / word if word.endswith('.pt') else word for word in words.split()]
    (tmp_path / 'x' / last).mkdir(parents=True)
    for file in (f'{last}/last.pt', 'args.json'):
        (tmp_path / 'x' / file).write_text('an earlier run')
    done = tool(name, *PATTERNS, *words, '--epochs', 1, '--note', 'x')
    assert done.code == 2 and f'{last} already holds a run' in done.err and done.err.count('\n') == 1, (
        done.err
    )
    assert (tmp_path / 'x' / 'args.json').read_text() == 'an earlier run'
    assert not [path for path in (tmp_path / 'x').glob('*/*.pt') if path.parent.name != last]


def test_a_loss_that_is_not_finite_ends_attackers_and_copies(img_root):
    from tools.fedka import adapted
    from tools.subtask import attack
    from tools.transferability import train_all

    train, test = dataset.load('patterns:80', img_root, 'cpu')
    args = SimpleNamespace(seed=1, lr=1e37, attack_lr=1e38, attack_epochs=2, adapt_epochs=2, train=2,
                           data_name='patterns')  # fmt: skip
    amp = torch.no_grad  # stands for one that changes nothing: the classifier alone is trained
    net = build('resnet8', 10)
    with pytest.raises(NonFinite, match='of the attack'):
        attack(net, 'resnet8', train, test, args, amp, True)
    with pytest.raises(NonFinite, match='on the probe set'):
        adapted(net, train, args, 0)
    source = SimpleNamespace(name='mine', net='resnet8', file=None, seen_by=lambda img, *_: img)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NonFinite, match='mine, epoch'):
        patch.setattr('models.load_weights', lambda *_, **__: None)
        train_all(source, train, test, args, 1e38, torch.enable_grad)


def test_weights_without_a_classifier_have_no_logits_to_rank(script, img_root, tmp_path):
    torch.manual_seed(0)
    state = build('resnet8', 7).state_dict()
    torch.save(state, tmp_path / 'whole.pt')
    body = {key: value for key, value in state.items() if not key.startswith('fc.')}
    torch.save(body, tmp_path / 'body.pt')
    words = [f'resnet8={tmp_path / name}.pt' for name in ('whole', 'body')]
    done = script('tools.transferability', *words, '--data_name', 'patterns:80', '--img_root', img_root,
                  '--out', tmp_path / 'out')  # fmt: skip
    assert done.code == 0, done.err
    whole, body = json.loads((tmp_path / 'out' / 'ranking.json').read_text())['networks']
    assert not any(row['metrics']['logme'] is None for row in (whole, body))
    assert all(
        whole['metrics'][name] is not None and body['metrics'][name] is None for name in ('leep', 'nce')
    )


def test_a_slimmed_teacher_has_a_private_home(tool, tmp_path):
    whole = build('resnet8', 5)
    groups = slimming.groups(whole)
    keep = [torch.arange(len(v)) < len(v) // 2 for v in slimming.scores(whole, groups, 'l1')]
    torch.save(slimming.shrink(whole, groups, keep).state_dict(), tmp_path / 'slim.pt')
    files = saved(tmp_path / 'whole.pt'), tmp_path / 'slim.pt'
    done = tool('fedka', '--t_name', 'resnet8', '--t_model', *files, '--s_name', 'resnet8', *PATTERNS,
                '--epochs', 1, '--local_epochs', 1, '--adapt_epochs', 1, '--note', 'x')  # fmt: skip
    assert done.code == 0, done.err


def test_a_comparison_of_knowledge_moves_to_another_folder(tool, tmp_path, monkeypatch):
    import tools.knowledge
    import transferability as tr

    monkeypatch.setattr(tools.knowledge, 'draw', lambda *_: None)
    monkeypatch.setattr(tr.knowledge, 'effective', lambda s, _: torch.ones(len(s), dtype=torch.bool))
    teacher = saved(tmp_path / 't.pt', classes=10)
    words = ('knowledge', '--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8', *PATTERNS,
             '--epochs', 1, '--checkpoints', 0, 1, '--probes', 1, '--noise_steps', 2, '--noise_batch', 2,
             '--grid', 6, '--test_images', 4)  # fmt: skip
    assert tool(*words, '--note', 'old').code == 0
    done = tool(*words, '--note', 'new', '--resume', tmp_path / 'old')
    assert done.code == 0, done.err
    (tmp_path / 'old' / 'labels' / 'epoch0.pt').unlink()
    shutil.rmtree(tmp_path / 'new')
    done = tool(*words, '--note', 'new', '--resume', tmp_path / 'old')
    assert done.code == 2 and 'epoch0.pt' in done.err and done.err.count('\n') == 1, done.err


def test_pools_of_mixes_are_written_whole(script, tmp_path, img_root, monkeypatch):
    import tools.select_mixup

    files = {}
    monkeypatch.setattr(
        tools.select_mixup, 'write_atomic', lambda path, content: files.update({path.name: content})
    )
    words = ('--data_name', 'patterns:80', '--img_root', img_root, '--out', tmp_path / 'x', '--real', 9)
    assert script('tools.select_mixup', *words).code == 0
    assert set(files) == {'train.npz', 'test.npz', 'pool.json'} and not list((tmp_path / 'x').iterdir())


# ------------------------------------------------------------------------------------------------- scripts

KA = 'train_ka --t_name resnet8 --t_model x --s_name resnet8 '
DFKD = 'train_dfkd --t_name resnet8 --t_model x --s_name resnet8 --kd_mode '
DENSE = 'train_dense --data_name scenes:24 --size 32 --labelled 6 --steps 1 --kd_mode '


@pytest.mark.parametrize('words,said', [
    (KA + '--ka_mode unic --data_name faces --t_attributes Bangs --num_parts 2', '--num_parts: not for'),
    (KA + '--ka_mode unic --data_name faces --t_attributes Bangs --split random', '--split: not for'),
    (KA + '--ka_mode unic --data_name faces --t_attributes Bangs --t_classes 0-4', '--t_classes: not for'),
    (KA + '--ka_mode unic --data_name shapes --size 16', '--size: not for --data_name shapes'),
    (KA + '--ka_mode unic --data_name shapes --t_attributes Bangs', '--t_attributes: not for'),
    (KA + '--ka_mode customize --data_name faces --epochs_ft 9', '--epochs_ft: customize would not read it'),
    ('train_ka --ka_mode scratch --data_name faces:48 --size 16 --t_name resnet8', 'needs as many of each'),
    (KA + '--ka_mode unic --data_name faces:48 --size 16 --batch_size 8', '0 tasks for 1 teachers: say --t'),
    (KA + '--ka_mode unic --data_name patterns:40 --batch_size 8 --num_parts 2', 'say --num_parts or'),
    (DFKD + 'kd_pool --pool_init x --g_steps 5', '--g_steps: kd_pool would not read it'),
    (DFKD + 'deepinv --lr_z 0.1', '--lr_z: deepinv would not read it'),
    (DFKD + 'dafl --milestones 0.5 --sched cosine', '--milestones: dafl would not read it'),
    (DFKD + 'dafl --eta_min 0.1', '--eta_min: dafl would not read it'),
    (DFKD + 'dafl --momentum 0.5 --optim adam', '--momentum: dafl would not read it'),
    (DFKD + 'kegnet --warmup 0', '--warmup 0: kegnet trains its generators in these epochs'),
    ('train_lm --kd_mode ce --data_name markov --t_steps 9', '--t_steps: no teacher is trained here'),
    (DENSE + 'alone --milestones 0.5', '--milestones: --schedule onecycle does not read it'),
    (DENSE + 'alone --t_model x', '--t_model: alone has no teacher'),
    (DENSE + 'alone --s_name deeplabv3:resnet10 --batch_size 1', 'deeplabv3:resnet10: Expected more than 1'),
    (DENSE + 'st --t_name deeplabv3:resnet10 --batch_size 1 --t_steps 1', 'a step needs more pictures'),
])  # fmt: skip
def test_mistakes(script, words, said):
    done = script(*words.split())
    assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err


def test_flags_that_one_of_several_methods_reads():
    words = ('--t_name', 'resnet8', '--t_model', 'x', '--s_name', 'resnet8', '--pool_init', 'x',
             '--g_steps', 5, '--milestones', 0.5, '--eta_min', 0.1)  # fmt: skip
    words += ('--kd_mode', 'kd_pool', 'dafl')
    wanted = read_methods(train_dfkd.parse_args([str(word) for word in words]))
    assert (wanted['kd_pool'].recipe.g_steps, wanted['dafl'].recipe.g_steps) == (0, 5)


def test_too_few_images_for_a_student_of_several(script, tmp_path):
    files = [saved(tmp_path / f'{k}.pt') for k in range(2)]
    words = ('--t_name', 'resnet8', '--t_model', *files, *PATTERNS, '--limit_train', 1)
    done = script('train_ka', '--ka_mode', 'concat', *words)
    assert done.code == 2 and '1 training images are left' in done.err and done.err.count('\n') == 1, done.err


def test_limits_of_faces_for_backbones(script, tmp_path):
    teacher = saved(tmp_path / 't.pt', classes=2)
    words = (
        '--data_name',
        'faces:48',
        '--size',
        16,
        '--batch_size',
        10,
        '--epochs',
        1,
        '--t_name',
        'resnet8',
    )
    done = script('train_ka', '--ka_mode', 'unic', *words, '--t_model', teacher, '--t_attributes', 'Smiling',
                  '--limit_train', 20, '--limit_test', 7)  # fmt: skip
    assert done.code == 0 and 'faces:48: 20 + 7 images' in done.out, done.err


def test_blanks_between_names_of_attributes(script, tmp_path):
    words = ('--data_name', 'faces:48', '--size', 16, '--batch_size', 10, '--t_name', 'resnet8', '--t_model',
             saved(tmp_path / 't.pt', classes=4), '--t_attributes', 'Bangs, Smiling')  # fmt: skip
    for mode in ('each_attribute', 'unic'):  # a setting each
        done = script('train_ka', '--ka_mode', mode, '--resume', tmp_path / 'no.pt', *words)
        assert 'no attribute is called' not in done.err and 'teacher 1, resnet8' in done.out, done.err


def test_attributes_that_all_test_images_share(script, img_root):
    test = dataset.load_attributes('faces:10', img_root, 'cpu', 16, labelled=True)[2]
    alike = [name for name, share in majority(test.targets, test.names).items() if share == 100]
    words = ('--data_name', 'faces:10', '--size', 16, '--batch_size', 5, '--epochs', 1)
    done = script('train_ka', '--ka_mode', 'scratch', *words, '--attributes', *alike)
    assert done.code == 2 and 'all test images are alike' in done.err and done.err.count('\n') == 1, done.err


def test_a_text_in_another_script():
    assert of_characters('a', 'plain words\n\t' * 90).replaced == 0
    some = of_characters('a', 'naïve ' * 200)
    assert math.isclose(some.replaced, 1 / 6) and 'ï' not in some.symbols
    for text in ('кошка ', 'γάτα ', '猫'):
        with pytest.raises(ValueError, match='a: [0-9]+% of it would be blanks, only printable ASCII'):
            of_characters('a', text * 900)
