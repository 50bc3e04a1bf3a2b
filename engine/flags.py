"""The flags that scripts share, and how the text of a flag becomes a value."""

import argparse
import shlex

from dataset import spelled
from engine.errors import UserError
from engine.parser import Parser


def add_common_flags(
    parser: Parser,
    epochs: int = 200,
    lr: float | None = 0.1,
    rate: str = 'default 0.1',
    more_data: str = '',
    batch_size: int = 128,
) -> None:
    """The flags that every training script has; rate, more_data: what --help says besides."""
    add_data_flags(parser, more_data)
    # fmt: off
    flag = parser.add_argument_group("recipe (the defaults are Knowledge-Distillation-Zoo's)").add_argument
    flag('--val_split', type=fraction, default=0.0, metavar='F',
         help='held-out share of the training set; best.pt is chosen on it; default 0; best.pt is then '
              'chosen '
              'on the test set, and the log says so')
    flag('--epochs', type=positive_int, default=epochs, help=f'default {epochs}')
    flag('--batch_size', type=positive_int, default=batch_size, help=f'of each process, default {batch_size}')
    flag('--lr', type=positive_float, default=lr, help=f'learning rate, {rate}')
    flag('--schedule', choices=('steps', 'onecycle'), default='steps',
         help='steps: the learning rate drops at the milestones; onecycle: it moves at every step, linearly '
              'up to --lr over the first fifth of the run, then linearly to 0; default steps')
    flag('--milestones', type=milestone, nargs='*', default=[0.5, 0.75], metavar='F',
         help='SGD: shares of the run where the rate drops; default 0.5 0.75')
    flag('--lr_decay', type=positive_float, default=0.1, help='SGD: factor at a milestone, default 0.1')
    flag('--momentum', type=fraction, default=0.9, help='SGD: Nesterov momentum, default 0.9')
    flag('--no_nesterov', dest='nesterov', action='store_false',
         help='SGD: plain momentum, not Nesterov; as RepDistiller and mdistiller have it')
    flag('--weight_decay', type=fraction, default=1e-4, help='on all parameters, default 1e-4')
    flag('--pad', choices=('reflect', 'zero'), default='reflect',
         help='what crops see around an image; reflect, the image mirrored; zero, black, as '
              'RepDistiller and mdistiller have it; not for folder; default reflect')
    flag('--seed', type=seed_number, default=2, help='of initial weights and batches, default 2')
    # fmt: on
    add_machine_flags(parser)
    # fmt: off
    parser.add_argument('--compile', action='store_true',
        help='networks through torch.compile; a minute of start, faster steps on CUDA, other rounding')
    flag = add_output_flags(parser)
    flag('--print_freq', type=positive_int, default=50,
         help='steps between shown losses, default 50')


def add_optimiser_flag(parser: Parser) -> None:
    # fmt: off
    parser.add_argument('--optim', choices=('sgd', 'adamw'), default='sgd',
        help='sgd, or adamw for transformers; with it say --weight_decay 0.05, as DeiT does; default sgd')


OF_STEPS = {'milestones': [0.5, 0.75], 'lr_decay': 0.1}  # flags that steps alone read, and their defaults
OF_SGD = {'momentum': 0.9, 'nesterov': True}  # that SGD alone reads


def with_rate(args: argparse.Namespace) -> argparse.Namespace:
    """The flags, with the optimiser's learning rate where none is said; refused if nobody reads them."""
    args.lr = args.lr or {'sgd': 0.1, 'adamw': 1e-3}[args.optim]
    if args.schedule != 'steps':
        refuse_given(args, OF_STEPS, f'--schedule {args.schedule} does not read it')
    if args.optim != 'sgd':
        refuse_given(args, OF_SGD, f'--optim {args.optim} does not read it')
    return args


def refuse_given(args: argparse.Namespace, unread: dict, why: str) -> None:
    """unread: flags with their defaults, at which they must be."""
    for key, default in unread.items():
        if getattr(args, key) != default:
            flag = '--no_nesterov' if key == 'nesterov' else f'--{key}'
            raise UserError(f'{flag}: {why}')


RATE = 'default 0.1 with sgd, 0.001 with adamw'


def add_label_flag(flag) -> None:
    flag('--labelled', type=share, metavar='F',
         help='share of the training images that keep their labels, drawn by --seed; of the others '
              'train_base.py sees nothing, and train_kd.py learns what a teacher says; default: all that '
              'have one')  # fmt: skip


def add_output_flags(parser: Parser):
    """Where results go, how a run goes on; returns what adds further flags to the same group."""
    # fmt: off
    flag = add_place_flags(parser)
    flag('--save_every', type=positive_int, default=1, metavar='N',
         help='epochs between checkpoints; last.pt and best.pt, which are also written after the last: '
              'a kill '
              'loses up to N; '
              'default 1')
    add_board_flag(flag)
    return flag


def add_board_flag(flag) -> None:
    flag('--tensorboard', action='store_true', help='also write TensorBoard scalars')


def add_place_flags(parser: Parser):
    """Where results go, and how a run goes on; returns what adds further flags to the same group."""
    # fmt: off
    flag = parser.add_argument_group('output').add_argument
    flag('--save_root', default='./save', help='where output folders go, default ./save')
    flag('--note', help='name of the output folder; default: made from the flags')
    flag('--resume', metavar='auto|never|PATH',
         help='auto: continue, or start; what is in the output folder; never: start afresh and overwrite; '
              'PATH: continue from this folder or last.pt; default: refuse to overwrite')
    return flag


def add_data_flags(parser: Parser, more: str = '') -> None:
    """Which images, where they lie."""
    # fmt: off
    flag = parser.add_argument_group('data').add_argument
    flag('--data_name', default='shapes', metavar='NAME',
         help=f'shapes, patterns, cifar10, cifar100, folder, arrays{more}; shapes and patterns (tiny, for '
              'data-free methods) are embedded, no download, and shapes:N, cifar10:N have N training images; '
              'folder: IMG_ROOT/train and IMG_ROOT/val with one folder per class; arrays: IMG_ROOT/train.npz '
              'and IMG_ROOT/test.npz; default shapes')
    flag('--img_root', default='./data', help='where the data lies, default ./data')
    flag('--image_size', type=positive_int, default=224, help='folder only: side of the crops, default 224')
    flag('--workers', type=whole_number, default=4, help='folder only: decoding processes, default 4')
    flag('--convert_rgb', action='store_true',
         help='folder only: convert images that are not RGB; grey, CMYK and palette images (ImageNet '
              'has some), '
              'instead of refusing; alpha is dropped, not blended')


def data_words(args: argparse.Namespace, classes: list[int] | None = None) -> str:
    """What stands after --data_name in a command for the same images, with the flags of add_data_flags.

    classes: those that the network tells apart, in its order, for --classes of tools/eval.py; None: all.
    """
    words = [args.data_name]
    words += ['--img_root', args.img_root] if args.img_root != './data' else []
    words += ['--image_size', str(args.image_size)] if args.image_size != 224 else []
    words += ['--convert_rgb'] if args.convert_rgb else []
    words += ['--classes', spelled(classes)] if classes else []
    return shlex.join(words)


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


def positive_int(text: str) -> int:
    return _number(int, text, lambda x: 0 < x < 2**31, 'a whole number > 0')


def whole_number(text: str) -> int:
    return _number(int, text, lambda x: 0 <= x < 2**31, 'a whole number >= 0')


def seed_number(text: str) -> int:
    """Epochs' seeds are a million times it, in 64 bits."""
    return _number(int, text, lambda x: abs(x) < 10**12, 'a whole number of at most 12 digits')


LARGEST = 3e38  # that float32 holds


def any_number(text: str) -> float:
    return _number(float, text, lambda x: abs(x) < LARGEST, 'a number')


def positive_float(text: str) -> float:
    return _number(float, text, lambda x: 0 < x < LARGEST, 'a number > 0')


def share_of_ce(text: str) -> float:
    return _number(float, text, lambda x: 0 <= x < LARGEST, 'a number >= 0')


def one_weight(text: str) -> float:
    return _number(float, text, lambda x: 0 <= x < LARGEST, 'a number >= 0, one for all students')


def fraction(text: str) -> float:
    return _number(float, text, lambda x: 0 <= x < 1, 'a share from 0 to below 1')


def milestone(text: str) -> float:
    return _number(float, text, lambda x: 0 <= x < 1, 'a share from 0 to below 1 (150 of 240 epochs: 0.625)')


def share(text: str) -> float:
    return _number(float, text, lambda x: 0 < x < 1, 'a share between 0 and 1')


def _number(kind, text, legal, wanted):
    try:
        if legal(value := kind(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f'expected {wanted}, got {text!r}')


def add_head_flag(flag, of: str) -> None:
    flag('--new_head', action='store_true',
         help=f'of {of} take all but the classifier; for weights with other classes, or none')  # fmt: skip


def head_of(flag: str) -> str:
    """What load_weights says of weights of this flag, beside which --new_head is offered."""
    return f'{flag} FILE --new_head keeps the rest'


def check_head(args: argparse.Namespace, of: str) -> None:
    if args.new_head and not getattr(args, of.removeprefix('--')):
        raise UserError(f'--new_head: goes with {of} FILE')


def add_thread_flag(parser: Parser) -> None:
    parser.add_argument('--student_threads', type=positive_int, default=1, metavar='N',
        help='CPU: threads inside each operation; of each student, as many students train at the same '
             'time as '
             '--threads allows. Last digits depend on N and on nothing else: alone or beside others, on two '
             'cores or sixteen, a student ends with the same weights; default 1')  # fmt: skip


def add_graph_flag(parser: Parser) -> None:
    parser.add_argument('--cuda_graphs', action='store_true',
        help='let the GPU repeat a recorded step; students side by side: several times faster '
             'for small networks; elsewhere nothing changes')  # fmt: skip
