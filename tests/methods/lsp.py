"""How lsp.npz feeds kd_losses/lsp.py, and how it is called on random tensors."""

import torch

from kd_losses.lsp import LSP
from tests.methods.shared import case

EDGES = 'torch.arange(n).repeat(3), torch.cat([torch.arange(n).roll(k) for k in (0, 1, 2)])'
cases = {
    'lsp': f"""
loss = m.LSP(gamma=0.1)
inputs = {{'feat_s': S(n, 4), 'feat_t': T(n, 5), 'edge_index': torch.stack([{EDGES}])}}
""",
    'lsp_rbf': f"""
loss = m.LSP('rbf', sigma=4.0)
inputs = {{'feat_s': S(n, 4), 'feat_t': T(n, 5), 'edge_index': torch.stack([{EDGES}])}}
""",
}
exceptions = {
    'any_size': {'feat_s': 'any width', 'feat_t': 'any width', 'edge_index': 'any number of edges'},
}


def golden(z):
    edge_index = torch.stack([z.input('edge_src'), z.input('edge_dst')])
    loss = LSP(**z.hp('gamma'))
    yield case(z, loss, 'feat_s', 'feat_t', call=lambda **x: loss(**x, edge_index=edge_index))
    for side in 'st':
        z.compare(f'out_prob_{side}', loss.probabilities(z.input(f'feat_{side}'), edge_index))
