"""EEL, evolutionary embedding learning: an angular constraint between student and teacher embeddings.

X. Wu, R. He, Y. Hu, Z. Sun, "Learning an Evolutionary Embedding via Massive Knowledge Distillation", IJCV
2020.

RECONSTRUCTION. Only the abstract could be read; this is its "correlated embedding loss with an angular
constraint", rebuilt from the published Angular Loss. It is verified against two implementations of this
formula, not against the authors' code.

    s, t = embeddings of length 1
    a = tan(angle)^2
    K(i) = the samples of other classes than i
    e[i, k] = 4 * a * (s_i + t_i).t_k - 2 * (1 + a) * s_i.t_i
    loss = mean over i of log(1 + sum over k in K(i) of exp(e[i, k]))

Tap: the pooled embeddings, and the labels. The paper repeats training with each student as the next teacher.

Differences: nothing to compare with.

Source: formula only, see above; no code of the authors was found.

Use:
    >>> import torch
    >>> from eel import EEL
    >>> feat_s, feat_t = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
    >>> EEL(64, 128)(feat_s, feat_t, torch.arange(8) % 3).backward()
    >>> feat_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
from torch import Tensor, nn


class EEL(nn.Module):
    """Smooth angular loss with teacher embeddings as positives and negatives.

    Args:
        s_dim, t_dim: widths of the two embeddings; where they differ, a bias-free linear map brings the
            student's to t_dim. Omitted: equal widths.
        angle: in degrees, between 0 and 90; 45.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim), target: (N,) labels. Returns a scalar; a sample without a
        negative contributes 0. No gradient reaches feat_t.
        Rows of label -100 are left out. Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: angle is out of range; a feature or target of a wrong shape.
    """

    def __init__(self, s_dim: int | None = None, t_dim: int | None = None, angle: float = 45.0) -> None:
        super().__init__()
        if not 0 < angle < 90:
            raise ValueError(f'EEL: angle must be between 0 and 90 degrees, got {angle}')
        self.a = math.tan(math.radians(angle)) ** 2
        if (s_dim is None) != (t_dim is None):
            raise ValueError(
                f'EEL: s_dim and t_dim must be given together or left out, got {s_dim} and {t_dim}'
            )
        self.map, self.s_dim = None, s_dim
        if s_dim != t_dim:
            self.map = nn.Linear(s_dim, t_dim, bias=False)

    def forward(self, feat_s: Tensor, feat_t: Tensor, target: Tensor) -> Tensor:
        _expect('EEL', 'feat_s', feat_s, 'N', self.s_dim or 'D')
        t_dim = feat_s.shape[1] if self.map is None else self.map.out_features
        _expect('EEL', 'feat_t', feat_t, len(feat_s), t_dim)
        target, valid = _labels('EEL', target, len(feat_s), 2**31)  # any number of classes
        with _no_autocast(feat_s):
            s = _full(feat_s)
            s, t = _unit(s if self.map is None else _run(self.map, s)), _unit(_full(feat_t.detach(), feat_s))
            alike = (_exact(4 * self.a * (s + t)) @ _exact(t).T).to(s.dtype)
            e = alike - 2 * (1 + self.a) * (s * t).sum(dim=1, keepdim=True)
            same = target[:, None] == target
            e = e.masked_fill(same if valid is None else same | ~valid, -torch.inf)
            return _mean(torch.cat([torch.zeros_like(e[:, :1]), e], dim=1).logsumexp(dim=1), valid)


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


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


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


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.feat, t.feat, batch.target)
