"""GKD, generalised knowledge distillation: a Jensen-Shannon divergence between forward and reverse KL.

R. Agarwal, N. Vieillard, Y. Zhou, P. Stanczyk, S. Ramos, M. Geist, O. Bachem, "On-Policy Distillation of
Language Models: Learning from Self-Generated Mistakes", ICLR 2024, arXiv:2306.13649.

    p = softmax(out_t / temperature), q = softmax(out_s / temperature), m = beta * p + (1 - beta) * q
    loss = mean over positions of [beta * KL(p, m) + (1 - beta) * KL(q, m)]      for 0 < beta < 1
    beta = 0: KL(p, q), forward;  beta = 1: KL(q, p), reverse

Tap: the logits of both networks on the same tokens: of the data, or of samples of the student (on-policy:
with probability lmbda a step replaces the batch by prompts that the student has continued, without
gradient). Alone, without cross-entropy.

Differences: this is the reference's loss with beta's two ends. They are jumps: towards 0 the mixture goes
to 0 like beta * KL(p, q), so beta = 0.01 nearly switches learning off, and beta = 0 is the full KL;
likewise at 1. Dividing by beta * (1 - beta) would make one continuous family; nobody does. 'none' is summed
over the classes; without target the mean is over all positions of (N, L, K). Positions of target -100 reach
neither value nor gradient, whatever stands in their logits; a class of -inf in either network counts
nothing. Memory: a chunk of positions at a time is in float32, in backward again.

Source: huggingface/trl, trl/experimental/gkd/gkd_trainer.py (generalized_jsd_loss); the authors' code is
not public.

Use:
    >>> import torch
    >>> from gkd import GKD
    >>> out_s, out_t = torch.randn(2, 5, 9, requires_grad=True), torch.randn(2, 5, 9)
    >>> target = torch.tensor([[-100, -100, 1, 1, 1], [-100, 1, 1, 1, -100]])
    >>> GKD()(out_s, out_t, target).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2**19  # logits in float32 at a time; on a GPU eight times as many, for fewer launches


class GKD(nn.Module):
    """Generalised Jensen-Shannon divergence of two networks' next tokens.

    Args:
        beta: the teacher's share of the mixture, 0 to 1; 0.5. 0 is forward KL, 1 reverse KL.
        temperature: of both softmaxes, > 0; 1. The loss is not multiplied by its square.
        reduction: 'batchmean', over the positions that count; 'sum'; 'mean', also over the classes;
            'none', one value per position, 0 where target is -100.

    Shape:
        out_s, out_t: (N, L, K) or (N, K) logits of the same tokens and classes, K >= 2.
        target: (N, L) or (N,) integers, aligned with the logits (those at i predict target[i]); positions of
        -100 are left out, ids of 0 and up count, also unknown ones; None: every position counts.
        Returns a scalar. No gradient reaches out_t. Computed in float32, or in float64 as the student.
        num_items: divides the sum instead, the positions of all micro-batches and processes, for exact
        accumulation; 0 gives 0.

    Raises:
        ValueError: an argument out of its range; shapes that differ; K < 2; an id below 0;
            num_items with 'none'.
    """

    def __init__(self, beta: float = 0.5, temperature: float = 1.0, reduction: str = 'batchmean') -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f'GKD: beta must be from 0 to 1, got {beta}')
        if not temperature > 0:
            raise ValueError(f'GKD: temperature must be > 0, got {temperature}')
        if reduction not in ('batchmean', 'sum', 'mean', 'none'):
            raise ValueError(
                f"GKD: reduction must be 'batchmean', 'sum', 'mean' or 'none', got {reduction!r}"
            )
        self.beta, self.temperature, self.reduction = beta, temperature, reduction

    def forward(
        self,
        out_s: Tensor,
        out_t: Tensor,
        target: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> Tensor:
        if num_items is not None and self.reduction == 'none':
            raise ValueError(
                "GKD: num_items must be None with reduction='none', got a number: divide yourself"
            )
        rows, rows_t, counts = _tokens('GKD', out_s, out_t, target)
        jsd = _by_position(self._divergence, rows, rows_t, counts)
        if counts is not None:
            jsd = torch.where(counts, jsd, 0.0)
        if self.reduction == 'none':
            return jsd.reshape(out_s.shape[:-1])
        if num_items is not None:
            n = num_items.to(jsd) if isinstance(num_items, Tensor) else jsd.new_full((), num_items)
            n = n.reshape(())
            return torch.where(n == 0, 0.0, jsd.sum() / torch.where(n == 0, 1.0, n))
        if self.reduction == 'sum':
            return jsd.sum()
        mean = _mean(jsd, counts)
        return mean / rows.shape[1] if self.reduction == 'mean' else mean

    def _divergence(self, out_s: Tensor, out_t: Tensor, counts: Tensor | None) -> Tensor:
        log_q, log_p = _log_pair(out_s, out_t, counts, self.temperature)
        if self.beta == 0:
            return (log_p.exp() * (log_p - log_q)).sum(dim=1)
        if self.beta == 1:
            return (log_q.exp() * (log_q - log_p)).sum(dim=1)
        # in the logarithm: where both probabilities are 0 in float32 their mixture would have none
        log_m = torch.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))
        to_teacher, to_student = log_p.exp() * (log_p - log_m), log_q.exp() * (log_q - log_m)
        return (self.beta * to_teacher + (1 - self.beta) * to_student).sum(dim=1)


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


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
