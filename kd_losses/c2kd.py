"""C2KD, context correlation distillation: attention matrices of a speech recogniser teach a lip reader.

Y. Zhao, Z. Feng, X. Wang, M. Song, "Context Correlation Distillation for Lip Reading", Journal of
Computer-Aided Design and Computer Graphics 34 (2022), 1559.

    DSA = mean over all entries of (dec_s - dec_t)^2                     (attention of the decoder to itself)
    A = softmax of cross_s' over the target axis, B = softmax of cross_t over the target axis, X = A B
    S = softmax of X over the student's frames, R = softmax of X over the teacher's frames
    E = softmax of enc_t over its first axis
    ESA = exp(-gamma * err) * sum over b, h, i, j of (enc_s S - R E)^2   (attention of the encoder to itself)
    loss = max(1 - alpha - beta, 0) * CE + alpha * (DSA of two layers) + ESA of two layers
    beta = exp(-gamma * err), alpha = 0.3;  what lies beyond a sample's lengths is 0 after every softmax

Networks of unlike input lengths, with the same heads and the same target sequence.

Tap: attention probabilities (B, H, L, L'), lengths, the student's character error rate on the batch.

Differences: the released code compares attention of different samples and heads, since its two networks lay
them out differently; here the order is explicit. It applies softmax to probabilities, kept. Its weight of
cross-entropy may be negative; here it ends at 0. The authors say that their training is not published.

Source: zju-vipa/KamalEngine, examples/distillation/c2kd/utils/losses.py and kamal/distillation/c2kd.

Use:
    >>> import torch
    >>> from c2kd import DSA
    >>> dec_s, dec_t = (torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(2, 4, 5, 5))
    >>> DSA()(dec_s.softmax(dim=3), dec_t.softmax(dim=3)).backward()
    >>> dec_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DSA(nn.Module):
    """Mean squared difference of the decoders' attention to themselves.

    Shape:
        dec_s, dec_t: (B, H, L, L), equal. Returns a scalar. No gradient reaches dec_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: shapes are wrong.
    """

    def forward(self, dec_s: Tensor, dec_t: Tensor) -> Tensor:
        _expect('DSA', 'dec_s', dec_s, 'B', 'H', 'L', 'L')
        _expect('DSA', 'dec_t', dec_t, *dec_s.shape)
        return F.mse_loss(_full(dec_s), _full(dec_t.detach(), dec_s))


class ESA(nn.Module):
    """Squared difference of the encoders' attention, aligned through the decoders' attention to them.

    Args:
        gamma: how fast the weight falls with the error rate; 1.

    Shape:
        enc_s: (B, H, Ls, Ls), enc_t: (B, H, Lt, Lt), cross_s: (B, H, Ly, Ls), cross_t: (B, H, Ly, Lt),
        scores or probabilities;
        len_s, len_t, len_y: (B,) lengths of samples; err: error rate of the student, 0 to 1. Returns a
        scalar, summed over samples and heads. No gradient reaches the teacher.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: shapes are wrong; a length is negative or larger than its map.
    """

    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(
        self,
        enc_s: Tensor,
        cross_s: Tensor,
        enc_t: Tensor,
        cross_t: Tensor,
        len_s: Tensor,
        len_t: Tensor,
        len_y: Tensor,
        err: float = 0.0,
    ) -> Tensor:
        _expect('ESA', 'enc_s', enc_s, 'B', 'H', 'Ls', 'Ls')
        B, H, Ls, _ = enc_s.shape
        _expect('ESA', 'enc_s', enc_s, B, H, Ls, Ls)
        _expect('ESA', 'enc_t', enc_t, B, H, 'Lt', 'Lt')
        Lt = enc_t.shape[2]
        _expect('ESA', 'enc_t', enc_t, B, H, Lt, Lt)
        _expect('ESA', 'cross_s', cross_s, B, H, 'Ly', Ls)
        Ly = cross_s.shape[2]
        _expect('ESA', 'cross_t', cross_t, B, H, Ly, Lt)
        for name, length in (('len_s', len_s), ('len_t', len_t), ('len_y', len_y)):
            _expect('ESA', name, length, B)
        in_s, in_t, in_y = (_within(x, n) for x, n in ((len_s, Ls), (len_t, Lt), (len_y, Ly)))
        q, c = _full(enc_s), _full(cross_s, enc_s)
        q_t, c_t = _full(enc_t.detach(), enc_s), _full(cross_t.detach(), enc_s)
        with _no_autocast(enc_s):
            A = _exact(_masked(c.mT.softmax(dim=3), in_s, in_y))
            Bm = _exact(_masked(c_t.softmax(dim=2), in_y, in_t))
            X = (A @ Bm).to(q.dtype)
            S, R = _masked(X.softmax(dim=2), in_s, in_t), _masked(X.softmax(dim=3), in_s, in_t)
            E = _masked(q_t.softmax(dim=2), in_t, in_t)
            gap = _exact(q) @ _exact(S) - _exact(R) @ _exact(E)
        return (math.exp(-self.gamma * err) * gap.square().sum()).to(q.dtype)


def smoothed_ce(logits: Tensor, gold: Tensor, smoothing: float = 0.1, ignore: int = -1) -> Tensor:
    """Cross-entropy with 1 - smoothing at the label and smoothing / K at every other class.

    logits: (B, L, K); gold: (B, L) labels, `ignore` and -100 are padding. The mean is over the other tokens;
    0 if there is none.
    """
    _expect('smoothed_ce', 'logits', logits, 'B', 'L', 'K')
    B, L, K = logits.shape
    _expect('smoothed_ce', 'gold', gold, B, L)
    gold = gold if gold.is_floating_point() else gold.long()  # eight bits have no -100
    flat = torch.where(gold == ignore, -100, gold).flatten()
    target, valid = _labels('smoothed_ce', flat, B * L, K, 'gold')
    log_p = F.log_softmax(_full(logits), dim=2).flatten(0, 1)
    right = log_p.gather(1, target[:, None])[:, 0]
    loss = -(1 - smoothing) * right - smoothing / K * (log_p.sum(dim=1) - right)
    return _mean(loss, valid)


def _within(length: Tensor, n: int) -> Tensor:
    """(B, n), True before the sample's end."""
    if length.device.type == 'cpu' and not getattr(torch.compiler, 'is_compiling', bool)():
        for value in length.tolist():
            if not 0 <= value <= n:
                raise ValueError(
                    f'ESA: len_s, len_t and len_y must be of 0..{n}, the size of the map, got {value}: count '
                    'the frames or symbols of each sample'
                )
    return torch.arange(n, device=length.device)[None, :] < length[:, None]


def _masked(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, H, n, m) with what lies beyond the lengths 0."""
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], x, 0.0)


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
