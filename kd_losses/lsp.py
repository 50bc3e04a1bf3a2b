"""LSP, local structure preserving: which of its neighbours a node of a graph resembles.

Y. Yang, J. Qiu, M. Song, D. Tao, X. Wang, "Distilling Knowledge from Graph Convolutional Networks", CVPR
2020, arXiv:2003.10477.

    e_uv = exp(-gamma * sum over d of |feat[u, d] - feat[v, d]|)              for every edge u -> v
    p_uv = softmax of e_uv over the edges that enter v
    loss = 1 / V * sum over v and u -> v of p_t[uv] * (log p_t[uv] - log p_s[uv])

Tap: features of all nodes at a middle layer of two networks on one graph; widths may differ. A batch of
images is a graph, too: connect each to its nearest ones. The weight is 100 in the paper (from memory,
unverified).

Differences: none from the authors' code, whose kernel this is; kernel='rbf' is exp(-||u - v||^2 / (2 sigma)),
the paper's best (from memory, unverified). Values are small: the softmax is over numbers between 0 and 1.
Choose gamma (sigma) so that usual distances give about 1 in the exponent, else there is no gradient.

Source: ihollywhy/DistillGCN.PyTorch, local_structure.py (distanceNet) and auxilary_loss.py (graph_KLDiv).

Use:
    >>> import torch
    >>> from lsp import LSP
    >>> feat_s, feat_t = torch.randn(5, 8, requires_grad=True), torch.randn(5, 16)
    >>> edge_index = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])  # from, to
    >>> LSP()(feat_s, feat_t, edge_index).backward()
    >>> feat_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class LSP(nn.Module):
    """Divergence between the distributions of similarities that a node has to its neighbours.

    Args:
        kernel: 'l1exp' or 'rbf'.
        gamma: factor of the L1 distance in 'l1exp', > 0; 0.01.
        sigma: width of 'rbf', > 0; 100.

    Shape:
        feat_s: (V, D_s), feat_t: (V, D_t) features of the nodes; edge_index: (2, E) integers, row 0 where an
        edge begins, row 1 where it ends, self-loops where the graph has them. Returns a scalar; nodes that no
        edge enters count with 0. No gradient reaches feat_t. `probabilities(feat, edge_index)` returns (E,).
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: an argument is not legal; shapes do not fit; an edge names a node that is not there.
    """

    def __init__(self, kernel: str = 'l1exp', gamma: float = 0.01, sigma: float = 100.0) -> None:
        super().__init__()
        if kernel not in ('l1exp', 'rbf'):
            raise ValueError(f'LSP: kernel must be l1exp or rbf, got {kernel!r}')
        if not gamma > 0 or not sigma > 0:
            raise ValueError(f'LSP: gamma and sigma must be > 0, got {gamma} and {sigma}')
        self.kernel, self.gamma, self.sigma = kernel, gamma, sigma

    def forward(self, feat_s: Tensor, feat_t: Tensor, edge_index: Tensor) -> Tensor:
        _expect('LSP', 'feat_s', feat_s, 'V', 'D')
        _expect('LSP', 'feat_t', feat_t, len(feat_s), 'D')
        edge_index = self._edges(edge_index, len(feat_s))
        log_s = self._log_probabilities_of(_full(feat_s), edge_index)
        log_t = self._log_probabilities_of(_full(feat_t.detach(), feat_s), edge_index)
        return (log_t.exp() * (log_t - log_s)).sum() / len(feat_s)

    def probabilities(self, feat: Tensor, edge_index: Tensor) -> Tensor:
        """(E,): of every edge among those that enter the same node."""
        _expect('LSP', 'feat', feat, 'V', 'D')
        return self._log_probabilities_of(_full(feat), self._edges(edge_index, len(feat))).exp()

    def _edges(self, edge_index: Tensor, count: int) -> Tensor:
        if tuple(edge_index.shape) == (2, 0):  # nodes without edges
            return edge_index.long()
        _expect('LSP', 'edge_index', edge_index, 2, 'E')
        if edge_index.is_floating_point():
            raise ValueError(
                f'LSP: edge_index must be of integers, got {edge_index.dtype}: edge_index.long()'
            )
        edge_index = _kept(edge_index.long())
        if edge_index.device.type == 'cpu' and not getattr(torch.compiler, 'is_compiling', bool)():
            for node in edge_index.aminmax():
                if not 0 <= int(node) < count:
                    raise ValueError(
                        f'LSP: edge_index must name nodes 0..{count - 1}, got {int(node)}: number the '
                        'nodes of the batch from 0'
                    )
        return edge_index

    def _log_probabilities_of(self, feat: Tensor, edge_index: Tensor) -> Tensor:
        source, end = edge_index
        gap = feat.index_select(0, source) - feat.index_select(0, end)
        if self.kernel == 'l1exp':
            exponent = self.gamma * gap.abs().sum(dim=1)
        else:
            exponent = gap.square().sum(dim=1) / (2 * self.sigma)
        e = (-exponent).exp() + 0 * exponent  # an infinite feature is a fault, not a distant neighbour
        total = e.new_zeros(len(feat)).index_add(0, end, e.exp())  # 0 <= e <= 1: no overflow
        return e - total.index_select(0, end).log()


def _kept(x: Tensor) -> Tensor:
    """Integers and masks of torch.inference_mode are copied, to serve backward."""
    compiling = getattr(torch.compiler, 'is_compiling', bool)()
    return x.clone() if not compiling and x.is_inference() else x


def _expect(who: str, name: str, x: Tensor, *wanted: int | str) -> None:
    """Refuse another shape and say what to do. A letter is an axis of any length but 0, for K (classes) 1."""
    got = tuple(x.shape)
    right = [n > int(w == 'K') if isinstance(w, str) else n == w for n, w in zip(got, wanted)]
    if len(got) == len(wanted) and all(right) and 0 not in got:
        return
    if 0 in got:
        remedy = 'leave an empty batch out'
    elif len(got) == 2 and len(wanted) == 1:
        remedy = 'a number per row: x.flatten() of (N, 1) or (N, L), x.argmax(1) of one-hot labels'
    elif len(got) > len(wanted) and len(wanted) < 3:
        remedy = (
            'classes last, then flatten: x.movedim(1, -1).flatten(0, 2) for (N, K, H, W), x.flatten(0, 1) '
        )
        remedy += 'for (N, L, V), target.flatten()'
    elif len(wanted) == 4 and len(got) in (3, 5):
        remedy = 'x[..., None] makes a map of (N, C, L), x.flatten(3) one of (N, C, D, H, W)'
    elif len(got) != len(wanted):
        remedy = 'unsqueeze or flatten axes'
    elif not right[0]:
        remedy = 'all arguments need the samples of one batch (drop_last=True if the last one is smaller)'
    elif got[1] == 1 and 'K' in wanted:
        remedy = 'a sigmoid network has two classes, torch.cat([torch.zeros_like(z), z], 1)'
    elif not right[1]:
        remedy = 'give channels, widths or classes as the loss was built for, or as the other side has them'
    else:
        remedy = 'bring maps to one size, F.adaptive_avg_pool2d'
    shape = ', '.join(map(str, wanted)) + ',' * (len(wanted) == 1)
    raise ValueError(f'{who}: {name} must be ({shape}), got {got}: {remedy}')


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
