"""What the training scripts share: errors, seeds, precision, evaluation, logs, checkpoints, result files."""

import argparse
import ast
import contextlib
import copy
import csv
import hashlib
import inspect
import io
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

if tuple(map(int, str(torch.__version__).split('.')[:2])) < (2, 11):  # before anything fails for want of it
    print(f'the training scripts need torch >= 2.11, this is {torch.__version__}; the losses alone need 2.2',
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dataset
from models import load_weights
from models.checkpoint import compare_classes, named_weights, read_checkpoint

# ---------------------------------------------------------------------------------------------- errors


class UserError(Exception):
    """A mistake of the person at the keyboard: one line on stderr and exit code 2."""


class NonFinite(Exception):
    """A loss became inf or NaN: one line on stderr and exit code 1, the weights are those before the step."""


@contextlib.contextmanager
def user_errors():
    """What models, dataset and the loss constructors raise about their arguments is the user's mistake."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(' '.join(str(error).split())) from error


def run(main: Callable[[], int | None]) -> None:
    """Call a script's main and turn the expected ways to fail into one line and an exit code."""
    script = Path(sys.argv[0]).name
    try:
        sys.exit(main())
    except (UserError, dataset.BadImage) as error:  # a bad image shows when it is reached
        if '--debug' in sys.argv:
            error.__suppress_context__ = False  # show all of it
            traceback.print_exception(error)
        print(f'{script}: error: {error}', file=sys.stderr)
        sys.exit(2)
    except NonFinite as error:
        print(f'{script}: stopped: {error}', file=sys.stderr)
        sys.exit(1)


# ----------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """argparse with the house's habits: --a-b means --a_b, no abbreviations, defaults shown by --help."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument(
            '--debug', action='store_true', help='with an error message show where it was raised'
        )

    def parse_args(self, args=None):
        def underscores(word):
            flag, equals, value = word.partition('=')
            return '--' + flag[2:].replace('-', '_') + equals + value if flag.startswith('--') else word

        return super().parse_args([underscores(word) for word in (sys.argv[1:] if args is None else args)])

    def error(self, message):
        raise UserError(f'{message} (--help lists all flags)')


def add_common_flags(
    parser: Parser,
    epochs: int = 200,
    lr: float | None = 0.1,
    rate: str = 'default 0.1',
    more_data: str = '',
) -> None:
    """The flags that every training script has; rate, more_data: what --help says besides."""
    add_data_flags(parser, more_data)
    # fmt: off
    flag = parser.add_argument_group("recipe (the defaults are Knowledge-Distillation-Zoo's)").add_argument
    flag('--val_split', type=fraction, default=0.0, metavar='F',
         help='hold out this share of the training set and choose best.pt on it; default 0: best.pt is '
              'chosen on the test set, and the log says so')
    flag('--epochs', type=positive_int, default=epochs, help=f'default {epochs}')
    flag('--batch_size', type=positive_int, default=128, help='of each process, default 128')
    flag('--lr', type=positive_float, default=lr, help=f'learning rate, {rate}')
    flag('--schedule', choices=('steps', 'onecycle'), default='steps',
         help='steps: the learning rate drops at the milestones; onecycle: it moves at every step, linearly '
              'up to --lr over the first fifth of the run, then linearly to 0; default steps')
    flag('--milestones', type=fraction, nargs='*', default=[0.5, 0.75], metavar='F',
         help='SGD: shares of the run after which the learning rate drops, default 0.5 0.75')
    flag('--lr_decay', type=positive_float, default=0.1, help='SGD: factor at a milestone, default 0.1')
    flag('--momentum', type=fraction, default=0.9, help='SGD: Nesterov momentum, default 0.9')
    flag('--no_nesterov', dest='nesterov', action='store_false',
         help='SGD: plain momentum instead of Nesterov, as RepDistiller and mdistiller have it')
    flag('--weight_decay', type=fraction, default=1e-4, help='on all parameters, default 1e-4')
    flag('--pad', choices=('reflect', 'zero'), default='reflect',
         help='what a random crop sees outside of an image: reflect, the image mirrored; zero, black, as '
              'RepDistiller and mdistiller have it; not for folder; default reflect')
    flag('--seed', type=seed_number, default=2, help='of initial weights and batches, default 2')
    # fmt: on
    add_machine_flags(parser)
    # fmt: off
    parser.add_argument('--compile', action='store_true',
        help='networks through torch.compile: a minute of start, faster steps on CUDA, other rounding')
    flag = parser.add_argument_group('output').add_argument
    flag('--save_root', default='./save', help='where output folders go, default ./save')
    flag('--note', help='name of the output folder, default made from the flags')
    flag('--resume', metavar='auto|never|PATH',
         help='auto: continue what is in the output folder, or start; never: start afresh and overwrite; '
              'PATH: continue from this folder or last.pt; default: start, but refuse to overwrite')
    flag('--save_every', type=positive_int, default=1, metavar='N',
         help='write last.pt and best.pt every N epochs, and after the last: a kill loses up to N; '
              'default 1')
    flag('--print_freq', type=positive_int, default=50,
         help='show the running loss every so many steps, default 50')
    flag('--tensorboard', action='store_true', help='also write TensorBoard scalars')
    # fmt: on


def add_data_flags(parser: Parser, more: str = '') -> None:
    """Which images, where they lie."""
    # fmt: off
    flag = parser.add_argument_group('data').add_argument
    flag('--data_name', default='shapes', metavar='NAME',
         help='shapes (embedded, no download; shapes:N for N training images), cifar10, cifar100, or folder '
              f'(IMG_ROOT/train and IMG_ROOT/val with one folder per class){more}; default shapes')
    flag('--img_root', default='./data', help='where the data lies, default ./data')
    flag('--image_size', type=positive_int, default=224, help='folder only: side of the crops, default 224')
    flag('--workers', type=whole_number, default=4, help='folder only: decoding processes, default 4')
    flag('--convert_rgb', action='store_true',
         help='folder only: convert grey, CMYK and palette images (ImageNet has some) instead of refusing')
    # fmt: on


def add_machine_flags(parser: Parser) -> None:
    """Where and how it runs."""
    # fmt: off
    flag = parser.add_argument_group('machine').add_argument
    flag('--device', help='cuda, cuda:1, mps or cpu; default the best there is')
    flag('--amp', choices=('off', 'bf16', 'fp16'), default='off',
         help='precision of the networks; losses are always float32; default off')
    flag('--threads', type=positive_int, help='CPU threads, default all cores')
    flag('--deterministic', action='store_true',
         help='slower, reproducible kernels on CUDA; the CPU is reproducible anyway')
    # fmt: on


def positive_int(text: str) -> int:
    return _number(int, text, lambda x: x > 0, 'a whole number > 0')


def whole_number(text: str) -> int:
    return _number(int, text, lambda x: x >= 0, 'a whole number >= 0')


def seed_number(text: str) -> int:
    """Epochs' seeds are a million times it, in 64 bits."""
    return _number(int, text, lambda x: abs(x) < 10**12, 'a whole number of at most 12 digits')


def positive_float(text: str) -> float:
    return _number(float, text, lambda x: 0 < x < float('inf'), 'a number > 0')


def share_of_ce(text: str) -> float:
    return _number(float, text, lambda x: 0 <= x < float('inf'), 'a number >= 0')


def fraction(text: str) -> float:
    return _number(float, text, lambda x: 0 <= x < 1, 'a share from 0 to below 1')


def _number(kind, text, legal, wanted):
    try:
        if legal(value := kind(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f'expected {wanted}, got {text!r}')


def key_values(items: Iterable[str], flag: str) -> dict:
    """['T=4', 'kernel=linear'] -> {'T': 4, 'kernel': 'linear'}: values are Python literals, else strings."""
    result = {}
    for item in items:
        key, equals, text = item.partition('=')
        if not (key and equals):
            raise UserError(f'{flag}: expected key=value, got {item!r}')
        try:
            result[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            result[key] = text
    return result


def weights_and_options(
    args: argparse.Namespace, names: list[str], methods: dict, kind: str = 'kd'
) -> tuple[dict, dict]:
    """{name: weight} and {name: constructor arguments} from --lambda_kd and --kd_args (or another kind's)."""
    mode, heavy, flag = f'--{kind}_mode', f'--lambda_{kind}', f'--{kind}_args'
    chosen, wanted, given = (getattr(args, name[2:]) for name in (mode, heavy, flag))
    weights = {name: methods[name].weight for name in names}
    if len(wanted) == 1 and '=' not in wanted[0]:
        if len(names) > 1:
            raise UserError(f'{heavy} {wanted[0]}: with several methods say METHOD=number')
        wanted = [f'{names[0]}={wanted[0]}']
    for name, weight in key_values(wanted, heavy).items():
        if name not in names:
            raise UserError(f'{heavy}: {name!r} is not among {mode} {" ".join(chosen)}')
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            raise UserError(f'{heavy}: the weight of {name} must be a number, got {weight!r}')
        weights[name] = float(weight)

    options = {name: {} for name in names}
    for key, value in key_values(given, flag).items():
        name, _, key = key.rpartition('.')
        if not name and len(names) > 1:
            raise UserError(f'{flag} {key}: with several methods say METHOD.{key}=VALUE')
        name = name or names[0]
        if name not in names:
            raise UserError(f'{flag}: {name!r} is not among {mode} {" ".join(chosen)}')
        check_option(name, methods[name].loss, key, value, flag)
        options[name][key] = value
    return weights, options


def check_option(name: str, loss: type, key: str, value, flag: str) -> None:
    """A key and its type against the constructor's signature, before anything else happens."""
    signature = inspect.signature(loss)
    shown = f'the signature is {loss.__name__}{str(signature).replace(" -> None", "")}'
    if key not in signature.parameters:
        raise UserError(f'{flag}: {name} has no argument {key!r}; {shown}')
    kind = signature.parameters[key].annotation
    legal = True
    with contextlib.suppress(TypeError):  # a list of something: the constructor says more
        legal = isinstance(value, int | float if kind is float else kind)
    if not legal or (isinstance(value, bool) and kind is not bool):
        raise UserError(f'{flag}: {key}={value!r} of {name} has the wrong type; {shown}')


# --------------------------------------------------------------------------------------- several processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many torchrun started, 1 without it; known before anything is initialised."""
    return int(os.environ.get('WORLD_SIZE', 1))


def join_processes(device: torch.device) -> torch.device:
    """Under torchrun: meet the other processes; returns this one's device."""
    if processes() == 1:
        return device
    if device.type == 'cuda':
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, place, many = next(dist.rendezvous('env://'))
        # After a failure torchrun offers the same store again, with addresses of dead processes still in it.
        # On one machine the count of restarts gives each start a corner of its own; several machines do not
        # count alike (README, "Several processes").
        if os.environ.get('GROUP_WORLD_SIZE', '1') == '1':
            store = dist.PrefixStore(f'start {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        dist.init_process_group(
            'nccl' if device.type == 'cuda' else 'gloo', store=store, rank=place, world_size=many
        )
    return device


def distributed(module: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel around a training step; the module itself without torchrun.

    All processes get rank 0's weights here. Buffers are not sent at every step: batch norm statistics belong
    to their process (evaluation uses rank 0's).
    """
    if processes() == 1:
        return module
    ids = [device] if device.type == 'cuda' else None
    return DistributedDataParallel(module, ids, broadcast_buffers=False, find_unused_parameters=True)


@torch.no_grad()
def same_buffers(net: nn.Module) -> None:
    """Give all processes rank 0's batch norm statistics."""
    if processes() > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def summed(x: Tensor) -> Tensor:
    """The sum over all processes."""
    if processes() > 1:
        dist.all_reduce(x)
    return x


def gathered(x) -> list:
    """[what each process has], in order."""
    if processes() == 1:
        return [x]
    everyone = [None] * processes()
    dist.all_gather_object(everyone, x)
    return everyone


class _Gather(torch.autograd.Function):
    """(N, ...) -> (processes x N, ...); backward sums the gradients of all processes' losses."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(processes())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(processes())[rank()]


class Gathered:
    """Feats of all processes, gathered when they are asked for."""

    def __init__(self, f) -> None:
        self._f = f

    def __getattr__(self, name: str):
        value = getattr(self._f, name)
        one = isinstance(value, Tensor)
        gathered = _Gather.apply(value) if one else [_Gather.apply(x) for x in value]
        setattr(self, name, gathered)
        return gathered


def gather_batches(s, t, b):
    """Student, teacher and batch of all processes, for losses that relate samples to each other."""
    if processes() == 1:
        return s, t, b
    everything = copy.copy(b)
    everything.target = _Gather.apply(b.target)
    return Gathered(s), Gathered(t), everything


# --------------------------------------------------------------------------------- device, seeds, precision


def setup(args: argparse.Namespace) -> torch.device:
    """Threads, seeds and kernels as the flags say; returns the device."""
    torch.set_num_threads(args.threads or cores())
    mps = torch.backends.mps.is_available()
    name = args.device or ('cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu')
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name}: {str(error).splitlines()[0]}') from None
    device = join_processes(device)
    torch.backends.cudnn.benchmark = not args.deterministic  # it chooses by timing, differently every time
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True, warn_only=True)  # names what has none
        torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel for every empty tensor
    seed_all(args.seed)
    return device


def cores() -> int:
    """Cores that this process may use: torch counts those of the whole machine."""
    if (chosen := os.environ.get('OMP_NUM_THREADS', '')).isdecimal():
        return max(int(chosen), 1)
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # a container's share, 'max' or microseconds per period
        quota, period = Path('/sys/fs/cgroup/cpu.max').read_text().split()
        count = min(count, -(-int(quota) // int(period)))
    return max(count, 1)


def seed_all(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


PRECISIONS = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': None}


def autocast(device: torch.device, amp: str) -> Callable[[], torch.autocast]:
    """To be called at every use, `with amp():`, since threads cannot share one.

    Casts of weights are not cached: the cache is one for all threads, and what is recorded must not use it.
    """
    return partial(torch.autocast, device.type, PRECISIONS[amp], enabled=amp != 'off', cache_enabled=False)


def precision(amp: Callable[[], torch.autocast], device: torch.device) -> torch.dtype | None:
    """What autocast turns weights into, None if it is off."""
    with amp():
        on = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if on else None


def compile_networks(args: argparse.Namespace, *nets: nn.Module) -> None:
    """With --compile: in place, so names of weights, copies and checkpoints stay as they are."""
    for net in nets if args.compile else ():
        net.compile()


def learning_rate(args: argparse.Namespace, epoch: float) -> float:
    """A pure function of the epochs done, so a resumed run needs no scheduler state.

    epoch: with its fraction, 2.5 in the middle of the third; the milestones of `steps` look at whole epochs.
    """
    if args.schedule == 'onecycle':
        return args.lr * one_cycle(epoch / args.epochs)
    return args.lr * args.lr_decay ** sum(int(epoch) >= share * args.epochs for share in args.milestones)


def one_cycle(done: float) -> float:
    """Share of the highest learning rate, for a share of the run: up for a fifth of it, then down to 0."""
    return min(done / 0.2, (1 - done) / 0.8)


def set_learning_rate(opt: torch.optim.Optimizer, lr: float) -> None:
    if not isinstance(opt.param_groups[0]['lr'], Tensor):
        for group in opt.param_groups:
            group['lr'] = lr
    elif getattr(opt, 'rate', None) != lr:  # a tensor is what a recorded step reads: filled where it lies
        opt.rate = lr
        for group in opt.param_groups:
            group['lr'].fill_(lr)


def phase_epochs(epochs_of_200: int, epochs: int, chosen: int | None = None) -> int:
    """Epochs of a phase: what the flag says, else the method's share of a run of 200, at least one."""
    if not epochs_of_200 or chosen is not None:
        return chosen if epochs_of_200 else 0
    return max(round(epochs_of_200 * epochs / 200), 1)


def sgd(parameters: Iterable[nn.Parameter | dict], args: argparse.Namespace) -> torch.optim.SGD:
    """parameters: tensors, or groups of them as torch.optim takes them."""
    parameters = list(parameters)
    first = parameters[0]['params'][0] if isinstance(parameters[0], dict) else parameters[0]
    if not first.is_cuda:
        return torch.optim.SGD(
            parameters, args.lr, args.momentum, weight_decay=args.weight_decay, nesterov=wants_nesterov(args)
        )
    return fused_sgd(parameters, args)


def wants_nesterov(args: argparse.Namespace) -> bool:
    """torch refuses it without momentum."""
    return getattr(args, 'nesterov', True) and args.momentum > 0


def fused_sgd(parameters: list, args: argparse.Namespace) -> torch.optim.SGD:
    """SGD that can skip an update on the device (Meter.guard) and be recorded, the learning rate a tensor."""
    first = parameters[0]['params'][0] if isinstance(parameters[0], dict) else parameters[0]
    rate = torch.tensor(args.lr, device=first.device)
    opt = torch.optim.SGD(
        parameters,
        rate,
        args.momentum,
        weight_decay=args.weight_decay,
        nesterov=wants_nesterov(args),
        fused=True,
    )

    def zero_momentum(opt, *_):
        # the fused kernel wants a momentum of all parameters or of none: one whose first gradient comes late
        # starts from 0, which is what it would have
        for group in opt.param_groups if args.momentum else ():
            for p in group['params']:
                if p.grad is not None and opt.state[p].get('momentum_buffer') is None:
                    opt.state[p]['momentum_buffer'] = torch.zeros_like(p)

    def plain_rate(opt, state):
        """In a checkpoint the rate is a number, as it is on every other device."""
        groups = [group | {'lr': float(group['lr']), 'fused': None} for group in state['param_groups']]
        return state | {'param_groups': groups}

    def own_rate(opt):
        """Whatever device the checkpoint came from."""
        for group in opt.param_groups:
            rate.fill_(group['lr'])
            group |= {'lr': rate, 'fused': True, 'foreach': False}

    opt.register_step_pre_hook(zero_momentum)
    opt.register_state_dict_post_hook(plain_rate)
    opt.register_load_state_dict_post_hook(own_rate)
    return opt


# -------------------------------------------------------------------------------- steps and what they measure


class Meter:
    """Sums of one epoch, kept on the device: reading them is what waits, so it is done rarely.

    Also the guard against a non-finite loss, asked before backward. It looks at once, except on CUDA, where
    that would drain the queue at every step: there the fused optimiser is told to skip the update, and the
    step is remembered and shows at the next reading. `failure` then is a sentence that names run and step.

    Everything is changed in place, also by reset, so that a recorded step finds it where it was.
    """

    def __init__(self, name: str, epoch: int, device: torch.device) -> None:
        self.name, self.failure = name, ''
        self.sums = {}
        self.zero = torch.zeros((), device=device)
        self.steps = torch.zeros_like(self.zero, dtype=torch.int64)
        self.bad_step = torch.full_like(self.steps, -1)
        self.epoch = epoch

    def reset(self, epoch: int) -> None:
        """Begin another epoch."""
        self.epoch, self.failure = epoch, ''
        for value in (*self.sums.values(), self.steps):
            value.zero_()
        self.bad_step.fill_(-1)

    def guard(self, loss: Tensor, opt: torch.optim.Optimizer, teacher: Tensor | None = None) -> bool:
        """Whether to go on with this step."""
        finite = torch.isfinite(loss.detach())
        if processes() > 1:  # all go on, or none
            finite = summed((~finite).float()) == 0
        if loss.device.type != 'cuda':
            if not finite:
                bad_teacher = teacher is not None and not torch.isfinite(teacher).all()
                reason = 'the teacher gives non-finite logits' if bad_teacher else str(loss.item())
                self._fail(int(self.steps), reason)
            return bool(finite)
        opt.found_inf = (~finite).float()
        self.bad_step.copy_(torch.where((self.bad_step < 0) & ~finite, self.steps, self.bad_step))
        return True

    def _fail(self, step: int, reason: str) -> None:
        where = f'epoch {self.epoch + 1}, step {step + 1}'
        self.failure = f'{self.name}: the loss is not finite at {where} ({reason})'

    def add(self, out: Tensor | None, target: Tensor, **losses: Tensor | float) -> None:
        """out: logits for the training accuracy; None in phases without a student."""
        n = len(target)
        # a plain number is filled in on the device: copying it there would wait
        values = {
            key: (loss.detach() if isinstance(loss, Tensor) else torch.full_like(self.zero, loss)) * n
            for key, loss in losses.items()
        }
        if out is not None:
            values['hits'] = (out.detach().argmax(dim=1) == target).sum()
        for key, value in {**values, 'n': torch.full_like(self.steps, n)}.items():
            self.sums.setdefault(key, torch.zeros_like(value)).add_(value)
        self.steps += 1

    def read(self, net: nn.Module | None = None) -> dict[str, float]:
        """Means over the epoch so far, top-1 in percent; empty after a failure.

        With `net`, at the end of an epoch, its weights are looked at too: a finite loss may have had a
        gradient that was not, and such weights must not reach the disk.
        """
        if not self.failure and (bad := int(self.bad_step)) >= 0:
            self._fail(bad, 'found at the next reading')
        if not self.failure and net is not None and not all_finite(net):
            self.failure = (
                f'{self.name}: a weight is not finite after epoch {self.epoch + 1}, step {int(self.steps)}'
            )
        if self.failure:
            return {}
        if not self.sums:
            return {}
        total = torch.stack([value.double() for value in self.sums.values()])
        if net is not None:
            total = summed(total)
        sums = dict(zip(self.sums, total.tolist()))
        if not sums['n']:
            return {}
        means = {key: value / sums['n'] for key, value in sums.items() if key not in ('n', 'hits')}
        return means | ({'train_top1': 100 * sums['hits'] / sums['n']} if 'hits' in sums else {})


def all_finite(net: nn.Module) -> bool:
    """Whether all weights are: one reading from the device."""
    largest = nn.utils.get_total_norm(list(net.parameters()), norm_type=float('inf'))
    return bool(torch.isfinite(largest))


def add_thread_flag(parser: Parser) -> None:
    parser.add_argument('--student_threads', type=positive_int, default=1, metavar='N',
        help='CPU: threads inside the operations of each student; as many students train at the same time as '
             '--threads allows. Last digits depend on N and on nothing else: alone or beside others, on two '
             'cores or sixteen, a student ends with the same weights; default 1')  # fmt: skip


def add_graph_flag(parser: Parser) -> None:
    parser.add_argument('--cuda_graphs', action='store_true',
        help='record a training step and let the GPU repeat it, students side by side: several times faster '
             'for small networks; elsewhere nothing changes')  # fmt: skip


def graphs_wanted(args: argparse.Namespace, device: torch.device) -> bool:
    if not getattr(args, 'cuda_graphs', False) or device.type != 'cuda':
        return False
    if args.amp == 'fp16':
        raise UserError('--cuda_graphs: the loss scaling of --amp fp16 cannot be recorded; use bf16')
    if processes() > 1:
        raise UserError('--cuda_graphs: works in one process only')
    return True


def evaluate(net: nn.Module, data, amp: Callable[[], torch.autocast]) -> dict[str, float]:
    """Top-1, top-5 (percent), cross-entropy over every image once, and the number of non-finite logits."""
    return figures(counted(net, data, amp))


@torch.no_grad()
def counted(net: nn.Module, data, amp: Callable[[], torch.autocast]) -> Tensor:
    """What evaluate needs, on the device: nothing waits for it yet."""
    net.eval()
    same_buffers(net)
    sums = torch.zeros(5, dtype=torch.float64, device='cpu' if data.device.type == 'mps' else data.device)
    for img, target, _ in data.test_batches(128 if data.device.type == 'cpu' else 1000):
        with amp():
            out = net(img)
        out = out.float()
        ranked = out.topk(min(5, out.shape[1]), dim=1).indices == target[:, None]
        loss = F.cross_entropy(out, target, reduction='sum')
        bad = (~torch.isfinite(out)).sum()
        sums += torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, bad, bad * 0 + len(out)]).to(sums)
    return summed(sums)


def figures(counts: Tensor) -> dict[str, float]:
    top1, top5, loss, bad, n = counts.tolist()
    return {'top1': 100 * top1 / n, 'top5': 100 * top5 / n, 'loss': loss / n, 'bad': int(bad)}


@torch.no_grad()
def outputs(net: nn.Module, data) -> tuple[Tensor, Tensor]:
    """What a network that stacks several logits (M, N, K) says of every image, and the labels."""
    net.eval()
    same_buffers(net)
    batches = data.test_batches(128 if data.device.type == 'cpu' else 1000)
    parts = [(net(img), target) for img, target, _ in batches]
    outs, target = torch.cat([out for out, _ in parts], dim=1), torch.cat([target for _, target in parts])
    shares = gathered((outs.cpu(), target.cpu()))  # of unequal size
    joined = torch.cat([out for out, _ in shares], dim=1), torch.cat([target for _, target in shares])
    return tuple(x.to(outs.device) for x in joined)


def measure(net: nn.Module, val, test, amp: Callable[[], torch.autocast]) -> dict[str, Tensor]:
    """{'val': ..., 'test': ...} for measured(); without 'val' if there is no validation set."""
    return {half: counted(net, data, amp) for half, data in (('val', val), ('test', test)) if data}


def measured(counts: dict[str, Tensor]) -> dict[str, float]:
    """test_top1, test_top5, and val_top1, val_top5 if there is a validation set."""
    row = {}
    for half, sums in counts.items():
        seen = figures(sums)
        row |= {f'{half}_top1': seen['top1'], f'{half}_top5': seen['top5']}
    return row


def load_teacher(net: nn.Module, path: str, data, amp: Callable[[], torch.autocast]) -> dict[str, float]:
    """Fill, freeze and measure a teacher; one that gives non-finite logits is refused."""
    with user_errors():
        said = load_weights(net, path, class_names=getattr(data, 'class_names', None))
    net.requires_grad_(False).to(data.device, memory_format=torch.channels_last)
    measured = evaluate(net, data, amp)
    if measured['bad']:
        raise UserError(
            f'{path}: the teacher is not finite, {measured["bad"]} of its logits on the test set are not'
        )
    return measured | {'said': said}


class StopAfterEpoch:
    """Ctrl-C and SIGTERM ask for a stop at the next checkpoint; a second one stops at once."""

    def __init__(self) -> None:
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, _) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if rank() == 0:
            print(
                '\nstopping after this epoch and its checkpoint; once more to stop at once', file=sys.stderr
            )

    def agreed(self) -> int:
        """The signal that any process has received, or 0: all stop together."""
        if processes() == 1:
            return self.signal or 0
        flag = torch.tensor(float(self.signal or 0))
        if dist.get_backend() == 'nccl':
            flag = flag.cuda()
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


# ------------------------------------------------------------------------------------------------ output


def output_folder(path: Path) -> Path:
    """Make sure results can be written before hours are spent on them."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f'.probe-{os.getpid()}'
        probe.write_bytes(b'')
        probe.unlink()
    except OSError as error:
        raise UserError(f'{path}: cannot write to the output folder ({error.strerror})') from None
    return path


def write_atomic(path: Path, content: bytes) -> None:
    """All or nothing: a reader sees the old file or the new one, also after a crash or on a full disk.

    Under torchrun only the first process writes.
    """
    if rank() > 0:
        return
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        state = 'the previous version is intact' if path.exists() else 'nothing was written'
        raise UserError(f'{path}: cannot be written ({error.strerror}); {state}') from None


def save_checkpoint(path: Path, content: dict) -> None:
    if rank() > 0:
        return
    buffer = io.BytesIO()
    torch.save(on_cpu(content), buffer)
    write_atomic(path, buffer.getvalue())


def on_cpu(x):
    """The same with every tensor on the CPU: a file that any machine can read."""
    if isinstance(x, Tensor):
        return x.cpu()
    if isinstance(x, dict):
        moved = copy.copy(x)  # with what a state_dict knows besides
        moved.update((key, on_cpu(value)) for key, value in x.items())
        return moved
    return type(x)(map(on_cpu, x)) if isinstance(x, (list, tuple)) else x


def load_checkpoint(path: Path, math_args: dict) -> dict:
    """A checkpoint of ours, refused when its run differs in anything that changes the numbers."""
    with user_errors():
        content = read_checkpoint(path)
    if not isinstance(content.get('args'), dict) or 'epoch' not in content:
        raise UserError(f'{path}: is not a checkpoint of this script')
    old = content['args']
    differ = [f'{k} was {old.get(k)!r}, is {v!r}' for k, v in math_args.items() if old.get(k) != v]
    if differ:
        hint = ''
        weights = {'--init': path.with_name('net.pt'), '--s_init': path.with_name('student.pt')}
        finished = [f'{flag} {file}' for flag, file in weights.items() if file.exists()]
        if finished and math_args['epochs'] > old.get('epochs', math_args['epochs']):
            hint = (
                '; this run is finished, and its learning rates belong to its length: to go on from its '
                f'weights, start another one, --note NAME {finished[0]}'
            )
        raise UserError(f'{path}: cannot resume, {"; ".join(differ)}{hint}')
    return content


def write_metrics(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows[::-1] for key in row))  # phases have fewer columns
    writer = csv.DictWriter(text, columns, restval='')
    writer.writeheader()
    writer.writerows({k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomic(path, text.getvalue().encode())


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, (json.dumps(content, indent=1) + '\n').encode())


def provenance(device: torch.device) -> dict:
    """Where a number comes from: command, commit, machine."""

    def git(*words):
        try:
            done = subprocess.run(['git', *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:  # there is no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git('rev-parse', 'HEAD') or os.environ.get('SOURCE_COMMIT')  # a copy without its history
    if commit and git('status', '--porcelain', '--untracked-files=no'):
        commit += '-dirty'
    script = Path(sys.argv[0]).resolve()
    here = Path(__file__).resolve().parent
    script = script.relative_to(here) if script.is_relative_to(here) else script.name
    return {
        'command': ' '.join(['python', str(script), *sys.argv[1:]]),
        'commit': commit,
        'machine': {
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
            'cpu': _cpu_name(),
            'threads': torch.get_num_threads(),
            'torch': str(torch.__version__),
            'python': platform.python_version(),
        },
    }


def class_names_of(data) -> dict:
    """{'class_names': [...]}, empty for data whose classes have no names."""
    names = getattr(data, 'class_names', None)
    return {'class_names': names} if names else {}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


class Log:
    """Lines to the screen (without tearing the progress bar) and to log.txt."""

    def __init__(self, folder: Path) -> None:
        self.path, self.bar = folder / 'log.txt', None

    def __call__(self, line: str) -> None:
        if rank() > 0:
            return
        if self.bar is not None and not self.bar.disable:
            self.bar.write(line)
        else:
            print(line, flush=True)
        with contextlib.suppress(OSError), open(self.path, 'a') as file:  # checkpoints report a full disk
            file.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")}  {line}\n')


def progress_bar(total: int, done: int, log: Log):
    """A tqdm bar over all steps of the run, with an ETA on a terminal, silent elsewhere."""
    try:
        from tqdm import tqdm
    except ImportError:
        log('no progress bar: tqdm is not installed (pip install tqdm)')
        return _NoBar()
    quiet = True if rank() > 0 else None  # None: silent where there is no terminal
    log.bar = tqdm(total=total, initial=done, disable=quiet, unit='step', dynamic_ncols=True, smoothing=0.05)
    return log.bar


class _NoBar:
    disable = True

    def update(self):
        pass

    def set_postfix_str(self, text, refresh=True):
        pass

    def close(self):
        pass


def tensorboard(folder: Path, wanted: bool):
    """A SummaryWriter, or None. Imported only when asked for."""
    if not wanted or rank() > 0:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError('--tensorboard: tensorboard is not installed (pip install tensorboard)') from None
    return SummaryWriter(folder)


# ------------------------------------------------------------------------------------------ one run's record


def resume_point(choice: str | None, folder: Path) -> Path | None:
    """The checkpoint that --resume asks to continue in this run's folder; None starts from scratch."""
    last = folder / 'last.pt'
    if choice == 'auto':
        return last if last.exists() else None
    if choice == 'never':
        for name in ('last.pt', 'best.pt', 'results.json', 'metrics.csv'):
            if rank() == 0:
                (folder / name).unlink(missing_ok=True)
        return None
    if choice is not None:  # a file, a run's folder, or the folder of a group of runs
        candidates = [Path(choice), Path(choice) / 'last.pt', Path(choice) / folder.name / 'last.pt']
        for path in candidates:
            if path.is_file():
                return path
        raise UserError(
            f'--resume {choice}: no checkpoint there, looked for {", ".join(map(str, candidates))}'
        )
    if last.exists():
        raise UserError(
            f'{folder} already holds a run: --resume auto continues it, --resume never overwrites it, '
            f'--note NAME starts another one'
        )
    return None


class Record:
    """The paper trail of one network in training: its history and the files of its output folder.

    last.pt (everything a resume needs, written every epoch), best.pt (weights of the best epoch so far),
    metrics.csv (one row per epoch), and at the end results.json and the plain weights.

    Args:
        folder: where the files go.
        parts: what has state: {'net': ..., 'opt': ..., ...}, anything with state_dict and load_state_dict.
        math_args: everything that changes the numbers; a resume with other values is refused.
        origin: command, commit and machine, kept from the first start; commits of resumes are added. With
            class_names, all files of weights have them, too.
        selected_on: 'val' or 'test', whose figure chooses the best epoch.
        key: which figure, more is better.
    """

    def __init__(
        self, folder: Path, parts: dict, math_args: dict, origin: dict, selected_on: str, key: str = 'top1'
    ) -> None:
        self.folder, self.parts, self.math_args = output_folder(folder), parts, math_args
        self.origin, self.key = origin, f'{selected_on}_{key}'
        self.history: list[dict] = []
        self.saved = 0  # epochs that the checkpoint knows of
        self.waiting: dict | None = None  # the best weights so far, where best.pt is older
        if rank() == 0:
            for leftover in self.folder.glob('.*.tmp'):  # of a kill in the middle of a write
                leftover.unlink(missing_ok=True)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @property
    def best(self) -> dict:
        """The row of the best epoch, the first of equals; phases before the training do not count."""
        return max((row for row in self.history if self.key in row), key=lambda row: row[self.key])

    def resume(self, path: Path | None) -> None:
        if path is None:
            return
        content = load_checkpoint(path, self.math_args)
        with user_errors():
            compare_classes(path, content['origin'].get('class_names'), self.origin.get('class_names'))
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        self.history = content['history']
        self.saved = self.epoch
        best = path.with_name('best.pt')
        if best.exists() and not (self.folder / 'best.pt').exists():  # the run moves to another folder
            write_atomic(self.folder / 'best.pt', best.read_bytes())
        commit, names = self.origin['commit'], self.origin.get('class_names')
        self.origin = content['origin'] | ({'class_names': names} if names else {})
        commits = [self.origin['commit'], *self.origin.get('resumed_with', [])]
        if commit not in commits:
            self.origin['resumed_with'] = [*commits[1:], commit]

    def epoch_done(self, row: dict, save: bool = True) -> None:
        """save: False leaves the checkpoints as they are: a kill then loses this epoch, too."""
        self.history.append(row)
        if self.key in row and self.best is row:
            weights = self._weights()
            for key, value in weights.items():
                weights[key] = value.clone()
            self.waiting = {'net': weights, 'epoch': row['epoch']}
        if save:
            self.save()
        else:
            write_metrics(self.folder / 'metrics.csv', self.history)

    def save(self) -> None:
        """Write what is newer than the files."""
        if self.saved == self.epoch:
            return
        if self.waiting:
            save_checkpoint(self.folder / 'best.pt', self.waiting)
            self.waiting = None
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {'epoch': self.epoch, 'history': self.history, 'args': self.math_args, 'origin': self.origin}
        write_metrics(self.folder / 'metrics.csv', self.history)
        save_checkpoint(self.folder / 'last.pt', state)
        self.saved = self.epoch

    def _weights(self) -> dict:
        return named_weights(deployed(self.parts['net']), self.origin.get('class_names'))

    def finish(self, weights: str, facts: dict) -> str:
        """Write the plain weights and results.json; return the headline, which is the last epoch's."""
        save_checkpoint(self.folder / weights, self._weights())
        last, best = self.history[-1], self.best
        half, _, key = self.key.partition('_')
        selected_on = {'val': 'validation split', 'test': 'test data'}[half]
        name = f'test_{key}'
        write_json(self.folder / 'results.json', facts | {
            'last': tested(last),
            'best': tested(best) | {'selected_on': selected_on},
            'curve': [round(row[name], 4) for row in self.history if name in row],
            'seconds': round(sum(row['seconds'] for row in self.history), 1),
            'recipe': self.math_args,
            **self.origin,
        })  # fmt: skip
        headline = {'top1': 'top-1'}.get(key, key)
        return (
            f'{headline} {last[name]:.2f} at the last epoch; best {best[name]:.2f} '
            f'at epoch {best["epoch"]}, selected on {selected_on}'
        )


def tested(row: dict) -> dict:
    """What an epoch's row says of the test set."""
    figures = {k.removeprefix('test_'): v for k, v in row.items() if k.startswith('test_')}
    return figures | {'epoch': row['epoch']}


def deployed(net: nn.Module) -> nn.Module:
    """What is kept of a network after training: some methods add exits or heads that are not."""
    return net.deployed() if hasattr(net, 'deployed') else net


def math_args(args: argparse.Namespace, **more) -> dict:
    """The flags that change the numbers of a run, as plain values."""
    names = ('data_name', 'image_size', 'val_split', 'epochs', 'batch_size', 'lr', 'milestones', 'lr_decay',
             'momentum', 'weight_decay', 'seed', 'amp')  # fmt: skip
    # older checkpoints do not know these
    newer = {'compile': False, 'schedule': 'steps', 'phases': 'before', 'ramp_epochs': None,
             'nesterov': True, 'pad': 'reflect'}  # fmt: skip
    chosen = {name: getattr(args, name) for name, default in newer.items()
              if getattr(args, name, default) != default}  # fmt: skip
    return {name: getattr(args, name) for name in names} | {'processes': processes()} | chosen | more


def fingerprint(net: nn.Module) -> str:
    """A short name for a network's weights, to notice that a file has changed since."""
    digest = hashlib.sha1()
    for key, value in net.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def read_data(args: argparse.Namespace, device: torch.device):
    """(training set, test set), whole."""
    folder_only = {'image_size': args.image_size, 'workers': args.workers, 'convert_rgb': args.convert_rgb}
    with user_errors():
        return dataset.load(args.data_name, args.img_root, device, **folder_only)


def load_data(args: argparse.Namespace, device: torch.device, log: Callable = lambda line: None):
    """(training set, validation set or None, test set) as the flags say."""
    train, test = read_data(args, device)
    for note in getattr(test, 'notes', ()):
        log(note)
    if args.pad != 'reflect' and not isinstance(train, dataset.Resident):
        raise UserError(f'--pad {args.pad}: {args.data_name} is cropped at random sizes, without padding')
    train.pad = args.pad
    val = None
    if args.val_split:
        train, val = train.split(args.val_split, args.seed)
    if args.batch_size > len(train):
        raise UserError(f'--batch_size {args.batch_size}: the training set has {len(train)} images only')
    share(train, val, test)
    return train, val, test


def share(*sets) -> None:
    """Tell data sets which part of every batch is this process's."""
    for data in sets:
        if data:
            data.shard = (rank(), processes())
