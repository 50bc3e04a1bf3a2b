"""Networks that learn from each other: from the flags of train_dml.py to the module that steps."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import models
from engine.batch import Batch, Probe, as_float
from engine.errors import UserError, user_errors
from engine.evaluate import features_of, refuse_misfit
from engine.flags import head_of
from engine.method_flags import built_from, refuse_many_processes, refuse_unknown, weights_and_options
from engine.record import fingerprint
from methods import KD, PEERS


class Step(nn.Module):
    """The networks with their loss: one training step is one forward pass of this module."""

    def __init__(self, peers: nn.Module, kd: nn.Module, method, amp) -> None:
        super().__init__()
        self.peers, self.kd, self.method, self.amp = peers, kd, method, amp

    def look(self, x) -> list:
        with self.amp():
            fs = self.peers(x)
        return [as_float(f) for f in fs]

    def forward(self, batch: Batch):
        """Logits of all, sum of their cross-entropies, and the loss."""
        batch.peers = self.look
        own_views = [batch.img, *batch.views.values()] if batch.views else batch.img
        fs = self.look(own_views)
        loss_ce = sum(F.cross_entropy(f.out, batch.target) for f in fs)
        return [f.out for f in fs], loss_ce, self.method.feed(self.kd, fs, None, batch)


class Reading(nn.Module):
    """The networks for evaluation: logits of each, then of the ensemble, stacked."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, img):
        fs = self.step.look(img)
        ensemble = self.step.method.own.ensemble or mean_logits
        return torch.stack([*(f.out for f in fs), ensemble(self.step.kd, fs)])


def mean_logits(kd, fs):
    return torch.stack([f.out for f in fs]).mean(dim=0)


def read_method(args):
    """The row, its weight and its arguments."""
    (name,) = args.kd_mode
    elsewhere = {key: 'is not a method for peers, use train_kd.py' for key in KD}
    refuse_unknown('--kd_mode', [name], PEERS, elsewhere)
    if len(args.net_names) < 2:
        raise UserError(f'--net_names {" ".join(args.net_names)}: needs two networks or more')
    if args.net_inits and len(args.net_inits) != len(args.net_names):
        raise UserError(f'--net_inits: {len(args.net_inits)} files for {len(args.net_names)} networks')
    refuse_many_processes([name], PEERS)
    if args.amp == 'fp16' and PEERS[name].own.second_update:
        raise UserError(f'--amp fp16: gradients of the second update of {name} are not scaled; use bf16')
    weights, options = weights_and_options(args, [name], PEERS)
    if not (PEERS[name].when.ce or weights[name]):
        raise UserError(f'--lambda_kd 0: {name} has nothing to learn, its loss has the cross-entropy')
    return PEERS[name], weights[name], options[name]


def build_networks(args, num_classes: int, device, log) -> list[nn.Module]:
    """Different initial weights, or a refusal: networks that start equal stay equal."""
    nets = []
    for k, name in enumerate(args.net_names):
        torch.manual_seed(args.seed + k)
        with user_errors():
            net = models.build(name, num_classes)
            if args.net_inits:
                head = head_of('--net_inits')
                said = models.load_weights(net, args.net_inits[k], new_head=args.new_head, head=head)
                log(f'initial net{k + 1}: {said}')
        nets.append(net.to(device, memory_format=torch.channels_last))
    prints = [fingerprint(net) for net in nets]
    for k, text in enumerate(prints):
        if text in prints[:k]:
            raise UserError(
                f'--net_inits: networks {prints.index(text) + 1} and {k + 1} start from equal weights '
                f'and would stay equal'
            )
    return nets


def build_step(args, method, options: dict, nets, train, amp, device) -> Step:
    img, target, index, _ = next(train.train_batches(args.batch_size, args.seed, 0))
    img, target, index = img[:2], target[:2], index[:2]
    for name, net in zip(args.net_names, nets):
        refuse_misfit(name, net, train)
    with torch.no_grad():
        seen = [features_of(name, net.eval(), img) for name, net in zip(args.net_names, nets)]

    def another_net(net):
        with user_errors():
            name = args.net_names[next(k for k, other in enumerate(nets) if other is net)]
            return models.build(name, train.num_classes).to(device, memory_format=torch.channels_last)

    probe = Probe(seen, None, nets, None, train, args.batch_size, args.epochs, train.num_classes,
                  another_net)  # fmt: skip
    torch.manual_seed(args.seed)
    with built_from('--kd_args' if options else '', args.kd_mode[0]):
        kd = method.build(method.loss, probe, **options).to(device)
        torch.manual_seed(args.seed + len(nets))  # heads of networks: not the weights that one of them has
        step = Step(method.own.peers(nets, probe), kd, method, amp).to(device)
        inner = method.when.inner and method.when.inner(0, args.epochs)
        batch = Batch(img, target, index, {}, epochs=args.epochs, generator=torch.Generator(device),
                      inner=inner)  # fmt: skip
        copy.deepcopy(step).train()(batch)  # shapes that do not meet show here
    return step
