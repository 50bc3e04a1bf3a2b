"""Time of the losses, forward and backward, as ratios to the same losses in another checkout of this project.

    git worktree add ../before 344b9bc^
    python -m benchmarks.against ../before                  all cases
    python -m benchmarks.against ../before dlb kdcl         only these
    python -m benchmarks.against ../before --rounds 101

Both are loaded into this one process, from the files of their methods. They are measured in short turns, with
one thread and CPU time, on equal inputs of 128 samples, 100 classes and maps of CIFAR's sizes. ratio = median
over the rounds of time here / time there, low and high its quartiles, undisturbed the ratio of the times that
one round in ten undercuts: on a busy machine the steadier figure. A case fails where the values differ by
more than 1e-4. Writes JSON with --out FILE.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.origin import commit_of, provenance
from engine.record import write_json

HERE = Path(__file__).resolve().parent.parent
N, K, D = 128, 100, 64

LINE = (
    '{loss:10} {ratio:6.3f}  ({low} to {high})  undisturbed {undisturbed:6.3f}  {microseconds:8.1f} us, '
    'there {microseconds_there:8.1f} us'
)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def load(folder: Path, name: str):
    """The module of one method, from its file in a checkout."""
    spec = importlib.util.spec_from_file_location(f'{name}_of_{folder.name}', folder / f'kd_losses/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------- a case: the module of the method -> a call without arguments


def logits(cls: str, **options) -> Callable:
    """Student, teacher, labels."""

    def make(module):
        loss, out_s, out_t, y = getattr(module, cls)(**options), leaf(N, K), torch.randn(N, K), labels()
        return lambda: loss(out_s, out_t, y)

    return make


def embeddings(cls: str, *more: str) -> Callable:
    def make(module):
        loss, feat_s, feat_t, y = getattr(module, cls)(), leaf(N, D), torch.randn(N, D), labels()
        return (lambda: loss(feat_s, feat_t, y)) if more else (lambda: loss(feat_s, feat_t))

    return make


def labels() -> Tensor:
    return torch.randint(K, (N,))


def several(count: int, *shape: int) -> list[Tensor]:
    return [leaf(*shape) for _ in range(count)]


def dlb(module):
    loss, out, now, then = module.DLB(), leaf(N, K), leaf(N, K), torch.randn(N, K)
    y, y_prev = labels(), labels()
    return lambda: loss(out, y, now, then, y_prev)


def kdcl(module):
    loss, outs, y = module.KDCL(), several(2, N, K), labels()
    return lambda: loss(outs, y)


def dgkd(module):
    loss, out_s, outs_t, y = module.DGKD().eval(), leaf(N, K), [torch.randn(N, K) for _ in range(3)], labels()
    return lambda: loss(out_s, outs_t, y)


def guided(module):
    """The soft targets of cd; the class had another name before."""
    loss, out_s, out_t, y = (getattr(module, 'GuidedKD', None) or module.GKD)(4.0), leaf(N, K), None, labels()
    out_t = torch.randn(N, K) + 4 * F.one_hot(y, K)
    return lambda: loss(out_s, out_t, y)


def one(module):
    loss, outs, feat, y = module.ONE(D), several(3, N, K), leaf(N, D), labels()
    return lambda: loss(outs, feat, y)


def sobolev(module):
    """With networks of one hidden layer."""
    loss, img, y = module.Sobolev(), leaf(N, 3, 8, 8), labels()
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Tanh(), nn.Linear(32, K)) for _ in range(2)]
    return lambda: loss(nets[0](img), nets[1](img), img, y)


def lwm(module):
    """With the part of a network behind its last map."""
    loss, fm_s, fm_t, y = module.LwM(), leaf(N, D, 8, 8), leaf(N, D, 8, 8), labels()
    heads = [nn.Linear(D, K) for _ in range(2)]
    ends = [lambda fm, head=head: head(fm.relu().mean(dim=(2, 3))) for head in heads]
    return lambda: loss(ends[0](fm_s), fm_s, ends[1](fm_t), fm_t, y)


def okddip(module):
    loss, outs, feats, leader, y = module.OKDDip(D), several(3, N, K), several(3, N, D), leaf(N, K), labels()
    return lambda: loss(outs, feats, leader, y)


def pskd(module):
    loss, out, y, index = module.PSKD(1000, K), leaf(N, K), labels(), torch.randperm(1000)[:N]
    return lambda: loss(out, y, index, 10)


def byot(module):
    loss, outs, feats, y = module.BYOT([D] * 4), several(4, N, K), several(4, N, D), labels()
    return lambda: loss(outs, feats, y)


def dcm(module):
    loss, outs_1, outs_2, y = module.DCM(), several(3, N, K), several(3, N, K), labels()
    return lambda: loss(outs_1, outs_2, y)


def ddgsd(module):
    loss, outs, feats, y = module.DDGSD(), several(2, N, K), several(2, N, D), labels()
    return lambda: loss(*outs, *feats, y)


def tfkd_reg(module):
    loss, out, y = module.TfKDReg(), leaf(N, K), labels()
    return lambda: loss(out, y)


CASES = {
    'byot': ('byot', byot),
    'cd': ('cd', guided),
    'dcm': ('dcm', dcm),
    'ddgsd': ('ddgsd', ddgsd),
    'dgkd': ('dgkd', dgkd),
    'dkd': ('dkd', logits('DKD')),
    'dlb': ('dlb', dlb),
    'eel': ('eel', embeddings('EEL', 'target')),
    'kdcl': ('kdcl', kdcl),
    'lwm': ('lwm', lwm),
    'nkd': ('nkd', logits('NKD')),
    'ofakd': ('ofakd', logits('OFAKD')),
    'okddip': ('okddip', okddip),
    'onadvfd': ('onadvfd', logits('OnAdvFD')),
    'one': ('one', one),
    'pkt': ('pkt', embeddings('PKT')),
    'pskd': ('pskd', pskd),
    'sobolev': ('sobolev', sobolev),
    'tfkd': ('tfkd', tfkd_reg),
    'tfkd_self': ('tfkd', logits('TfKDSelf')),
    'wsld': ('wsld', logits('WSLD')),
}  # fmt: skip


def measure(name: str, folders: list[Path], rounds: int, seconds: float = 0.002) -> dict:
    calls = []
    for folder in folders:
        torch.manual_seed(0)
        file, make = CASES[name]
        calls.append(make(load(folder, file)))
    values = [float(call().detach()) for call in calls]
    if abs(values[0] - values[1]) > 1e-4 * max(1, abs(values[1])):
        raise SystemExit(f'{name}: {values[0]} here, {values[1]} there')
    repeat = max(1, round(seconds / timed(calls[1], 20)))
    times = ([], [])
    for i in range(rounds + 10):
        for side in (i % 2, 1 - i % 2):
            took = timed(calls[side], repeat)
            if i >= 10:
                times[side].append(took)
    ratios = sorted(a / b for a, b in zip(*times))
    quarter = len(ratios) // 4
    tenth = [1e6 * sorted(t)[len(t) // 10] for t in times]
    return {
        'loss': name, 'ratio': round(statistics.median(ratios), 3), 'low': round(ratios[quarter], 3),
        'high': round(ratios[-1 - quarter], 3), 'undisturbed': round(tenth[0] / tenth[1], 3),
        'microseconds': round(tenth[0], 1), 'microseconds_there': round(tenth[1], 1), 'rounds': rounds,
    }  # fmt: skip


def timed(call: Callable, repeat: int) -> float:
    start = time.process_time()
    for _ in range(repeat):
        call().backward()
    return (time.process_time() - start) / repeat


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path, help='the other checkout')
    parser.add_argument('names', nargs='*', help='cases; default all')
    parser.add_argument('--rounds', type=int, default=501, help='default 501')
    parser.add_argument('--out', help='also write the results here, as JSON')
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.names or CASES:
        rows.append(measure(name, [HERE, args.folder.resolve()], args.rounds))
        print(LINE.format(**rows[-1]), flush=True)
    if args.out:
        origin = provenance(torch.device('cpu'))
        words = [str(args.folder), *args.names, '--rounds', str(args.rounds), '--out', args.out]
        origin['command'] = ' '.join(['python -m benchmarks.against', *words])
        write_json(Path(args.out), {'rows': rows, 'commit_there': commit_of(args.folder), **origin})


if __name__ == '__main__':
    main()
