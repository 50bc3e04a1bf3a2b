"""Quantifying knowledge: which pixels a layer keeps, and when in its training a network learnt to keep them.

X. Cheng, Z. Rao, Y. Chen, Q. Zhang, "Explaining Knowledge Distillation by Quantifying the Knowledge", CVPR
2020, arXiv:2003.03622.

    y = img + up(sigma) * noise                  sigma (h, w): a scale per cell, noise: standard normal
    f = relu(features(y)), f0 = relu(features(img))
    H = log(sigma) + 0.5 * log(2 * pi) + 0.5     per cell
    loss = mean of (f - f0)^2 / sigma_f - lam * mean over cells of H

sigma_f is the mean of (f - f0)^2 for sigma = 0.01. As much noise as the layer does not notice is found by
descent; where H is low the layer carries information about the cell, where it is high it has discarded it. A
cell is a visual concept if its H is lower, by more than a threshold, than that of the background in the mean.
Three numbers of a training run are compared with those of another: how many concepts there are, how early and
how simultaneously an image's concepts are learnt, how many that were once there remain.

Tap: any layer, `features` is a function of images in [0, 1] with the normalisation inside; a ReLU follows in
any case. Networks in evaluation mode.

Differences: the authors' code is followed, not the paper's words. It skips the first checkpoint of ResNets
when it counts, but not among the distances, so that each distance is one checkpoint early: nothing is skipped
here. Its slope is infinite where an image had most concepts at epoch 0: such images are left out here.
`metrics` takes means over images: give it what `concepts` found for all of them at once.

Source: Jenniferlyx/Explaining-Knowledge-Distillation-by-Quantifying-the-Knowledge, sigma/train_sigma.py,
sigma/find_knowledge_new.py, model/models.py.

Use:
    >>> import torch
    >>> from knowledge import discard_entropy
    >>> sigma = discard_entropy(torch.nn.Conv2d(3, 4, 3), torch.rand(3, 16, 16), grid=4, steps=5, batch=4)
    >>> sigma.shape
    torch.Size([4, 4])
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def entropy(sigma: Tensor) -> Tensor:
    """Entropy of a normal distribution with this standard deviation, in nats."""
    return sigma.log() + 0.5 * math.log(2 * math.pi) + 0.5


class NoiseScale(nn.Module):
    """The noise that each cell of an image gets.

    Args:
        grid: cells (h, w), or one number for both.
        value: sigma at the start; always held in [0.001, 1].
        dtype: of sigma.

    Shape:
        img: (3, H, W). noise: (B, 3, H, W). Returns the noisy images (B, 3, H, W) and the mean entropy.

    Raises:
        ValueError: shapes are wrong.
    """

    def __init__(
        self, grid: int | tuple[int, int], value: float = 0.01, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        h, w = (grid, grid) if isinstance(grid, int) else grid
        if min(h, w) < 1:
            raise ValueError(f'NoiseScale: grid must have cells, got {grid}: 16 for 224 pixels, 8 for 32')
        self.sigma = nn.Parameter(torch.full((h, w), value, dtype=dtype))

    def clamp(self) -> None:
        """In place: no gradient sees it."""
        with torch.no_grad():
            self.sigma.clamp_(0.001, 1)

    def forward(self, img: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if img.dim() != 3 or noise.dim() != 4 or noise.shape[1:] != img.shape:
            got = f'{tuple(img.shape)} and {tuple(noise.shape)}'
            raise ValueError(f'NoiseScale: img must be (C, H, W), noise (B, C, H, W), got {got}: img[0]')
        self.clamp()
        scale = F.interpolate(self.sigma[None, None], img.shape[1:], mode='nearest')
        return img + scale * noise, entropy(self.sigma).mean()


def layer_change(features: Callable[[Tensor], Tensor], noisy: Tensor, img: Tensor) -> Tensor:
    """(B, ...): squared differences of the layer, after a ReLU, to that of the image without noise."""
    with torch.no_grad():
        clean = F.relu(features(img[None]))
    return (F.relu(features(noisy)) - clean).square()


def discard_entropy(
    features: Callable[[Tensor], Tensor], img: Tensor, grid: int | tuple[int, int] = 16, lam: float = 6.0,
    steps: int = 80, lr: float = 1e-4, batch: int = 96, goal: float = -2.8,
    generator: torch.Generator | None = None,
) -> Tensor | None:  # fmt: skip
    """How much noise each cell bears, at a mean entropy of about `goal`.

    Args:
        features: (B, 3, H, W) -> a layer, differentiable.
        img: (3, H, W) in [0, 1].
        grid: cells.
        lam: what entropy is worth; 6 for ResNets, 7 for VGG and AlexNet. Times 1.5 for the last 21 steps if
            the mean entropy has not exceeded `goal` by then; else these steps are left out.
        steps, lr: of the descent.
        batch: noisy images a step, on img's device.
        goal: the scales of the step whose mean entropy is nearest to it are returned.
        generator: of the noise, on the CPU.

    Returns:
        (h, w), detached; None for an image that the layer does not see: noise does not change it at all.

    Raises:
        ValueError: shapes are wrong; features are not finite.
    """
    scale = NoiseScale(grid, dtype=img.dtype).to(img.device)

    def noise() -> Tensor:
        return torch.randn(batch, *img.shape, generator=generator).to(img)

    with torch.no_grad():
        sigma_f = layer_change(features, scale(img, noise())[0], img).mean()
    if not torch.isfinite(sigma_f):
        raise ValueError(
            f'discard_entropy: features must be finite, got a distance of {float(sigma_f)}: look'
        )
    if sigma_f == 0:
        return None
    best, nearest = None, math.inf
    for step in range(steps):
        noisy, mean_entropy = scale(img, noise())
        value = float(mean_entropy.detach())
        if abs(value - goal) < nearest:
            best, nearest = scale.sigma.detach().clone(), abs(value - goal)
        if step == steps - 21:
            if value > goal:
                break
            lam = 1.5 * lam
        loss = layer_change(features, noisy, img).mean() / sigma_f - lam * mean_entropy
        (grad,) = torch.autograd.grad(loss, scale.sigma)
        if not torch.isfinite(grad).all():
            raise ValueError(f'discard_entropy: features must be finite, got {float(loss)} as loss: look')
        with torch.no_grad():
            scale.sigma -= lr * grad
    return best


# ----------------------------------------------------------------------------------------------- concepts


def central_square(h: int, w: int) -> Tensor:
    """(h, w) bool: what is taken for the foreground of images without a segmentation."""
    mask = torch.zeros(h, w, dtype=torch.bool)
    mask[int(h / 6) : int(5 * h / 6) + 1, int(w / 6) : int(5 * w / 6) + 1] = True
    return mask


def concepts(sigmas: Tensor, foreground: Tensor, threshold: float = 0.2) -> dict[str, Tensor]:
    """The visual concepts of images at checkpoints of a training.

    Args:
        sigmas: (I, M, h, w), of I images at M checkpoints in order.
        foreground: (h, w), or (I, h, w) with a mask for each image; not 0 inside.
        threshold: how much less than the background's a concept's entropy is, in nats.

    Returns:
        fore, back: (I, M) how many concepts lie inside and outside. background: (M,) its mean entropy.
        mask: (I, M, h, w) where the concepts are. inside: (I, h, w) the foreground.

    Raises:
        ValueError: shapes are wrong; an image has no cell inside or none outside.
    """
    if sigmas.dim() != 4 or foreground.shape[-2:] != sigmas.shape[2:] or foreground.dim() not in (2, 3):
        got = f'{tuple(sigmas.shape)} and {tuple(foreground.shape)}'
        remedy = 'a mask of the size of the grid'
        raise ValueError(
            f'concepts: sigmas must be (I, M, h, w), foreground (h, w) or (I, h, w), got {got}: {remedy}'
        )
    inside = (foreground != 0).expand(len(sigmas), *sigmas.shape[2:])
    outside = ~inside
    count = outside.sum(dim=(1, 2))
    if (count == 0).any() or not inside.flatten(1).any(dim=1).all():
        raise ValueError('concepts: foreground must have cells inside and outside, got all or none: a mask')
    h = entropy(sigmas)
    background = ((h * outside[:, None]).sum(dim=(2, 3)) / count[:, None]).mean(dim=0)
    mask = background[:, None, None] - h > threshold
    fore, back = ((mask & where[:, None]).sum(dim=(2, 3)) for where in (inside, outside))
    return {'fore': fore, 'back': back, 'background': background, 'mask': mask, 'inside': inside}


def effective(sigmas: Tensor, foreground: Tensor) -> Tensor:
    """(I,) bool: images that can be used, whose background is discarded at least as much as the foreground.

    sigmas: (I, M, h, w) at checkpoints where the network is trained (the authors: epoch 40 and later).
    """
    h = entropy(sigmas)
    inside = (foreground != 0).expand(len(sigmas), *sigmas.shape[2:])[:, None]
    means = [(h * where).sum(dim=(1, 2, 3)) / where.sum(dim=(1, 2, 3)) for where in (~inside, inside)]
    return means[0] >= means[1]


def distances(path: Sequence[float] | Tensor, checkpoints: Sequence[int] | Tensor) -> Tensor:
    """(M,): how far the weights of a layer have gone until each checkpoint.

    Args:
        path: per epoch the sum over its steps of ||w_after - w_before||, divided by the norm of the initial
            weights; the entry of epoch 0 is 0.
        checkpoints: their epochs.
    """
    path = torch.as_tensor(path, dtype=torch.float64)
    return path.cumsum(0)[torch.as_tensor(checkpoints, dtype=torch.int64)]


def metrics(found: dict[str, Tensor], distance: Tensor) -> dict[str, float]:
    """The numbers of a training run.

    Args:
        found: what `concepts` returned.
        distance: (M,), from `distances`.

    Returns:
        fore, back, ratio: concepts at the last checkpoint, and the share of them that lie inside (0 for an
            image without any), means over images.
        fore_mean, fore_var, fore_slope: mean and variance of the distance at which an image had its most
            concepts inside (the first such checkpoint), and the mean of that number divided by that distance;
            a small variance says that images are learnt at one time. back_...: the same outside.
        fore_share, back_share, total_share: of the cells that were a concept at some checkpoint the share
            that still are at the last, means over images.

    Raises:
        ValueError: distance is not (M,).
    """
    if distance.shape != found['background'].shape:
        wanted, got = tuple(found['background'].shape), tuple(distance.shape)
        raise ValueError(f'metrics: distance must be {wanted}, got {got}: one per checkpoint')
    found, distance = {key: x.cpu() for key, x in found.items()}, distance.cpu()
    last = {where: found[where][:, -1].double() for where in ('fore', 'back')}
    every = last['fore'] + last['back']
    made = {where: float(count.mean()) for where, count in last.items()}
    made['ratio'] = float((last['fore'] / every.clamp(min=1)).mean())
    for where in ('fore', 'back'):
        count = found[where]
        most = count.amax(dim=1, keepdim=True)
        first = ((count == most).cumsum(dim=1) == 0).sum(dim=1)
        at = distance.double()[first]
        moved = at > 0
        made[f'{where}_mean'] = float(at.mean())
        made[f'{where}_var'] = float(at.var(correction=0))
        made[f'{where}_slope'] = float((most[:, 0][moved] / at[moved]).mean())
    mask, inside = found['mask'], found['inside']
    for name, where in (('fore', inside), ('back', ~inside), ('total', torch.ones_like(inside))):
        once = (mask.any(dim=1) & where).sum(dim=(1, 2)).double()
        still = (mask[:, -1] & where).sum(dim=(1, 2)).double()
        made[f'{name}_share'] = float((still / once.clamp(min=1)).mean())
    return made
