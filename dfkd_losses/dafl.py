"""DAFL, data-free learning: a generator makes images of which the teacher is sure, of all classes alike.

H. Chen, Y. Wang, C. Xu, Z. Yang, C. Liu, B. Shi, C. Xu, C. Xu, Q. Tian, "Data-Free Learning of Student
Networks", ICCV 2019, arXiv:1904.01186.

    p = softmax(out_t), pbar = mean over n of p
    oh_loss = mean over n of cross-entropy(out_t, its own argmax)            surely some class
    ie_loss = sum over k of pbar * log10(pbar)                               all classes equally often
    act_loss = - mean over n, d of |feat_t|                                  strong features
    loss = oh * oh_loss + ie * ie_loss + act * act_loss                      of the generator
    student_loss = mean over n of KL(softmax(out_t) || softmax(out_s))

Tap: on the generated batch the teacher's logits and the embedding before its classifier. The student does not
enter the generator's loss. A batch should have several times as many images as there are classes.

Differences: NOTHING is detached in the generator's loss: its gradient reaches the images through the frozen
teacher. The paper has a natural logarithm and a factor 1/K, the authors' code log10, which stands here.
pbar * log10(pbar) is 0 at pbar = 0, in value and gradient. The authors' generator has batch norms with eps
0.8, a slip for a momentum; models/generators.py keeps it, their figures come from it.

Source: huawei-noah/Efficient-Computing, Data-Efficient-Model-Compression/DAFL/DAFL-train.py.

Use:
    >>> import torch
    >>> from dafl import DAFL
    >>> out_t, feat_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 64, requires_grad=True)
    >>> DAFL()(out_t, feat_t).backward()
    >>> out_t.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DAFL(nn.Module):
    """The generator's loss; student_loss is the student's.

    Args:
        oh: weight of one-hotness, 0.05 (authors' CIFAR-10; CIFAR-100 0.5).
        ie: weight of the information entropy, 5 (CIFAR-100 20).
        act: weight of the activations, 0.01 (CIFAR-100 0.1).

    Shape:
        out_t: (N, K) logits, feat_t: (N, D) embedding, both on the generated batch. Returns a scalar; `terms`
        returns {'oh', 'ie', 'act'} without weights. student_loss: out_s, out_t (N, K), no gradient reaches
        out_t there. Computed in float32, or in float64 as the logits.

    Raises:
        ValueError: shapes that do not meet.
    """

    def __init__(self, oh: float = 0.05, ie: float = 5.0, act: float = 0.01) -> None:
        super().__init__()
        self.oh, self.ie, self.act = oh, ie, act

    def forward(self, out_t: Tensor, feat_t: Tensor) -> Tensor:
        terms = self.terms(out_t, feat_t)
        return self.oh * terms['oh'] + self.ie * terms['ie'] + self.act * terms['act']

    def terms(self, out_t: Tensor, feat_t: Tensor) -> dict[str, Tensor]:
        _expect('DAFL', 'out_t', out_t, 'N', 'K')
        _expect('DAFL', 'feat_t', feat_t, len(out_t), 'D')
        out_t, feat_t = _full(out_t), _full(feat_t, out_t)
        pbar = F.softmax(out_t, dim=1).mean(dim=0)
        return {
            'oh': F.cross_entropy(out_t, out_t.argmax(dim=1)),
            'ie': (pbar * pbar.clamp(min=torch.finfo(pbar.dtype).tiny).log10()).sum(),
            'act': -feat_t.abs().mean(),
        }

    def student_loss(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        _expect('DAFL', 'out_s', out_s, 'N', 'K')
        _expect('DAFL', 'out_t', out_t, *out_s.shape)
        return _kl(_full(out_s), _full(out_t.detach(), out_s))


def _kl(out_s: Tensor, out_t: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(out_s, dim=1), F.log_softmax(out_t, dim=1)
    p, log_p = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)  # 0 * -inf has no gradient
    log_q = log_q.masked_fill((p == 0) & (log_q == -torch.inf), 0.0)
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=1).mean()


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


def feed(kd, made):
    return kd.terms(made.t.out, made.t.feat)
