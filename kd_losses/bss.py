"""BSS, boundary supporting samples: soft targets on images pushed onto the teacher's decision boundary.

B. Heo, M. Lee, S. Yun, J. Y. Choi, "Knowledge Distillation with Adversarial Samples Supporting Decision
Boundary", AAAI 2019, arXiv:1805.05532.

    base samples: both networks are right; at most attack_size, those where their probabilities of the other
        classes differ most;  attack class: another class, drawn by the teacher's probability
    attack, num_steps times, as long as the teacher still says target (z = teacher's logits of x):
        d = z[target] - z[attack class],  g = gradient of -d with respect to x
        x <- clip(x + step_alpha * (d + eps) * g / ||g||)
    p = softmax(attacked out / T)
    loss = mean over attacked n of sum over k of p_t * (log p_t - log p_s)                       (no T^2)

Tap: the logits of both networks on the attacked images: a second forward pass of each. The weight falls to 0
in the course of training. The paper combines it with soft targets on the clean images.

Differences: the authors' code: logits, not probabilities, guide the attack (score='prob' is
Knowledge-Distillation-Zoo's; for a confident teacher its gradient vanishes and that zoo's images become NaN),
and the step is divided by the norm, where the paper has its square. A vanishing gradient makes no step.

Cost: no loop over samples or classes, no host synchronisation: a fixed number of slots with a validity mask.

Source: bhheo/BSS_distillation, attacks/attack_BSS.py and train_BSS_distillation.py; score='prob':
AberHu/Knowledge-Distillation-Zoo, kd_losses/bss.py.

Use:
    >>> import torch
    >>> from bss import BSS, BSSAttacker
    >>> net_s, net_t = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)) for _ in 'st')
    >>> x = BSSAttacker().attack(net_t, torch.randn(8, 3, 8, 8), torch.arange(8), torch.arange(8).roll(1))
    >>> BSS()(net_s(x), net_t(x)).backward()
    >>> net_s[1].weight.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BSS(nn.Module):
    """KL divergence of softened probabilities on attacked images; `attack` makes them.

    Args:
        T: temperature, > 0; 3.
        attack_size: at most so many images of a batch are attacked; 32 of 128.
        step_alpha, num_steps, eps, clip, score: see BSSAttacker.

    Shape:
        attacked_out_s, attacked_out_t: (M, K), equal. valid: (M,) bool, samples that count; default all.
        Returns a scalar, 0 if none counts. No gradient reaches attacked_out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T or attack_size is not positive; the shapes differ.
    """

    def __init__(
        self,
        T: float = 3.0,
        attack_size: int = 32,
        step_alpha: float = 0.3,
        num_steps: int = 10,
        eps: float = 1e-4,
        clip: tuple = (-2.5, 2.5),
        score: str = 'logit',
    ) -> None:
        super().__init__()
        if not T > 0 or attack_size < 1:
            raise ValueError(f'BSS: T and attack_size must be > 0, got {T} and {attack_size}')
        self.T, self.attack_size = T, attack_size
        self.attacker = BSSAttacker(step_alpha, num_steps, eps, clip, score)

    def forward(self, attacked_out_s: Tensor, attacked_out_t: Tensor, valid: Tensor | None = None) -> Tensor:
        if attacked_out_s.shape[:1] == (0,) == attacked_out_t.shape[:1]:
            return _full(attacked_out_s).sum()  # none was attacked
        _expect('BSS', 'attacked_out_s', attacked_out_s, 'M', 'K')
        _expect('BSS', 'attacked_out_t', attacked_out_t, *attacked_out_s.shape)
        if valid is not None:
            _expect('BSS', 'valid', valid, len(attacked_out_s))
        log_p_s = F.log_softmax(_full(attacked_out_s) / self.T, dim=1)
        log_p_t = F.log_softmax(_full(attacked_out_t.detach(), attacked_out_s) / self.T, dim=1)
        p_t = log_p_t.exp()
        kl = torch.where(p_t == 0, 0.0, p_t * (log_p_t - log_p_s)).sum(dim=1)
        return _mean(kl, valid) + 0 * kl.detach().sum()  # NaN and inf show in spare slots too

    @torch.no_grad()
    def attack(
        self, teacher, img: Tensor, out_s: Tensor, out_t: Tensor, target: Tensor, generator=None
    ) -> tuple[Tensor, Tensor]:
        """Attacked images (M, C, H, W), M = min(attack_size, N), and which of them count (M,).

        teacher: callable from images to logits. Labels of -100 are never attacked. Spare slots repeat chosen
        samples, so that the student's batch norm sees nothing else; if none could be chosen, they hold
        different samples of the batch, and none counts.
        """
        _expect('BSS', 'out_s', out_s, 'N', 'K')
        _expect('BSS', 'out_t', out_t, *out_s.shape)
        target, known = _labels('BSS', target, *out_s.shape)
        wanted = target if known is None else torch.where(known, target, -100)  # -100: never right
        index, valid = choose(out_s, out_t, wanted, self.attack_size)
        slots = torch.arange(len(index), device=index.device)
        index = torch.where(valid.any(), index[slots % valid.sum().clamp(min=1)], index)
        u = torch.rand(len(index), **_by(generator), device=index.device)
        attack_class = sample_attack_class(out_t, index, u.to(_full(out_t).dtype))
        # what is not finite counts as right, and must show in the images
        hidden = 0 * (out_s + out_t).softmax(dim=1).sum(dim=1)[index]
        img = img[index] + hidden.to(img.dtype).reshape(-1, *[1] * (img.dim() - 1))
        return self.attacker.attack(teacher, img, target[index], attack_class), valid


class BSSAttacker:
    """Moves images towards, and just over, the teacher's boundary between two classes.

    Args:
        step_alpha: share of the gap closed by a step, 0.3.
        num_steps: 10.
        eps: added to the gap so that the boundary is crossed, 1e-4.
        clip: smallest and largest pixel of a normalised image, (-2.5, 2.5).
        score: 'logit', or 'prob' for the softmax of the logits.
    """

    def __init__(
        self,
        step_alpha: float = 0.3,
        num_steps: int = 10,
        eps: float = 1e-4,
        clip: tuple = (-2.5, 2.5),
        score: str = 'logit',
    ) -> None:
        if score not in ('logit', 'prob'):
            raise ValueError(f'BSSAttacker: score must be "logit" or "prob", got {score!r}')
        self.step_alpha, self.num_steps, self.eps = step_alpha, num_steps, eps
        self.clip, self.score = clip, score

    def attack(self, model, img: Tensor, target: Tensor, attack_class: Tensor) -> Tensor:
        """img (M, C, H, W), target and attack_class (M,) int64 -> attacked images, detached.

        model(img) gives logits, or a tuple whose last element is the logits. Its parameters get no gradient.
        """
        x = img.detach()
        for _ in range(self.num_steps if len(x) else 0):
            with torch.enable_grad():
                x = x.requires_grad_()
                out = model(x)
                out = _full(out[-1] if isinstance(out, (tuple, list)) else out)
                z = out if self.score == 'logit' else out.softmax(dim=1)
                gap = (z.gather(1, target[:, None]) - z.gather(1, attack_class[:, None]))[:, 0]
                (g,) = torch.autograd.grad(-gap.sum(), x)
            with torch.no_grad():
                norm = torch.linalg.vector_norm(g.flatten(1), dim=1)
                active = out.argmax(dim=1) == target
                moves = active & (norm > 0)
                size = self.step_alpha * (gap + self.eps) / torch.where(moves, norm, 1.0)
                size = torch.where(moves, size, 0.0).reshape(-1, *[1] * (x.dim() - 1))
                x = torch.where(active.any(), (x + size * g).clamp(*self.clip), x)  # else it has ended
        return x.detach()


def choose(out_s: Tensor, out_t: Tensor, target: Tensor, attack_size: int) -> tuple[Tensor, Tensor]:
    """(M,) indices of base samples, M = min(attack_size, N), and a mask of those that are some, in front.

    More candidates than attack_size: those of the largest score, in descending order; else by index.
    """
    out_s, out_t = _full(out_s.detach()), _full(out_t.detach(), out_s)
    right = (out_s.argmax(dim=1) == target) & (out_t.argmax(dim=1) == target)
    right = right | ((out_s + out_t).softmax(dim=1).sum(dim=1).isnan() & (target != -100))
    other = torch.arange(out_s.shape[1], device=out_s.device) != target[:, None]
    score = ((out_t.softmax(dim=1) - out_s.softmax(dim=1)).square() * other).sum(dim=1)
    index = torch.arange(len(target), device=target.device)
    key = torch.where(right.sum() > attack_size, score, -index.to(score.dtype))
    key = torch.where(right, key, -torch.inf)
    chosen = key.topk(min(attack_size, len(key))).indices
    return chosen, right[chosen]


def select_base_samples(out_s: Tensor, out_t: Tensor, target: Tensor, attack_size: int) -> Tensor:
    """Indices of the base samples only, as many as there are; reads the count back from the device."""
    chosen, valid = choose(out_s, out_t, target, attack_size)
    return chosen[valid]


def sample_attack_class(out_t: Tensor, idx: Tensor, u: Tensor | None = None) -> Tensor:
    """(M,) classes other than the predicted one, by the teacher's probability; u: uniforms in [0, 1)."""
    p = _full(out_t.detach())[idx].softmax(dim=1)
    u = torch.rand(len(idx), dtype=p.dtype, device=p.device) if u is None else u
    p, classes = p.sort(dim=1, descending=True)
    cumulated = p[:, 1:].cumsum(dim=1)
    r = u[:, None] * p[:, 1:].sum(dim=1, keepdim=True)
    reached = cumulated >= r
    first = torch.where(reached.any(dim=1), reached.to(torch.int64).argmax(dim=1), 0)
    return classes[:, 1:].gather(1, first[:, None])[:, 0]


def _by(generator: torch.Generator | None) -> dict:
    """Left out where there is none: torch.compile cannot pass None for a batch of another size."""
    return {} if generator is None else {'generator': generator}


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """Attack the teacher, then look at the attacked images with both networks."""
    exact = batch.exact or batch.teacher  # in bfloat16 the steps would be others
    attacked, valid = kd.attack(
        lambda x: exact(x).out, batch.img, s.out.detach(), t.out, batch.target, batch.generator
    )
    with torch.no_grad():
        goal = batch.teacher(attacked).out
    return kd(batch.student(attacked).out, goal, valid)


def build(loss, probe, **options):
    """The authors' clip, wider where the pixels of the data go beyond it."""
    scale = list(zip(probe.train_set.mean, probe.train_set.std))
    least, most = min(-m / s for m, s in scale), max((1 - m) / s for m, s in scale)
    return loss(**{'clip': (min(-2.5, float(least)), max(2.5, float(most))), **options})
