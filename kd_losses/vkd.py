"""VkD: an orthogonal projection of the student's features onto the normalised teacher's.

R. Miles, I. Elezi, J. Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections", CVPR 2024,
arXiv:2403.06213.

    W: (t_dim, s_dim) with orthonormal columns (rows, if t_dim < s_dim), kept so while it is trained
    t = feat_t minus its mean over the t_dim entries, over its standard deviation, per sample
    e = W * feat_s - t
    h(e) = e^2 / 2 where |e| < 1, else |e| - 1/2
    loss = mean over n and entries of h(e)

Tap: the pooled embeddings (for a transformer, the tokens' average). The projection preserves the student's
geometry, so it cannot do the learning in the student's place.

Differences: the authors' classification code; their detection variant standardises over the batch. The
projection is torch's orthogonal parametrisation, so the module can be copied and its state saved, but not
pickled whole; between unlike widths with the Cayley map, where torch's default, the authors', is
Householder's: it keeps signs in its parameter, which weight decay rounds to 0.

Source: roymiles/vkd, train.py (projector) and engine.py (train_one_epoch).

Use:
    >>> import torch
    >>> from vkd import VkD
    >>> feat_s, feat_t = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
    >>> VkD(64, 128)(feat_s, feat_t).backward()
    >>> feat_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal


class VkD(nn.Module):
    """Huber loss between orthogonally projected student and layer-normalised teacher features.

    Args:
        s_dim, t_dim: widths of the two embeddings.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim); further axes are flattened. Returns a scalar. No gradient
        reaches feat_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: a feature has another width than announced; the batch sizes differ.
    """

    def __init__(self, s_dim: int, t_dim: int) -> None:
        super().__init__()
        self.s_dim, self.t_dim = s_dim, t_dim
        # torch's choice for unlike widths keeps signs in the parameter, which weight decay would round to 0
        way = None if s_dim == t_dim else 'cayley'
        self.projection = orthogonal(nn.Linear(s_dim, t_dim, bias=False), orthogonal_map=way)
        if way:  # another key: a state of the other form would load as another projection, without a word
            self.register_buffer('cayley', torch.ones(1))

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        feat_s, feat_t = (x.flatten(1) if x.dim() > 2 else x for x in (feat_s, feat_t))
        _expect('VkD', 'feat_s', feat_s, 'N', self.s_dim)
        _expect('VkD', 'feat_t', feat_t, len(feat_s), self.t_dim)
        with _no_autocast(feat_s):
            projected = _run(self.projection, _full(feat_s))
            t = F.layer_norm(_full(feat_t.detach(), feat_s), (self.t_dim,), eps=1e-5)
            return F.smooth_l1_loss(projected, t)


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
