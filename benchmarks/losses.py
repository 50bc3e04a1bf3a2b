"""Time and memory of the losses, forward and backward, as ratios to their plain transcriptions in naive.py.

    python -m benchmarks.losses                 all cases
    python -m benchmarks.losses nst rkd         only cases whose name begins so
    python -m benchmarks.losses --quick         fewer rounds

Both sides of a case are measured in turns in this one run, with one thread and CPU time; the first two rounds
do not count. speed = median time of the plain form / median time of ours. Memory is the peak above what was
there before, in MiB. A case fails where the values differ. Losses without a case are plain transcriptions.
Writes JSON with --out FILE.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import models
from benchmarks import naive
from engine.record import provenance, write_json
from kd_losses import (
    AB,
    AT,
    CRD,
    DCM,
    DKD,
    FSP,
    IRG,
    KDSVD,
    NST,
    OFD,
    PKT,
    RKD,
    SP,
    VID,
    LwM,
    QuEST,
    Sobolev,
)
from kd_losses.bss import choose, sample_attack_class
from kd_losses.crd import _unit
from kd_losses.lwm import grad_cam
from kd_losses.sobolev import input_gradient


@dataclass
class Case:
    """ours() and plain() give one loss from fresh leaves; the goals are the specification's."""

    name: str
    size: str
    ours: callable
    plain: callable
    speed: float | None = None
    memory: float | None = None  # MiB; 'no more' means not more than the plain form
    goal_id: str = ''
    backward: bool = True
    tolerance: float = 1e-3


def maps(n, *shapes, relu=True):
    made = [torch.randn(n, *shape) for shape in shapes]
    return [x.relu() if relu else x for x in made]


STAGES = ((16, 32, 32), (32, 16, 16), (64, 8, 8))
LINE = '{:5}{:15}{:26}{:>8}{:>15}{:>8}{:>8}{:>9}{:>9}'
LESS = -1.0  # memory goal: no more than the plain form


def leaf(x):
    return x.detach().clone().requires_grad_()


def pair(name, size, loss, plain, s, t, *goal, **kw):
    return Case(name, size, lambda: loss(leaf(s), t), lambda: plain(leaf(s), t), *goal, **kw)


def per_stage(loss, plain, ss, ts):
    return (
        lambda: sum(loss(leaf(s), t) for s, t in zip(ss, ts)),
        lambda: sum(plain(leaf(s), t) for s, t in zip(ss, ts)),
    )


def cases():
    torch.manual_seed(0)
    ss, ts = maps(128, *STAGES), maps(128, *STAGES)
    pre_s, pre_t = maps(128, *STAGES, relu=False), maps(128, *STAGES, relu=False)
    yield pair('nst', '128 x 64x8x8', NST(), naive.nst, ss[2], ts[2], 30, 20, 'L1')
    s, t = maps(16, (512, 7, 7), (512, 7, 7))
    yield pair('nst', '16 x 512x7x7', NST(), naive.nst, s, t, 100, 16, 'L2')
    stem_s, stem_t = maps(128, STAGES[0], STAGES[0])
    fs, ft = [stem_s, *ss], [stem_t, *ts]

    def flow(loss):
        leaves = [leaf(x) for x in fs]
        return sum(loss(*p) for p in zip(leaves, leaves[1:], ft, ft[1:]))

    yield Case('fsp', '128, three pairs', lambda: flow(FSP()), lambda: flow(naive.fsp), 15, 60, 'L3')
    for n, d, speed, memory, goal in (
        (128, 64, 1.7, 8, 'L4'),
        (512, 64, 3, 32, 'L5'),
        (128, 2048, 20, 32, 'L6'),
    ):
        s, t = torch.randn(n, d), torch.randn(n, d)
        yield pair('rkd angle', f'{n} x {d}', RKD().angle, naive.rkd_angle, s, t, speed, memory, goal)
    s, t = torch.randn(128, 64), torch.randn(128, 64)
    yield pair('rkd distance', '128 x 64', RKD().distance, naive.rkd_distance, s, t, 1.1, LESS, 'L10')
    yield pair('pkt', '128 x 64', PKT(), naive.pkt, s, t)
    for negatives, speed, memory, goal in ((16384, 15, 80, 'L7'), (4096, 5, 48, 'L8')):
        yield crd(negatives, speed, memory, goal)
    fs, ft = [stem_s, *ss], [stem_t, *ts]
    yield Case('kdsvd', '128, four maps', lambda: KDSVD()([leaf(x) for x in fs], ft),
               lambda: naive.kdsvd([leaf(x) for x in fs], ft), 1.8, LESS, 'L9', tolerance=1e-2)  # fmt: skip
    three = '128, three stages'
    yield Case('at', three, *per_stage(AT(), naive.at, ss, ts), 1.1, LESS, 'L10')
    yield Case('sp', three, *per_stage(SP(), naive.sp, ss, ts), 1.1, LESS, 'L10')
    yield Case('ab', three, *per_stage(AB(), naive.ab, pre_s, pre_t), 1.1, LESS, 'L10')
    yield Case('ofd', three, *ofd(pre_s, pre_t), 1.1, LESS, 'L10')
    yield Case('vid', three, *vid(ss, ts), 1.1, LESS, 'L10')
    graph_s, graph_t = ([*m[1:], torch.randn(128, 64), torch.randn(128, 10)] for m in (ss, ts))
    yield Case('irg', '128', lambda: IRG()([leaf(x) for x in graph_s], graph_t),
               lambda: naive.irg([leaf(x) for x in graph_s], graph_t), 1.1, LESS, 'L10')  # fmt: skip
    target = torch.arange(512) % 1000
    out_s, out_t = torch.randn(512, 1000), torch.randn(512, 1000)
    yield Case('dkd', '512 x 1000', lambda: DKD()(leaf(out_s), out_t, target),
               lambda: naive.dkd(leaf(out_s), out_t, target))  # fmt: skip
    outs = [torch.randn(3, 128, 100) for _ in range(2)]
    classes = torch.arange(128) % 100
    yield Case('dcm', '2 x 3 x 128 x 100', lambda: DCM()(leaf(outs[0]), leaf(outs[1]), classes),
               lambda: naive.dcm(leaf(outs[0]), leaf(outs[1]), classes), 1.1, LESS)  # fmt: skip
    yield quest(ss[2], ts[2])
    yield bss()
    yield from gradients()


def crd(negatives, speed, memory, goal):
    n, n_data, width = 128, 50000, 64
    loss = CRD(width, width, n_data, nce_n=negatives)
    feat_s, feat_t = torch.randn(n, width), torch.randn(n, width)
    index = torch.randperm(n_data)[:n]
    rows = torch.cat([index[:, None], torch.randint(n_data, (n, negatives))], dim=1)
    loss(feat_s, feat_t, index, rows)  # sets Z
    loss.eval()  # both sides compare with the same memory

    def plain():
        e = (_unit(embed(f)) for embed, f in ((loss.embed_s, leaf(feat_s)), (loss.embed_t, feat_t)))
        return naive.crd(*e, loss.memory_s, loss.memory_t, rows, loss.z_s, loss.z_t, loss.nce_t)

    return Case('crd', f'128 x {negatives} negatives', lambda: loss(leaf(feat_s), feat_t, index, rows), plain,
                speed, memory, goal)  # fmt: skip


def ofd(ss, ts):
    losses = [OFD(s.shape[1], t.shape[1], torch.full((t.shape[1],), -0.3), 'mean') for s, t in zip(ss, ts)]
    for loss in losses:
        loss.connector = nn.Identity()  # the same on both sides, and dearer than the loss

    def ours():
        return sum(loss(leaf(s), t) for loss, s, t in zip(losses, ss, ts))

    def plain():
        return sum(naive.ofd(leaf(s), t, loss.margin) for loss, s, t in zip(losses, ss, ts))

    return ours, plain


def vid(ss, ts):
    losses = [VID(s.shape[1], t.shape[1]) for s, t in zip(ss, ts)]
    for loss in losses:
        loss.regressor = nn.Identity()  # the same on both sides, and dearer than the loss

    def ours():
        return sum(loss(leaf(s), t) for loss, s, t in zip(losses, ss, ts))

    def plain():
        trio = zip(losses, ss, ts)
        return sum(naive.vid(leaf(s), t, loss.regressor, loss.alpha, loss.eps) for loss, s, t in trio)

    return ours, plain


def quest(s, t):
    words = torch.randn(512, 64)
    loss = QuEST(64, 64, 512, centroids=words)

    def plain():
        return naive.quest(leaf(s), t, words, loss.weight, loss.scale)

    return Case('quest', '128 x 64x8x8, 512 words', lambda: loss(leaf(s), t), plain)


def bss():
    n, K, size = 128, 100, 64
    target = torch.arange(n) % K
    out_s, out_t = (torch.randn(n, K) + 4 * F.one_hot(target, K) for _ in range(2))
    u = torch.rand(size)

    def ours():
        index, valid = choose(out_s, out_t, target, size)
        return (sample_attack_class(out_t, index, u[: len(index)]) * valid).sum()

    def plain():
        return naive.bss_selection(out_s, out_t, target, size, u)[1].sum()

    return Case('bss selection', '64 of 128, 100 classes', ours, plain, 5, None, 'L13', backward=False)


def gradients():
    """Sobolev and LwM with their student and teacher: one training step without the optimiser."""
    img, target = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    net_s = models.build('resnet20', 10)
    net_t = models.build('resnet110', 10).eval().requires_grad_(False)

    def sobolev():
        own = img.detach().requires_grad_()
        jac_t = input_gradient(net_t(own), own, target)
        own = img.detach().requires_grad_()
        out = net_s(own)
        return Sobolev()(out, None, own, target, jac_t) + F.cross_entropy(out, target)

    def lwm():
        with torch.no_grad():
            t = net_t(img, True)
        with torch.enable_grad():
            fm = t.fms[-1].requires_grad_()
            cam_t = grad_cam(net_t.after(3, fm).out, fm, target, side='t')
        s = net_s(img, True)
        return LwM()(s.out, s.fms[-1], None, None, target, cam_t) + F.cross_entropy(s.out, target)

    size, nets = '32, resnet110 -> resnet20', (net_s, net_t, img, target)
    yield Case('sobolev step', size, sobolev, lambda: naive.sobolev_step(*nets), 1.2, LESS / 2, 'L11')
    yield Case('lwm step', size, lwm, lambda: naive.lwm_step(*nets), 1.2, LESS / 3, 'L12')


def once(step, backward: bool) -> float:
    start = time.process_time()
    loss = step()
    if backward:
        loss.backward()
    return time.process_time() - start


def peak(step, backward: bool) -> float:
    """MiB allocated at the same time, above what was there before."""
    with quiet(), torch.profiler.profile(profile_memory=True) as profile:
        once(step, backward)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'trace.json'
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())['traceEvents']
    held = highest = 0
    for event in sorted((e for e in events if e.get('name') == '[memory]'), key=lambda e: e['ts']):
        held += event['args']['Bytes']
        highest = max(highest, held)
    return highest / 2**20


@contextlib.contextmanager
def quiet():
    """The profiler writes trace marks to stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def measure(case: Case, rounds: int) -> dict:
    value, expected = float(case.ours().detach()), float(case.plain().detach())
    if abs(value - expected) > case.tolerance * max(abs(expected), 1e-6):
        raise SystemExit(f'{case.name} {case.size}: ours gives {value}, the plain form {expected}')
    times = ([], [])
    for i in range(rounds + 2):
        for side, step in zip(times, (case.ours, case.plain)):
            seconds = once(step, case.backward)
            if i >= 2:
                side.append(seconds)
    ours, plain = map(statistics.median, times)
    ratios = sorted(b / a for a, b in zip(*times))
    memory = [peak(step, case.backward) for step in (case.ours, case.plain)]
    limit = None if case.memory is None else case.memory if case.memory > 0 else -case.memory * memory[1]
    met = (case.speed is None or plain / ours >= case.speed) and (limit is None or memory[0] <= limit * 1.001)
    return {
        'goal': case.goal_id, 'loss': case.name, 'size': case.size, 'speed': round(plain / ours, 2),
        'speed_low': round(ratios[0], 2), 'speed_high': round(ratios[-1], 2), 'speed_goal': case.speed,
        'mib': round(memory[0], 1), 'mib_plain': round(memory[1], 1),
        'mib_goal': None if limit is None else round(limit, 1), 'met': met,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('names', nargs='*', help='beginnings of case names; default all')
    parser.add_argument('--quick', action='store_true', help='3 rounds instead of 7')
    parser.add_argument('--out', help='also write the results here, as JSON')
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    head = ('goal', 'loss', 'size', 'speed', 'spread', 'wanted', 'MiB', 'plain', 'at most')
    print(LINE.format(*head))
    for case in cases():
        if args.names and not any(case.name.startswith(name) for name in args.names):
            continue
        row = measure(case, 3 if args.quick else 7)
        rows.append(row)
        wanted = f'{row["speed_goal"]:.1f}' if row['speed_goal'] else '-'
        limit = f'{row["mib_goal"]:.0f}' if row['mib_goal'] is not None else '-'
        spread = f'{row["speed_low"]:.2f}-{row["speed_high"]:.2f}'
        cells = (
            row['goal'],
            row['loss'],
            row['size'],
            row['speed'],
            spread,
            wanted,
            row['mib'],
            row['mib_plain'],
        )
        print(LINE.format(*cells, limit) + ('' if row['met'] else '  missed'), flush=True)
    if args.out:
        origin = provenance(torch.device('cpu'))
        origin['command'] = ' '.join(['python -m benchmarks.losses', *sys.argv[1:]])
        write_json(Path(args.out), {'rows': rows, **origin})


if __name__ == '__main__':
    main()
