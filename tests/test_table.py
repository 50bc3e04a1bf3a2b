"""Tables of results: which runs are one row, what tells rows apart, over what their means are."""

import json
import shutil

import pytest

from engine.errors import UserError
from methods import METHODS
from tests import fresh
from tests.conftest import ROOT


def test_what_tells_rows_apart():
    """Stages, arguments and weights are in a row's name; teacher and start where a seed has several."""
    from report.page import outcomes
    from report.table import RECIPE, group, source_of_figure, table

    def run(name, seed, top1=50.0, given=(), stages=(), weight=None, teacher='t', **more):
        recipe = {'lr': 0.1, 'batch_size': 128, 'amp': 'off', 'seed': seed, 'initial': f'a{seed}', 'ce': 1.0}
        weight = METHODS[name].weight if weight is None else weight
        recipe |= {'methods': [[name, weight, dict(given), *stages]], 'teacher': teacher}
        return {'method': name, 'seed': seed, 'data': 'x', 'teacher': teacher, 'student': 'resnet8',
                'epochs': 2, 'recipe': recipe | more, 'machine': {'device': 'cpu'}, 'curve': [top1],
                'last': {'top1': top1}, 'best': {'top1': top1, 'selected_on': 'test data'}}  # fmt: skip

    def names(*runs):
        return {key[3]: len(found) for key, found in group(list(runs)).items()}

    for seed in (1, 2):  # of one seed or of several
        assert names(run('fitnet', 1), run('fitnet', seed, stages=['2'])) == {
            'fitnet': 1, 'fitnet (stages 2)': 1
        }  # fmt: skip
    sixth = [run('st', seed, given={'T': T}) | {'teacher_top1': 80.0 + seed} for seed in (1, 2, 3)
             for T in (4, 8)]  # fmt: skip
    assert names(*sixth) == {'st (T=4)': 3, 'st (T=8)': 3}, 'every seed has a teacher of its own'
    two = [run('st', 1) | {'teacher_top1': 80.0 + k} for k in range(2)]
    assert names(*two) == {'st (teacher at 80.00)': 1, 'st (teacher at 81.00)': 1}
    assert names(run('st', 1), run('st', 1, initial='b')) == {'st (start 1)': 1, 'st (start 2)': 1}
    assert names(run('st', 1, weight=1.0, ce=0.0)) == {'st (weight 1, ce 0)': 1}, 'also of a single row'
    joined = run('st', 1) | {'method': 'st+at'}
    joined['recipe']['methods'] = [['st', 0.1, {'T': 8}], ['at', 7.0, {}]]
    assert names(joined) == {'st+at (st.T=8, at.weight 7)': 1}
    peers = {'script': 'train_dml', 'method': ['dml', 2.0, {'T': 8}]}
    together = run('dml', 1)
    together['recipe'] = {'lr': 0.1, 'batch_size': 128, 'amp': 'off', 'seed': 1, **peers}
    assert names(together) == {'dml (T=8, weight 2)': 1}
    # one that reads a single teacher has the first of the process's; other teams read all
    pair = [run(name, 1, teacher='t+u') for name in ('st', 'mkd_avg')]
    assert {key[1:4:2] for key in group([*pair, run('st', 2)])} == {('t', 'st'), ('t+u', 'mkd_avg')}

    # a recipe's file is called otherwise than its method
    text = table([run('st', 1) | {'file': 'takd-assisted-s1'}, run('at', 1) | {'file': 'at-s1'}])
    assert '| st, takd-assisted | t' in text and '| at | t' in text
    # a baseline of another recipe is none of the page's methods
    plain = [run('st', 1) | {'method': 'baseline', 'teacher': None} for _ in range(2)]
    for lr, one in zip((0.1, 0.01), plain):
        del one['recipe']['methods']
        one['recipe'] |= {'lr': lr}
    assert names(*plain) == {'baseline (lr 0.1)': 1, 'baseline (lr 0.01)': 1}
    assert {m for e in outcomes.distilled('x', [*plain, run('st', 1)]) for m in e.values} == {'st'}
    # and is not what a student of the first recipe is compared with
    usual = {'image_size': 224, 'lr_decay': 0.1, 'milestones': [0.5, 0.75], 'weight_decay': 1e-4,
             'momentum': 0.9, 'val_split': 0.0, 'own_scale': None, 'lr': 0.1}  # fmt: skip
    others = {'bn_l1': 0.1, 'processes': 2, 'image_size': 32, 'lr_decay': 0.5, 'augment': 'x', 'lr': 0.2,
              'batch_size': 64, 'schedule': 'onecycle', 'milestones': [0.5], 'amp': 'bf16', 'optim': 'adamw',
              'weight_decay': 5e-4, 'momentum': 0.8, 'nesterov': False, 'pad': 'zero', 'labelled': 0.1,
              'val_split': 0.1, 'own_scale': [[0.5] * 3] * 2}  # fmt: skip
    assert others.keys() == set(RECIPE), 'a further key needs a value here'
    for key, value in others.items():
        alone = [r | {'recipe': r['recipe'] | usual} for r in plain]
        alone[1]['recipe'] |= {key: value}
        alone[1]['last'] = {'top1': 40.0}
        text = table([alone[1], alone[0], run('sla', 1, **usual)])
        assert [row for row in text.splitlines() if row.startswith('| sla') and '+0.00' in row], key
    # the figure says these names, too
    drawn = [source_of_figure([run('st', 1, given=given)]) for given in ({}, {'T': 8})]
    assert drawn[0] != drawn[1]


def test_a_seed_is_there_once(tmp_path):
    """Copies of a file are one run; a second run of a seed is refused, with the names of both files."""
    from report.page import outcomes
    from report.table import group, read_results

    path = ROOT / 'results' / 'cifar10-resnet20-resnet8-12epochs' / 'st-s2.json'
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        shutil.copy(path, tmp_path / folder / 'results.json')
    results = read_results([str(tmp_path)])
    assert len(results) == 2 and [len(runs) for runs in group(results).values()] == [1]
    results[1]['last'] = {'top1': 1.0}
    files = f'{tmp_path}/a/results.json and {tmp_path}/b/results.json'
    with pytest.raises(UserError, match=f'st is there twice with seed 2: name one folder: {files}'):
        group(results)
    results = read_results([str(ROOT / 'results' / 'lm-markov' / 'gkd-s1.json')] * 2)
    other = results[0] | {'seconds': 0}
    with pytest.raises(UserError, match='x: gkd is there twice with seed 1'):
        outcomes.others('x', [results[0], other])


def test_the_baseline_is_the_students_own():
    """Of all classes like the student, and of one seed only if it began from the student's weights."""
    from report.table import baseline_of, group

    def run(method, seed, initial, top1=50.0, classes=None):
        recipe = {
            'lr': 0.1,
            'batch_size': 128,
            'amp': 'off',
            'seed': seed,
            'initial': initial,
            'classes': classes,
        }
        if method == 'st':
            recipe |= {'ce': 1.0, 'methods': [['st', METHODS['st'].weight, {}]], 'teacher': 't'}
        return {'method': method, 'seed': seed, 'data': 'x', 'teacher': 't' if method == 'st' else None,
                'student': 'resnet8', 'epochs': 2, 'recipe': recipe, 'last': {'top1': top1}}  # fmt: skip

    def baseline(*runs):
        groups = group(list(runs))
        found = baseline_of(groups, next(key for key in groups if key[3] == 'st'))
        return found and found[0]['last']['top1']

    part = run('baseline', 1, 'b', 95.0, classes=[0, 1])
    assert baseline(run('st', 1, 'a'), run('baseline', 1, 'a', 40.0), part) == 40.0
    assert baseline(run('st', 1, 'a'), part) is None
    assert baseline(run('st', 1, 'a'), run('baseline', 1, 'other', 45.0)) is None
    assert baseline(run('st', 1, 'a'), run('baseline', 2, 'other', 45.0)) == 45.0, 'of another seed'


def test_a_schedule_says_what_differs():
    """From the scripts' defaults; and below the table that the student alone had another recipe."""
    from report.table import read_results, schedule, table

    folder = ROOT / 'results' / 'cifar10-resnet20-resnet8-12epochs-steps'
    st, alone = (read_results([str(folder / f'{name}.json')])[0] for name in ('st', 'baseline-resnet8'))
    assert schedule([st]) == '12 epochs, bf16'
    other = {'milestones': [0.625, 0.75, 0.875], 'weight_decay': 5e-4, 'nesterov': False, 'pad': 'zero'}
    st['recipe'] = st['recipe'] | other
    said = 'weight decay 0.0005, pad zero, bf16, falls at 0.625 0.75 0.875, no Nesterov'
    assert schedule([st]) == f'12 epochs, {said}'
    own = alone | {'recipe': alone['recipe'] | other}
    note = 'No gain: no student alone of this recipe.'
    assert note in table([st, alone]) and note not in table([st, alone, own]) and note not in table([st])
    st['recipe'] = st['recipe'] | {'optim': 'adamw', 'lr': 0.001, 'schedule': 'onecycle'}
    assert schedule([st]).startswith('12 epochs, one cycle, adamw, lr 0.001, weight decay')


def test_images_of_ones_own_are_compared_with_themselves():
    """Two folders of one name: rows, baselines and means of one are not those of the other."""
    from report.table import group, names_of, summary, table

    def run(method, images, top1, seed=1, scale=0.5):
        recipe = {'lr': 0.1, 'batch_size': 128, 'amp': 'off', 'seed': seed, 'initial': f'a{seed}'}
        recipe |= {'own_images': images, 'own_scale': [[scale] * 3, [scale] * 3]} if images else {}
        if method == 'st':
            recipe |= {'ce': 1.0, 'methods': [['st', METHODS['st'].weight, {}]], 'teacher': 't'}
        who = {'method': method, 'seed': seed, 'data': 'arrays', 'student': 'resnet8', 'epochs': 2}
        who |= {'teacher': 't' if method == 'st' else None, 'recipe': recipe}
        return who | {'machine': {'device': 'cpu'}, 'curve': [top1], 'last': {'top1': top1},
                      'best': {'top1': top1, 'selected_on': 'test data'}}  # fmt: skip

    one, three = 'aaaaaaaaaaaa', 'cccccccccccc'
    both = [run('baseline', one, 90.0), run('st', three, 20.0, scale=0.4)]
    assert '-70' not in table(both)
    rows = table([*both, run('baseline', three, 18.0, scale=0.4), run('st', one, 91.0)]).splitlines()
    assert [row for row in rows if '| st | t -> resnet8, arrays cccccc |' in row and '+2.00' in row], rows
    assert [row for row in rows if '| st | t -> resnet8, arrays aaaaaa |' in row and '+1.00' in row], rows
    assert not any('own_scale' in row for row in rows)
    four = [*both, run('baseline', three, 18.0, scale=0.4), run('st', one, 91.0)]
    assert len(set(names_of(list(group(four))))) == 4 and summary(four).count('| `st`, arrays ') == 2
    assert [len(runs) for runs in group([run('st', one, 90.0), run('st', three, 20.0, seed=2)]).values()] == [
        1, 1
    ], 'no repetitions'  # fmt: skip
    assert '+1.00' in table([run('baseline', None, 90.0), run('st', one, 91.0)]), 'older ones do not say'
    scaled = group([run('st', one, 90.0), run('st', one, 80.0, scale=0.4)])
    assert len(scaled) == 2 and all('own_scale' in key[3] for key in scaled)


def test_a_gain_is_over_the_seeds_that_both_have():
    """In the table, its summary and the page of the method; and rows of a figure have names of their own."""
    from report.page import method, outcomes
    from report.table import group, names_of, summary, table

    def run(method, seed, top1, epochs=2, student='resnet8'):
        recipe = {'lr': 0.1, 'batch_size': 128, 'amp': 'off', 'seed': seed, 'initial': f'a{seed}', 'ce': 1.0}
        if method == 'st':
            recipe |= {'methods': [['st', METHODS['st'].weight, {}]], 'teacher': 't'}
        return {'method': method, 'seed': seed, 'data': 'x', 'teacher': 't' if method == 'st' else None,
                'student': student, 'epochs': epochs, 'recipe': recipe, 'machine': {'device': 'cpu'},
                'curve': [top1], 'last': {'top1': top1},
                'best': {'top1': top1, 'selected_on': 'x'}}  # fmt: skip

    runs = [
        *(run('baseline', seed, top1) for seed, top1 in ((1, 40.0), (2, 50.0), (3, 60.0))),
        run('st', 1, 41.0),
    ]
    said = table(runs)
    assert '| st | t -> resnet8 | 41.00 | 1 | +1.00 |' in said and 'over the seeds that both have' in said
    assert '| `st` | 41.00 | +1.00 |' in summary(runs)
    page = method.run('st', outcomes.distilled('x', runs)[0])
    assert '<b class="up">+1.00</b> against the student alone, 40.00, over the seeds that both have' in page
    for seeds, gain in (((4,), '-9.00'), ((1, 2, 3), '-9.00')):
        said = table([*runs[:3], *(run('st', seed, 41.0) for seed in seeds)])
        assert f'| {gain} |' in said and 'that both have' not in said, seeds

    pairs = [
        run('st', 1, 41.0, epochs=epochs, student=name) for epochs, name in ((2, 'a'), (2, 'b'), (4, 'a'))
    ]
    assert names_of(group(pairs[:1])) == ['st']
    assert sorted(names_of(group(pairs))) == [f'st, t -> {pair} epochs' for pair in ('a, 2', 'a, 4', 'b, 2')]
    alone = [run('baseline', 1, 41.0), run('baseline', 2, 41.0)]
    alone[1]['recipe'] |= {'lr': 0.2}
    assert names_of(group(alone)) == ['resnet8 alone (lr 0.1)', 'resnet8 alone (lr 0.2)']


def test_the_page_compares_within_a_setting():
    """Detectors and lengths of one folder are not mixed: a gain is over this student's own training."""
    from report.page import outcomes

    found = [e for e in outcomes.experiments() if e.key.startswith('dense-rooms')]
    results = [json.loads(path.read_text()) for path in (outcomes.RESULTS / 'dense-rooms').glob('*.json')]
    for e in found:
        figure = {'mIoU, %': 'miou', 'AP': 'ap'}[e.metric]
        for method, values in e.values.items():
            for seed, value in values.items():
                settings = [{(r['student'], r['steps']) for r in results if r.get('method') == name
                             and r['seed'] == seed and r['last'].get(figure) == x}
                            for name, x in ((method, value), ('alone', e.alone[method][seed]))]  # fmt: skip
                assert settings[0] & settings[1], (e.key, method, seed)
    assert len(found) >= 4


def test_dense_tasks_over_seeds():
    """All figures of a row are means over its seeds; what differs between them is not the first's."""
    from report.ka import dense_table

    run = {
        'script': 'train_ka',
        'data': 'scenes',
        'teacher': None,
        'experiment': 'a',
        'tasks': ['seg', 'depth'],
    }
    runs = []
    for k in range(2):
        teachers = [{'task': 'seg', 'miou': 50.0 + 2 * k}, {'task': 'depth', 'rmse': 0.5 + 0.2 * k}]
        runs.append(run | {'method': 'ensemble', 'seed': k, 'teachers': teachers})
        runs.append(run | {'method': 'sbm', 'seed': k, 'branch_points': [k, 1], 'parameters': 1000 + k,
                           'epochs': 3, 'parameters_of_teachers': 2000, 'last': {'miou': 60.0 + 2 * k},
                           'after_first_phase': {'miou': 40.0 + 2 * k, 'epoch': 2}})  # fmt: skip
    _, teachers, block, sbm = dense_table(runs)
    assert teachers[1:4] == ['51.0 +- 1.4', '', '0.600 +- 0.141'] and teachers[-3:] == ['2,000', '', 2]
    assert block[0] == 'sbm, after the block phase' and block[1] == '41.0 +- 1.4' and block[-2:] == [2, 2]
    assert sbm[0] == 'sbm (branches at 0, 1 or 1, 1)' and sbm[1] == '61.0 +- 1.4'
    assert sbm[-3:] == ['1,000 to 1,001', 3, 2]
    _, *_, one = dense_table(runs[:2])
    assert one[0] == 'sbm (branches at 0, 1)' and one[-3] == '1,000'


def test_parts_that_seeds_drew_are_not_mixed():
    from report.ka import parts_table

    def run(method, seed, parts):
        last = {'top1': 50.0 + seed, 'part1': 60.0 + seed, 'part2': 70.0}
        form, routing = {'routing': [[90.0, 10.0], [5.0, 95.0]]}, [[90.0, 10.0], [5.0, 95.0]]
        facts = {
            'ensemble': {'ensembles': {'A': last | form}, 'teachers': [
                {'name': 'resnet8', 'classes': part, 'top1': 80.0} for part in parts]},
            'cfl': {'last': last, 'best': last, 'routing': routing, 'student': 'resnet8', 'epochs': 2},
        }  # fmt: skip
        return {'method': method, 'seed': seed, 'data': 'x', 'teacher': 't', 'experiment': 'a',
                'parts': parts, 'classes': [0, 1, 2, 3], **facts[method]}  # fmt: skip

    fixed = [run(method, seed, [[0, 1], [2, 3]]) for seed in (1, 2) for method in ('ensemble', 'cfl')]
    (cfl,) = [row for row in parts_table(fixed) if row[0].startswith('cfl')]
    assert cfl[:3] == ['cfl (resnet8)', '51.50 +- 0.71', '61.50 / 70.00'] and cfl[-2] == 2
    drawn = [
        run(method, seed, [[0, seed], [3 - seed, 3]]) for seed in (1, 2) for method in ('ensemble', 'cfl')
    ]
    rows = parts_table(drawn)
    assert {row[0] for row in rows if row[0].startswith(('cfl', 'teacher 1'))} == {
        'cfl (resnet8), seed 1', 'cfl (resnet8), seed 2', 'teacher 1, resnet8: 0, 1, seed 1',
        'teacher 1, resnet8: 0, 2, seed 2',
    }  # fmt: skip
    assert all(row[-2] == 1 for row in rows[1:])


def test_one_seed_is_not_every_seed():
    from report.dense import SETTING, text_of

    def run(method, seed, miou):
        known = dict.fromkeys(SETTING, 'x') | {'task': 'segmentation', 'steps': 3, 'script': 'train_dense'}
        return known | {
            'method': method,
            'seed': seed,
            'last': {'miou': miou, 'accuracy': miou},
            'teacher': None,
        }

    runs = [run('alone', 1, 50.0), run('alone', 2, 51.0), run('cwd', 1, 52.0), run('cwd', 2, 53.0)]
    text = text_of([*runs, run('st', 1, 60.0)])
    assert 'with every seed: `cwd`.' in text and '| `st` | 60.0 |' in text


def test_other_recipes_are_no_seeds_of_one_row():
    """Tables of the other scripts: a run with another learning rate has a row, or a table, of its own."""
    from report import dense, dfkd, ka, tasks

    def two(name):
        run = json.loads((ROOT / 'results' / name).read_text())
        other = {'seed': 9, 'recipe': run['recipe'] | {'lr': 0.77, 'lr_ka': 0.77}}
        return [run | more | {'experiment': 'x'} for more in ({}, other)]

    assert dense.text_of(two('dense-rooms/segmentation-ifvd-s1.json')).count('lr 0.77') == 1
    assert '`fastdfkd` (lr 0.77)' in dfkd.table(two('dfkd-patterns/fastdfkd-s1.json'))
    name = 'lsp (labels 0.05, kernel rbf, sigma 30)'
    assert [*tasks.groups_of(two('graphs/lsp-rbf-s1.json'))] == [f'{name} (lr {lr})' for lr in (0.005, 0.77)]
    with pytest.raises(UserError, match=r'x: ka_vit is there with lr 0.001, lr_ka 0.001 and lr 0.77'):
        ka.group(two('ka-vit/ka_vit-s3.json'))


def test_a_folder_with_results_of_several_scripts(tmp_path):
    """Each command takes what it is of; folders in one another count once."""
    (tmp_path / 'a').mkdir()
    for folder, file in (('dense-rooms', 'segmentation-ifvd-s1'), ('lm-markov', 'gkd-s1'),
                         ('digits', 'libs-s1'), ('ka-cifar10-two', 'concat'),
                         ('cifar10-resnet20-resnet8-12epochs', 'st-s2')):  # fmt: skip
        shutil.copy(ROOT / 'results' / folder / f'{file}.json', tmp_path / 'a')
    done = fresh.run('-m', 'report', 'table', tmp_path, tmp_path / 'a', '--out', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    lines = [line for line in (tmp_path / 'out' / 'table.md').read_text().splitlines() if line[:3] == '| s']
    assert len(lines) == 1 and lines[0].startswith('| st | resnet20 -> resnet8 | 85.23 | 1 |')
    shutil.copy(ROOT / 'results' / 'graphs' / 'lsp-rbf-s1.json', tmp_path / 'a')
    done = fresh.run('-m', 'report', 'tasks', tmp_path / 'a')
    assert done.returncode == 2 and 'results of both' in done.stderr
