"""A data-free training's images as a pool: inverted batch after batch, or given; see dfkd_kinds.py."""

import copy

import torch
from torch import Tensor, nn

from dataset import Resident
from engine.dfkd_source import Made, Source
from methods.dfkd import Recipe
from models.generators import crop_and_flip


class Pool(Source):
    """Batches of images, made one after the other and kept as bytes; g_steps 0: a given pool."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        images, recipe = self.row.images, self.recipe
        self.pool, self.generator = None, None
        if images.generator:
            self.generator = self.network(images.generator(recipe, self.setting, self.options))
            # an update of the generator itself, where clones of it make the images
            self.slow = self.adam(self.generator.parameters(), recipe.lr_g * recipe.g_steps)
            self.parts |= {'generator': self.generator, 'slow': self.slow}
        head = list(self.kd.parameters())
        self.opt_head = self.adam(head, recipe.lr_g, (0.9, 0.999)) if head else None
        if head:
            self.parts['opt_head'] = self.opt_head
        low, high = (self.setting.normalise(torch.full_like(self.setting.mean, x)) for x in (0.0, 1.0))
        self.low, self.high = low, high

    def make(self) -> None:
        recipe, images = self.recipe, self.row.images
        if recipe.g_steps:
            self.keep(self.inverted(recipe, images))
        self.order = iter(())

    def inverted(self, recipe: Recipe, images) -> Tensor:
        """The best images of some steps, in 0..1."""
        n, device, net = recipe.synth_batch_size, self.setting.device, None
        target = torch.randint(self.setting.num_classes, (n,), generator=self.rng).sort().values
        if self.generator is None:
            target = torch.arange(n) % self.setting.num_classes
            shape = (n, 3, self.setting.size, self.setting.size)
            z = torch.randn(shape, generator=self.rng).to(device, memory_format=torch.channels_last)
            z.requires_grad_()
            opt = self.adam([z], recipe.lr_g)
        else:
            net = images.begin(self.kd, self, self.rng).train()
            z = self.noise(n).requires_grad_()
            z_lr = recipe.lr_z or recipe.lr_g
            opt = self.adam([{'params': list(net.parameters())}, {'params': [z], 'lr': z_lr}], recipe.lr_g)
        target = target.to(device)
        between = images.gradients and (lambda: images.gradients(self.kd, self, net))
        opts = [opt, self.opt_head] if self.opt_head else [opt]
        best_loss, best, kept = torch.full((), float('inf'), device=device), None, None
        for _ in range(recipe.g_steps):
            made_of = net(z) if net else z
            x = images.view(made_of, self.rng) if images.view else self.usual_view(made_of)
            made = Made(self, x, self.teacher(x), target, z, made_of)
            loss, terms = self.loss(made)
            shown, keep = made_of.detach().clone(), made.keep
            better = loss.detach() < best_loss
            best_loss = torch.where(better, loss.detach(), best_loss)
            best = shown if best is None else torch.where(better, shown, best)
            kept = keep if kept is None else torch.where(better, keep, kept)
            if not self.descend(loss, opts, between):
                break
            self.meter.add(None, x, loss_g=loss, **terms)
            if net is None:
                z.data.clamp_(self.low, self.high)
        if images.end and not self.meter.failure:
            images.end(self.kd, self, net, kept)
        return best if net else self.setting.pixels(best)

    def usual_view(self, images: Tensor) -> Tensor:
        x = self.setting.normalise(crop_and_flip(images, self.rng))
        return x.contiguous(memory_format=torch.channels_last)

    def clone(self) -> nn.Module:
        return copy.deepcopy(self.generator)

    def keep(self, images: Tensor) -> None:
        """Into the pool, 8 bits a channel."""
        self.last = self.setting.normalise(images).contiguous(memory_format=torch.channels_last)
        rows = (255 * images.clamp(0, 1)).byte().permute(0, 2, 3, 1)
        kept = rows if self.pool is None else torch.cat([self.pool.images, rows])
        self.fill(kept[-self.recipe.pool_max :] if self.recipe.pool_max else kept)

    def fill(self, images: Tensor) -> None:
        """images: (N, H, W, 3) bytes."""
        self.pool = self.setting.in_memory(images)

    def sample(self) -> Tensor:
        index = next(self.order, None)
        if index is None:  # another pass over the pool
            order = torch.randperm(len(self.pool), generator=self.rng)
            parts = order.split(self.recipe.batch_size)
            self.order = iter([part for part in parts if len(part) > 1 or len(parts) == 1])
            index = next(self.order)
        return draw_crops(self.pool, index, self.rng)

    def show(self, n: int) -> Tensor:
        return self.pool.images[-n:].permute(0, 3, 1, 2).float() / 255

    def facts(self) -> dict:
        if self.last is None:  # nothing was made since a resume, or ever
            images = self.pool.images[-256:].permute(0, 3, 1, 2).float() / 255
            self.last = self.setting.normalise(images)
        return super().facts() | {'pool': len(self.pool)}

    def state_dict(self) -> dict:
        return super().state_dict() | {'pool': None if self.pool is None else self.pool.images}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if state['pool'] is not None:
            self.fill(state['pool'])


def draw_crops(images: Resident, index: Tensor, generator: torch.Generator) -> Tensor:
    """These images, cropped with black around them and flipped at random, normalised."""
    reach = min(images.images.shape[1] // 8, 4)  # 4 for 32 pixels, the most that a set in memory knows
    shift = 4 + torch.randint(-reach, reach + 1, (len(index), 2), generator=generator)
    flip = torch.randint(2, (len(index),), generator=generator)
    return images.crops(*(x.to(images.device) for x in (index, shift, flip)))
