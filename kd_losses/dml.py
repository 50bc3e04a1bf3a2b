"""DML, deep mutual learning: networks trained together, each pulled to the others' predictions.

Y. Zhang, T. Xiang, T. M. Hospedales, H. Lu, "Deep Mutual Learning", CVPR 2018, arXiv:1706.00384.

    p = softmax of the logits
    loss = mean over the peers l of mean over n of sum over k of p_l * (log p_l - log p)      KL(p_l || p)

Tap: the logits of M >= 2 networks on the same batch, one call per network with the others as peers; added to
each one's cross-entropy. Networks that start from equal weights stay equal, with loss 0 for ever.

Differences: the mean over the peers is the paper's, the authors' code sums (peer_reduction='sum'). All
networks step at once from the same forward pass, as in Knowledge-Distillation-Zoo; the authors update them in
turn.

Source: formula only; YingZhangDUT/Deep-Mutual-Learning, train_models.py (TensorFlow) and
AberHu/Knowledge-Distillation-Zoo, kd_losses/dml.py were read.

Use:
    >>> import torch
    >>> from dml import DML
    >>> out, peers = torch.randn(8, 10, requires_grad=True), [torch.randn(8, 10), torch.randn(8, 10)]
    >>> DML()(out, peers).backward()
    >>> out.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DML(nn.Module):
    """KL divergence from the peers' to this network's probabilities.

    Args:
        peer_reduction: 'mean' or 'sum' over the peers.

    Shape:
        out: (N, K); peers: a tensor (N, K), or a list of them. Returns a scalar. No gradient reaches the
        peers.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: peer_reduction is neither; there is no peer; the shapes differ.
    """

    def __init__(self, peer_reduction: str = 'mean') -> None:
        super().__init__()
        if peer_reduction not in ('mean', 'sum'):
            raise ValueError(f'DML: peer_reduction must be "mean" or "sum", got {peer_reduction!r}')
        self.peer_reduction = peer_reduction

    def forward(self, out: Tensor, peers: Tensor | list[Tensor]) -> Tensor:
        peers = [peers] if isinstance(peers, Tensor) else list(peers)
        _expect('DML', 'out', out, 'N', 'K')
        if not peers:
            raise ValueError("DML: peers must be one or more, got 0: the other networks' logits")
        for i, p in enumerate(peers):
            _expect('DML', f'peers[{i}]', p, *out.shape)
        log_p = F.log_softmax(_full(out), dim=1)
        total = sum(_kl(F.log_softmax(_full(p.detach(), out), dim=1), log_p) for p in peers)
        return total / len(peers) if self.peer_reduction == 'mean' else total


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    q = log_q.exp()
    return torch.where(q == 0, 0.0, q * (log_q - log_p)).sum(dim=1).mean()


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


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return sum(kd(x.out, [y.out for y in s if y is not x]) for x in s)
