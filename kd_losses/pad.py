"""PAD, prime-aware adaptive distillation: trust the samples whose features can be predicted.

Y. Zhang, Z. Lan, Y. Dai, F. Zeng, Y. Bai, J. Chang, Y. Wei, "Prime-Aware Adaptive Distillation", ECCV 2020,
arXiv:2008.01458.

    f = feat_s, through a linear connector where the widths differ
    v = batch norm of a linear map of f: the predicted logarithm of the variance, per dimension
    loss = mean over n and dimensions of [(feat_t - f)^2 / (exp(v) + eps) + v]

Tap: the pooled embedding. Connector and variance branch are trained with the student. The authors warm up
with the plain squared error, the function `l2` of this file, before they switch to this.

Differences: the form torchdistill says it had from the author (mean, no factor 1/2); the connector is ours. A
batch of one is normalised by the running statistics.

Source: yoshitomo-matsubara/torchdistill, torchdistill/losses/mid_level.py (PADL2Loss) and
torchdistill/models/wrapper.py (VarianceBranch4PAD).

Use:
    >>> import torch
    >>> from pad import PAD
    >>> feat_s, feat_t = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
    >>> PAD(64, 128)(feat_s, feat_t).backward()
    >>> feat_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PAD(nn.Module):
    """Gaussian negative log-likelihood of the teacher's embedding with a predicted variance per entry.

    Args:
        s_dim, t_dim: widths of the two embeddings.
        eps: added to the variance; 1e-6.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim). Returns a scalar, possibly negative. No gradient reaches
        feat_t. `l2(feat_s, feat_t)` is the warm-up loss.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: a feature of another shape than announced; the batch sizes differ.
    """

    def __init__(self, s_dim: int, t_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.s_dim, self.t_dim, self.eps = s_dim, t_dim, eps
        self.connector = None
        if s_dim != t_dim:
            self.connector = nn.Linear(s_dim, t_dim)
            nn.init.xavier_normal_(self.connector.weight)
            nn.init.zeros_(self.connector.bias)
        self.variance = nn.Linear(t_dim, t_dim)
        self.norm = nn.BatchNorm1d(t_dim)

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        self._check(feat_s, feat_t)
        with _no_autocast(feat_s):
            f, t = self._connect(_full(feat_s)), _full(feat_t.detach(), feat_s)
            v = _run(self.variance, f)
            if self.training and len(f) == 1:  # one sample has no batch statistics
                bn = self.norm
                known = (_full(t, v) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
                v = F.batch_norm(v, *known, eps=bn.eps)
            else:
                v = _run(self.norm, v)
            return ((t - f).square() / (v.exp() + self.eps) + v).mean()

    def l2(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        self._check(feat_s, feat_t)
        with _no_autocast(feat_s):
            return F.mse_loss(self._connect(_full(feat_s)), _full(feat_t.detach(), feat_s))

    def _connect(self, feat_s: Tensor) -> Tensor:
        return feat_s if self.connector is None else _run(self.connector, feat_s)

    def _check(self, feat_s: Tensor, feat_t: Tensor) -> None:
        _expect('PAD', 'feat_s', feat_s, 'N', self.s_dim)
        _expect('PAD', 'feat_t', feat_t, len(feat_s), self.t_dim)


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


def _run(module: nn.Module, x: Tensor, *more):
    """module(x, ...) in the precision of x, whatever half() or double() has made of the parameters."""
    if all(p.dtype == x.dtype for p in module.parameters()):
        return module(x, *more)
    state = {name: _full(p, x) for name, p in module.named_parameters()}
    state |= {name: _full(b, x) if b.is_floating_point() else b for name, b in module.named_buffers()}
    y = torch.func.functional_call(module, state, (x, *more))
    with torch.no_grad():
        for name, b in module.named_buffers():  # running statistics
            if b is not state[name]:  # a copy onto itself is a change, which backward would refuse
                b.copy_(state[name])
    return y


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """Squared distances at first, as if every sample were equally certain."""
    return (kd if batch.inner else kd.l2)(s.feat, t.feat)
