"""CIRKD, cross-image relational distillation: how pixels relate to those of other pictures, and to a memory.

C. Yang, H. Zhou, Z. An, X. Jiang, Y. Xu, Q. Zhang, "Cross-Image Relational Knowledge Distillation for
Semantic Segmentation", CVPR 2022, arXiv:2204.06986.

    batch = 1 / N^2 * sum over ordered pairs of pictures i, j, i = j included, of KL_ij
    KL_ij = mean over the pixels of i of the divergence of softmax(similarities to the pixels of j / T)
    pixel, region = T_kd^2 * mean over labelled pixels of the divergence of softmax(similarities to vectors of
        every class, drawn from a queue of teacher's pixels or of regions' means / T / T_kd)
    loss = batch + w_pixel * pixel + w_region * region

Similarities are products of vectors of length 1; for the memory the student's go through a head before.

Tap: the map that the classifier reads, and the labels of the pixels. The authors add soft targets per pixel
(T 1, weight 1). pooled=True for SegFormer. The head is trained with the student; the queues, num_classes *
(pixel_memory + region_memory) * t_channels numbers, are in the checkpoint. They belong to one process.

Differences: the authors' pixel queue holds the first pixels of a picture, whatever they show, as numbers
within a class are taken for positions; here it holds pixels of the class. A zero vector has no gradient.

Source: winycg/CIRKD, losses/cirkd_mini_batch.py and losses/cirkd_memory.py.

Use:
    >>> import torch
    >>> from cirkd import CIRKD
    >>> fm_s, fm_t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 6, 8, 8)
    >>> CIRKD(4, 6, num_classes=3)(fm_s, fm_t, torch.randint(3, (2, 32, 32))).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CIRKD(nn.Module):
    """Divergence of pixel similarities within the batch, and to queues of pixels and regions.

    Args:
        s_channels, t_channels: channels of the two maps.
        num_classes: labels are 0 .. num_classes - 1.
        T, T_kd: temperatures of the similarities and, on top, of the memory's divergence; 0.1 and 1.
        pixel_memory, region_memory: lengths of the queues, per class.
        pixel_contrast, region_contrast: vectors to compare with, over all classes; each class gives an equal
            share and one more, all it has if that is less.
        update: pixels that a class of a picture adds to its queue, at most.
        ignore: the label of pixels that have none, -1; 255 in the files of VOC. -100 is left out as well.
        pooled: the batch term on maps averaged 2 x 2.
        w_pixel, w_region: weights of the memory's terms.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W), target: (N, H_0, W_0) integers of any size.
        generator: where to draw from. Returns a scalar. No gradient reaches fm_t. In training, forward first
        adds to the queues; in evaluation they stay. Computed in float32, also under TF32, or in float64 as
        the student.

    Raises:
        ValueError: an argument is not legal; shapes differ; target is not of integers or has a label that is
        none of the above (on the CPU).
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        num_classes: int,
        T: float = 0.1,
        T_kd: float = 1.0,
        pixel_memory: int = 20000,
        region_memory: int = 2000,
        pixel_contrast: int = 4096,
        region_contrast: int = 1024,
        update: int = 16,
        ignore: int = -1,
        pooled: bool = False,
        w_pixel: float = 0.1,
        w_region: float = 0.1,
    ) -> None:
        super().__init__()
        if not (T > 0 and T_kd > 0):
            raise ValueError(f'CIRKD: T and T_kd must be > 0, got {T} and {T_kd}')
        counts = (num_classes, pixel_memory, region_memory, pixel_contrast, region_contrast, update)
        if min(counts) < 1:
            raise ValueError(f'CIRKD: num_classes, memories, contrasts and update must be >= 1, got {counts}')
        self.s_channels, self.t_channels, self.num_classes = s_channels, t_channels, num_classes
        self.T, self.T_kd, self.update, self.ignore, self.pooled = T, T_kd, update, ignore, pooled
        self.pixel_contrast, self.region_contrast = pixel_contrast, region_contrast
        self.w_pixel, self.w_region = w_pixel, w_region
        self.head = nn.Sequential(
            nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(t_channels),
            nn.ReLU(),
            nn.Conv2d(t_channels, t_channels, kernel_size=1, bias=False),
        )
        for name, length in (('pixel', pixel_memory), ('region', region_memory)):
            self.register_buffer(f'{name}_queue', _unit(torch.randn(num_classes, length, t_channels)))
            self.register_buffer(f'{name}_ptr', torch.zeros(num_classes, dtype=torch.int64))

    def forward(
        self, fm_s: Tensor, fm_t: Tensor, target: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        self._check(fm_s, fm_t)
        if self.training:
            self.enqueue(fm_t, target, generator)
        device = fm_s.device
        pixel_index = self._draw(self.pixel_queue, self.pixel_contrast, generator, device)
        region_index = self._draw(self.region_queue, self.region_contrast, generator, device)
        pixel, region = self.memory_losses(fm_s, fm_t, target, pixel_index, region_index)
        return self.batch_loss(fm_s, fm_t) + self.w_pixel * pixel + self.w_region * region

    def batch_loss(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """The first term."""
        self._check(fm_s, fm_t)
        n = len(fm_s)
        with _no_autocast(fm_s):
            s, t = _full(fm_s), _full(fm_t.detach(), fm_s)
            if self.pooled:
                s, t = (F.avg_pool2d(x, 2, 2, ceil_mode=True) for x in (s, t))
            s, t = _exact(_pixels(s)), _exact(_pixels(t))
            # pixels of one picture with all others: recomputed in backward, so that one table lives at a time
            of_picture = [
                checkpoint(
                    _divergence_to, s[i], s, t[i], t, self.T, use_reentrant=False, preserve_rng_state=False
                )
                for i in range(n)
            ]
            return torch.stack(of_picture).mean().to(_full(fm_s).dtype)

    def memory_losses(
        self, fm_s: Tensor, fm_t: Tensor, target: Tensor, pixel_index: Tensor, region_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(pixel, region), of the given rows of the queue of every class; the queues stay as they are."""
        self._check(fm_s, fm_t)
        _, valid = self._labels_of(fm_s, target)
        with _no_autocast(fm_s):
            z, y = _exact(_pixels(_run(self.head, _full(fm_s)))), _exact(_pixels(_full(fm_t.detach(), fm_s)))
            terms = []
            for queue, index in ((self.pixel_queue, pixel_index), (self.region_queue, region_index)):
                v = _full(queue[:, index].flatten(0, 1), z)
                log_q, log_p = ((x @ v.T / self.T / self.T_kd).log_softmax(dim=2) for x in (z, y))
                rows = torch.where(valid, _kl(log_p, log_q).sum(dim=2), 0.0)
                terms.append((rows.sum() / valid.sum().clamp(min=1) * self.T_kd**2).to(_full(fm_s).dtype))
            return tuple(terms)

    @torch.no_grad()
    def enqueue(self, fm_t: Tensor, target: Tensor, generator: torch.Generator | None = None) -> None:
        """Put every class's mean and some of its pixels, of each picture, into the queues."""
        _expect('CIRKD', 'fm_t', fm_t, 'N', self.t_channels, 'H', 'W')
        y, valid = self._labels_of(fm_t, target)
        vectors = _pixels(_full(fm_t))
        y = torch.where(valid, y, -1).cpu()  # one wait for the device, not one per class
        pixel_ptr, region_ptr = self.pixel_ptr.tolist(), self.region_ptr.tolist()
        for labels, x in zip(y, vectors):
            for k in labels.unique().tolist():
                if k < 0:
                    continue
                places = (labels == k).nonzero()[:, 0]
                mean = _unit(x[places.to(x.device)].mean(dim=0))
                self.region_queue[k, region_ptr[k]] = mean.to(self.region_queue.dtype)
                region_ptr[k] = (region_ptr[k] + 1) % self.region_queue.shape[1]
                device = 'cpu' if generator is None else generator.device
                order = torch.randperm(len(places), generator=generator, device=device).cpu()
                length = self.pixel_queue.shape[1]
                chosen = places[order[: min(self.update, length)]]
                wraps = pixel_ptr[k] + len(chosen) >= length
                start = length - len(chosen) if wraps else pixel_ptr[k]
                rows = _unit(x[chosen.to(x.device)]).to(self.pixel_queue.dtype)
                self.pixel_queue[k, start : start + len(chosen)] = rows
                pixel_ptr[k] = 0 if wraps else start + len(chosen)
        self.pixel_ptr.copy_(torch.tensor(pixel_ptr))
        self.region_ptr.copy_(torch.tensor(region_ptr))

    def _check(self, fm_s: Tensor, fm_t: Tensor) -> None:
        _expect('CIRKD', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('CIRKD', 'fm_t', fm_t, len(fm_s), self.t_channels, *fm_s.shape[2:])

    def _labels_of(self, fm: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (N, HW) at the map's size, and where they count."""
        labels = _dense_labels('CIRKD', target, len(fm), self.num_classes, self.ignore)
        return tuple(_nearest(x, *fm.shape[2:]).flatten(1) for x in labels)

    def _draw(self, queue: Tensor, contrast: int, generator, device) -> Tensor:
        length, n = queue.shape[1], contrast // self.num_classes + 1
        if n >= length:
            return torch.arange(length, device=device)
        return torch.randperm(length, generator=generator, device=device)[:n]


def _pixels(fm: Tensor) -> Tensor:
    """(N, C, H, W) -> vectors (N, HW, C) of length 1."""
    return _unit(fm.flatten(2).mT)


def _divergence_to(s_i: Tensor, s: Tensor, t_i: Tensor, t: Tensor, T: float) -> Tensor:
    """The pixels (HW, C) of a picture with those of all (N, HW, C): the mean divergence over both."""
    log_q, log_p = ((x @ y.mT / T).log_softmax(dim=2) for x, y in ((s_i, s), (t_i, t)))
    return _kl(log_p, log_q).sum(dim=2).mean()


def _dense_labels(who: str, target: Tensor, n: int, K: int, ignore: int) -> tuple[Tensor, Tensor]:
    """Labels (N, H, W) of 0..K-1 as int64, and where they count: not at ignore and -100, which are 0 then.

    Other labels are refused, but on a GPU, where looking at them would wait, only by the kernels.
    """
    _expect(who, 'target', target, n, 'H', 'W')
    if target.is_floating_point():
        raise ValueError(f'{who}: target must be of integers, got {target.dtype}: target.long()')
    target = target.long()
    valid = (target != ignore) & (target != -100)
    if target.device.type == 'cpu' and not getattr(torch.compiler, 'is_compiling', bool)():
        bad = target[valid & ((target < 0) | (target >= K))]
        if len(bad):
            raise ValueError(
                f'{who}: target must be in 0..{K - 1}, or {ignore} or -100 for pixels without a label, got '
                f'{bad[0].item()}: set `ignore` to the mark of your data'
            )
    return torch.where(valid, target, 0), valid


def _nearest(y: Tensor, h: int, w: int) -> Tensor:
    """Labels (N, H, W) at the size of a map, by nearest neighbour, in integers."""
    rows = torch.arange(h, device=y.device) * y.shape[1] // h
    return y[:, rows][:, :, torch.arange(w, device=y.device) * y.shape[2] // w]


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    x, y = s.feat, t.feat
    x = (
        x
        if x.shape[2:] == y.shape[2:]
        else F.interpolate(x, y.shape[2:], mode='bilinear', align_corners=False)
    )
    return kd(x, y, batch.target, generator=batch.generator)


def build(loss, probe, **options):
    n = probe.pictures  # no longer queues than they have vectors for
    lengths = {'pixel_memory': min(20000, 16 * n), 'region_memory': min(2000, n)}
    widths = probe.s.feat.shape[1], probe.t.feat.shape[1]
    return loss(*widths, probe.num_classes, **{**lengths, **options})
