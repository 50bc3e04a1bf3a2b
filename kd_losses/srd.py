"""SRD, simple recipe distillation: a linear projector, batch norm on both sides, the log of a power sum.

R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation", AAAI 2024,
arXiv:2303.11098.

    bn(x) = (x - mean) / sqrt(var + eps), mean and biased variance of each dimension over the batch
    a = bn(linear map of feat_s),  b = bn(feat_t)
    diff: feature = log(sum over n and d of |a - b|^power)
    corr: feature = log(sum over d of |c_d - 1|^power + 1e-5),  c_d = mean over n of a * b
    logit = T^2 * mean over n of KL(softmax(out_t / T), softmax(out_s / T))
    loss = w_feat * feature + w_logit * logit

Tap: the embeddings of the last stage, and the logits; maps and patch tokens are averaged over positions. The
linear map learns with the student. Thanks to the logarithm the gradient does not grow with the distance;
the value may be negative, and moves with the size of the batch.

Differences: two losses go by this name. The authors' ResNet code takes differences (diff), their DeiT code
correlations (corr, with w_feat 1, eps 0), which does not run as published: it calls a class that does not
exist, reads a variable that is not defined and fixes the student's width; its formula is here. Their batch
norm keeps running statistics that nothing reads. Equal features give log 0 there, and here the logarithm of
the smallest normal number without a gradient; a dimension that is constant counts 0 in corr.

Source: roymiles/Simple-Recipe-Distillation, imagenet/torchdistill/losses/single.py (OurDistillationLoss).

Use:
    >>> import torch
    >>> from srd import SRD
    >>> feat_s, feat_t = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
    >>> SRD(64, 128)(feat_s, feat_t).backward()
    >>> feat_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SRD(nn.Module):
    """Log of a power sum between batch-normalised embeddings, and soft targets.

    Args:
        s_dim, t_dim: widths of the embeddings.
        mode: 'diff', elementwise differences; 'corr', correlations of matched dimensions.
        power: exponent, 4.
        eps: added to the variances; None: 1e-4 for diff, 0 for corr.
        w_feat, w_logit: weights of the two terms, 2 and 1.
        T: temperature of the logits, > 0; 1.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim), N >= 2; or maps (N, C, H, W), or tokens (N, L, C).
        out_s, out_t: (N, K), or both None: no logit term. Returns a scalar. No gradient reaches feat_t and
        out_t. `terms` returns (feature, logit) without the weights.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: mode is another word; T is not positive; shapes differ; N = 1; one of the logits is given.
    """

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        mode: str = 'diff',
        power: float = 4.0,
        eps: float | None = None,
        w_feat: float = 2.0,
        w_logit: float = 1.0,
        T: float = 1.0,
    ) -> None:
        super().__init__()
        if mode not in ('diff', 'corr'):
            raise ValueError(f"SRD: mode must be 'diff' or 'corr', got {mode!r}")
        if not T > 0:
            raise ValueError(f'SRD: T must be > 0, got {T}')
        self.s_dim, self.t_dim, self.mode, self.power = s_dim, t_dim, mode, power
        self.eps = (1e-4 if mode == 'diff' else 0.0) if eps is None else eps
        self.w_feat, self.w_logit, self.T = w_feat, w_logit, T
        self.embed = nn.Linear(s_dim, t_dim)

    def forward(
        self, feat_s: Tensor, feat_t: Tensor, out_s: Tensor | None = None, out_t: Tensor | None = None
    ) -> Tensor:
        feature, logit = self.terms(feat_s, feat_t, out_s, out_t)
        return self.w_feat * feature + self.w_logit * logit

    def terms(
        self, feat_s: Tensor, feat_t: Tensor, out_s: Tensor | None = None, out_t: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        _expect('SRD', 'feat_s', feat_s, 'N', *_axes(feat_s, self.s_dim))
        _expect('SRD', 'feat_t', feat_t, len(feat_s), *_axes(feat_t, self.t_dim))
        if len(feat_s) < 2:
            raise ValueError(
                f'SRD: feat_s must have 2 samples or more, got {tuple(feat_s.shape)}: one has no variance '
                f'(drop_last=True if the last batch is smaller)'
            )
        feature = self.feature(_pooled(_full(feat_s)), _pooled(_full(feat_t.detach(), feat_s)))
        if (out_s is None) != (out_t is None):
            raise ValueError('SRD: out_s and out_t must be given together, got one: leave both out')
        return feature, feature.new_zeros(()) if out_s is None else self.logit(out_s, out_t, feat_s)

    def feature(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        with _no_autocast(feat_s):
            a, b = self.bn(_run(self.embed, feat_s)), self.bn(feat_t)
        if self.mode == 'corr':
            return ((a * b).mean(dim=0) - 1).abs().pow(self.power).sum().add(1e-5).log()
        total = (a - b).abs().pow(self.power).sum()
        return total.clamp(min=torch.finfo(total.dtype).tiny).log()

    def bn(self, x: Tensor) -> Tensor:
        """By this batch's statistics, in evaluation mode, too; 0 where a variance is 0 and so is eps."""
        mean = x.mean(dim=0)
        x = x - mean
        var = x.square().mean(dim=0)
        if self.eps:
            return x / (var + self.eps).sqrt()
        # of equal numbers the mean is off by a rounding
        constant = var <= (8 * torch.finfo(x.dtype).eps * mean).square().clamp(min=1e-12)
        return torch.where(constant, 0.0, x / torch.where(constant, 1.0, var).sqrt())

    def logit(self, out_s: Tensor, out_t: Tensor, feat_s: Tensor) -> Tensor:
        _expect('SRD', 'out_s', out_s, len(feat_s), 'K')
        _expect('SRD', 'out_t', out_t, *out_s.shape)
        log_p_s = F.log_softmax(_full(out_s, feat_s) / self.T, dim=1)
        log_p_t = F.log_softmax(_full(out_t.detach(), feat_s) / self.T, dim=1)
        return _kl(log_p_t, log_p_s).sum(dim=1).mean() * self.T**2


def _axes(feat: Tensor, dim: int) -> tuple:
    """After the samples: of embeddings, tokens, maps."""
    return {3: ('L', dim), 4: (dim, 'H', 'W')}.get(feat.dim(), (dim,))


def _pooled(feat: Tensor) -> Tensor:
    return feat.mean(dim=1) if feat.dim() == 3 else feat.flatten(2).mean(dim=2) if feat.dim() == 4 else feat


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


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
    return kd(s.feat, t.feat, s.out, t.out)
