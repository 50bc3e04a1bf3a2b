"""RRD, relational representation distillation: relate each image to a queue of teacher embeddings alike.

N. Giakoumoglou, T. Stathaki, "Relational Representation Distillation", 2024, arXiv:2407.12073.

    a = embed_s(feat_s), b = embed_t(feat_t), rows divided by their length
    Q = a queue of teacher embeddings; first this batch's b takes the place of the oldest rows
    p_t[n] = softmax over j of Q_j.b_n / T_t, p_s[n] = softmax over j of Q_j.a_n / T_s
    loss = - mean over n of sum over j of p_t * log p_s

Tap: the pooled embeddings before the classifier. embed_t never learns, since b and Q are constants: it is a
random projection of the teacher, of which the student learns the relations. The value is never below the
entropy of p_t, which grows while the queue fills: over the first queue / N steps the loss may rise while the
student learns.

Differences: the authors' code in its first-in-first-out form, with the command line's temperatures; a comment
in it, and the paper, have the sharper one on the student's side. Their momentum form sends finished
probabilities through another softmax and is left out. The first queue has columns, not rows, of length 1, as
the code has it; after queue / N steps nothing of that is left. A row that is not finite makes the loss NaN
but is not kept. The queue and its pointer are buffers, so a resumed run goes on exactly.

Cost: one product (N, feat_dim) x (feat_dim, queue) for each side.

Source: giakoumoglou/distillers, cifar/distillers/RRD.py (RRD_FifoMemory_Loss).

Use:
    >>> import torch
    >>> from rrd import RRD
    >>> feat_s, feat_t = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
    >>> RRD(64, 128)(feat_s, feat_t).backward()
    >>> feat_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RRD(nn.Module):
    """Cross-entropy of softened similarities to a queue.

    Args:
        s_dim, t_dim: widths of the two embeddings.
        feat_dim: common width; 128.
        queue: length of the queue, at least a batch; 16384.
        T_s, T_t: temperatures of student and teacher, > 0; 0.1 and 0.02.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim), N <= queue; further axes are flattened. Returns a scalar. No
        gradient reaches feat_t. In eval mode and without gradients the queue stays as it is.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: a temperature is not positive; queue < 1 or smaller than the batch; an embedding of
            another width; the batch sizes differ.
    """

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        feat_dim: int = 128,
        queue: int = 16384,
        T_s: float = 0.1,
        T_t: float = 0.02,
    ) -> None:
        super().__init__()
        if not T_s > 0 or not T_t > 0 or queue < 1:
            raise ValueError(f'RRD: T_s and T_t must be > 0 and queue >= 1, got {T_s}, {T_t} and {queue}')
        self.s_dim, self.t_dim, self.T_s, self.T_t = s_dim, t_dim, T_s, T_t
        self.embed_s = nn.Linear(s_dim, feat_dim)
        self.embed_t = nn.Linear(t_dim, feat_dim).requires_grad_(False)
        self.register_buffer('queue', F.normalize(torch.randn(queue, feat_dim), dim=0))
        self.register_buffer('pointer', torch.tensor(0))

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        feat_s, feat_t = (x.flatten(1) if x.dim() > 2 else x for x in (feat_s, feat_t))
        _expect('RRD', 'feat_s', feat_s, 'N', self.s_dim)
        _expect('RRD', 'feat_t', feat_t, len(feat_s), self.t_dim)
        if len(feat_s) > len(self.queue):
            raise ValueError(
                f'RRD: feat_s must have at most {len(self.queue)} samples, got {len(feat_s)}: '
                'a longer queue, or smaller batches'
            )
        with _no_autocast(feat_s):
            a = _unit(_run(self.embed_s, _full(feat_s)))
            with torch.no_grad():
                b = _unit(_run(self.embed_t, _full(feat_t.detach(), feat_s)))
            Q = _exact(self._with(b) if self.training and torch.is_grad_enabled() else _full(self.queue, b))
            log_p_s = F.log_softmax((_exact(a) @ Q.T).to(a.dtype) / self.T_s, dim=1)
            p_t = F.softmax((_exact(b) @ Q.T).to(b.dtype) / self.T_t, dim=1)
            return -(p_t * log_p_s).sum(dim=1).mean()

    @torch.no_grad()
    def _with(self, b: Tensor) -> Tensor:
        """A copy of the queue that has this batch; the queue itself has it too, afterwards."""
        size = len(self.queue)
        rows = (self.pointer + torch.arange(len(b), device=b.device)) % size
        old = _full(self.queue, b)
        whole = b.isfinite().all(dim=1, keepdim=True)
        queue = old.index_copy(0, rows, torch.where(whole, b, old[rows]))
        self.queue.copy_(queue)
        self.pointer.copy_((self.pointer + len(b)) % size)
        return queue


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


def build(loss, probe, **options):
    kd = loss(probe.s.feat.shape[1], probe.t.feat.shape[1], **options)
    if len(kd.queue) < probe.batch_size:
        raise ValueError(f'RRD: queue must hold a batch of {probe.batch_size}, got {len(kd.queue)}')
    return kd
