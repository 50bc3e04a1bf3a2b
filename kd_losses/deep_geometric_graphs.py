"""GraphKD, deep geometric distillation: match the graph that a batch forms at each layer.

C. Lassance, M. Bontonou, G. B. Hacene, V. Gripon, J. Tang, A. Ortega, "Deep Geometric Knowledge Distillation
with Graphs", ICASSP 2020, arXiv:1911.03080 (authors and venue from memory, unverified).

    S = cosines between the flattened maps of all pairs of samples, 0 on the diagonal
    d_i = sum over j of S_ij
    A = S_ij / sqrt(d_i * d_j), of student and teacher, (N, N)
    level = sum over i, j of ((A_t^p)_ij - (A_s^p)_ij)^2                       (matrix powers)
    loss = mean over levels of level
    edges 'intra' ('inter'): A only between samples of the same (of different) classes
    k: A only where it is one of the k largest of a row of the teacher's A, or its transpose

Tap: maps after the ReLU of all stages but the last, and the pooled embedding. Channels, sizes and widths may
differ. The authors' weight is 25, beside cross-entropy, without soft targets.

Differences: value and gradient are those of the authors' code. A degree that is not positive (a dead sample,
or signed features) gives NaN there; here its row is 0, without gradient. The authors compare k with the
literal 128 for "no mask"; here that is None. Samples of label -100 are in no graph. A batch of two says
nothing: its graph is the same for all features.

Source: cadurosar/graph_kd, utils.py (representations_to_adj, do_gkd) and studentGKD.py.

Use:
    >>> import torch
    >>> from deep_geometric_graphs import GraphKD
    >>> fms_s, fms_t = [torch.rand(8, 4, 6, 6, requires_grad=True)], [torch.rand(8, 9, 3, 3)]
    >>> GraphKD()(fms_s, fms_t).backward()
    >>> fms_s[0].grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class GraphKD(nn.Module):
    """Squared error between normalised adjacency matrices of a batch, averaged over the levels.

    Args:
        power: of the matrices, 1, 2 or more; 1.
        k: neighbours of each sample in the teacher's graph that count, > 0; None, or N and more: all.
        edges: 'all', 'intra' (within a class) or 'inter' (between classes).

    Shape:
        fms_s, fms_t: lists of tensors (N, ...); target: (N,) labels, needed for 'intra' and 'inter'. Returns
        a scalar, 0 for N = 1. No gradient reaches fms_t. Samples of label -100 are left out.
        Computed in float32, graphs in float64, or all in float64 as the student.

    Raises:
        ValueError: an argument is not legal; the lists differ in length, the tensors in batch size; a target
            is missing or wrong.
    """

    def __init__(self, power: int = 1, k: int | None = None, edges: str = 'all') -> None:
        super().__init__()
        if power < 1 or (k is not None and k < 1):
            raise ValueError(f'GraphKD: power and k must be 1 or more, got {power} and {k}')
        if edges not in ('all', 'intra', 'inter'):
            raise ValueError(f'GraphKD: edges must be all, intra or inter, got {edges!r}')
        self.power, self.k, self.edges = power, k, edges

    def forward(self, fms_s: list[Tensor], fms_t: list[Tensor], target: Tensor | None = None) -> Tensor:
        if not len(fms_s) or len(fms_s) != len(fms_t):
            raise ValueError(
                f'GraphKD: fms_s and fms_t must hold one tensor per level, got {len(fms_s)} and '
                f'{len(fms_t)}: pair the stages'
            )
        n = len(fms_s[0])
        for name, fms in (('fms_s', fms_s), ('fms_t', fms_t)):
            for i, fm in enumerate(fms):
                _expect('GraphKD', f'{name}[{i}]', fm, n or 'N', *'D' * (fm.dim() - 1 or 1))
        if target is None and self.edges != 'all':
            raise ValueError(f'GraphKD: target must be ({n},), got None: edges={self.edges!r} needs labels')
        valid = kept = None
        if target is not None:
            target, valid = _labels('GraphKD', target, n, 2**62)  # classes are only compared
            same = target[:, None] == target[None, :]
            kept = {'all': None, 'intra': same, 'inter': ~same}[self.edges]
        with _no_autocast(fms_s[0]):
            levels = [self._level(x, y, valid, kept, fms_s[0]) for x, y in zip(fms_s, fms_t)]
        return sum(levels) / len(levels)

    def _level(self, fm_s, fm_t, valid, kept, like) -> Tensor:
        s, t = (_graph(_full(x, like), valid) for x in (fm_s, fm_t.detach()))
        valid, kept = (x if x is None else x.to(s.device) for x in (valid, kept))
        if kept is not None:
            s, t = s * kept, t * kept
        if self.k is not None and self.k < len(s):
            mask = neighbours(t, self.k, valid)
            s, t = s * mask, t * mask
        far = (_power(t, self.power) - _power(s, self.power)).square().sum()
        return far.to(_full(like[:0]).dtype).to(like.device)


def adjacency(fm: Tensor, valid: Tensor | None = None) -> Tensor:
    """(N, ...) -> (N, N) cosines divided by the roots of both degrees; valid: (N,), who is in the graph."""
    return _graph(fm, valid).to(fm.dtype).to(fm.device)


def _graph(fm: Tensor, valid: Tensor | None) -> Tensor:
    """The adjacency in float64. Embeddings that are almost alike have cosines near 1, equal to float32.

    So a cosine is 1 - |v_i - v_j|^2 / 2 here, v the unit vectors less their mean: far smaller numbers.
    """
    x = fm.flatten(1)
    if valid is not None:
        x = torch.where(valid[:, None], x, 0.0)
    u = _unit(x)
    lives = (u != 0).any(dim=1)
    v = _exact(u - u.mean(dim=0))
    h = v.square().sum(dim=1) / 2
    far = _double(h[:, None] + h - v @ v.T)
    S = torch.where((lives[:, None] & lives).to(far.device), 1 - far, 0 * far.detach())  # NaN must show
    S = S.masked_fill(torch.eye(len(S), dtype=torch.bool, device=S.device), 0.0)
    degree = S.sum(dim=1)
    lonely = degree <= 1e-12  # NaN is not: it must show in the loss
    root = torch.where(lonely, 0.0, torch.where(lonely, 1.0, degree).rsqrt())
    return root[:, None] * S * root[None, :]


def neighbours(adj: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """(N, N) of 0 and 1: the k largest entries of each row, and their transpose."""
    if valid is not None:
        adj = adj.masked_fill(~valid[None, :], -torch.inf)
    mask = torch.zeros_like(adj).scatter_(1, adj.topk(min(k, len(adj)), dim=1).indices, 1.0)
    return torch.maximum(mask, mask.T)


def _power(A: Tensor, power: int) -> Tensor:
    made = A
    for _ in range(power - 1):
        made = made @ A
    return made


def _double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (Apple's)."""
    return (x.cpu() if x.device.type == 'mps' else x).double()


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


def _labels(who: str, target: Tensor, n: int, K: int, name: str = 'target') -> tuple[Tensor, Tensor | None]:
    """n labels of 0..K-1 as int64, and which rows count, None for all: not those of -100, which are 0 then.

    Other labels are refused, but on a GPU, where looking at them would wait, only by the kernels.
    """
    _expect(who, name, target, n)
    if target.is_floating_point():
        raise ValueError(f'{who}: {name} must be ({n},) of integers, got {target.dtype}: {name}.long()')
    target, compiling = target.long(), getattr(torch.compiler, 'is_compiling', bool)()
    if not compiling and target.is_inference():  # what a teacher says under inference_mode: for backward
        target = target.clone()
    if target.device.type == 'cpu' and not compiling:
        (lowest,), (highest,) = (y.tolist() for y in target.aminmax(dim=0, keepdim=True))
        if lowest >= 0 and highest < K:
            return target, None
        for y in target.tolist():
            if y != -100 and not 0 <= y < K:
                raise ValueError(f'{who}: {name} must be in 0..{K - 1}, or -100 to leave a row out, got {y}')
    valid = target != -100
    return torch.where(valid, target, 0), valid


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _exact(x: Tensor) -> Tensor:
    """For products that decide the loss: in float64 where float32 ones are rounded, TF32 for example."""
    return x.double() if x.dtype == torch.float32 and _rounded() and x.device.type != 'mps' else x


def _rounded() -> bool:
    """Whether torch.set_float32_matmul_precision or its newer forms ask for less than float32."""
    mode = getattr(torch.backends.cuda.matmul, 'fp32_precision', None)
    if mode is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() != 'highest'
    rounded = ('tf32', 'bf16')
    return mode in rounded or torch.backends.mkldnn.matmul.fp32_precision in rounded


_rounded._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its imports


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """The stages but the last, after the ReLU, then the embedding."""
    sides = (
        [pre.relu() for pre in f.pres[1:-1]] if sums else f.fms[1:-1] for f, sums in zip((s, t), kd.sums)
    )
    pairs = [*zip(*sides), (s.feat, t.feat)]
    return kd([x for x, _ in pairs], [y for _, y in pairs], batch.target)


def build(loss, probe, **options):
    kd = loss(**options)
    kd.sums = [_sums(f) for f in (probe.s, probe.t)]
    return kd


def _sums(f) -> bool:
    """Whether the last map is before a ReLU, as a wide network's: not after it, and not without one."""
    return bool((f.fms[-1] < 0).any()) and not torch.equal(f.fms[-1], f.pres[-1])
