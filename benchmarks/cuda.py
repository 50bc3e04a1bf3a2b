"""What only a GPU can tell: do the losses agree with the CPU, does a step wait for the host, how fast is it.

    python -m benchmarks.cuda                    everything but G2, some minutes
    python -m benchmarks.cuda agree G3           only these
    python -m benchmarks.cuda G2 --epochs 200    the wall time of train_kd.py's runs on CIFAR-10
    python -m benchmarks.cuda --device cpu       a rehearsal without a GPU: no figure of it means anything

agree  every row of METHODS: loss and gradient of the student's weights on the GPU against the CPU, float32
       without TF32, the same weights and images; rows that draw random numbers on the device: finite
G1     a training step of ResNet-20, batch 128, bfloat16: a replayed CUDA graph against the usual step
G2     train_kd.py st --cuda_graphs, ResNet-20 from ResNet-20 and from ResNet-110, start to end
G3     steps of every row under torch.cuda.set_sync_debug_mode('error')
G4     is a sum: of the seconds in the result files that tools/reproduce.py writes on the GPU

Exit code 1 if a row disagrees or waits. Writes JSON with --out FILE.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import models
import train_base
import train_kd
import utils
from benchmarks.trainer import BATCH, data, students_of
from kd_losses import METHODS

ROWS = [name for name, m in METHODS.items() if not m.peers]
TOLERANCE = 2e-3  # of the largest gradient; float32 sums in another order, through a network


def student_gradient(name: str, n: int, device: torch.device):
    """(loss, gradients of the student's weights, whether random numbers were drawn) of one step."""
    train = data(64, device)
    runs, world = students_of([name], 'resnet14', train, 'off', n)
    (run,) = runs
    kept = {}
    run.opt.register_step_pre_hook(lambda *_: kept.update(
        {key: p.grad.detach().cpu().clone() for key, p in run.net.named_parameters() if p.grad is not None}
    ))  # fmt: skip
    before = run.generator.get_state().clone()
    take_step(run, world, next(train.train_batches(n, 0, 0, world.views)))
    loss = {key: float(value) / n for key, value in run.meter.sums.items()}
    return loss.get('ce', 0) + loss['kd'], kept, not torch.equal(before, run.generator.get_state())


def take_step(run, world, batch) -> None:
    """What train_kd.py does with a batch, for one student, late in a run when every loss counts."""
    img, target, index, more = batch
    ts = world.teachers_on(img)
    b = SimpleNamespace(img=img, target=target, index=index, views=more, epoch=140, epochs=200,
                        teacher=world.teacher, net_t=world.net_t)  # fmt: skip
    b.shared = world.prepared([run], ts, b)
    train_kd.train_student(run, b, ts)


def agree(device: torch.device) -> list[dict]:
    rows = []
    for name in ROWS:
        here, there = (student_gradient(name, 16, d) for d in (torch.device('cpu'), device))
        scale = max(float(g.abs().max()) for g in here[1].values())
        worst = max(float((here[1][key] - there[1][key]).abs().max()) for key in here[1]) / scale
        loss = abs(here[0] - there[0]) / abs(here[0])
        finite = all(torch.isfinite(g).all() for g in there[1].values())
        ok = finite and (here[2] or max(loss, worst) < TOLERANCE)
        said = 'draws: finite' if here[2] else f'loss {loss:.1e}  gradient {worst:.1e}'
        print(f'agree {name:12s} {said:38s} {"" if ok else "NO"}', flush=True)
        rows.append({'goal': 'agree', 'what': name, 'loss': loss, 'gradient': worst, 'draws': here[2],
                     'met': ok})  # fmt: skip
    return rows


def replay(device: torch.device, steps: int) -> list[dict]:
    """G1, in milliseconds per step; both ways take turns."""
    train, amp = data(device=device), utils.autocast(device, 'bf16', cache=False)
    batch = next(train.train_batches(BATCH, 0, 0))
    ways = {}
    for way in ('usual', 'replayed'):
        torch.manual_seed(0)
        net = models.build('resnet20', 10).to(device, memory_format=torch.channels_last).train()
        args = argparse.Namespace(lr=0.1, momentum=0.9, weight_decay=1e-4)
        meter, scaler = utils.Meter(way, 0, device), torch.amp.GradScaler(device.type, enabled=False)
        step = partial(train_base.train_step, net, utils.sgd(net.parameters(), args), scaler, amp, meter)
        record = utils.cuda_graph([]) if way == 'replayed' and device.type == 'cuda' else None
        ways[way] = utils.Replayed(step, record)
        for _ in range(8):
            ways[way](*batch)
    times = {way: [timed(step, batch, steps, device) for _ in range(5)] for way, step in ways.items()}
    usual, replayed = (1000 * statistics.median(times[way]) / steps for way in ('usual', 'replayed'))
    ratio = usual / replayed
    print(f'G1    usual {usual:.3f} ms, replayed {replayed:.3f} ms: x{ratio:.2f}, wanted x2.5', flush=True)
    return [{'goal': 'G1', 'what': 'ResNet-20 step, replayed graph', 'usual_ms': usual,
             'replayed_ms': replayed, 'ratio': ratio, 'wanted': 2.5, 'met': ratio >= 2.5}]  # fmt: skip


def timed(step, batch, steps: int, device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        step(*batch)
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize()


def whole_runs(device: torch.device, epochs: int, img_root: str) -> list[dict]:
    """G2: seconds of whole runs of the script. The teachers are untrained, which changes no time."""
    rows = []
    for teacher, most in (('resnet20', 120), ('resnet110', 200)):
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / 'teacher.pt'
            torch.save(models.build(teacher, 10).state_dict(), weights)
            words = ['train_kd.py', '--kd_mode', 'st', '--t_name', teacher, '--t_model', str(weights),
                     '--s_name', 'resnet20', '--data_name', 'cifar10', '--img_root', img_root,
                     '--save_root', folder, '--amp', 'bf16', '--cuda_graphs', '--device', str(device),
                     '--epochs', str(epochs)]  # fmt: skip
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
        met = seconds <= most if epochs == 200 else None
        print(
            f'G2    {epochs} epochs R20 from {teacher}: {seconds:.0f} s, wanted {most} s for 200', flush=True
        )
        rows.append({'goal': 'G2', 'what': f'R20 from {teacher}', 'epochs': epochs, 'seconds': seconds,
                     'wanted': most, 'met': met})  # fmt: skip
    return rows


def unsynchronised(device: torch.device) -> list[dict]:
    """G3: three steps to warm up, then two in which waiting for the device is an error."""
    rows = []
    for name in ROWS:
        train = data(6 * 32, device)
        (run,), world = students_of([name], 'resnet14', train, 'bf16', 32)
        batches = list(train.train_batches(32, 0, 0, world.views))
        said = ''
        for k, batch in enumerate(batches):
            if device.type == 'cuda':
                torch.cuda.set_sync_debug_mode('error' if k >= 3 else 'default')
            try:
                take_step(run, world, batch)
            except RuntimeError as error:
                said = ' '.join(str(error).split())[:90]
                break
            finally:
                if device.type == 'cuda':
                    torch.cuda.set_sync_debug_mode('default')
        eager = METHODS[name].eager
        met = not said or bool(eager)
        print(
            f'G3    {name:12s} {said or "no waiting":60s} {eager if said else ""}{"" if met else " NO"}',
            flush=True,
        )
        rows.append({'goal': 'G3', 'what': name, 'waits': said, 'eager': eager, 'met': met})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('goals', nargs='*', metavar='agree|G1|G2|G3', help='default agree G1 G3')
    parser.add_argument('--device', default='cuda', help='default cuda')
    parser.add_argument('--epochs', type=int, default=200, help='G2: default 200')
    parser.add_argument('--steps', type=int, default=100, help='G1: per round, default 100')
    parser.add_argument('--img_root', default='./data', help='G2: where CIFAR-10 lies, default ./data')
    parser.add_argument('--out', help='also write the results here, as JSON')
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        print('benchmarks.cuda: error: no CUDA device here (--device cpu rehearses)', file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    wanted = {
        'agree': partial(agree, device),
        'G1': partial(replay, device, args.steps),
        'G2': partial(whole_runs, device, args.epochs, args.img_root),
        'G3': partial(unsynchronised, device),
    }
    if unknown := set(args.goals) - wanted.keys():
        print(f'benchmarks.cuda: error: no goal is called {", ".join(sorted(unknown))}', file=sys.stderr)
        return 2
    rows = [row for goal in args.goals or ('agree', 'G1', 'G3') for row in wanted[goal]()]
    if args.out:
        origin = utils.provenance(device)
        origin['command'] = ' '.join(['python -m benchmarks.cuda', *sys.argv[1:]])
        utils.write_json(Path(args.out), {'rows': rows, **origin})
    return int(any(row['met'] is False for row in rows if row['goal'] in ('agree', 'G3')))


if __name__ == '__main__':
    sys.exit(main())
