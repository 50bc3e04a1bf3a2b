"""The three kinds of image sources of a data-free training: online, pool, fixed; see dfkd_source.py."""

import torch
from torch import Tensor, nn

from dataset import Resident
from engine.dfkd_pool import Pool, draw_crops
from engine.dfkd_source import Made, Source


class Online(Source):
    """A generator that is trained as long as the student."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        recipe = self.recipe
        self.generator = self.network(self.row.images.generator(recipe, self.setting, self.options))
        self.parts |= {'generator': self.generator}
        self.parts['opt_g'] = self.opt_g = self.adam(self.generator.parameters(), recipe.lr_g)
        self.judge = self.network(self.row.images.judge(self.options)) if self.row.images.judge else None
        if self.judge:
            self.parts['judge'] = self.judge
            self.parts['opt_d'] = self.opt_d = self.adam(self.judge.parameters(), recipe.lr_g)
        self.z: Tensor | None = None
        self.order = iter(())  # of the other domain's images

    def begin_epoch(self, seed: int, epoch: int) -> None:
        super().begin_epoch(seed, epoch)
        self.order = iter(())

    def make(self) -> None:
        for _ in range(self.recipe.g_steps):
            self.z = self.noise(self.recipe.synth_batch_size)
            x = self.normalised(self.generator(self.z), self.generator)
            made = Made(self, x, self.teacher(x), z=self.z)
            said = {}
            if self.judge:
                said['loss_d'] = self.learn_to_judge(x.detach())
                self.judge.requires_grad_(False)
                made.d_fake = self.judge(x)
                self.judge.requires_grad_(True)
            loss, terms = self.loss(made)
            if self.descend(loss, [self.opt_g]):
                self.meter.add(None, x, loss_g=loss, **terms, **said)
            self.last, self.said = x.detach(), made.t

    def learn_to_judge(self, x: Tensor) -> Tensor:
        ood, index = self.setting.ood, next(self.order, ())
        if len(index) < len(x):  # another pass
            self.order = iter(torch.randperm(len(ood), generator=self.rng).to(x.device).split(len(x)))
            index = next(self.order)
        centre = torch.full((len(x), 2), 4, device=x.device)
        real = ood.crops(index, centre, torch.zeros_like(index))  # as they are
        loss = self.kd.discriminator_loss(self.judge(x), self.judge(real))
        self.descend(loss, [self.opt_d])
        return loss

    @torch.no_grad()
    def sample(self) -> Tensor:
        if self.row.images.sample == 'made':
            return self.last
        z = self.z if self.row.images.sample == 'same noise' else self.noise(self.recipe.batch_size)
        self.generator.train(self.row.images.train_mode)
        x = self.normalised(self.generator(z), self.generator)
        self.generator.train()
        if self.setting.ood:
            x = torch.cat([x, self.augmented(self.setting.ood, len(x))])
        return x

    def augmented(self, images: Resident, n: int) -> Tensor:
        index = torch.randint(len(images), (n,), generator=self.rng)
        return draw_crops(images, index, self.rng)

    @torch.no_grad()
    def show(self, n: int) -> Tensor:
        z = torch.randn(n, self.recipe.nz, generator=torch.Generator().manual_seed(0))
        images = self.generator.eval()(z.to(self.setting.device))
        self.generator.train()
        return images if self.generator.pixels else self.setting.pixels(images)


class Fixed(Source):
    """Generators with decoders, trained before the student; then a fixed set of images from all of them."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        make, options = self.row.images, self.options
        count = range(options['n_gen'])
        nets = [make.generator(self.recipe, self.setting, options) for _ in count]
        self.generators = self.network(nn.ModuleList(nets))
        decoders = [make.decoder(self.recipe, self.setting, options) for _ in count]
        self.decoders = self.network(nn.ModuleList(decoders))
        self.opt_g = self.adam([*self.generators.parameters(), *self.decoders.parameters()], self.recipe.lr_g)
        self.parts |= {'generators': self.generators, 'decoders': self.decoders, 'opt_g': self.opt_g}
        self.order, self.trained = iter(()), False

    def begin_epoch(self, seed: int, epoch: int) -> None:
        super().begin_epoch(seed, epoch)
        self.order, self.trained = iter(()), epoch >= self.recipe.warmup
        if self.trained:
            generator = torch.Generator().manual_seed(seed)
            self.set = self.some(self.options['n_set'], generator)
            self.generators.eval()

    def some(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise, and labels one-hot."""
        z = torch.randn(n, self.recipe.nz, generator=generator)
        label = torch.randint(self.setting.num_classes, (n,), generator=generator)
        label = nn.functional.one_hot(label, self.setting.num_classes)
        return z.to(self.setting.device), label.to(self.setting.device, torch.float32)

    def make(self) -> None:
        for _ in range(0 if self.trained else self.recipe.g_steps):
            total, said = 0, {}
            for generator, decoder in zip(self.generators, self.decoders):  # each learns by itself
                z, label = self.some(self.recipe.synth_batch_size, self.rng)
                x = generator(z, label)
                made = Made(self, x, self.teacher(x), label, z, z_hat=decoder(x))
                loss, terms = self.loss(made)
                total = total + loss
                said = {name: said.get(name, 0) + term / len(self.generators) for name, term in terms.items()}
            if self.descend(total, [self.opt_g]):
                self.meter.add(None, x, loss_g=total / len(self.generators), **said)
            self.last = x.detach()

    @torch.no_grad()
    def sample(self) -> Tensor:
        count, n = len(self.generators), len(self.set[0])
        index = next(self.order, None)
        if index is None:
            order = torch.randperm(count * n, generator=self.rng).to(self.setting.device)
            self.order = iter(order.split(self.recipe.batch_size))
            index = next(self.order)
        parts = [index[index // n == k] % n for k in range(count)]
        nets = zip(self.generators, parts)
        self.last = torch.cat([net(self.set[0][part], self.set[1][part]) for net, part in nets if len(part)])
        return self.last

    @torch.no_grad()
    def show(self, n: int) -> Tensor:
        z, label = self.some(n, torch.Generator().manual_seed(0))
        label = torch.eye(self.setting.num_classes, device=label.device).repeat(n, 1)[:n]
        was = self.generators.training
        images = self.generators[0].eval()(z, label)
        self.generators.train(was)
        return self.setting.pixels(images)


SOURCES = {'online': Online, 'pool': Pool, 'fixed': Fixed}
