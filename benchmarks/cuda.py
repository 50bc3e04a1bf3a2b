"""What only a GPU can tell: do the losses agree with the CPU, do recorded steps equal usual ones, how fast.

    python -m benchmarks.cuda                    everything but whole, some minutes
    python -m benchmarks.cuda agree record       only these
    python -m benchmarks.cuda record --rows st crd       ... of these methods
    python -m benchmarks.cuda whole --epochs 200    the wall time of train_kd.py's runs on CIFAR-10
    python -m benchmarks.cuda --device cpu       a rehearsal without a GPU: no figure of it means anything

agree   every row of METHODS, in each phase it has: loss and gradient of the weights on the GPU against the
        CPU, float32 without TF32, the same weights and images; rows that draw on the device: finite
record  every row that a CUDA graph may repeat, in each phase: eight usual steps against three usual and five
        replayed ones, every weight, momentum and sum equal bit for bit under deterministic kernels
draws   crd's negatives on the device: distinct, of other classes, all equally often
replay  a training step of ResNet-20, batch 128, bfloat16: a replayed CUDA graph against the usual step
whole   train_kd.py st --cuda_graphs, ResNet-20 from ResNet-20 and from ResNet-110, start to end
waiting steps of every row under torch.cuda.set_sync_debug_mode('error')
What a table costs is a sum: of the seconds in the result files that tools/reproduce.py writes on the GPU.

A row that raises is reported and the next one follows. Exit code 1 if a row raises, disagrees or waits. With
--out FILE the results are written as JSON after every row.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

import models
import train_base
import train_kd
from benchmarks.trainer import BATCH, data, students_of
from engine import optimise, side_by_side
from engine.batch import Batch
from engine.device import autocast
from engine.meter import Meter
from engine.optimise import sgd
from engine.record import provenance, write_json
from kd_losses import CRD
from methods import METHODS

ROWS = [name for name, m in METHODS.items() if not m.own.peers]
TOLERANCE = 2e-3  # of the largest gradient, or twice what float32 itself costs on the CPU
LOSS_TOLERANCE = 1e-4  # of the loss
STEPS = side_by_side.Repeated.usual + 5


def phases_of(name: str) -> list[str]:
    method = METHODS[name]
    return [
        *(['pretrain'] if method.when.pretrain else []),
        *(['init'] if method.when.alone else []),
        'train',
    ]


def one_student(name: str, phase: str, train, amp: str, n: int, **flags):
    """(run, teachers) of a row, begun in an epoch of this phase: late in a run, when every loss counts."""
    flags |= {'init_epochs': 1, 'pretrain_epochs': 1}
    (run,), teachers, args = students_of([name], 'resnet14', train, amp, n, **flags)
    early = {'train': 140, 'init': -1, 'pretrain': -sum(run.before)}
    train_kd.begin_epoch(run, early[phase], args)
    optimise.set_learning_rate(run.opt, 0.01)
    return run, teachers


def student_gradient(name: str, phase: str, n: int, device: torch.device, exact: bool = False):
    """(loss, gradients of the weights, whether random numbers were drawn) of one step.

    exact: the student's network computes in float64; what the losses read is float32, as always.
    """
    train = data(64, device)
    run, teachers = one_student(name, phase, train, 'off', n)
    if exact:
        net = run.step.net.double()
        net.register_forward_pre_hook(lambda _, seen: (seen[0].double(), *seen[1:]))
        if after := getattr(net, 'after', None):  # fcfd calls it with maps of the other network
            net.after = lambda k, fm: after(k, fm.double())
    kept = {}
    run.opt.register_step_pre_hook(lambda *_: kept.update(
        {key: p.grad.detach().cpu().clone() for key, p in run.step.named_parameters() if p.grad is not None}
    ))  # fmt: skip
    before = run.generator.get_state().clone()
    train_kd.train_student(run, teachers(*next(train.train_batches(n, 0, 0, teachers.views))))
    sums = {key: float(value) / n for key, value in run.meter.sums.items()}
    loss = sum(weight * sums[key] for key, weight in run.weights.items())
    return loss, kept, not torch.equal(before, run.generator.get_state())


def agree(device: torch.device, names: list[str], done) -> None:
    for name in names:
        for phase in phases_of(name):
            done('agree', name, phase, partial(agreement, name, phase, device))


def agreement(name: str, phase: str, device: torch.device) -> dict:
    """How far the GPU's float32 is from the CPU's, beside how far that is from float64."""
    cpu = torch.device('cpu')
    here, there = (student_gradient(name, phase, 16, d) for d in (cpu, device))
    rounding = distance(here[1], student_gradient(name, phase, 16, cpu, exact=True)[1])
    worst, loss = distance(here[1], there[1]), abs(here[0] - there[0]) / abs(here[0])
    finite = all(torch.isfinite(g).all() for g in there[1].values())
    met = finite and (here[2] or loss < LOSS_TOLERANCE and worst < max(TOLERANCE, 2 * rounding))
    said = f'loss {loss:.1e}  gradient {worst:.1e}, of float32 itself {rounding:.1e}'
    return {'said': 'draws: finite' if here[2] else said, 'loss': loss, 'gradient': worst,
            'rounding': rounding, 'draws': here[2], 'met': met}  # fmt: skip


def distance(one: dict, other: dict) -> float:
    """The largest difference of two sets of gradients, in parts of the largest gradient."""
    scale = max(float(g.abs().max()) for g in one.values())
    return max(float((g - other[key]).abs().max()) for key, g in one.items()) / scale


def record(device: torch.device, names: list[str], done) -> None:
    for name in names:
        if not METHODS[name].limits.no_graph:
            for phase in phases_of(name):
                done('record', name, phase, partial(repetition, name, phase, device))


def repetition(name: str, phase: str, device: torch.device) -> dict:
    """Under what --deterministic sets: which algorithm a convolution takes must not depend on timing."""
    torch.backends.cudnn.benchmark, before = False, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic = True
    try:
        usual, recorded = (trained(name, phase, device, way) for way in ('usual', 'recorded'))
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before, False
    differ = [key for key in usual if not torch.equal(usual[key], recorded[key])]
    return {'said': f'differ: {", ".join(differ[:3])}' if differ else 'equal', 'differ': len(differ),
            'met': not differ}  # fmt: skip


def trained(name: str, phase: str, device: torch.device, way: str) -> dict:
    """Everything that training moves, after eight steps."""
    train = data(STEPS * 32, device)
    run, teachers = one_student(name, phase, train, 'bf16', 32, cuda_graphs=True)
    said = []
    graphs = side_by_side.Graphs(device, said.append)
    if way == 'usual':
        run.usual_only = 'as asked'
    for batch in graphs.looks(teachers, train.train_batches(32, 0, 0, teachers.views)):
        graphs.train(train_kd.train_student, [run], batch)
    if said or run.meter.failure:
        raise RuntimeError(' '.join([*said, run.meter.failure]))
    if way == 'recorded' and graphs.own[run.name].replay is None:
        raise RuntimeError('nothing was recorded')
    state = {f'weight {key}': value for key, value in run.step.state_dict().items()}
    for k, moments in enumerate(run.opt.state_dict()['state'].values()):
        state |= {f'optimiser {k} {key}': value for key, value in moments.items()}
    state |= {f'sum {key}': value for key, value in run.meter.sums.items()} | {'steps': run.meter.steps}
    return {key: value.detach().cpu() for key, value in state.items() if isinstance(value, torch.Tensor)}


def stand_in(*_):
    """Records like CUDA, for rehearsals: the work runs at every replay, on what was recorded."""

    def capture(work):
        if work.func is not side_by_side._settled:
            return work, None
        returned = work()  # a look at a batch leaves its results where they were

        def replay():
            for place, value in zip(tensors(returned), tensors(work()), strict=True):
                place.copy_(value)

        return replay, returned

    return capture


def tensors(seen: Batch) -> list[torch.Tensor]:
    """All that a look at a batch has made."""
    teachers = [
        x for t in seen.all_t for x in (t._f.out, t._f.feat, *t._f.fms, *t._f.pres, *t._cast.values())
    ]
    return [*teachers, *(seen.once[key] for key in sorted(seen.once, key=lambda f: f.__name__))]


def draws(device: torch.device, _, done) -> None:
    done('draws', 'crd', '', partial(negatives, device))


def negatives(device: torch.device) -> dict:
    n, many, classes = 600, 200, 3
    targets = torch.arange(n) % classes
    crd = CRD(4, 4, n, targets, nce_n=many).to(device)
    generator = torch.Generator(device).manual_seed(0)
    index = torch.arange(0, n, 7, device=device)
    counts, right = torch.zeros(n, device=device), True
    for _ in range(20):
        drawn = crd._draw(index, generator)[:, 1:]
        ordered = drawn.sort(dim=1).values
        right &= bool((ordered[:, 1:] != ordered[:, :-1]).all())
        right &= bool((crd.targets[drawn] != crd.targets[index][:, None]).all())
        counts += torch.bincount(drawn.flatten(), minlength=n)
    spread = float(counts.std() / counts.mean())
    return {'said': f'distinct, of other classes: {right}; spread of counts {spread:.2f}',
            'met': right and spread < 0.1}  # fmt: skip


def replay(device: torch.device, steps: int, done) -> None:
    done('replay', 'ResNet-20 step, replayed graph', '', partial(faster, device, steps))


def faster(device: torch.device, steps: int) -> dict:
    """replay, in milliseconds per step; both ways take turns."""
    train, amp = data(device=device), autocast(device, 'bf16')
    batch, ways = next(train.train_batches(BATCH, 0, 0)), {}
    for way in ('usual', 'replayed'):
        torch.manual_seed(0)
        net = models.build('resnet20', 10).to(device, memory_format=torch.channels_last).train()
        args = argparse.Namespace(lr=0.1, momentum=0.9, weight_decay=1e-4)
        opt, scaler = sgd(net.parameters(), args), torch.amp.GradScaler(device.type, enabled=False)
        lean = way == 'replayed' and device.type == 'cuda'
        cast, counters = (torch.bfloat16, side_by_side.host_counters(net)) if lean else (None, [])
        run = train_base.Run(way, net, opt, scaler, amp, Meter(way, 0, device), cast, counters, 0.0, [])
        ways[way] = run, side_by_side.Graphs(device) if lean else side_by_side.InTurn()
    for run, how in ways.values():
        several_steps(run, how, batch, 8)
    times = {way: [] for way in ways}
    for _ in range(5):
        for way, (run, how) in ways.items():
            wait(device)
            started = time.perf_counter()
            several_steps(run, how, batch, steps)
            wait(device)
            times[way].append(time.perf_counter() - started)
    usual, replayed = (1000 * statistics.median(times[way]) / steps for way in ways)
    ratio = usual / replayed
    return {'said': f'usual {usual:.3f} ms, replayed {replayed:.3f} ms: x{ratio:.2f}, wanted x2.5',
            'usual_ms': usual, 'replayed_ms': replayed, 'ratio': ratio, 'wanted': 2.5,
            'met': ratio >= 2.5}  # fmt: skip


def several_steps(run, how, batch, steps: int) -> None:
    for seen in how.looks(Batch, [batch] * steps):
        how.train(train_base.train_step, [run], seen)


def wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize()


def whole_runs(device: torch.device, epochs: int, img_root: str, done) -> None:
    for teacher, most in (('resnet20', 120), ('resnet110', 200)):
        done('whole', f'R20 from {teacher}', '', partial(whole_run, teacher, most, device, epochs, img_root))


def whole_run(teacher: str, most: int, device: torch.device, epochs: int, img_root: str) -> dict:
    """Seconds of a whole run of the script. The teacher is untrained, which changes no time."""
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
    return {'said': f'{epochs} epochs: {seconds:.0f} s, wanted {most} s for 200', 'epochs': epochs,
            'seconds': seconds, 'wanted': most, 'met': met}  # fmt: skip


def unsynchronised(device: torch.device, names: list[str], done) -> None:
    for name in names:
        done('waiting', name, '', partial(waits, name, device))


def waits(name: str, device: torch.device) -> dict:
    """Three steps to warm up, then two in which waiting for the device is an error."""
    train = data(5 * 32, device)
    run, teachers = one_student(name, 'train', train, 'bf16', 32)
    said = ''
    for k, batch in enumerate(train.train_batches(32, 0, 0, teachers.views)):
        if device.type == 'cuda':
            torch.cuda.set_sync_debug_mode('error' if k >= 3 else 'default')
        try:
            train_kd.train_student(run, teachers(*batch))
        except RuntimeError as error:
            said = ' '.join(str(error).split())[:90]
            break
        finally:
            if device.type == 'cuda':
                torch.cuda.set_sync_debug_mode('default')
    eager = METHODS[name].limits.no_graph
    return {'said': f'{said or "no waiting"} {eager if said else ""}', 'waits': said, 'eager': eager,
            'met': not said or bool(eager)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('goals', nargs='*', metavar='GOAL', help='default: all but whole')
    parser.add_argument('--rows', nargs='+', default=ROWS, metavar='METHOD', help='only these methods')
    parser.add_argument('--device', default='cuda', help='default cuda')
    parser.add_argument('--epochs', type=int, default=200, help='whole: default 200')
    parser.add_argument('--steps', type=int, default=100, help='replay: per round, default 100')
    parser.add_argument('--img_root', default='./data', help='whole: where CIFAR-10 lies, default ./data')
    parser.add_argument('--out', help='also write the results here, as JSON')
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        print('benchmarks.cuda: error: no CUDA device here (--device cpu rehearses)', file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if device.type != 'cuda':
        side_by_side.cuda_capture = stand_in
    goals = {
        'agree': partial(agree, device, args.rows),
        'record': partial(record, device, args.rows),
        'draws': partial(draws, device, args.rows),
        'replay': partial(replay, device, args.steps),
        'whole': partial(whole_runs, device, args.epochs, args.img_root),
        'waiting': partial(unsynchronised, device, args.rows),
    }
    args.goals = [{'G1': 'replay', 'G2': 'whole', 'G3': 'waiting'}.get(goal, goal) for goal in args.goals]
    if unknown := [*sorted(set(args.goals) - goals.keys()), *sorted(set(args.rows) - set(ROWS))]:
        print(f'benchmarks.cuda: error: no goal or method is called {", ".join(unknown)}', file=sys.stderr)
        return 2
    rows, origin = [], provenance(device)
    origin['command'] = ' '.join(['python -m benchmarks.cuda', *sys.argv[1:]])

    def done(goal: str, what: str, phase: str, measure) -> None:
        started = time.perf_counter()
        try:
            row = measure()
        except Exception as error:  # one row must not cost the others, least of all on a borrowed GPU
            said = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
            row = {'said': said, 'error': said, 'met': False}
        row = {'goal': goal, 'what': what, 'phase': phase, **row, 'seconds': time.perf_counter() - started}
        missed = ' NO' if row['met'] is False else ''
        print(f'{goal:7s} {what:12s} {phase:8s} {row["said"]}{missed}', flush=True)
        rows.append(row)
        if args.out:
            write_json(Path(args.out), {'rows': rows, **origin})

    for goal in args.goals or [goal for goal in goals if goal != 'whole']:
        goals[goal](done)
    return int(any(row['met'] is False for row in rows if row['goal'] not in ('replay', 'whole')))


if __name__ == '__main__':
    sys.exit(main())
