"""GraftKD, progressive grafting: parts of the student stand in the teacher and must not change its direction.

C. Shen, X. Wang, Y. Yin, J. Song, S. Luo, M. Song, "Progressive Network Grafting for Few-Shot Knowledge
Distillation", AAAI 2021, arXiv:2012.04915.

    unit(z) = z / max(||z||, 1e-12)
    loss = sum over n of ||unit(out_s) - unit(out_t)||^2 = sum over n of 2 - 2 * cos(out_s[n], out_t[n])

Summed over the batch, not averaged, as the authors do. No labels.

Tap: logits. In the paper out_s is of the teacher with blocks of the student in the place of its own, between
1x1 convolutions: first each block by itself (the rest frozen), then more and more of them together, with 1 to
50 images per class (tools/graft.py). train_kd.py has the loss alone, for whole students.

Differences: none in value. A zero row of logits gets no gradient.

Source: zju-vipa/NetGraft, graft_block.py and graft_net.py.

Use:
    >>> import torch
    >>> from graftkd import GraftKD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> GraftKD()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GraftKD(nn.Module):
    """Squared distance of logits of length 1, summed over the batch.

    Args:
        norm_loss: False: mean squared error of the logits as they are; True.

    Shape:
        out_s, out_t: (N, K), equal, K >= 2. Returns a scalar. No gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: shapes are wrong.
    """

    def __init__(self, norm_loss: bool = True) -> None:
        super().__init__()
        self.norm_loss = norm_loss

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        _expect('GraftKD', 'out_s', out_s, 'N', 'K')
        _expect('GraftKD', 'out_t', out_t, *out_s.shape)
        s, t = _full(out_s), _full(out_t.detach(), out_s)
        return (_unit(s) - _unit(t)).square().sum() if self.norm_loss else F.mse_loss(s, t)


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


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
