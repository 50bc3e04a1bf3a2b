"""SOKA, self-coordinated amalgamation: a weighted sum of the teachers' maps, and balanced task losses.

S. Luo, W. Pan, X. Wang, D. Wang, H. Tang, M. Song, "Collaboration by Competition: Self-coordinated Knowledge
Amalgamation for Multi-talent Student Learning", ECCV 2020.

    collaboration:  loss = mean over all elements of (fm_s - sum over teachers of A_i * fm_t_i)^2;  A learned
    competition:    g_i = || gradient of task loss L_i in the last shared weight ||,  G_i = w_i * g_i
                    r_i = (L_i / L_i at the start) / mean over tasks of the same
                    loss = sum over tasks of |G_i - mean(G) * r_i^alpha|, the target held constant
                    then w <- w / sum(w)                                          (GradNorm, arXiv:1711.02257)

Tap: maps of the student's shared part and of every teacher, equal shapes; one SOKAFeature per level. Per
batch: heads on sum of w_i * L_i; shared part on 0.05 of it plus the feature loss; w on the balance. w stays
at 1 / n in the first tenth of the run.

Differences: the authors published no code. KamalEngine's reproduction, which its readme says may differ from
the paper, freezes layers after the forward pass, so that its encoder and A never train after the first phase.
We keep three optimisers apart instead. Its A has a weight per position, shape (C, H, W); (C, 1, 1) is ours
and fits any image size. Any number of tasks. w is kept at 1e-3 or above, then divided
by its sum.

Source: zju-vipa/KamalEngine, kamal/amalgamation/taskonomy_amalgamation.py (a reproduction, not the authors');
the balance: formula only.

Use:
    >>> import torch
    >>> from soka import SOKAFeature
    >>> fm_s = torch.randn(8, 16, 4, 4, requires_grad=True)
    >>> fms_t = [torch.randn(8, 16, 4, 4), torch.randn(8, 16, 4, 4)]
    >>> SOKAFeature(2, (16, 1, 1))(fm_s, fms_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class SOKAFeature(nn.Module):
    """Squared distance of the student's map to a learned sum of the teachers' maps.

    Args:
        n_teachers: how many.
        shape: of the weights of one teacher, (C, H, W) or (C, 1, 1); drawn from [0, 1).

    Shape:
        fm_s: (N, C, H, W); fms_t: list of the same shape. Returns a scalar, with return_terms=True also
        {'la': the same}. No gradient reaches fms_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: shape does not have three axes; a map does not fit it or fm_s.
    """

    def __init__(self, n_teachers: int, shape: tuple) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(
                f'SOKAFeature: shape must be (C, H, W) or (C, 1, 1), got {tuple(shape)}: take fm_s.shape[1:]'
            )
        self.weight = nn.Parameter(torch.rand(n_teachers, *shape))

    def forward(self, fm_s: Tensor, fms_t: list[Tensor], return_terms: bool = False):
        teachers, *shape = self.weight.shape
        _expect(
            'SOKAFeature',
            'fm_s',
            fm_s,
            'N',
            shape[0],
            *('HW'[i] if n == 1 else n for i, n in enumerate(shape[1:])),
        )
        if len(fms_t) != teachers:
            raise ValueError(
                f'SOKAFeature: fms_t must hold {teachers} maps, got {len(fms_t)}: one per teacher'
            )
        for i, fm_t in enumerate(fms_t):
            _expect('SOKAFeature', f'fms_t[{i}]', fm_t, *fm_s.shape)
        joined = sum(w * _full(fm_t.detach(), fm_s) for w, fm_t in zip(_full(self.weight, fm_s), fms_t))
        loss = (_full(fm_s) - joined).square().mean()
        return (loss, {'la': loss}) if return_terms else loss


class GradNorm(nn.Module):
    """Task weights that let all tasks train at one pace.

    Args:
        n_tasks: how many.
        alpha: how strongly slower tasks are favoured, >= 0; 1.5.

    Shape:
        task_losses: (n_tasks,); shared_param: the weight of the last shared layer. Returns a scalar whose
        gradient reaches `weights` only. The first call fills `init_losses`.

    Raises:
        ValueError: task_losses has another length.
    """

    def __init__(self, n_tasks: int, alpha: float = 1.5) -> None:
        super().__init__()
        self.alpha = alpha
        self.weights = nn.Parameter(torch.full((n_tasks,), 1 / n_tasks))
        self.register_buffer('init_losses', torch.zeros(n_tasks))

    def forward(self, task_losses: Tensor, shared_param: Tensor) -> Tensor:
        with _no_autocast(task_losses):
            grads = [torch.autograd.grad(loss, shared_param, retain_graph=True)[0] for loss in task_losses]
            norms = [grad.norm() for grad in grads]
        return self.balance(task_losses, torch.stack(norms))

    def balance(self, task_losses: Tensor, grad_norm: Tensor) -> Tensor:
        """The same from the norms of the gradients, (n_tasks,)."""
        if task_losses.shape != self.weights.shape:
            raise ValueError(
                f'GradNorm: task_losses must be {tuple(self.weights.shape)}, got {tuple(task_losses.shape)}: '
                f'stack the losses of the {len(self.weights)} tasks'
            )
        task_losses, grad_norm = task_losses.detach(), grad_norm.detach()
        self.start(task_losses)
        tiny = 1e-12
        ratio = task_losses / self.init_losses.clamp(min=tiny)
        ratio = ratio / ratio.mean().clamp(min=tiny)
        scaled = self.weights * grad_norm
        return (scaled - scaled.detach().mean() * ratio**self.alpha).abs().sum()

    @torch.no_grad()
    def start(self, task_losses: Tensor) -> None:
        """Remember the first losses, once."""
        self.init_losses.copy_(torch.where(self.init_losses == 0, task_losses.detach(), self.init_losses))

    @torch.no_grad()
    def renormalise(self) -> None:
        """After the optimiser's step: weights sum to 1."""
        self.weights.clamp_(min=1e-3)
        self.weights.div_(self.weights.sum())


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


class Coordination(nn.Module):
    """SOKA's parts: a feature loss per level, the balance of tasks, the last weight that they share."""

    def __init__(self, channels: list, n_teachers: int, shared: nn.Parameter, alpha: float = 1.5) -> None:
        super().__init__()
        self.features = nn.ModuleList(SOKAFeature(n_teachers, (c, 1, 1)) for c in channels)
        self.norm, self.shared = GradNorm(n_teachers, alpha), [shared]  # a list: it is the student's


def feed(ka, s, all_t, batch):
    """The tasks are the teachers' parts of the classes, each with the soft targets of its teacher."""
    parts = torch.stack([batch.soft(s.out[:, block], [t.out]) for t, block in zip(all_t, batch.blocks)])
    terms = {f'task{i}': part for i, part in enumerate(parts, 1)}
    ka.norm.start(parts)
    if batch.update == 'balance':
        return ka.norm(parts, ka.shared[0]), terms
    loss = (ka.norm.weights.detach() * parts).sum()
    la = sum(f(s.fms[k], [t.fms[k] for t in all_t]) for k, f in zip(batch.layers, ka.features))
    if batch.update == 'collaboration':
        loss = 0.05 * loss + la
    return loss, terms | {'la': la}


def build(loss, probe, **options):
    body = [m for module in probe.net_s.feat_modules() for m in module.modules() if isinstance(m, nn.Conv2d)]
    wide = [conv for conv in body if conv.kernel_size != (1, 1)]
    channels = [probe.s.fms[k].shape[1] for k in probe.layers]
    return loss(channels, len(probe.all_t), (wide or body)[-1].weight, **options)


def parameters(net, ka) -> dict:
    """What each update moves: heads on the tasks, the shared part on the maps, the weights on the balance."""
    head = list(net.classifier_layer().parameters())
    body = [p for p in net.parameters() if all(p is not q for q in head)]
    features = list(ka.features.parameters())
    return {
        'all': ([*body, *head], []),
        'competition': (head, []),
        'collaboration': (body, features),
        'balance': ([], [ka.norm.weights]),
    }


def after_update(ka, update: str) -> None:
    if update == 'balance':
        ka.norm.renormalise()
