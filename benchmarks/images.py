"""What it costs to make images without data, against a plain transcription of the same updates.

    python -m benchmarks.images                  dafl, deepinv, fastdfkd
    python -m benchmarks.images dafl --out FILE  writes JSON

An update of the images' source: resnet20 is the teacher, resnet8 the student, 64 images of 32 pixels, one
thread. The plain form is written as the authors' scripts are: networks as they are built, in float32 and the
usual memory layout, all their parameters asking for gradients, a loss at every hook, and the loss read in
every update. Ours freezes both networks, lays images and networks out channels last, folds the teacher's
batch norms where no statistics are asked for, and reads nothing; in float32 and in bfloat16. Both draw the
same random numbers; if their first losses differ in float32 by more than 1e-3, the comparison ends. CPU time,
both sides in turns; ratio: the median over the rounds of plain time / time here.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from engine.device import autocast, precision
from engine.dfkd_build import Probe
from engine.dfkd_kinds import SOURCES
from engine.dfkd_source import Setting, Source
from engine.record import provenance, write_json
from methods.dfkd import DFKD
from models.generators import crop_and_flip

N, K, SIZE, WIDTH, STEPS, ROUNDS, CPU = 64, 10, 32, 32, 4, 9, torch.device('cpu')
MEAN, STD = (torch.full((3, 1, 1), x) for x in (0.5, 0.25))
LINE = '{:10}{:>10}{:>10}{:>10}{:>8}  {}'


def networks() -> tuple[nn.Module, nn.Module]:
    """Teacher and student, with running statistics that are not those of the start."""
    torch.manual_seed(0)
    nets = models.build('resnet20', K), models.build('resnet8', K)
    with torch.no_grad():
        for net in nets:
            for _ in range(20):
                net.train()(torch.randn(N, 3, SIZE, SIZE))
    return tuple(net.eval() for net in nets)


def begun(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------- as train_dfkd.py does


def source(name: str, amp: str) -> Source:
    """The image source of a row, as train_dfkd.py builds it."""
    row, (net_t, net_s) = DFKD[name], networks()
    recipe = replace(row.recipe, batch_size=N, synth_batch_size=N, g_steps=STEPS, width=WIDTH)
    to_networks = autocast(CPU, amp)
    setting = Setting(MEAN, STD, SIZE, K, CPU, to_networks)
    net_t.requires_grad_(False)
    net_t, net_s = (net.to(memory_format=torch.channels_last) for net in (net_t, net_s))
    if not row.needs.statistics:
        net_t = models.folded(net_t, torch.randn(2, 3, SIZE, SIZE), precision(to_networks, CPU))
    torch.manual_seed(0)
    kd = row.build(row.loss, Probe(net_t), row.weights, row.options)
    return SOURCES[row.images.kind](name, row, recipe, row.weights, row.options, kd, net_t, net_s, setting)


def ours(name: str, amp: str) -> Callable[[], float | None]:
    """() -> STEPS updates, and in the first call the first loss; the source goes on from where it was."""
    made, first = source(name, amp), []
    made.rng.manual_seed(1)
    plain = made.loss

    def loss(batch):
        made.loss = plain
        value, terms = plain(batch)
        first.append(value.item())
        return value, terms

    made.loss = loss

    def updates() -> float | None:
        made.synthesize()
        made.pool = None  # the images are not kept: only making them is compared
        return first.pop() if first else None

    return updates


# ------------------------------------------------------------------------------------------------ plain forms


def statistics_of(net_t: nn.Module, distance: Callable) -> list[Tensor]:
    """A list that holds the distance at every batch norm after each forward pass."""
    found = []

    def hook(k: int, m: nn.Module, x: tuple, y: Tensor) -> None:
        found[k] = distance(m, x[0], k)

    for m in net_t.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(partial(hook, len(found)))
            found.append(torch.zeros(()))
    return found


def distance(m: nn.BatchNorm2d, x: Tensor, k: int) -> Tensor:
    mean = x.mean([0, 2, 3])
    var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
    return torch.norm(m.running_var - var, 2) + torch.norm(m.running_mean - mean, 2)


def generator_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    row = DFKD[name]
    setting = Setting(MEAN, STD, SIZE, K, CPU, None)
    return row.images.generator(replace(row.recipe, width=WIDTH), setting, row.options)


def plain_dafl() -> Callable[[], float]:
    (net_t, _), g, rng = networks(), generator_of('dafl'), begun()
    opt, weights, nz = torch.optim.Adam(g.parameters(), 0.02), DFKD['dafl'].weights, DFKD['dafl'].recipe.nz

    def updates() -> float:
        said = []
        for _ in range(STEPS):
            x = g(torch.randn(N, nz, generator=rng))
            t = net_t(x, True)
            p = F.softmax(t.out, dim=1).mean(dim=0)
            oh, act = F.cross_entropy(t.out, t.out.argmax(dim=1)), -t.feat.abs().mean()
            loss = weights['oh'] * oh + weights['ie'] * (p * torch.log10(p)).sum() + weights['act'] * act
            opt.zero_grad()
            loss.backward()
            opt.step()
            said.append(loss.item())
        return said[0]

    return updates


def plain_deepinv() -> Callable[[], float]:
    (net_t, net_s), rng, weights = networks(), begun(), DFKD['deepinv'].weights
    found, target = statistics_of(net_t, distance), torch.arange(N) % K
    low, high = (0 - MEAN) / STD, (1 - MEAN) / STD

    def updates() -> float:
        said = []
        torch.randint(K, (N,), generator=rng)  # the source draws classes, and takes others here
        x = torch.randn(N, 3, SIZE, SIZE, generator=rng).requires_grad_()
        opt, best, images = torch.optim.Adam([x], 0.1, (0.5, 0.99)), float('inf'), None
        for _ in range(STEPS):
            dy, dx = torch.randint(-4, 5, (2,), generator=rng).tolist()
            seen = torch.roll(x, (dy, dx), (2, 3))
            if torch.randint(2, (), generator=rng).item():
                seen = torch.flip(seen, (3,))
            out_t, out_s = net_t(seen), net_s(seen)
            p, q = (F.softmax(out / 3, dim=1) for out in (out_s, out_t))
            p, q, m = (y.clamp(0.01, 0.99) for y in (p, q, (p + q) / 2))
            js = (
                F.kl_div(p.log(), m, reduction='batchmean') + F.kl_div(q.log(), m, reduction='batchmean')
            ) / 2
            parts = (seen[:, :, :, :-1] - seen[:, :, :, 1:], seen[:, :, :-1] - seen[:, :, 1:],
                     seen[:, :, 1:, :-1] - seen[:, :, :-1, 1:],
                     seen[:, :, :-1, :-1] - seen[:, :, 1:, 1:])  # fmt: skip
            loss = weights['ce'] * F.cross_entropy(out_t, target) + weights['bn'] * sum(found)
            loss = loss + weights['tv_l1'] * sum(d.abs().mean() for d in parts)
            loss = loss + weights['compete'] * (1 - torch.clamp(js, 0, 1))
            said.append(loss.item())
            if said[-1] < best:
                best, images = said[-1], x.data.clone()
            opt.zero_grad()
            net_t.zero_grad()
            net_s.zero_grad()
            loss.backward()
            opt.step()
            x.data = torch.max(torch.min(x.data, high), low)
        assert len(images) == N
        return said[0]

    return updates


def plain_fastdfkd() -> Callable[[], float]:
    (net_t, net_s), g, rng, weights = networks(), generator_of('fastdfkd'), begun(), DFKD['fastdfkd'].weights
    kept, calls, nz = {}, [0], DFKD['fastdfkd'].recipe.nz
    slow = torch.optim.Adam(g.parameters(), 3e-3 * STEPS, (0.5, 0.999))
    now = {}

    def smoothed(m: nn.BatchNorm2d, x: Tensor, k: int) -> Tensor:
        mean, var = x.mean([0, 2, 3]), x.var([0, 2, 3], unbiased=False)
        now[k] = mean.detach(), var.detach()
        if k in kept:
            mean, var = (0.1 * new + 0.9 * old for new, old in zip((mean, var), kept[k]))
        return torch.norm(m.running_var - var, 2) + torch.norm(m.running_mean - mean, 2)

    found = statistics_of(net_t, smoothed)

    def updates() -> float:
        said = []
        calls[0] += 1
        target = torch.randint(K, (N,), generator=rng).sort().values
        fast, z = copy.deepcopy(g).train(), torch.randn(N, nz, generator=rng).requires_grad_()
        opt = torch.optim.Adam(
            [{'params': fast.parameters()}, {'params': [z], 'lr': 0.01}], 3e-3, (0.5, 0.999)
        )
        best, images = float('inf'), None
        slow.zero_grad()
        for _ in range(STEPS):
            pixels = fast(z)
            x = (crop_and_flip(pixels, rng) - MEAN) / STD
            out_t = net_t(x)
            loss = weights['bn'] * sum(found) + weights['oh'] * F.cross_entropy(out_t, target)
            if calls[0] >= DFKD['fastdfkd'].recipe.warmup:
                out_s = net_s(x)
                mask = (out_s.argmax(1) == out_t.argmax(1)).float()
                kl = F.kl_div(F.log_softmax(out_s, 1), F.softmax(out_t, 1), reduction='none').sum(1)
                loss = loss - weights['adv'] * (kl * mask).mean()
            said.append(loss.item())
            if said[-1] < best:
                best, images = said[-1], pixels.data.clone()
            opt.zero_grad()
            loss.backward()
            for p, q in zip(g.parameters(), fast.parameters()):
                p.grad = q.grad.clone() if p.grad is None else p.grad + q.grad
            opt.step()
        for k, pair in now.items():
            kept[k] = tuple(0.9 * a + 0.1 * b for a, b in zip(kept[k], pair)) if k in kept else pair
        slow.step()
        assert len(images) == N
        return said[0]

    return updates


PLAIN = {'dafl': plain_dafl, 'deepinv': plain_deepinv, 'fastdfkd': plain_fastdfkd}


def measure(name: str, amp: str, rounds: int) -> dict:
    here, there = ours(name, amp), PLAIN[name]()
    first = here(), there()
    if amp == 'off' and abs(first[0] - first[1]) > 1e-3 * abs(first[1]):
        raise SystemExit(f'{name}: the first loss is {first[0]} here, {first[1]} there')
    pairs = []
    for i in range(rounds):
        took = [0.0, 0.0]
        for side in (i % 2, 1 - i % 2):
            start = time.process_time()
            (here, there)[side]()
            took[side] = 1e3 * (time.process_time() - start) / STEPS
        pairs.append(took)
    ratios = sorted(b / a for a, b in pairs)
    mine, plain = map(statistics.median, zip(*pairs))
    return {
        'method': name, 'amp': amp, 'ms': round(mine, 1), 'ms_plain': round(plain, 1),
        'ratio': round(statistics.median(ratios), 2), 'ratio_low': round(ratios[0], 2),
        'ratio_high': round(ratios[-1], 2), 'rounds': rounds,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('names', nargs='*', choices=[*PLAIN, []], default=[], help='methods; default all')
    parser.add_argument('--rounds', type=int, default=ROUNDS, help=f'default {ROUNDS}')
    parser.add_argument('--out', help='also write the results here, as JSON')
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(LINE.format('method', 'networks', 'ms', 'plain ms', 'ratio', ''))
    for name in args.names or PLAIN:
        for amp in ('off', 'bf16'):
            rows.append(measure(name, amp, args.rounds))
            r = rows[-1]
            spread = f'{r["ratio_low"]} to {r["ratio_high"]}'
            print(LINE.format(name, amp, r['ms'], r['ms_plain'], r['ratio'], spread), flush=True)
    if args.out:
        origin = provenance(CPU)
        words = [*args.names, '--rounds', str(args.rounds), '--out', args.out]
        origin['command'] = ' '.join(['python -m benchmarks.images', *words])
        write_json(Path(args.out), {'rows': rows, **origin})
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
