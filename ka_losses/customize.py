"""Adaptive amalgamation: student networks made to measure, from teachers that share one wanted task.

C. Shen, M. Xue, X. Wang, J. Song, L. Sun, M. Song, "Customizing Student Networks from Heterogeneous Teachers
via Adaptive Knowledge Amalgamation", ICCV 2019, arXiv:1908.07121.

    feat = sum over levels of mean over elements of (b_s(fm_s) - b_t(fm_t))^2      bridges b: 1x1 convolutions
    soft = mean over elements of (m * out_s - out_t)^2                                  m learned, starts at 1
    wn   = sum over levels of mean over filters w of b_t of (||w||^2 - 1)^2
    loss = feat + soft + w_wn * wn

Round one, sources to component: every image is given only to the source that is surest of the wanted classes
(`select_teacher`: smallest entropy); the loss is called once per source with its images. Round two,
components to target: every image to every component, one head per task, bridges on the target's side only
(t_channels=None), so no wn. wn keeps the bridges from the trivial answer b = 0.

Tap: the stages' outputs BEFORE their ReLU, equal height and width per level, and the logits of the shared
task (a source's classifier cut to it).

Differences: KamalEngine adds wn six times in its class version and leaves out m in its first round; we do
neither. It sorts images to sources before training; we select inside the batch, the same assignment, as the
sources are fixed. Entropy through log_softmax: its attribute version overflows.

Source: zju-vipa/KamalEngine, kamal/amalgamation/customize_class.py and customize_attribute.py.

Use:
    >>> import torch
    >>> from customize import Customize
    >>> fms_s, fms_t = [torch.randn(8, 16, 4, 4, requires_grad=True)], [torch.randn(8, 32, 4, 4)]
    >>> out_s, out_t = torch.randn(8, 3), torch.randn(8, 3)
    >>> Customize([16], [32], [24])(fms_s, fms_t, out_s, out_t).backward()
    >>> fms_s[0].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Customize(nn.Module):
    """Distance of student and one source in a bridge space, at several levels, and of their logits.

    Args:
        s_channels: list, of the student's maps.
        t_channels: list, of the source's maps; None: no bridge there, h_channels are the source's channels.
        h_channels: list, widths of the bridges; authors half of the source's.
        w_wn: weight of wn, 1.
        scale_logits: learn m; False: m is 1.

    Shape:
        fms_s, fms_t: lists over levels of (N, C, H, W), H and W equal per level; out_s, out_t: (N, K), equal.
        Returns a scalar, with return_terms=True also {'feat', 'soft', 'wn'}. No gradient reaches fms_t
        and out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: lists of different lengths; shapes that do not meet.
    """

    def __init__(
        self,
        s_channels: list[int],
        t_channels: list[int] | None,
        h_channels: list[int],
        w_wn: float = 1.0,
        scale_logits: bool = True,
    ) -> None:
        super().__init__()
        for name, channels in (('t_channels', t_channels), ('h_channels', h_channels)):
            if channels is not None and len(channels) != len(s_channels):
                raise ValueError(
                    f'Customize: {name} must have {len(s_channels)} levels as s_channels, got '
                    f'{len(channels)}: give one entry per level'
                )
        self.s_channels, self.w_wn = list(s_channels), w_wn
        self.t_channels = list(h_channels if t_channels is None else t_channels)
        self.bridge_s = nn.ModuleList(nn.Conv2d(c, h, 1) for c, h in zip(s_channels, h_channels))
        self.bridge_t = nn.ModuleList(nn.Conv2d(c, h, 1) for c, h in zip(t_channels or [], h_channels))
        self.m = nn.Parameter(torch.ones(1)) if scale_logits else None

    def forward(
        self,
        fms_s: list[Tensor],
        fms_t: list[Tensor],
        out_s: Tensor,
        out_t: Tensor,
        return_terms: bool = False,
    ):
        self._check(fms_s, fms_t, out_s, out_t)
        with _no_autocast(out_s):
            fms_s, fms_t = [_full(fm, out_s) for fm in fms_s], [_full(fm.detach(), out_s) for fm in fms_t]
            bridged = [_run(b, fm) for b, fm in zip(self.bridge_t, fms_t)] if len(self.bridge_t) else fms_t
            feat = sum(F.mse_loss(_run(b, fm), want) for b, fm, want in zip(self.bridge_s, fms_s, bridged))
            scale = 1 if self.m is None else _full(self.m, out_s)
            soft = F.mse_loss(scale * _full(out_s), _full(out_t.detach(), out_s))
            wn = sum(
                [
                    (_full(b.weight, out_s).flatten(1).square().sum(dim=1) - 1).square().mean()
                    for b in self.bridge_t
                ],
                start=torch.zeros_like(soft),
            )
            loss = feat + soft + self.w_wn * wn
        return (loss, {'feat': feat, 'soft': soft, 'wn': wn}) if return_terms else loss

    def _check(self, fms_s, fms_t, out_s, out_t) -> None:
        _expect('Customize', 'out_s', out_s, 'N', 'C')
        for name, fms, channels in (('fms_s', fms_s, self.s_channels), ('fms_t', fms_t, self.t_channels)):
            if len(fms) != len(channels):
                raise ValueError(
                    f'Customize: {name} must hold {len(channels)} maps, got {len(fms)}: a list, one per level'
                )
            for level, (fm, c) in enumerate(zip(fms, channels)):
                size = 'HW' if name == 'fms_s' else fms_s[level].shape[2:]
                _expect('Customize', f'{name}[{level}]', fm, len(out_s), c, *size)
        _expect('Customize', 'out_t', out_t, *out_s.shape)


def entropies(outs_t: list[Tensor]) -> Tensor:
    """Logits of the sources, each (N, K) -> (N, number of sources) entropies of their softmax."""
    for i, out_t in enumerate(outs_t):
        _expect('entropies', f'outs_t[{i}]', out_t, len(outs_t[0]) if i else 'N', 'C')
    logs = [F.log_softmax(_full(out_t.detach()), dim=1) for out_t in outs_t]
    terms = [torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p) for log_p in logs]
    return torch.stack([-term.sum(dim=1) for term in terms], dim=1)


def select_teacher(outs_t: list[Tensor]) -> Tensor:
    """(N,) index of the source with the smallest entropy; the lowest index of equals."""
    return entropies(outs_t).argmin(dim=1)


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(ka, s, all_t, batch):
    """Round one: each image from the source that is surest of it. A GPU waits for who that is."""
    which = select_teacher([t.out for t in all_t])
    results = []
    for i, (loss, t) in enumerate(zip(ka, all_t)):
        mine = (which == i).nonzero()[:, 0]
        if len(mine):
            maps = ([f.pres[k][mine] for k in batch.layers] for f in (s, t))
            results.append(loss(*maps, s.out[mine], t.out[mine], return_terms=True))
    return _total(results)


def build(loss, probe, **options):
    """One module per source, bridges half as wide as the source's maps."""
    s, *all_t = ([f.pres[k].shape[1] for k in probe.layers] for f in (probe.s, *probe.all_t))
    return nn.ModuleList(loss(s, t, [max(c // 2, 1) for c in t], **options) for t in all_t)


def feed_target(ka, s, all_t, batch):
    """Round two: every image from every component, each for its own head."""
    return _total(
        loss(*([f.pres[k] for k in batch.layers] for f in (s, t)), s.out[:, block], t.out, return_terms=True)
        for loss, t, block in zip(ka, all_t, batch.blocks)
    )


def build_target(loss, probe, **options):
    """One module per component, bridges on the target's side only."""
    s, *all_t = ([f.pres[k].shape[1] for k in probe.layers] for f in (probe.s, *probe.all_t))
    return nn.ModuleList(loss(s, None, t, **options) for t in all_t)


def _total(results) -> tuple[Tensor, dict]:
    """The sum of several (loss, terms)."""
    losses, terms = zip(*results)
    return sum(losses), {key: sum(term[key] for term in terms) for key in terms[0]}
