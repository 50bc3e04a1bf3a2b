"""The rows of train_dfkd.py: a frozen teacher, a student, and images that are made, not given.

The columns say what is made how, in the spirit of columns.py. A preset is the authors' for CIFAR-10, but for
`deepinv` and `dfq`, whose values are those of a later comparison (zju-vipa/CMI), `mosaickd` (a teacher of
CIFAR-100, images of CIFAR-10) and `kegnet` (SVHN); that of `fastdfkd` is for wide networks.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from dfkd_losses import cmi, dafl, deepinversion, dfad, dfq, fastdfkd, kegnet, mosaickd, zskt
from kd_losses import SoftTarget
from models.generators import (
    Decoder,
    LabelGenerator,
    PatchDiscriminator,
    TransposedGenerator,
    UpsamplingGenerator,
)

from .columns import Limits


@dataclass(frozen=True)
class Recipe:
    """A preset; every field is a flag of train_dfkd.py, too.

    An epoch is ep_steps / kd_steps rounds of one call of the image source (g_steps updates of it) and
    kd_steps updates of the student.
    """

    epochs: int
    ep_steps: int  # updates of the student in an epoch; 0: one pass over the other domain's images
    kd_steps: int
    g_steps: int
    batch_size: int
    lr: float
    lr_g: float
    nz: int = 256
    synth_batch_size: int = 0  # 0: batch_size
    warmup: int = 0  # epochs in which images are made and the student rests
    T: float = 1.0
    optim: str = 'sgd'
    momentum: float = 0.9
    weight_decay: float = 1e-4
    sched: str = 'cosine'  # or 'steps'
    milestones: tuple[float, ...] = ()  # shares of the student's epochs
    eta_min: float = 0.0
    sched_g: str = 'constant'  # or 'student': as the student's
    per_step: bool = False  # the rates move in every step, not every epoch
    betas: tuple[float, float] = (0.9, 0.999)
    lr_z: float = 0.0  # of the noise; 0: lr_g
    clip: float = 0.0  # of both gradients' norms; 0: not
    width: int = 64  # of generators: the authors' has 64
    pool_max: int = 0  # images that a pool keeps, the newest; 0: all


@dataclass(frozen=True)
class Images:
    """Where they come from.

    kind: 'online', 'pool' or 'fixed', see engine/dfkd_kinds.py.
    generator: (recipe, setting, options) -> network; None in a pool: the pixels themselves are optimised.
    judge: (options) -> a discriminator of real images of another domain and generated ones.
    decoder: (recipe, setting, options) -> from images to noise.
    sample: online: the student learns from 'fresh' images, from the 'made' ones of the generator's update, or
        from what the generator makes now of the 'same noise'.
    train_mode: online: of the generator, when it makes images for the student.
    student_first: the student's updates come before the source's.
    view: pool: (images, rng) -> what the networks see, normalised; None: crop, flip, normalise.
    begin: pool: (kd, source, rng) -> the network that makes this batch.
    gradients: pool: (kd, source, network), between backward and every step.
    end: pool: (kd, source, network, kept), after the last.
    """

    kind: str
    generator: Callable | None = None
    judge: Callable | None = None
    decoder: Callable | None = None
    sample: str = 'fresh'
    train_mode: bool = True
    student_first: bool = False
    view: Callable | None = None
    begin: Callable | None = None
    gradients: Callable | None = None
    end: Callable | None = None


@dataclass(frozen=True)
class Needs:
    """What the trainer must provide.

    statistics: batch norms of the teacher with running statistics.
    student: the mode of the student while images are made, 'train' or 'eval'; '': it is not looked at.
    ood: real images of another domain, --ood_name.
    pool: a given pool, --pool_init.
    """

    statistics: bool = False
    student: str = ''
    ood: bool = False
    pool: bool = False


def built(loss, probe, weights, options):
    """With those of the weights and options that its constructor knows."""
    known = inspect.signature(loss).parameters
    return loss(**{key: value for key, value in (weights | options).items() if key in known})


def soft_targets(kd, s, t, T):
    return SoftTarget(T)(s.out, t.out)


@dataclass(frozen=True)
class Method:
    """A row. feed(kd, made) -> terms that the image source minimises, made: see engine/dfkd_source.py.

    weights: of these terms, the authors'.
    student: (kd, s, t, T) -> what the student minimises.
    build: (loss, probe, weights, options) -> module; probe.net_t is a teacher for its hooks.
    options: arguments of loss, source and networks, with their defaults: --kd_args.
    """

    loss: type
    feed: Callable | None
    weights: dict[str, float]
    images: Images
    recipe: Recipe
    student: Callable = soft_targets
    build: Callable = built
    options: dict = field(default_factory=dict)
    needs: Needs = Needs()
    limits: Limits = Limits()


# fmt: off
def upsampling(end, *widths):
    """widths: in units of the recipe's width."""
    def build(recipe, setting, options):
        return UpsamplingGenerator(recipe.nz, setting.size, tuple(int(w * recipe.width) for w in widths), end,
                                   options.get('bn_eps', 1e-5))
    return build


def upsampling_or_transposed(recipe, setting, options):
    """The authors' second network for images of 64 pixels and more."""
    if setting.size < 64:
        return upsampling('norm', 2, 2, 1)(recipe, setting, options)
    return TransposedGenerator(recipe.nz, setting.size, recipe.width)


def labelled(recipe, setting, options): return LabelGenerator(recipe.nz, setting.num_classes, setting.size)
def decoder(recipe, setting, options):  return Decoder(recipe.nz, setting.size, options['n_layers'])
def patches(options):                   return PatchDiscriminator()


ALONE = Limits(one_process='every process would train a generator of its own')
POOL = Limits(one_process='every process would fill a pool of its own')
ADAM = (0.5, 0.999)

DFKD = {
    'dafl': Method(
        dafl.DAFL, dafl.feed, {'oh': 0.05, 'ie': 5.0, 'act': 0.01},
        Images('online', upsampling('norm', 2, 2, 1), sample='made'),
        Recipe(2000, 120, 1, 1, 1024, 0.1, 0.02, nz=1000, weight_decay=5e-4, sched='steps',
               milestones=(0.4, 0.8)),
        options={'bn_eps': 0.8}, limits=ALONE),
    'dfad': Method(
        dfad.DFAD, dfad.feed, {'adv': 1.0},
        Images('online', upsampling_or_transposed, student_first=True),
        Recipe(500, 250, 5, 1, 256, 0.1, 1e-3, weight_decay=5e-4, sched='steps', milestones=(0.2, 0.4),
               sched_g='student'),
        dfad.student, options={'log': False}, needs=Needs(student='train'), limits=ALONE),
    'zskt': Method(
        zskt.ZSKT, zskt.feed, {'adv': 1.0},
        Images('online', upsampling('affine', 2, 2, 1), sample='same noise'),
        Recipe(200, 4000, 10, 1, 128, 2e-3, 1e-3, nz=100, optim='adam', weight_decay=0.0, sched_g='student',
               per_step=True, clip=5.0),
        zskt.student, options={'at': 250.0}, needs=Needs(student='train'), limits=ALONE),
    'dfq': Method(
        dfq.DFQ, dfq.feed, {'adv': 1.0, 'bn': 1.0, 'oh': 1.0, 'balance': 20.0},
        Images('online', upsampling('pixels', 4, 2, 1), train_mode=False),
        Recipe(200, 400, 10, 1, 256, 0.1, 1e-3, betas=ADAM),
        build=dfq.build, needs=Needs(statistics=True, student='eval'), limits=ALONE),
    'deepinv': Method(
        deepinversion.DeepInversion, deepinversion.feed,
        {'ce': 1.0, 'bn': 10.0, 'compete': 1.0, 'tv_l1': 1e-3, 'tv_l2': 0.0, 'l2': 0.0},
        Images('pool', view=deepinversion.view),
        Recipe(200, 400, 400, 1000, 256, 0.1, 0.1, betas=(0.5, 0.99), T=20.0),
        build=deepinversion.build, options={'first_bn_multiplier': 1.0, 'js_T': 3.0, 'exact': False},
        needs=Needs(statistics=True, student='eval'), limits=POOL),
    'cmi': Method(
        cmi.CMI, cmi.feed, {'adv': 0.5, 'bn': 1.0, 'oh': 1.0, 'cr': 0.8},
        Images('pool', upsampling('pixels', 2, 2, 1), begin=cmi.begin, end=cmi.end),
        Recipe(200, 400, 400, 200, 128, 0.1, 1e-3, synth_batch_size=256, betas=ADAM, T=20.0),
        build=cmi.build, options={'cr_T': 0.1, 'head_dim': 256, 'bank_size': 40960, 'n_neg': 4096},
        needs=Needs(statistics=True, student='eval'), limits=POOL),
    'fastdfkd': Method(
        fastdfkd.MomentumBNStatistics, fastdfkd.feed, {'adv': 1.1, 'bn': 10.0, 'oh': 0.4},
        Images('pool', upsampling('pixels', 2, 2, 1), begin=fastdfkd.begin, gradients=fastdfkd.gradients,
               end=fastdfkd.end),
        Recipe(220, 400, 400, 5, 256, 0.2, 3e-3, warmup=20, lr_z=0.01, eta_min=2e-4, betas=ADAM, T=20.0),
        build=fastdfkd.build, options={'bn_mmt': 0.9, 'meta': 'fomaml', 'reset_l0': True},
        needs=Needs(statistics=True, student='eval'), limits=POOL),
    'mosaickd': Method(
        mosaickd.MosaicKD, mosaickd.feed, {'adv': 1.0, 'align': 1.0, 'local': 1.0, 'balance': 10.0},
        Images('online', upsampling('pixels', 4, 2, 1), patches),
        Recipe(200, 0, 5, 1, 256, 0.1, 1e-3, nz=100, betas=ADAM, sched_g='student', per_step=True),
        options={'ood_subset': 0}, needs=Needs(student='train', ood=True), limits=ALONE),
    'kegnet': Method(
        kegnet.KegNet, kegnet.feed, {'cls': 1.0, 'dec': 1.0, 'div': 1.0},
        Images('fixed', labelled, decoder=decoder),
        Recipe(600, 500, 500, 100, 64, 1e-4, 1e-2, nz=10, synth_batch_size=256, warmup=200, optim='adam',
               weight_decay=0.0, sched='steps'),
        options={'metric': 'l1', 'n_gen': 5, 'n_layers': 3, 'n_set': 6400}, limits=ALONE),
    'kd_pool': Method(
        nn.Identity, None, {}, Images('pool'),
        Recipe(200, 400, 400, 0, 128, 0.1, 1e-3, T=20.0), build=lambda loss, *_: loss(),
        needs=Needs(pool=True), limits=POOL),
}
