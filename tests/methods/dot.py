"""How dot.npz feeds kd_losses/dot.py."""

import torch

from kd_losses.dot import DOT


def golden(z):
    steps = z.hp('steps')['steps']
    p = [torch.nn.Parameter(z.param(f'p{i}')) for i in range(4)]
    optimiser = DOT(p, **z.hp('lr', 'momentum', 'delta', 'weight_decay', 'dampening'))
    paths = [[] for _ in p]

    def gradients(kind, step):
        for i, x in enumerate(p):
            key = f'grad_{kind}_p{i}'
            x.grad = z.input(key).detach()[step] if f'in_{key}' in z else None

    for step in range(steps):
        gradients('kd', step)
        optimiser.step_kd()
        gradients('task', step)
        optimiser.step()
        for path, x in zip(paths, p):
            path.append(x.detach().clone())
    for i, path in enumerate(paths):
        z.compare(f'out_p{i}', torch.stack(path))
    for key in [k for k in z.arrays if k.startswith('out_buf_')]:
        kind, i = key.split('_')[2:]
        name = {'task': 'momentum_buffer', 'kd': 'momentum_kd_buffer'}[kind]
        z.compare(key, optimiser.state[p[int(i[1:])]][name])
    yield from ()
