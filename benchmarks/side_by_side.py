"""Students on worker threads against students one after another with all threads inside each operation.

    python -m benchmarks.side_by_side            four students, idle and beside one busy process, some minutes
    python -m benchmarks.side_by_side --quick    fewer rounds

Both ways take turns in one process on the same students; the figure is milliseconds per student and step.
Beside a busy process the goal is at most twice the time that the free share of the machine would allow.
Writes JSON with --out FILE.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import engine.threads  # noqa: F401

import torch

import engine.device
import train_kd
from benchmarks.trainer import BATCH, data, students_of
from engine import side_by_side
from engine.record import provenance, write_json

METHODS = ['st', 'at', 'sp', 'pkt']


def spin() -> None:
    while True:
        pass


def measure(rounds: int, steps: int, cores: int) -> dict[str, list[float]]:
    """{way: seconds per student and step of each round}"""
    train = data((steps + 1) * BATCH)
    runs, teachers, args = students_of(METHODS, 'resnet20', train, 'bf16')
    for run in runs:
        train_kd.begin_epoch(run, 0, args)
    ways = {'in turn': side_by_side.InTurn(), 'workers': side_by_side.Workers(cores, 1)}
    seconds = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, how in ways.items():
            torch.set_num_threads(cores if way == 'in turn' else 1)
            seen = how.looks(teachers, train.train_batches(BATCH, 0, number))
            how.train(train_kd.train_student, runs, next(seen))  # the first step of a round is not counted
            started = time.perf_counter()
            for batch in seen:
                how.train(train_kd.train_student, runs, batch)
            if number:
                seconds[way].append((time.perf_counter() - started) / (steps * len(runs)))
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--quick', action='store_true', help='2 rounds of 2 steps instead of 5 of 4')
    parser.add_argument('--out', help='also write the results here, as JSON')
    args = parser.parse_args()
    rounds, steps = (2, 2) if args.quick else (5, 4)
    cores, rows = engine.device.cores(), []
    for beside in (0, 1):
        busy = [multiprocessing.get_context('fork').Process(target=spin, daemon=True) for _ in range(beside)]
        for process in busy:
            process.start()
        seconds = measure(rounds, steps, cores)
        for process in busy:
            process.terminate()
        turn, workers = (statistics.median(seconds[way]) for way in ('in turn', 'workers'))
        row = {'beside': beside, 'cores': cores, 'in_turn_ms': 1000 * turn, 'workers_ms': 1000 * workers,
               'ratio': turn / workers,
               'spread_ms': [1000 * limit(seconds['workers']) for limit in (min, max)]}  # fmt: skip
        said = ''
        if beside:
            allowed = rows[0]['workers_ms'] * cores / (cores - beside)
            row |= {'allowed_ms': allowed, 'of_allowed': row['workers_ms'] / allowed}
            said = f', {row["of_allowed"]:.2f} of the time that the free share allows'
        rows.append(row)
        print(f'{cores} cores, {beside} busy beside: in turn {row["in_turn_ms"]:.0f} ms, workers '
              f'{row["workers_ms"]:.0f} ms: x{row["ratio"]:.2f}{said}', flush=True)  # fmt: skip
    if args.out:
        origin = provenance(torch.device('cpu'))
        origin['command'] = ' '.join(['python -m benchmarks.side_by_side', *sys.argv[1:]])
        write_json(Path(args.out), {'rows': rows, **origin})
    return 0


if __name__ == '__main__':
    sys.exit(main())
