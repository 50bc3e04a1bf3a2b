"""How deep_geometric_graphs.npz feeds kd_losses/deep_geometric_graphs.py."""

from kd_losses.deep_geometric_graphs import GraphKD, adjacency, neighbours
from tests.methods.shared import Case

exceptions = {
    'any_rank': 'vectors are compared like maps',
    'open_labels': 'labels are only compared with each other',
}


def golden(z):
    hp = z.hp('levels', 'weight', 'power', 'k')
    target = z.input('target')
    more = {
        '': {},
        '_full': {},
        '_power': {'power': hp['power']},
        '_knn': {'k': hp['k']},
        '_intra': {'edges': 'intra'},
        '_inter': {'edges': 'inter'},
        '_last': {},
        '_knn_power': {'k': hp['k'], 'power': hp['power'], 'edges': 'inter'},
    }
    for suffix, options in more.items():
        levels = range(hp['levels'])[-1:] if suffix == '_last' else range(hp['levels'])
        loss, maps = GraphKD(**options), {f'fm_s_{i}': z.input(f'fm_s_{i}') for i in levels}
        fms_t = [z.input(f'fm_t_{i}') for i in levels]
        yield Case(
            lambda loss=loss, fms_t=fms_t, **x: hp['weight'] * loss(list(x.values()), fms_t, target),
            maps,
            f'loss{suffix}',
            {f'grad_{name}{suffix}': fm for name, fm in maps.items()},
        )
        assert all(fm.grad is None for fm in fms_t)
    for i in range(hp['levels']):
        graphs = {side: adjacency(z.input(f'fm_{side}_{i}')) for side in 'st'}
        for side, graph in graphs.items():
            z.compare(f'out_adj_{side}_{i}', graph)
        z.compare(f'out_mask_t_{i}', neighbours(graphs['t'], hp['k']))
