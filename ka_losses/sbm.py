"""SBM, "Student Becoming the Master": one network for dense tasks, branched off one teacher after another.

J. Ye, Y. Ji, X. Wang, K. Ou, D. Tao, M. Song, "Student Becoming the Master: Knowledge Amalgamation for Joint
Scene Parsing, Depth Estimation, and More", CVPR 2019, arXiv:1904.10167.

    seg:    T^2 * mean over pixels of sum over k of p_t * (log p_t - log p_s)
            ('hard': cross-entropy with the teacher's argmax)
    depth:  mean of |out_s - out_t|
            ('si': with d = log out_s - log out_t, mean over images of mean(d^2) - mean(d)^2 / 2)
    normal: - mean over images of (sum over valid pixels of the cosine / number of valid pixels)
    loss = sum over tasks of weight * term

    ChannelCoding: x * sigmoid(W2 * relu(W1 * pooled x)): what a branch needs of the trunk's map.

Procedure: the trunk starts as teacher one. Each task leaves it at a branch point, through a ChannelCoding and
the REMAINING blocks of its teacher. Those are frozen while the trunk and the codings learn (block phase), the
best branch point per task is chosen on unlabelled images, then everything is trained (fine-tuning).

Tap: the networks' outputs, student and teacher, in the order of the tasks.

Differences: KL and L1 as in KamalEngine, 'hard' and 'si' as in the authors' 2019 code; the original is
TensorFlow and was not found. Pooling is global; KamalEngine's pools the left square of a wide map. In 'si' an
image without a valid pixel is skipped; in their code it is NaN.

Source: zju-vipa/KamalEngine, kamal/amalgamation/task_branching.py; 'hard' and 'si': commit 1336e1d,
examples/sbm/joint_net.py and train.py.

Use:
    >>> import torch
    >>> from sbm import SBM
    >>> outs_s = [torch.randn(2, c, 8, 8, requires_grad=True) for c in (13, 1, 3)]
    >>> outs_t = [torch.randn(2, c, 8, 8) for c in (13, 1, 3)]
    >>> SBM()(outs_s, outs_t).backward()
    >>> outs_s[0].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SBM(nn.Module):
    """The sum of the tasks' distances to their teachers.

    Args:
        tasks: any of 'seg', 'depth', 'normal', in the order of the outputs.
        seg: 'kl' or 'hard'.
        depth: 'l1' or 'si' (scale-invariant; pixels where the teacher says exactly 0 are left out).
        weights: one per task; None: 1 each.
        T: temperature of 'kl', > 0.

    Shape:
        outs_s, outs_t: lists over tasks of (N, K, H, W), (N, 1, H, W), (N, 3, H, W), equal; mask: (N, 1, H,
        W) of 0 and 1, used by the normals only. Returns a scalar, with return_terms=True also {task: term}
        without weights. No gradient reaches outs_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: unknown task or form; T not positive; lists or shapes that do not meet.
    """

    def __init__(
        self,
        tasks: tuple = ('seg', 'depth', 'normal'),
        seg: str = 'kl',
        depth: str = 'l1',
        weights: list | None = None,
        T: float = 1.0,
    ) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'SBM: T must be > 0, got {T}')
        if seg not in ('kl', 'hard') or depth not in ('l1', 'si'):
            raise ValueError(
                f"SBM: seg must be 'kl' or 'hard' and depth 'l1' or 'si', got {seg!r} and {depth!r}"
            )
        for task in tasks:
            if task not in ('seg', 'depth', 'normal'):
                raise ValueError(f"SBM: tasks must be of 'seg', 'depth', 'normal', got {task!r}")
        if weights is not None and len(weights) != len(tasks):
            raise ValueError(f'SBM: weights must have {len(tasks)} entries, got {len(weights)}: one per task')
        self.tasks, self.T, self.seg, self.depth = tuple(tasks), T, seg, depth
        self.weights = tuple([1.0] * len(tasks) if weights is None else weights)

    def forward(
        self,
        outs_s: list[Tensor],
        outs_t: list[Tensor],
        mask: Tensor | None = None,
        return_terms: bool = False,
    ):
        for name, outs in (('outs_s', outs_s), ('outs_t', outs_t)):
            if len(outs) != len(self.tasks):
                raise ValueError(
                    f'SBM: {name} must hold {len(self.tasks)} tensors, got {len(outs)}: one per task'
                )
        terms = {}
        for task, out_s, out_t in zip(self.tasks, outs_s, outs_t):
            _expect(
                'SBM', f'outs_s of {task}', out_s, 'N', {'depth': 1, 'normal': 3}.get(task, 'K'), 'H', 'W'
            )
            _expect('SBM', f'outs_t of {task}', out_t, *out_s.shape)
            name = f'{task} {len(terms) + 1}' if task in terms else task  # several teachers of a kind
            terms[name] = self._term(task, _full(out_s), _full(out_t.detach(), out_s), mask)
        loss = sum(weight * term for weight, term in zip(self.weights, terms.values()))
        return (loss, terms) if return_terms else loss

    def _term(self, task: str, s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        if task == 'seg':
            return _kl(s, t, self.T) if self.seg == 'kl' else _hard(s, t)
        if task == 'depth':
            return (s - t).abs().mean() if self.depth == 'l1' else _si(s, t)
        return _cosine(s, t, mask)


class ChannelCoding(nn.Module):
    """A gate per channel, from the pooled map.

    Args:
        channels: C.
        reduction, min_hidden: hidden width = max(min_hidden, C // reduction); 4 and 16.

    Shape:
        x: (N, C, H, W) -> the same.

    Raises:
        ValueError: x has other channels.
    """

    def __init__(self, channels: int, reduction: int = 4, min_hidden: int = 16) -> None:
        super().__init__()
        hidden = max(min_hidden, channels // reduction)
        self.w1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.w2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _expect('ChannelCoding', 'x', x, 'N', self.w1.in_channels, 'H', 'W')
        pooled = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.w2(F.relu(self.w1(pooled))))


def _kl(s: Tensor, t: Tensor, T: float) -> Tensor:
    log_p_s, log_p_t = F.log_softmax(s / T, dim=1), F.log_softmax(t / T, dim=1)
    p_t = log_p_t.exp()
    return torch.where(p_t == 0, 0.0, p_t * (log_p_t - log_p_s)).sum(dim=1).mean() * T**2


def _hard(s: Tensor, t: Tensor) -> Tensor:
    hidden = 0 * t.softmax(dim=1).sum()  # argmax does not see NaN and inf, which must show
    return F.cross_entropy(s, t.argmax(dim=1)) + hidden


def _si(s: Tensor, t: Tensor) -> Tensor:
    valid = (t != 0).flatten(1)
    d = (s.clamp(1e-10, 1e10).log() - t.clamp(1e-10, 1e10).log()).flatten(1)
    d = torch.where(valid, d, 0.0)
    count = valid.sum(dim=1).clamp(min=1)
    each = d.square().sum(dim=1) / count - 0.5 * (d.sum(dim=1) / count).square()
    hidden = 0 * (s.detach().sum() + t.sum())  # the clamp makes inf finite
    return each.sum() / valid.any(dim=1).sum().clamp(min=1) + hidden


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _cosine(s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
    dot = (_unit(s.movedim(1, -1)) * _unit(t.movedim(1, -1))).sum(dim=-1)[:, None]
    if mask is None:
        return -dot.mean()
    _expect('SBM', 'mask', mask, *dot.shape)
    mask = mask.to(dot)
    return -((dot * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)).clamp(min=1)).mean()


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
    return ka(s, all_t, return_terms=True)


def build(loss, probe, **options):
    return loss(probe.tasks, **options)


def forward(net, batch):
    """In the block phase every branch leaves the trunk at a random point."""
    points = None if batch.phase else [batch.rng.randrange(net.levels) for _ in net.branches]
    return net(batch.img, points)


@torch.no_grad()
def begin_phase(net, phase: int, ka, teachers_on, sample) -> str:
    """After the block phase: choose each task's branch point, the one of least loss on unlabelled images."""
    if phase == 0:
        return ''
    sums = torch.zeros(net.levels, len(net.branches))
    net.eval()
    for img, *_ in sample():
        all_t = teachers_on(img)
        for k in range(net.levels):
            _, terms = ka(net(img, [k] * len(net.branches)), all_t, return_terms=True)
            sums[k] += torch.stack(list(terms.values())).cpu() * len(img)
    net.choose(sums.argmin(dim=0).tolist())
    return f'branch points {net.points.tolist()}'
