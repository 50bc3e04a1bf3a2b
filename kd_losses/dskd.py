"""DSKD, dual-space knowledge distillation: each network's hidden states are read by the other's head.

S. Zhang, X. Zhang, Z. Sun, Y. Chen, J. Xu, "Dual-Space Knowledge Distillation for Large Language Models",
EMNLP 2024, arXiv:2406.17328.

    KL_T(a -> b) = sum over k of P (log P - log softmax(b / T)), P = softmax(a / T)
    z_ts = t2s(hid_t) head_s^T,   z_st = s2t(hid_s) head_t^T              (t2s, s2t: linear maps, trained)
    ce = cross-entropy of z_ts with target                                (trains t2s)
    student_space = mean over positions of KL_T(z_ts, a constant -> out_s)
    teacher_space = mean over positions of KL_T(out_t -> z_st)            (trains s2t and the student)
    loss = ce + student_space + teacher_space

DSKDCMA, for different tokens: Q = query([emb_s(input), emb_s(target)]), keys [emb_t(input), emb_t(target)]
/ std, A = Q keys^T / sqrt(2 D_t); z_ts = softmax(A) t2s(hid_t / std + emb_t(target) / std) head_s^T, and
z_st = softmax(A^T) s2t(hid_s) head_t^T at the teacher's positions; student_space only where argmax z_ts =
target, at temperature T * T_t; all sums are divided by the number of the student's positions.

Tap: logits, the last hidden states, which the head reads, and the head's weights; DSKDCMA also the input
ids and embedding tables. Authors: half of it beside half of cross-entropy; learning rate 1e-3 for the
linear maps.

Differences: the authors' code, divided by the batch's own positions. They hide non-finite logits. DSKDCMA
attends to later positions as well and knows the token to predict, so its ce is no measure of prediction.
Positions of target -100 reach neither value nor gradient (but the hidden states of DSKDCMA: a standard
deviation is of them all). Memory: a chunk of positions at a time is in float32; the heads are as a whole.

Source: songmzhang/DSKD, code/criterions/dual_space_kd.py, dual_space_kd_with_cross_model_attention.py.

Use:
    >>> import torch
    >>> from dskd import DSKD
    >>> out_s, out_t, y = torch.randn(2, 5, 9, requires_grad=True), torch.randn(2, 5, 9), torch.ones(2, 5)
    >>> hid_s, head_s, hid_t, head_t = (torch.randn(s) for s in ((2, 5, 4), (9, 4), (2, 5, 6), (9, 6)))
    >>> DSKD(4, 6)(out_s, hid_s, head_s, out_t, hid_t, head_t, y.long()).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2**19  # logits in float32 at a time; on a GPU eight times as many, for fewer launches


class DSKD(nn.Module):
    """Distillation in the spaces of both networks, for one vocabulary.

    Args:
        s_dim, t_dim: widths of the hidden states.
        T: temperature, > 0; 2.

    Shape:
        out_s, out_t: (N, L, K) logits, K >= 2; hid_s: (N, L, s_dim), hid_t: (N, L, t_dim);
        head_s: (K, s_dim), head_t: (K, t_dim); target: (N, L) labels, aligned with the logits, -100 leaves a
        position out. Returns a scalar; `terms` (ce, student_space, teacher_space). No gradient reaches the
        teacher's tensors or the heads. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; a wrong shape; K < 2; a label that is no class.
    """

    def __init__(self, s_dim: int, t_dim: int, T: float = 2.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'DSKD: T must be > 0, got {T}')
        self.s_dim, self.t_dim, self.T = s_dim, t_dim, T
        self.t2s, self.s2t = nn.Linear(t_dim, s_dim), nn.Linear(s_dim, t_dim)

    def forward(
        self,
        out_s: Tensor,
        hid_s: Tensor,
        head_s: Tensor,
        out_t: Tensor,
        hid_t: Tensor,
        head_t: Tensor,
        target: Tensor,
    ) -> Tensor:
        return sum(self.terms(out_s, hid_s, head_s, out_t, hid_t, head_t, target))

    def terms(self, out_s, hid_s, head_s, out_t, hid_t, head_t, target) -> tuple[Tensor, Tensor, Tensor]:
        _of_network('DSKD', '_s', out_s, hid_s, head_s, self.s_dim)
        _of_network('DSKD', '_t', out_t, hid_t, head_t, self.t_dim)
        rows, rows_t, counts = _tokens('DSKD', out_s, out_t, target)
        index, _ = _labels('DSKD', target.flatten(), *rows.shape)
        with _no_autocast(out_s):
            # filled before the maps, whose weights would take a NaN from anywhere
            to_s = _run(self.t2s, _filled(_full(hid_t.detach(), out_s).flatten(0, 1), counts))
            to_t = _run(self.s2t, _filled(_full(hid_s, out_s).flatten(0, 1), counts))
            ce, student = _student_space(rows, to_s, head_s, index, counts, self.T)
            teacher = _teacher_space(rows_t, to_t, head_t, counts, self.T)
            return _mean(ce, counts), _mean(student, counts), _mean(teacher, counts)


class DSKDCMA(nn.Module):
    """The same for different tokens: cross-model attention aligns the positions.

    Args:
        s_dim, t_dim: widths of the hidden states.
        T: temperature, > 0; 2.
        T_t: a further one of the teacher's states as the student's head reads them, > 0; 1.

    Shape:
        out_s: (N, L, K_s), out_t: (N, M, K_t); hid_s: (N, L, s_dim), hid_t: (N, M, t_dim);
        head_s, emb_s: (K_s, s_dim), head_t, emb_t: (K_t, t_dim), heads and tables of input embeddings;
        input_s, target: (N, L), input_t, target_t: (N, M), the ids read and to be predicted, target -100
        leaves a position out.
        Returns a scalar; `terms` (ce, student_space, teacher_space). No gradient reaches the teacher's
        tensors, heads or tables. A text without a position of the teacher is to be left out. Computed in
        float32, or in float64 as the student.

    Raises:
        ValueError: a temperature is not positive; a wrong shape; K < 2; an id that is no class.
    """

    def __init__(self, s_dim: int, t_dim: int, T: float = 2.0, T_t: float = 1.0) -> None:
        super().__init__()
        if not (T > 0 and T_t > 0):
            raise ValueError(f'DSKDCMA: T and T_t must be > 0, got {T} and {T_t}')
        self.s_dim, self.t_dim, self.T, self.T_t = s_dim, t_dim, T, T_t
        self.t2s, self.s2t = nn.Linear(t_dim, s_dim), nn.Linear(s_dim, t_dim)
        self.query = nn.Linear(2 * s_dim, 2 * t_dim)

    def forward(
        self,
        out_s: Tensor,
        hid_s: Tensor,
        head_s: Tensor,
        emb_s: Tensor,
        input_s: Tensor,
        out_t: Tensor,
        hid_t: Tensor,
        head_t: Tensor,
        emb_t: Tensor,
        input_t: Tensor,
        target: Tensor,
        target_t: Tensor,
    ) -> Tensor:
        return sum(
            self.terms(
                out_s, hid_s, head_s, emb_s, input_s, out_t, hid_t, head_t, emb_t, input_t, target, target_t
            )
        )

    def terms(
        self, out_s, hid_s, head_s, emb_s, input_s, out_t, hid_t, head_t, emb_t, input_t, target, target_t
    ) -> tuple[Tensor, Tensor, Tensor]:
        who = 'DSKDCMA'
        s = _side(who, '_s', out_s, hid_s, head_s, emb_s, input_s, 'target', target, self.s_dim, out_s)
        _tensors(who, out_t=out_t, hid_t=hid_t)
        of_t = (x.detach() for x in (out_t, hid_t, head_t, emb_t))
        t = _side(who, '_t', *of_t, input_t, 'target_t', target_t, self.t_dim, out_s)
        if len(out_t) != len(out_s):
            raise ValueError(
                f'{who}: out_t must be ({len(out_s)}, M, K), got {tuple(out_t.shape)}: the same texts'
            )
        with _no_autocast(out_s):
            keys = torch.cat([t.read, t.said], dim=2)
            Q = _run(self.query, torch.cat([s.read, s.said], dim=2))
            A = _product(Q, (keys / _spread(keys)).mT) / math.sqrt(2 * self.t_dim)
            A = A - 100000.0 * ~(s.counts[:, :, None] & t.counts[:, None, :])
            v_t = _run(self.t2s, t.hid / _spread(t.hid) + t.said / _spread(t.said))
            v_s = _run(self.s2t, s.hid)
            to_s, to_t = _product(A.softmax(dim=2), v_t), _product(A.mT.softmax(dim=2), v_s)
            counts_s, counts_t = s.counts.flatten(), t.counts.flatten()
            ce, student = _student_space(
                s.out,
                _filled(to_s.flatten(0, 1), counts_s),
                head_s,
                s.index,
                counts_s,
                self.T,
                self.T_t,
                True,
            )
            teacher = _teacher_space(t.out, _filled(to_t.flatten(0, 1), counts_t), head_t, counts_t, self.T)
            n = counts_s.sum()
            teacher = torch.where(counts_t & (n > 0), teacher, 0.0).sum() / n.clamp(min=1)
            return _mean(ce, counts_s), _mean(student, counts_s), teacher


class _Side:
    """What DSKDCMA has of one network: rows of logits, states, embeddings of the ids read and to be said."""


def _side(who, of, out, hid, head, emb, ids, name, target, dim, like) -> _Side:
    side = _Side()
    _of_network(who, of, out, hid, head, dim)
    _table(who, f'emb{of}', emb, out.shape[2], dim)
    _expect(who, f'input{of}', ids, *out.shape[:2])
    _expect(who, name, target, *out.shape[:2])
    _no_mask(who, name, target)
    side.out, side.counts = out.flatten(0, 1), target.long() != -100
    side.index, _ = _labels(who, target.flatten(), *side.out.shape, name)
    read, _ = _labels(who, torch.where(side.counts, ids, -100).flatten(), *side.out.shape, f'input{of}')
    table = _full(emb.detach(), like)
    side.read, side.said = (table[i].reshape(*out.shape[:2], dim) for i in (read, side.index))
    side.hid = _full(hid, like)
    return side


def _of_network(who: str, of: str, out: Tensor, hid: Tensor, head: Tensor, dim: int) -> None:
    _tensors(who, **{f'out{of}': out, f'hid{of}': hid})
    if out.dim() != 3:
        raise ValueError(
            f'{who}: out{of} must be (N, L, K), got {tuple(out.shape)}: unsqueeze or flatten axes'
        )
    _expect(who, f'out{of}', out.detach().flatten(0, 1), 'N', 'K')
    _expect(who, f'hid{of}', hid, *out.shape[:2], dim)
    _table(who, f'head{of}', head, out.shape[2], dim)


def _table(who: str, name: str, table: Tensor, K: int, dim: int) -> None:
    """A head or embeddings: a row for each class of the logits."""
    if table.dim() == 2 and len(table) > K:
        raise ValueError(
            f'{who}: {name} must be ({K}, {dim}), got {tuple(table.shape)}: cut it as the logits are, '
            f'{name}[:{K}]'
        )
    _expect(who, name, table, K, dim)


def _student_space(out_s, state, head, index, counts, T: float, T_t: float = 1.0, right: bool = False):
    """At each position: cross-entropy of the teacher's state under the student's head, its KL to out_s."""
    head = _full(head.detach(), out_s)

    def each(out_s, state, index, counts):
        z = _product(state, head.T)
        ce = -F.log_softmax(z, dim=1).gather(1, index[:, None]).squeeze(1)
        log_p = F.log_softmax(z.detach() / (T * T_t), dim=1)
        log_q = F.log_softmax(_filled(_full(out_s), counts) / T, dim=1)
        kl = _kl_of_logs(log_p, log_q)
        if right:  # a teacher that is wrong here says nothing; NaN still does
            kl = torch.where(z.detach().argmax(dim=1) == index, kl, 0 * kl.detach())
        return torch.stack([ce, kl], dim=1)

    return _by_position(each, out_s, state, index, counts).unbind(dim=1)


def _teacher_space(out_t, state, head, counts, T: float):
    """At each position: KL from the teacher to the student's state under the teacher's head."""
    head = _full(head.detach(), state)

    def each(out_t, state, counts):
        log_p = F.log_softmax(_filled(_full(out_t, state), counts) / T, dim=1)
        return _kl_of_logs(log_p, F.log_softmax(_product(state, head.T) / T, dim=1))

    return _by_position(each, out_t, state, counts)


def _kl_of_logs(log_p_t: Tensor, log_p_s: Tensor) -> Tensor:
    """(N,): KL of each row; 0 where p_t is 0, whatever the logarithms are."""
    p_t = log_p_t.exp()
    return torch.where(p_t == 0, 0.0, p_t * (log_p_t - log_p_s)).sum(dim=1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (_exact(a) @ _exact(b)).to(a.dtype)


def _spread(x: Tensor) -> Tensor:
    """The standard deviation of all entries, a constant."""
    return x.detach().std().clamp(min=1e-6)


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    head_s, head_t = batch.net_s.head(), batch.net_t.head()
    return kd(s.out, s.hid, head_s, t.out, t.hid, head_t, batch.target)


def feed_cma(kd, s, t, batch):
    """The same texts in the teacher's own tokens. Heads and embeddings are tied."""
    other = batch.second()
    table_s, table_t = batch.net_s.head(), other.net.head()
    return kd(s.out, s.hid, table_s, table_s, batch.x, other.t.out, other.t.hid, table_t, table_t, other.x,
              batch.target, other.target)  # fmt: skip


def build(loss, probe, **options):
    return loss(probe.s.hid.shape[2], probe.t.hid.shape[2], **options)


def build_cma(loss, probe, **options):
    return loss(probe.s.hid.shape[2], probe.second.t.hid.shape[2], **options)
