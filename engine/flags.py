"""The flags that scripts share, and how the text of a flag becomes a value."""

import argparse
import ast
import contextlib
import inspect
import sys
from collections.abc import Iterable

from engine.errors import UserError
from engine.processes import processes


class Short(argparse.RawDescriptionHelpFormatter):
    """--help on a screen or two: the first clause of each text, and the default."""

    def __init__(self, prog: str, **more) -> None:
        super().__init__(prog, max_help_position=26, **more)

    def _format_args(self, action, default_metavar: str) -> str:
        if action.nargs in ('+', '*'):
            return f'{self._metavar_formatter(action, default_metavar)(1)[0]} ...'
        return super()._format_args(action, default_metavar)

    def _get_default_metavar_for_optional(self, action) -> str:
        return 'X'

    def _split_lines(self, text: str, width: int) -> list[str]:
        first, *others = ' '.join(text.split()).split('; ')
        default = [clause for clause in others if clause.startswith('default')]
        return super()._split_lines('; '.join([first, *default[-1:]]), width)


class Parser(argparse.ArgumentParser):
    """argparse with the house's habits: --a-b means --a_b, no abbreviations, defaults shown by --help."""

    def __init__(self, description: str) -> None:
        super().__init__(
            usage='%(prog)s FLAGS', description=description, allow_abbrev=False, formatter_class=Short,
            epilog='docs/flags.md has what each flag means in full.',
        )  # fmt: skip
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
         help='held-out share of the training set; best.pt is chosen on it; default 0; best.pt is then '
              'chosen '
              'on the test set, and the log says so')
    flag('--epochs', type=positive_int, default=epochs, help=f'default {epochs}')
    flag('--batch_size', type=positive_int, default=128, help='of each process, default 128')
    flag('--lr', type=positive_float, default=lr, help=f'learning rate, {rate}')
    flag('--schedule', choices=('steps', 'onecycle'), default='steps',
         help='steps: the learning rate drops at the milestones; onecycle: it moves at every step, linearly '
              'up to --lr over the first fifth of the run, then linearly to 0; default steps')
    flag('--milestones', type=fraction, nargs='*', default=[0.5, 0.75], metavar='F',
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
    add_output_flags(parser)


def add_label_flag(flag) -> None:
    flag('--labelled', type=fraction, metavar='F',
         help='share of the training images that keep their labels, drawn by --seed; of the others '
              'train_base.py sees nothing, and train_kd.py learns what a teacher says; default: all that '
              'have one')  # fmt: skip


def add_output_flags(parser: Parser) -> None:
    """Where results go, how a run goes on, and what it shows meanwhile."""
    # fmt: off
    flag = add_place_flags(parser)
    flag('--save_every', type=positive_int, default=1, metavar='N',
         help='epochs between checkpoints; last.pt and best.pt, which are also written after the last: '
              'a kill '
              'loses up to N; '
              'default 1')
    flag('--print_freq', type=positive_int, default=50,
         help='steps between shown losses, default 50')
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
              'instead of refusing')


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


def refuse_unknown(
    flag: str, names: Iterable[str], rows: dict, elsewhere: dict[str, str] | None = None
) -> None:
    """elsewhere: {a method of another script: what to do with it}"""
    for name in sorted(set(names) - rows.keys()):
        if name in (elsewhere or {}):
            raise UserError(f'{flag} {name}: {elsewhere[name]}')
        raise UserError(f'{flag}: no method is called {name!r}; there are {", ".join(rows)}')


def refuse_repeated(flag: str, words: list[str]) -> None:
    """Of students, and of the methods that one student joins with +."""
    if any(len(set(names)) < len(names) for names in (words, *(word.split('+') for word in words))):
        raise UserError(f'{flag} {" ".join(words)}: something is named twice')


def refuse_many_processes(names: Iterable[str], rows: dict) -> None:
    for name in sorted(names):
        if processes() > 1 and rows[name].limits.one_process:
            raise UserError(f'{name} runs in one process only: {rows[name].limits.one_process}')


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
        check_option(name, methods[name].loss, key, value, flag, getattr(methods[name], 'build', None))
        options[name][key] = value
    return weights, options


def check_option(name: str, loss: type, key: str, value, flag: str, build=None) -> None:
    """A key and its type against the constructor's signature, and the build's, before anything else."""
    signature = inspect.signature(loss)
    shown = f'the signature is {loss.__name__}{str(signature).replace(" -> None", "")}'
    own = inspect.signature(build).parameters if build else {}
    legal = {k: p for k, p in own.items() if p.default is not p.empty} | dict(signature.parameters)
    if key not in legal:
        raise UserError(f'{flag}: {name} has no argument {key!r}; {shown}')
    kind = legal[key].annotation
    legal = True
    with contextlib.suppress(TypeError):  # a list of something: the constructor says more
        legal = isinstance(value, int | float if kind is float else kind)
    if not legal or (isinstance(value, bool) and kind is not bool):
        raise UserError(f'{flag}: {key}={value!r} of {name} has the wrong type; {shown}')


def add_head_flag(flag, of: str) -> None:
    flag('--new_head', action='store_true',
         help=f'of {of} take all but the classifier; for weights with other classes, or none')  # fmt: skip


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
