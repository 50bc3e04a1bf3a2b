"""LIBS, lip by speech: a speech recogniser teaches a lip reader by whole sequences, characters and frames.

Y. Zhao, R. Xu, X. Wang, P. Hou, H. Tang, M. Song, "Hearing Lips: Improving Lip Reading by Distilling Speech
Recognizers", AAAI 2020, arXiv:1911.11502.

    SEQ = mean over n of ||seq_t - t_seq(seq_s)||^2
    CTX = 1 / M * sum over the M matched pairs (j, i) of ||ctx_t[i] - t_ctx(ctx_s[j])||^2
    q_j = t_frm(frm_s[j]),  b_ji = softmax over i of q_j.frm_t[i]
    FRM = mean over n of mean over j of ||q_j - sum over i of b_ji frm_t[i]||^2, b without gradient
    loss = w_seq * SEQ + w_ctx * CTX + w_frame * FRM

t_seq, t_ctx, t_frm are linear maps, trained with the student. Pairs are the longest common subsequence of the
teacher's greedy characters and the truth: what the recogniser gets wrong does not teach.

Tap: last state of both encoders, attention context of every decoding step, outputs of both encoders, masks.

Differences: no code of the authors was found. A reconstruction, from memory, unverified, beyond the abstract,
which confirms the three levels, the alignment and the filter. That b has no gradient is our choice.

Source: formula only, a reconstruction.

Use:
    >>> import torch
    >>> from libs import LIBS
    >>> sizes = (4, 3), (4, 5, 3), (4, 7, 3)  # last state, five characters, seven frames
    >>> seq_s, ctx_s, frm_s = (torch.randn(*size, requires_grad=True) for size in sizes)
    >>> seq_t, ctx_t, frm_t = torch.randn(4, 6), torch.randn(4, 5, 6), torch.randn(4, 20, 6)
    >>> pairs = [[(0, 0), (1, 2)], [(3, 3)], [], [(4, 4)]]
    >>> LIBS(3, 6)(seq_s, seq_t, ctx_s, ctx_t, frm_s, frm_t, pairs).backward()
    >>> seq_s.grad.norm() * frm_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class LIBS(nn.Module):
    """Squared distances at three levels of two encoder-decoders with inputs of unlike length.

    Args:
        s_dim, t_dim: widths of the student's and the teacher's states.
        w_seq, w_ctx, w_frame: weights of sequence, characters and frames; 10, 40, 10.

    Shape:
        seq_s: (N, s_dim), seq_t: (N, t_dim); ctx_s: (N, L_s, s_dim), ctx_t: (N, L_t, t_dim); frm_s:
        (N, J, s_dim), frm_t: (N, I, t_dim); pairs: per sample a list of (step_s, step_t), or (M, 3) integers
        (sample, step_s, step_t); mask_s: (N, J), mask_t: (N, I), True on valid frames, None: all. Returns a
        scalar, `terms` the three. No gradient reaches the teacher. Without pairs CTX is 0.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: shapes are wrong; a pair names a sample or a step that is not there.
    """

    def __init__(
        self, s_dim: int, t_dim: int, w_seq: float = 10.0, w_ctx: float = 40.0, w_frame: float = 10.0
    ) -> None:
        super().__init__()
        self.s_dim, self.t_dim = s_dim, t_dim
        self.w_seq, self.w_ctx, self.w_frame = w_seq, w_ctx, w_frame
        self.t_seq, self.t_ctx, self.t_frm = (nn.Linear(s_dim, t_dim) for _ in range(3))

    def forward(
        self, seq_s, seq_t, ctx_s, ctx_t, frm_s, frm_t, pairs, mask_s: Tensor | None = None, mask_t=None
    ) -> Tensor:
        sequence, context, frame = self.terms(seq_s, seq_t, ctx_s, ctx_t, frm_s, frm_t, pairs, mask_s, mask_t)
        return self.w_seq * sequence + self.w_ctx * context + self.w_frame * frame

    def terms(
        self, seq_s, seq_t, ctx_s, ctx_t, frm_s, frm_t, pairs, mask_s=None, mask_t=None
    ) -> tuple[Tensor, Tensor, Tensor]:
        _expect('LIBS', 'seq_s', seq_s, 'N', self.s_dim)
        n = len(seq_s)
        _expect('LIBS', 'seq_t', seq_t, n, self.t_dim)
        for name, x, dim in (
            ('ctx_s', ctx_s, self.s_dim),
            ('ctx_t', ctx_t, self.t_dim),
            ('frm_s', frm_s, self.s_dim),
            ('frm_t', frm_t, self.t_dim),
        ):
            _expect('LIBS', name, x, n, 'L', dim)
        for name, mask, frm in (('mask_s', mask_s, frm_s), ('mask_t', mask_t, frm_t)):
            if mask is not None:
                _expect('LIBS', name, mask, *frm.shape[:2])
        if not isinstance(pairs, Tensor):
            rows = [(k, *pair) for k, found in enumerate(pairs) for pair in found]
            pairs = torch.tensor(rows, dtype=torch.int64, device=seq_s.device).reshape(-1, 3)
        if pairs.dim() != 2 or pairs.shape[1] != 3:
            raise ValueError(
                f'LIBS: pairs must be (M, 3), got {tuple(pairs.shape)}: sample, step of the student, step of '
                'the teacher'
            )
        pairs = _kept(pairs.long())
        _named('LIBS', pairs, n, ctx_s.shape[1], ctx_t.shape[1])
        with _no_autocast(seq_s):
            seq_t, ctx_t, frm_t = (_full(x.detach(), seq_s) for x in (seq_t, ctx_t, frm_t))
            sequence = (seq_t - _run(self.t_seq, _full(seq_s))).square().sum(dim=1).mean()
            k, i_s, i_t = pairs.unbind(dim=1)
            gap = ctx_t[k, i_t] - _run(self.t_ctx, _full(ctx_s, seq_s))[k, i_s]
            context = gap.square().sum() / max(len(pairs), 1)
            frame = self._frame(_run(self.t_frm, _full(frm_s, seq_s)), frm_t, mask_s, mask_t)
        return sequence, context, frame

    def _frame(self, q: Tensor, frm_t: Tensor, mask_s: Tensor | None, mask_t: Tensor | None) -> Tensor:
        """q: (N, J, t_dim)."""
        score = _exact(q.detach()) @ _exact(frm_t).mT
        if mask_t is not None:
            mask_t = _kept(mask_t.bool())
            score = torch.where(mask_t[:, None, :], score, -torch.inf)
            frm_t = torch.where(mask_t[:, :, None], frm_t, 0.0)
            # a text without a valid frame of the teacher has nothing to align to
            score = torch.where(mask_t.any(dim=1)[:, None, None], score, 0.0)
        aligned = (score.softmax(dim=2) @ _exact(frm_t)).to(q.dtype)
        distance = (q - aligned).square().sum(dim=2)
        if mask_t is not None:
            distance = torch.where(mask_t.any(dim=1)[:, None], distance, 0.0)
        if mask_s is None:
            return distance.mean()
        mask_s = _kept(mask_s.bool())
        return (torch.where(mask_s, distance, 0.0).sum(dim=1) / mask_s.sum(dim=1).clamp(min=1)).mean()


def _named(who: str, pairs: Tensor, *sizes: int) -> None:
    """Refuse numbers of samples and steps that are not there; a GPU's kernels do it by themselves."""
    if pairs.device.type != 'cpu' or getattr(torch.compiler, 'is_compiling', bool)():
        return
    for pair in pairs.tolist():
        if not all(0 <= i < size for i, size in zip(pair, sizes)):
            raise ValueError(
                f'{who}: pairs must name (sample, step_s, step_t) below {sizes}, got {tuple(pair)}: count '
                'from 0'
            )


def _kept(x: Tensor) -> Tensor:
    """Integers and masks of torch.inference_mode are copied, to serve backward."""
    compiling = getattr(torch.compiler, 'is_compiling', bool)()
    return x.clone() if not compiling and x.is_inference() else x


def lcs_pairs(pred, target) -> list[tuple[int, int]]:
    """Longest common subsequence: [(position in target, position in pred)], in order."""
    best = [[0] * (len(pred) + 1) for _ in range(len(target) + 1)]
    for j in range(len(target) - 1, -1, -1):
        for i in range(len(pred) - 1, -1, -1):
            same = pred[i] == target[j]
            best[j][i] = best[j + 1][i + 1] + 1 if same else max(best[j + 1][i], best[j][i + 1])
    found, j, i = [], 0, 0
    while j < len(target) and i < len(pred):
        if pred[i] == target[j]:
            found.append((j, i))
            j, i = j + 1, i + 1
        elif best[j + 1][i] >= best[j][i + 1]:
            j += 1
        else:
            i += 1
    return found


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


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


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
