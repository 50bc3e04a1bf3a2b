"""Tables of results: which runs are one row, what tells rows apart, over what their means are."""

from methods import METHODS


def test_what_tells_rows_apart():
    """Stages, arguments and weights are in a row's name; teacher and start where a seed has several."""
    from report.page import outcomes
    from report.table import group, source_of_figure, table

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
    usual = {'image_size': 224, 'lr_decay': 0.1}
    others = {'bn_l1': 0.1, 'processes': 2, 'image_size': 32, 'lr_decay': 0.5, 'augment': 'x'}
    for key, value in others.items():
        alone = [r | {'recipe': r['recipe'] | usual | {'lr': 0.1}} for r in plain]
        alone[1]['recipe'] |= {key: value}
        alone[1]['last'] = {'top1': 40.0}
        text = table([alone[1], alone[0], run('sla', 1, **usual)])
        assert [row for row in text.splitlines() if row.startswith('| sla') and '+0.00' in row], key
    # the figure says these names, too
    drawn = [source_of_figure([run('st', 1, given=given)]) for given in ({}, {'T': 8})]
    assert drawn[0] != drawn[1]
