"""AFK, amalgamating filtered knowledge: streams through one shared trunk that differ only by small filters.

J. Ye, X. Wang, Y. Ji, K. Ou, M. Song, "Amalgamating Filtered Knowledge: Learning Task-customized Student from
Multi-task Teachers", IJCAI 2019, arXiv:1905.11569.

    y_u = 1 where sigmoid(out_t_u) > 0.5, else 0
    loss = sum over streams u of mean over n and classes of binary cross-entropy(out_s_u, y_u)

    Filter: gate_u = sigmoid(W2 * relu(W1 * pooled m_u)), m_u: middle activation of a residual block, which
    gives relu(branch(x_u) + shortcut(x_u) * gate_u) for every stream u.

Tap: multi-label logits of each stream and of its teacher. Branching off the trunk, freezing and fine-tuning
go as in sbm.py.

Differences: hard pseudo-labels as in the authors' code, a logit of exactly 0 counts as negative. The hidden
width of a Filter is a fraction in their code under Python 3; ours is rounded down.

Source: zju-vipa/KamalEngine at commit afd0557, kamal/models/resnet.py (Attention, JointResNet) and
examples/afk/train.py.

Use:
    >>> import torch
    >>> from afk import AFK
    >>> outs_s = [torch.randn(8, 3, requires_grad=True), torch.randn(8, 4)]
    >>> outs_t = [torch.randn(8, 3), torch.randn(8, 4)]
    >>> AFK()(outs_s, outs_t).backward()
    >>> outs_s[0].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AFK(nn.Module):
    """Binary cross-entropy against each teacher's decisions.

    Shape:
        outs_s, outs_t: lists over streams of (N, K_u), equal. Returns a scalar, with return_terms=True also
        {'stream0': ..., ...}. No gradient reaches outs_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: lists or shapes that do not meet.
    """

    def forward(self, outs_s: list[Tensor], outs_t: list[Tensor], return_terms: bool = False):
        if len(outs_s) != len(outs_t) or not outs_s:
            raise ValueError(
                f'AFK: outs_t must hold {len(outs_s)} tensors as outs_s, got {len(outs_t)}: one per stream'
            )
        terms = {}
        for u, (out_s, out_t) in enumerate(zip(outs_s, outs_t)):
            _expect('AFK', f'outs_s[{u}]', out_s, 'N', 'C')
            _expect('AFK', f'outs_t[{u}]', out_t, *out_s.shape)
            t = _full(out_t.detach(), out_s)
            # NaN and inf must show; -inf is a no
            label = torch.where(t > 0, 1.0, 0.0).to(t) + 0 * t.masked_fill(t == -torch.inf, 0.0)
            terms[f'stream{u}'] = F.binary_cross_entropy_with_logits(_full(out_s), label)
        loss = sum(terms.values())
        return (loss, terms) if return_terms else loss


class Filter(nn.Module):
    """A gate per channel for one stream through a residual block.

    Args:
        in_channels: of the block's middle activation.
        out_channels: of the block's output.
        reduction, min_hidden: hidden width = max(min_hidden, out_channels // reduction); 8 and 16.

    Shape:
        mid: (N, in_channels, H, W) -> (N, out_channels, 1, 1).

    Raises:
        ValueError: mid has other channels.
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: int = 8, min_hidden: int = 16) -> None:
        super().__init__()
        hidden = max(min_hidden, out_channels // reduction)
        self.w1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.w2 = nn.Conv2d(hidden, out_channels, 1, bias=False)

    def forward(self, mid: Tensor) -> Tensor:
        _expect('Filter', 'mid', mid, 'N', self.w1.in_channels, 'H', 'W')
        return torch.sigmoid(self.w2(F.relu(self.w1(mid.mean(dim=(2, 3), keepdim=True)))))


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


def feed(ka, s, all_t, batch):
    """s: logits of every stream."""
    return ka([_decisions(out) for out in s], [_decisions(t.out) for t in all_t], return_terms=True)


def forward(net, batch):
    """In the block phase every stream leaves the trunk at a random point."""
    points = None if batch.phase else [batch.rng.randrange(net.levels) for _ in net.branches]
    return net(batch.img, points)


@torch.no_grad()
def begin_phase(net, phase: int, ka, teachers_on, sample) -> str:
    """After the block phase: choose where each stream leaves: least loss on unlabelled images."""
    if phase == 0:
        return ''
    sums = torch.zeros(net.levels, len(net.branches))
    net.eval()
    for img, *_ in sample():
        all_t = teachers_on(img)
        for k in range(net.levels):
            _, terms = feed(ka, net(img, [k] * len(net.branches)), all_t, None)
            sums[k] += torch.stack(list(terms.values())).cpu() * len(img)
    net.choose(sums.argmin(dim=0).tolist())
    return f'branch points {net.points.tolist()}'


def _decisions(out: Tensor) -> Tensor:
    """Logits (no, yes, no, yes, ...) -> one logit per attribute."""
    return out[:, 1::2] - out[:, ::2]
