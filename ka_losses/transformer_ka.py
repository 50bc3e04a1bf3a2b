"""Amalgamation of detection transformers: one DETR for the object classes of several.

H. Zhang, F. Mao, M. Xue, G. Fang, Z. Feng, J. Song, M. Song, "Knowledge Amalgamation for Object Detection
with Transformers", IEEE TIP 2023, arXiv:2203.03187.

    SA: the student's sequence is as long as all teachers' together; chunk i follows teacher i:
        loss = sum over teachers of mean over unpadded tokens and D of (norm(chunk_i) - norm(seq_t_i))^2
        norm: a LayerNorm shared by all, after taking each channel's mean away ('channel') or not ('layer')
    TA: a teacher's query is a target if its argmax is an object and its probability > threshold; the n_max
        surest per image are kept. Targets and student queries are matched by
            c_1 * (-p_s[label]) + c_2 * |box_s - box_t|_1 + c_3 * (-GIoU)              (linear sum assignment)
        kd   = [sum over matched of T^2 * KL(softmax(target / T) || softmax(student / T))
                + eos * sum over unmatched of -log p_s[background]] / (matched + eos * unmatched)
        loss = kd + w_bbox * sum of L1 / targets + w_giou * sum of (1 - GIoU) / targets
        target logits: the teacher's, at background and its task's columns; -5 at all others

Tap: SA after the input projection and after each encoder layer; TA at the last decoder layer, and with a
matching of its own at each auxiliary one. The authors weigh both by 1 - epoch / epochs beside labels, by 1
without.

Differences: the authors' aggregation baseline (SeqAgg) projects with a matrix that is never trained; here it
is a parameter. Any number of teachers and of classes. Areas are kept at 1e-12 or above (in their code two
empty boxes give 0 / 0). Their VOC configuration names SA wrongly and silently trains without it.

Source: zhfeing/Transformer-KA-PyTorch, amalgamation/loss.py and light_detr/loss/loss.py, matcher.py.

Use:
    >>> import torch
    >>> from transformer_ka import TaskAmalgamation
    >>> boxes, logits = torch.rand(2, 5, 4), torch.randn(2, 5, 4, requires_grad=True)
    >>> teachers = [{'logits': torch.randn(2, 5, c), 'boxes': boxes} for c in (3, 2)]
    >>> out_s = {'logits': logits, 'boxes': boxes}  # column 0 is background
    >>> TaskAmalgamation([[0, 2], [1]], 3)(out_s, teachers).backward()
    >>> logits.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TaskAmalgamation(nn.Module):
    """TA: the teachers' detections as targets of the student's.

    Args:
        teacher_tasks: per teacher the classes it knows, 0 to num_classes - 1; its column c + 1 is class
            teacher_tasks[i][c], column 0 is background.
        num_classes: of the student, without background.
        threshold: least probability of a target.
        n_max: most targets per image.
        T: temperature.
        eos: weight of background.
        cost: of class, box and GIoU in the matching.
        w_bbox, w_giou: weights of the box terms.

    Shape:
        out_s: {'logits': (N, Q, 1 + num_classes), 'boxes': (N, Q, 4) as centre x, centre y, width, height in
        0..1}; outs_t: list of the same with 1 + len(teacher_tasks[i]) columns and any Q. Returns a scalar,
        with return_terms=True also {'kd', 'bbox', 'giou'} without weights. No gradient reaches outs_t.
        Computed in float32, also under TF32, or in float64 as the student. A GPU waits: the CPU matches.

    Raises:
        ValueError: classes outside the range; shapes that do not meet; a box of negative size.
        ImportError: scipy is not installed (the assignment needs it).
    """

    def __init__(
        self,
        teacher_tasks: list[list[int]],
        num_classes: int,
        threshold: float = 0.1,
        n_max: int = 50,
        T: float = 4.0,
        eos: float = 0.1,
        cost: tuple = (1, 5, 2),
        w_bbox: float = 5.0,
        w_giou: float = 2.0,
    ) -> None:
        super().__init__()
        if any(not 0 <= c < num_classes for task in teacher_tasks for c in task):
            raise ValueError(
                f'TaskAmalgamation: teacher_tasks must lie in 0..{num_classes - 1}, got {teacher_tasks}'
            )
        self.columns = [[0, *(c + 1 for c in task)] for task in teacher_tasks]
        self.num_classes, self.threshold, self.n_max, self.T = num_classes, threshold, n_max, T
        self.eos, self.cost, self.w_bbox, self.w_giou = eos, tuple(cost), w_bbox, w_giou

    def forward(self, out_s: dict, outs_t: list[dict], return_terms: bool = False):
        targets = self.targets(outs_t, out_s['logits'])
        kd, bbox, giou = self._losses(out_s, targets, self.match(out_s, targets))
        loss = kd + self.w_bbox * bbox + self.w_giou * giou
        # a NaN or inf may sit where nothing was matched, but must show
        seen = [out_s['boxes'], *(x for out in outs_t for x in (out['logits'].softmax(dim=2), out['boxes']))]
        loss = loss + 0 * sum(_full(x.detach(), loss).sum() for x in seen)
        return (loss, {'kd': kd, 'bbox': bbox, 'giou': giou}) if return_terms else loss

    @torch.no_grad()
    def targets(self, outs_t: list[dict], like: Tensor | None = None) -> list[dict]:
        """Per image, surest first: boxes (M, 4), labels (M,) student columns, logits (M, 1 + K), keep (M,),
        the query's number when those of all teachers are counted one after the other. like: the student's
        logits, for the precision."""
        if len(outs_t) != len(self.columns):
            raise ValueError(
                f'TaskAmalgamation: outs_t must hold {len(self.columns)}, got {len(outs_t)}: one per teacher'
            )
        wide, boxes = [], []
        for i, (out, columns) in enumerate(zip(outs_t, self.columns)):
            logits = _full(out['logits'].detach(), like)
            n = len(wide[0][0]) if wide else 'N'
            _expect('TaskAmalgamation', f'logits of outs_t[{i}]', logits, n, 'Q', len(columns))
            _expect('TaskAmalgamation', f'boxes of outs_t[{i}]', out['boxes'], *logits.shape[:2], 4)
            padded = logits.new_full((*logits.shape[:2], 1 + self.num_classes), -5.0)
            padded[:, :, columns] = logits
            p, label = logits.softmax(dim=2).max(dim=2)
            wide.append((padded, p, label, torch.tensor(columns, device=logits.device)[label]))
            boxes.append(_full(out['boxes'].detach(), like))
        logits, p, own, label = (torch.cat(x, dim=1) for x in zip(*wide))
        boxes = torch.cat(boxes, dim=1)
        result = []
        for n in range(len(logits)):
            candidates = ((own[n] > 0) & (p[n] > self.threshold)).nonzero()[:, 0]
            keep = candidates[p[n, candidates].argsort(descending=True, stable=True)][: self.n_max]
            result.append(
                {'boxes': boxes[n, keep], 'labels': label[n, keep], 'logits': logits[n, keep], 'keep': keep}
            )
        return result

    @torch.no_grad()
    def match(self, out_s: dict, targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
        """Per image: matched student queries, ascending, and the target of each."""
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError:
            raise ImportError('TaskAmalgamation needs scipy for the assignment (pip install scipy)') from None
        logits, boxes = self._check(out_s, targets)
        result = []
        for p, box, target in zip(logits.softmax(dim=2), boxes, targets):
            c_class, c_box, c_giou = self.cost
            cost = -c_class * p[:, target['labels']] + c_box * torch.cdist(box, target['boxes'], p=1)
            cost = cost - c_giou * giou(box[:, None], target['boxes'][None])
            source, wanted = linear_sum_assignment(cost.nan_to_num(0.0, 0.0, 0.0).cpu().numpy())
            result.append(
                (torch.as_tensor(source, device=p.device), torch.as_tensor(wanted, device=p.device))
            )
        return result

    def _losses(self, out_s: dict, targets: list[dict], pairs: list) -> tuple[Tensor, Tensor, Tensor]:
        logits, boxes = self._check(out_s, targets)
        matched = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
        for n, (source, _) in enumerate(pairs):
            matched[n, source] = True
        got = torch.cat([logits[n, source] for n, (source, _) in enumerate(pairs)])
        want = torch.cat([target['logits'][j] for target, (_, j) in zip(targets, pairs)])
        log_q, log_p = F.log_softmax(got / self.T, dim=1), F.log_softmax(want / self.T, dim=1)
        p = log_p.exp()
        divergence = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum() * self.T**2
        background = -F.log_softmax(logits, dim=2)[..., 0][~matched].sum()
        weight = matched.to(logits).sum() + self.eos * (~matched).to(logits).sum()
        kd = (divergence + self.eos * background) / weight.clamp(min=1e-12)

        box_s = torch.cat([boxes[n, source] for n, (source, _) in enumerate(pairs)])
        box_t = torch.cat([target['boxes'][j] for target, (_, j) in zip(targets, pairs)])
        count = max(sum(len(target['labels']) for target in targets), 1)
        return kd, (box_s - box_t).abs().sum() / count, (1 - giou(box_s, box_t)).sum() / count

    def _check(self, out_s: dict, targets: list[dict]) -> tuple[Tensor, Tensor]:
        logits, boxes = _full(out_s['logits']), _full(out_s['boxes'], out_s['logits'])
        _expect('TaskAmalgamation', 'logits of out_s', logits, len(targets), 'Q', 1 + self.num_classes)
        _expect('TaskAmalgamation', 'boxes of out_s', boxes, *logits.shape[:2], 4)
        for name, box in [('out_s', boxes), *(('outs_t', target['boxes']) for target in targets)]:
            if (box[..., 2:] < 0).any():
                raise ValueError(
                    f'TaskAmalgamation: boxes of {name} must have sizes >= 0, got less: give centre and size'
                )
        return logits, boxes


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of boxes (..., 4) as centre x, centre y, width, height."""
    low_a, high_a = a[..., :2] - a[..., 2:] / 2, a[..., :2] + a[..., 2:] / 2
    low_b, high_b = b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2
    tiny = 1e-12
    both = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(dim=-1)
    union = ((high_a - low_a).prod(dim=-1) + (high_b - low_b).prod(dim=-1) - both).clamp(min=tiny)
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).clamp(min=0).prod(dim=-1)
    hull = hull.clamp(min=tiny)
    return both / union - (hull - union) / hull


def detr_ce(logits: Tensor, labels: Tensor, eos: float = 0.1) -> Tensor:
    """DETR's classification: logits (N, Q, 1 + K), labels (N, Q) with 0 for background, which weighs eos;
    -100 is left out."""
    _expect('detr_ce', 'logits', logits, 'N', 'Q', 'K')
    _expect('detr_ce', 'labels', labels, *logits.shape[:2])
    out = _full(logits).flatten(0, 1)
    y, valid = _labels('detr_ce', labels.flatten(), *out.shape, 'labels')
    weight = torch.where(y == 0, eos, 1.0).to(out.dtype)
    weight = weight if valid is None else torch.where(valid, weight, 0.0)
    ce = F.cross_entropy(out, y, reduction='none')
    return torch.where(weight == 0, 0.0, weight * ce).sum() / weight.sum().clamp(min=1e-12)


class SeqHint(nn.Module):
    """SA at one layer: each chunk of the student's sequence follows its teacher.

    Args:
        n_teachers: T.
        dim: D.
        norm: 'channel' or 'layer', see above.

    Shape:
        seq_s: (T L, N, D); seqs_t: list of T (L, N, D); pad_mask: (N, L), True where padded. Returns a
        scalar, with return_terms=True also {'hint': the same}. No gradient reaches seqs_t.

    Raises:
        ValueError: unknown norm; shapes that do not meet.
    """

    def __init__(self, n_teachers: int, dim: int, norm: str = 'channel') -> None:
        super().__init__()
        self.n_teachers, self.norm = n_teachers, _Norm('SeqHint', dim, norm)

    def forward(
        self, seq_s: Tensor, seqs_t: list[Tensor], pad_mask: Tensor | None = None, return_terms: bool = False
    ):
        _check_sequences('SeqHint', seq_s, seqs_t, self.n_teachers, self.n_teachers)
        loss = 0.0
        for chunk, seq_t in zip(_full(seq_s).chunk(self.n_teachers), seqs_t):
            error = (_run(self.norm, chunk) - _run(self.norm, _full(seq_t.detach(), chunk))).square()
            if pad_mask is None:
                loss = loss + error.mean()
                continue
            _expect('SeqHint', 'pad_mask', pad_mask, error.shape[1], error.shape[0])
            kept = (pad_mask == 0).T[:, :, None]  # of whatever type
            loss = loss + (error * kept).sum() / (kept.sum() * error.shape[2]).clamp(min=1)
        return (loss, {'hint': loss}) if return_terms else loss


class SeqAgg(nn.Module):
    """The baseline: one sequence follows a linear map of the teachers' concatenated channels; as SeqHint.

    Shape:
        seq_s: (L, N, D); seqs_t: list of T (L, N, D). Returns a scalar.
    """

    def __init__(self, n_teachers: int, dim: int, norm: str = 'channel') -> None:
        super().__init__()
        self.n_teachers, self.norm = n_teachers, _Norm('SeqAgg', dim, norm)
        self.proj = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_teachers * dim, dim)))

    def forward(self, seq_s: Tensor, seqs_t: list[Tensor], return_terms: bool = False):
        _check_sequences('SeqAgg', seq_s, seqs_t, self.n_teachers, 1)
        with _no_autocast(seq_s):
            joined = torch.cat([_run(self.norm, _full(seq_t.detach(), seq_s)) for seq_t in seqs_t], dim=2)
            wanted = (_exact(joined) @ _exact(_full(self.proj, seq_s))).to(joined.dtype)
            loss = F.mse_loss(_run(self.norm, _full(seq_s)), wanted)
        return (loss, {'agg': loss}) if return_terms else loss


@torch.no_grad()
def compress_tokens(seqs_t: list[Tensor], cosine: bool = False) -> Tensor:
    """Which teacher's token to keep at each position: the one least like all tokens.

    seqs_t: T of (L, N, D). Returns (N, L) indices into the concatenated sequence, ascending per image.
    """
    for i, seq_t in enumerate(seqs_t):
        _expect('compress_tokens', f'seqs_t[{i}]', seq_t, *(seqs_t[0].shape if i else ('L', 'N', 'D')))
    tokens = torch.cat([_full(seq_t) for seq_t in seqs_t]).transpose(0, 1)  # (N, T L, D)
    if cosine:
        norm = torch.linalg.vector_norm(tokens, dim=2)
        alike = (_exact(tokens) @ _exact(tokens).transpose(1, 2)).to(tokens.dtype) / (
            norm[:, :, None] * norm[:, None] + 1e-5
        )
        alike = alike.mean(dim=2)
    else:
        alike = (tokens * tokens.mean(dim=1, keepdim=True)).sum(dim=2)
    length = len(seqs_t[0])
    teacher = alike.unflatten(1, (len(seqs_t), length)).argmin(dim=1)  # (N, L)
    return (teacher * length + torch.arange(length, device=teacher.device)).sort(dim=1).values


class _Norm(nn.LayerNorm):
    def __init__(self, owner: str, dim: int, norm: str) -> None:
        if norm not in ('channel', 'layer'):
            raise ValueError(f"{owner}: norm must be 'channel' or 'layer', got {norm!r}")
        super().__init__(dim)
        self.centre = norm == 'channel'

    def forward(self, seq: Tensor) -> Tensor:
        return super().forward(seq - seq.mean(dim=(0, 1)) if self.centre else seq)


def _check_sequences(owner: str, seq_s: Tensor, seqs_t: list[Tensor], teachers: int, chunks: int) -> None:
    if len(seqs_t) != teachers:
        raise ValueError(
            f'{owner}: seqs_t must hold {teachers} sequences, got {len(seqs_t)}: one per teacher'
        )
    length, *rest = seqs_t[0].shape
    for i, seq_t in enumerate(seqs_t):
        _expect(owner, f'seqs_t[{i}]', seq_t, *(('L', 'N', 'D') if i == 0 else seqs_t[0].shape))
    _expect(owner, 'seq_s', seq_s, chunks * length, *rest)


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
