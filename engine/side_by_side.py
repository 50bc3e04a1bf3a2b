"""How the students of a group train side by side: chosen once, before the loop.

Students share a batch and what the teachers say of it, and nothing else. So a training step is one look at
the batch, then every student's own step, in any order or at the same time:

InTurn   one student after another, in this thread: the plain way, and the one for several processes.
Workers  on the CPU, a student per core. Two threads inside one small convolution wait for each other more
         than they gain, and spin while they wait: beside one other busy program they are ten times slower.
         Two students on two cores need not wait. While they learn from a batch, the next one is looked at.
Graphs   on CUDA. A small network's step is hundreds of kernels of a few microseconds, and starting them one
         by one takes longer than running them. A CUDA graph starts them all at once; one graph per student,
         each on a stream of its own, lets students fill the gaps that others leave.

Each has `looks` (what is seen of every batch of an epoch), `train` (a step of every student) and `each`
(anything else that is done for every student, such as the evaluation).
"""

import argparse
import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import torch

import engine.processes
import engine.side_by_side
from engine.errors import UserError
from engine.processes import processes
from engine.recording import Repeated, cast_weights, cuda_capture, host_counters  # noqa: F401  asked for here


def choose(args, device: torch.device, runs: list, log: Callable[[str], None]):
    """One of the three, as the flags, the device, the cores, and students that draw from a generator say."""
    if engine.side_by_side.graphs_wanted(args, device):
        return Graphs(device, log)
    if device.type != 'cpu' or engine.processes.processes() > 1:
        return InTurn()
    each, cores = args.student_threads, torch.get_num_threads()
    if len(runs) == 1 and each < cores:
        log(f'the student uses {each} of {cores} cores (--student_threads {cores} gives it all of them, with '
            f'other last digits)')  # fmt: skip
    torch.set_num_threads(each)
    alone = any(run.draws for run in runs)  # threads would share the one that dropout draws from
    return Workers(cores // each, each) if cores >= 2 * each and not alone else InTurn()


# --------------------------------------------------------------------------------------- one after another


class InTurn:
    def looks(self, look: Callable, batches: Iterable[tuple]) -> Iterator:
        """look(*batch) for every batch."""
        for batch in batches:
            yield look(*batch)

    def train(self, step: Callable, runs: list, seen) -> None:
        """step(run, seen) for every run."""
        for run in runs:
            step(run, seen)

    def each(self, function: Callable, runs: list) -> list:
        """[function(run), ...]"""
        return [function(run) for run in runs]


# ------------------------------------------------------------------------------------------ a core for each


class Workers:
    """Worker threads, each with so many threads of its own inside an operation.

    The results of a student depend on that second number (sums are cut into as many parts), and on nothing
    else here: not on how many workers there are, nor on who works beside it.
    """

    def __init__(self, workers: int, threads: int) -> None:
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))

    def looks(self, look: Callable, batches: Iterable[tuple]) -> Iterator:
        batches = iter(batches)

        def following():
            batch = next(batches, None)
            return None if batch is None else look(*batch)

        coming = self.pool.submit(following)
        try:
            while (seen := coming.result()) is not None:
                coming = self.pool.submit(following)
                yield seen
        finally:  # the loop may have been left early
            wait([coming])

    def train(self, step: Callable, runs: list, seen) -> None:
        self.each(partial(_swapped, step, seen), runs)

    def each(self, function: Callable, runs: list) -> list:
        jobs = [self.pool.submit(function, run) for run in runs]
        wait(jobs)  # all, before an error of one ends the training
        return [job.result() for job in jobs]


def _swapped(step, seen, run):
    return step(run, seen)


# ----------------------------------------------------------------------------------------- a graph for each


class Graphs:
    """A graph of the batch and the teachers, and a graph per student.

    A student whose step cannot be recorded (its row says so, or the recording fails) takes usual steps,
    beside the others. So do all with a last batch that is smaller.

    Args:
        device: where.
        log: called with a line when a recording fails.
    """

    def __init__(self, device: torch.device, log: Callable[[str], None] = print) -> None:
        self.device, self.log = device, log
        self.look, self.own, self.streams = Repeated(cuda_capture(None, [])), {}, {}
        self.places = None  # where every whole batch lies

    def looks(self, look: Callable, batches: Iterable[tuple]) -> Iterator:
        for img, target, index, views in batches:
            tensors = [img, target, index, *views.values()]
            self.places = self.places or [torch.empty_like(x) for x in tensors]
            whole = len(img) == len(self.places[0])
            if whole:
                for place, value in zip(self.places, tensors, strict=True):
                    place.copy_(value)
                tensors = self.places
            batch = (*tensors[:3], dict(zip(views, tensors[3:])))
            resting = getattr(look, 'resting', None)  # another look than the recorded one
            nobody = resting or not (getattr(look, 'nets', ()) or getattr(look, 'stored', None))
            self.look.capture = _nothing if nobody else cuda_capture(None, [])
            yield self.look(partial(_settled, look, batch), resting, recordable=whole)

    def train(self, step: Callable, runs: list, seen) -> None:
        fixed = seen is self.look.returned and self.look.replay is not None
        with self._apart(runs) as stream_of:
            for run in runs:
                with stream_of(run):
                    self._train(step, run, seen, fixed)

    def _train(self, step, run, seen, fixed: bool) -> None:
        if run.name not in self.own:
            capture = cuda_capture(self.streams.get(run.name), run.generators, run.counters)
            self.own[run.name] = Repeated(capture)
        own = self.own[run.name]
        try:
            # of another look, too: a recording reads what the look had made, and goes with it
            own(partial(step, run, seen), (self.look.decided, run.decided()), fixed and not run.usual_only)
        except RuntimeError as error:
            if not fixed or run.usual_only or own.done <= own.usual or own.replay is not None:
                raise  # it failed in a usual step, or a replay did
            said = ' '.join(str(error).split())[:200]
            self.log(f'{run.name}: its step cannot be recorded, usual steps follow ({said})')
            run.usual_only = 'recording failed'
            step(run, seen)

    def each(self, function: Callable, runs: list) -> list:
        """[function(run), ...], on the students' streams: function should not wait for its results."""
        results = []
        with self._apart(runs) as stream_of:
            for run in runs:
                with stream_of(run):
                    results.append(function(run))
        return results

    @contextlib.contextmanager
    def _apart(self, runs: list):
        """Every run's stream waits for what has been asked for so far; afterwards this one waits for all."""
        if self.device.type != 'cuda':
            yield lambda run: contextlib.nullcontext()
            return
        main = torch.cuda.current_stream(self.device)
        for run in runs:
            self.streams.setdefault(run.name, torch.cuda.Stream(self.device)).wait_stream(main)
        yield lambda run: torch.cuda.stream(self.streams[run.name])
        for run in runs:
            main.wait_stream(self.streams[run.name])


def _nothing(work: Callable) -> tuple[Callable, object]:
    """Of a look that asks nobody: CUDA warns of a graph without a kernel. The batch lies where it will."""
    return lambda: None, work()


def _settled(look: Callable, batch: tuple):
    """What is seen of a batch, with all casts made that students are known to read, and no others kept."""
    seen = look(*batch)
    for t in seen.all_t:
        t.cast_ahead()
        t.freeze()
    return seen


def graphs_wanted(args: argparse.Namespace, device: torch.device) -> bool:
    if not getattr(args, 'cuda_graphs', False) or device.type != 'cuda':
        return False
    if args.amp == 'fp16':
        raise UserError('--cuda_graphs: the loss scaling of --amp fp16 cannot be recorded; use bf16')
    if processes() > 1:
        raise UserError('--cuda_graphs: works in one process only')
    if args.optim != 'sgd':
        raise UserError('--cuda_graphs: works with --optim sgd only')
    return True
