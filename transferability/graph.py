"""The transferability graph: which models are near each other, as data and as a picture's coordinates.

J. Song et al., "Deep Model Transferability from Attribution Maps", NeurIPS 2019, arXiv:1909.11902, as
KamalEngine draws it.

    distance of two models = 1 - similarity, for instance of their attribution maps
    graph: every model's edges to its topk nearest ones; edges run both ways, none to itself
    normalised: d <- (d - min + 1e-8) / (max - min + 1e-8) over the edges that are kept
    layout: B = -1/2 J D^2 J with J = I - 1/M; coordinates are the two leading eigenvectors * sqrt(eigenvalue)

Differences: where topk reaches the number of edges all are kept, KamalEngine's code fails there.

Source: zju-vipa/KamalEngine, kamal/transferability/trans_graph.py

Use:
    >>> import torch
    >>> from graph import build_graph
    >>> d = torch.tensor([[0.0, 0.1, 0.5], [0.1, 0.0, 0.4], [0.5, 0.4, 0.0]])
    >>> [edge[:2] for edge in build_graph(['a', 'b', 'c'], d, topk=1)['edges']]
    [[0, 1], [1, 0], [2, 1]]
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def build_graph(names: Sequence[str | dict], dist: Tensor, topk: int = 5, normalize: bool = True) -> dict:
    """Nodes and the edges to the nearest nodes, as JSON takes them.

    Args:
        names: M names, or dicts with 'name' and any of 'task', 'dataset', 'url' and more.
        dist: (M, M) distances; the diagonal is not looked at.
        topk: an edge is kept if it is shorter than the (topk + 1)-th shortest of its source: topk edges,
            fewer where lengths are equal, all where topk >= M - 1.
        normalize: bring the lengths of the kept edges to (0, 1].

    Returns:
        {'nodes': [{'index', 'name', 'task', 'dataset', 'url', ...}],
        'edges': [[source, target, length], ...]}

    Raises:
        ValueError: dist is not (M, M) or not finite; topk < 1.
    """
    d = _distances('build_graph', dist, len(names))
    if topk < 1:
        raise ValueError(f'build_graph: topk must be >= 1, got {topk}: 5 is the default')
    edges = []
    for i, row in enumerate(d.tolist()):
        others = sorted(x for j, x in enumerate(row) if j != i)
        limit = others[topk] if topk < len(others) else float('inf')
        edges += [[i, j, x] for j, x in enumerate(row) if j != i and x < limit]
    if normalize and edges:
        low, high = min(e[2] for e in edges), max(e[2] for e in edges)
        edges = [[i, j, (x - low + 1e-8) / (high - low + 1e-8)] for i, j, x in edges]
    usual = {'task': 'classification', 'dataset': None, 'url': None}
    nodes = [usual | ({'name': x} if isinstance(x, str) else x) | {'index': i} for i, x in enumerate(names)]
    return {'nodes': nodes, 'edges': edges}


def layout(dist: Tensor) -> Tensor:
    """Points in the plane whose distances are as near to dist as a projection can.

    Args:
        dist: (M, M) distances; unlike ones of both directions are averaged.

    Returns:
        (M, 2) float64, around 0; of every axis the largest coordinate is positive.

    Raises:
        ValueError: dist is not (M, M) or not finite.
    """
    d = _distances('layout', dist, None)
    d = (d + d.T) / 2
    d.fill_diagonal_(0)
    b = -0.5 * d.square()
    b = b - b.mean(dim=0) - b.mean(dim=1, keepdim=True) + b.mean()
    value, vector = torch.linalg.eigh(b)
    points = torch.zeros(len(d), 2, dtype=d.dtype)
    kept = min(2, len(d))
    points[:, :kept] = (vector * value.clamp(min=0).sqrt()).flip(1)[:, :kept]
    sign = points.gather(0, points.abs().argmax(dim=0, keepdim=True)).sign()
    return points * torch.where(sign == 0, 1, sign)


def _distances(who: str, dist: Tensor, m: int | None) -> Tensor:
    """A copy in float64, on the CPU."""
    right = torch.is_tensor(dist) and dist.dim() == 2 and dist.shape[0] == dist.shape[1] > 0
    if not right or (m is not None and len(dist) != m):
        got = tuple(dist.shape) if torch.is_tensor(dist) else type(dist).__name__
        wanted = '(M, M)' if m is None else f'({m}, {m})'
        remedy = 'a row and a column per model, 1 - affinity_matrix(...)'
        raise ValueError(f'{who}: dist must be {wanted}, got {got}: {remedy}')
    d = dist.detach().cpu().double().clone()
    if not torch.isfinite(d).all():
        got = f'{int((~torch.isfinite(d)).sum())} numbers that are not'
        raise ValueError(f'{who}: dist must be finite, got {got}: leave out models whose maps are not finite')
    return d
