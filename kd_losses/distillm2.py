"""DistiLLM-2: skew KL on what the teacher wrote, skew reverse KL on what the student wrote.

J. Ko, T. Chen, S. Kim, T. Ding, L. Liang, I. Zharkov, S.-Y. Yun, "DistiLLM-2: A Contrastive Approach Boosts
the Distillation of LLMs", ICML 2025, arXiv:2503.07067.

    p = softmax(teacher), q = softmax(student); means over a text's positions, then over texts
    loss_t = mean of KL(p, a_t * p + (1 - a_t) * q)                            on answers of the teacher
    loss_s = mean of KL(q, (1 - a_s) * p + a_s * q), q constant inside         on answers of the student
    loss = (2 - beta) * loss_t + beta * loss_s
    gap(a, b) = exp(mean of log softmax(a)[target]) - exp(the same of b), per text
    a_t = clip(1 - (1 - alpha) * anchor_t / (gap(teacher, student) + 1e-5), 0.01, alpha), likewise a_s with
        gap(student, teacher) on the student's answers; both are alpha while there are no anchors
    ramp: beta = 1 + 0.5 * min(1, 2 * progress)

Tap: the logits of both networks on two answers to the same prompts. An anchor is the mean gap of the first
steps: set anchor_t and anchor_s together then. Alone, without cross-entropy.

Differences: the authors' function. Neither curriculum runs in their code (both are switched off there):
without anchors and beta this is what they trained with. With anchors their code would let gradient pass
through a; it is a constant here. A text of no position is left out. Positions of target -100 reach neither
value nor gradient; a class of -inf counts nothing. Memory: a chunk of positions at a time is in float32, in
backward again.

Source: jongwooko/distillm-2, src/distillm_trainer.py (kd_loss, get_batch_logps).

Use:
    >>> import torch
    >>> from distillm2 import DistiLLM2
    >>> out_s, out_t = torch.randn(2, 5, 9, requires_grad=True), torch.randn(2, 5, 9)
    >>> y = torch.ones(2, 5).long()
    >>> DistiLLM2()(out_s, out_t, y, out_s.flip(1), out_t.flip(1), y).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2**19  # logits in float32 at a time; on a GPU eight times as many, for fewer launches


class DistiLLM2(nn.Module):
    """Skew divergences on answers of the teacher and on answers of the student.

    Args:
        alpha: share of the skew, between 0 and 1; 0.1.
        anchor_t, anchor_s: mean gaps of the first steps, for the curriculum; also attributes, to be set
            later.

    Shape:
        out_s, out_t: (N, L, K) logits on the teacher's answers, K >= 2; target: (N, L) labels, aligned
        with the logits; positions of -100 are left out. out_s_gen, out_t_gen, target_gen: the same on the
        student's answers, (N', M, K). beta: the second part's weight, 0 to 2.
        Returns a scalar. No gradient reaches out_t, out_t_gen. `terms` returns (loss_t, loss_s), `skews`
        (a_t, a_s), (N,) each. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: alpha out of its range; one anchor without the other; shapes that differ; K < 2; a
            label that is no class.
    """

    def __init__(
        self, alpha: float = 0.1, anchor_t: float | None = None, anchor_s: float | None = None
    ) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(f'DistiLLM2: alpha must be between 0 and 1, got {alpha}')
        self.alpha, self.anchor_t, self.anchor_s = alpha, anchor_t, anchor_s

    def get_extra_state(self) -> tuple[float | None, float | None]:
        return self.anchor_t, self.anchor_s

    def set_extra_state(self, state: tuple[float | None, float | None]) -> None:
        self.anchor_t, self.anchor_s = state

    def forward(
        self,
        out_s: Tensor,
        out_t: Tensor,
        target: Tensor,
        out_s_gen: Tensor,
        out_t_gen: Tensor,
        target_gen: Tensor,
        beta: float = 1.0,
    ) -> Tensor:
        loss_t, loss_s = self.terms(out_s, out_t, target, out_s_gen, out_t_gen, target_gen)
        return (2 - beta) * loss_t + beta * loss_s

    def terms(self, out_s, out_t, target, out_s_gen, out_t_gen, target_gen) -> tuple[Tensor, Tensor]:
        skews = self.skews(out_s, out_t, target, out_s_gen, out_t_gen, target_gen)
        both = (
            (out_s, out_t, target, '', _skew_kl),
            (out_s_gen, out_t_gen, target_gen, '_gen', _skew_reverse),
        )
        return tuple(
            _over_texts('DistiLLM2', s, t, y, of, kind, a) for (s, t, y, of, kind), a in zip(both, skews)
        )

    @torch.no_grad()
    def skews(self, out_s, out_t, target, out_s_gen, out_t_gen, target_gen) -> tuple[Tensor, Tensor]:
        if (self.anchor_t is None) != (self.anchor_s is None):
            raise ValueError(
                'DistiLLM2: anchor_t and anchor_s must both be set, got one of them: or leave both None'
            )
        _texts('DistiLLM2', out_s, out_t, target, '')
        _texts('DistiLLM2', out_s_gen, out_t_gen, target_gen, '_gen')
        found, low = [], min(0.01, self.alpha)
        for anchor, out, texts in (
            (self.anchor_t, out_s, (out_t, out_s, target)),
            (self.anchor_s, out_s_gen, (out_s_gen, out_t_gen, target_gen)),
        ):
            if anchor:
                skew = 1 - (1 - self.alpha) * anchor / (_full(gap(*texts), out) + 1e-5)
                found.append(skew.clamp(low, self.alpha))
            else:  # no anchor, and an anchor of 0 at any gap
                found.append(
                    torch.full((len(out),), self.alpha, dtype=_full(out[:0]).dtype, device=out.device)
                )
        return tuple(found)


@torch.no_grad()
def gap(out_a: Tensor, out_b: Tensor, target: Tensor) -> Tensor:
    """(N,): how much likelier a finds the text than b, a difference of geometric means; 0 for no position."""
    rows, rows_b, counts = _texts('gap', out_a, out_b, target, '')
    index, _ = _labels('gap', target.flatten(), *rows.shape)
    counts = counts.reshape(target.shape)
    wide = next((rows[:0] for rows in (rows, rows_b) if rows.dtype == torch.float64), None)

    def log_probability(out, index, counts):
        return F.log_softmax(_filled(_full(out, wide), counts), dim=1).gather(1, index[:, None]).squeeze(1)

    means = []
    for out in (rows, rows_b):
        each = _by_position(log_probability, out, index, counts.flatten()).reshape(target.shape)
        means.append(torch.where(counts, each, 0.0).sum(dim=1) / counts.sum(dim=1).clamp(min=1))
    return means[0].exp() - means[1].exp()


def ramp(progress: float) -> float:
    """The second part's weight: from 1 to 1.5 in the first half of a training."""
    return 1 + 0.5 * min(1.0, 2 * progress)


def _texts(who: str, out_s: Tensor, out_t: Tensor, target: Tensor, of: str) -> tuple[Tensor, Tensor, Tensor]:
    _tensors(who, **{f'out_s{of}': out_s})
    if out_s.dim() != 3:
        raise ValueError(
            f'{who}: out_s{of} must be (N, L, K), got {tuple(out_s.shape)}: unsqueeze or flatten axes'
        )
    return _tokens(who, out_s, out_t, target, of)


def _over_texts(who: str, out_s, out_t, target, of: str, divergence, a: Tensor) -> Tensor:
    """Mean over the positions of each text, then over texts that have one."""
    rows, rows_t, counts = _texts(who, out_s, out_t, target, of)
    _labels(who, target.flatten(), *rows.shape, f'target{of}')
    skew = a[:, None].expand(target.shape).reshape(-1)
    each = _by_position(divergence, rows, rows_t, counts, skew)
    each, counts = torch.where(counts, each, 0.0).reshape(target.shape), counts.reshape(target.shape)
    texts = each.sum(dim=1) / counts.sum(dim=1).clamp(min=1)
    return texts.sum() / counts.any(dim=1).sum().clamp(min=1)


def _skew_kl(out_s: Tensor, out_t: Tensor, counts: Tensor, a: Tensor) -> Tensor:
    log_q, log_p = _log_pair(out_s, out_t, counts)
    a = a[:, None]
    return (log_p.exp() * (log_p - torch.logaddexp(log_p + a.log(), log_q + (-a).log1p()))).sum(dim=1)


def _skew_reverse(out_s: Tensor, out_t: Tensor, counts: Tensor, a: Tensor) -> Tensor:
    log_q, log_p = _log_pair(out_s, out_t, counts)
    a = a[:, None]
    log_m = torch.logaddexp(log_p + (-a).log1p(), log_q.detach() + a.log())
    return (log_q.exp() * (log_q - log_m)).sum(dim=1)


def _tensors(who: str, **given: Tensor) -> None:
    """Refuse what is none, as the object is that a network of transformers returns."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(
                f'{who}: {name} must be a tensor, got {type(x).__name__}: of what a network returns give '
                'out.logits as logits, out.hidden_states[-1] as hidden states'
            )


def _no_mask(who: str, name: str, target: Tensor) -> None:
    if target.dtype == torch.bool:  # its padding would count as id 0
        raise ValueError(
            f'{who}: {name} must be integers, got torch.bool: a mask is no target, give '
            'input_ids.masked_fill(mask == 0, -100)'
        )


def _tokens(
    who: str, out_s: Tensor, out_t: Tensor, target: Tensor | None = None, of: str = ''
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both logits as (positions, K), the teacher's detached, and which positions count; None: all."""
    _tensors(who, **{f'out_s{of}': out_s, f'out_t{of}': out_t})
    rows = out_s.flatten(0, 1) if out_s.dim() == 3 else out_s
    _expect(who, f'out_s{of}', rows, 'N', 'K')
    shape = tuple(out_s.shape)
    if out_t.shape != out_s.shape:
        raise ValueError(
            f'{who}: out_t{of} must be {shape}, got {tuple(out_t.shape)}: the same tokens and classes; a '
            'padded vocabulary is cut, out[..., :K], other tokenizers need ULD or DSKDCMA'
        )
    if target is not None and (target.shape != shape[:-1] or target.is_floating_point()):
        raise ValueError(
            f'{who}: target{of} must be {shape[:-1]} of integers, got {tuple(target.shape)} of '
            f'{target.dtype}: one per position, aligned: logits at i predict target[i]'
        )
    if target is None:
        return rows, out_t.detach().reshape(rows.shape), None
    _no_mask(who, f'target{of}', target)
    flat = target.reshape(-1).long()  # -100 is 156 in eight bits
    counts = flat != -100
    if flat.device.type == 'cpu' and not getattr(torch.compiler, 'is_compiling', bool)():
        wrong = torch.where(counts, flat, 0).amin().view(1).tolist()[0]
        if wrong < 0:
            raise ValueError(
                f'{who}: target{of} must be ids from 0 up, or -100 to leave a position out, got {wrong}: set '
                'the mark of your padding to -100'
            )
    return rows, out_t.detach().reshape(rows.shape), counts


def _filled(x: Tensor, counts: Tensor | None) -> Tensor:
    """Positions that do not count become 0 before anything is computed: not even a NaN gets through."""
    return x if counts is None else torch.where(counts[:, None], x, 0.0)


def _log_pair(out_s: Tensor, out_t: Tensor, counts: Tensor | None, T: float = 1.0) -> tuple[Tensor, Tensor]:
    """log q and log p; both 0 at a class that either network forbids with -inf, which so counts nothing."""
    s, t = (_filled(_full(x, out_s), counts) for x in (out_s, out_t))
    log_q, log_p = (F.log_softmax(x if T == 1 else x / T, dim=1) for x in (s, t))
    gone = (log_q == -torch.inf) | (log_p == -torch.inf)
    return log_q.masked_fill(gone, 0.0), log_p.masked_fill(gone, 0.0)


def _by_position(rows, *inputs: Tensor | None) -> Tensor:
    """rows(*inputs), a value or more per position, with some CHUNK logits in float32 at a time."""
    n, k = inputs[0].shape
    size = max(CHUNK * (1 if inputs[0].device.type == 'cpu' else 8) // k, 1)
    return rows(*inputs) if n <= size else _InChunks.apply(rows, size, *inputs)


def _part(inputs: list, i: int, size: int) -> list:
    return [x if x is None else x[i : i + size] for x in inputs]


class _InChunks(torch.autograd.Function):
    """rows(*inputs) over chunks of positions. Backward computes each chunk again, with its gradient: nothing
    as large as the logits is kept but the gradient itself, in the precision of the logits."""

    @staticmethod
    def forward(ctx, rows, size, *inputs):
        ctx.rows, ctx.size, learns = rows, size, ctx.needs_input_grad[2:]
        ctx.save_for_backward(*(x for x, learn in zip(inputs, learns) if learn))
        # a teacher's tensor may be of torch.inference_mode, which cannot be saved
        ctx.rest = [None if learn else x for x, learn in zip(inputs, learns)]
        values = None
        for i in range(0, len(inputs[0]), size):  # small values kept between large ones scatter memory
            part = rows(*_part(inputs, i, size))
            values = part.new_empty(len(inputs[0]), *part.shape[1:]) if values is None else values
            values[i : i + size] = part
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        saved, learns = iter(ctx.saved_tensors), ctx.needs_input_grad[2:]
        inputs = [next(saved) if learn else x for x, learn in zip(ctx.rest, learns)]
        grads = [torch.empty_like(x) if learn else None for x, learn in zip(inputs, learns)]
        for i in range(0, len(inputs[0]), ctx.size):
            part = _part(inputs, i, ctx.size)
            with torch.enable_grad():
                part = [x.detach().requires_grad_() if learn else x for x, learn in zip(part, learns)]
                values = ctx.rows(*part)
            leaves = [x for x, learn in zip(part, learns) if learn]
            made = iter(
                torch.autograd.grad(values, leaves, grad_out[i : i + ctx.size], materialize_grads=True)
            )
            for grad in grads:
                if grad is not None:
                    grad[i : i + ctx.size] = next(made)
        return None, None, *grads


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """Both wrote their answers before the training, the student with the weights it starts from."""
    w, g = batch.written(), batch.written_by_start()
    outs = batch.student(w.x).out, w.t.out, w.target, batch.student(g.x).out, g.t.out, g.target
    return kd(*outs)
