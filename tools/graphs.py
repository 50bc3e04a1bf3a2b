"""A graph network teaches a smaller one which neighbours each node resembles (lsp).

    python tools/graphs.py --kd_mode teacher --note large
    python tools/graphs.py --kd_mode alone lsp --labels 0.05 --kernel rbf --sigma 30 \\
        --t_model save/large/teacher/net.pt --note small

The data is embedded (dataset/graphs.py): communities of nodes whose own features hardly tell where they
belong. teacher trains the large network, alone the small one from labels only, lsp the small one from labels
and from the teacher's layer before the last, as the authors do it; students start from the same weights and
see the same batches. With --labels 0.05 one node in twenty has a label, while the teacher, trained with all
of them, shows its layer for every node.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, and for each network a folder with last.pt (continued by
--resume auto), best.pt, net.pt, metrics.csv, results.json.
"""

import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from dataset.graphs import CLASSES, FEATURES, graphs  # noqa: E402
from engine import errors, session  # noqa: E402
from engine.device import refuse_amp, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.flags import (  # noqa: E402
    add_machine_flags,
    add_output_flags,
    positive_float,
    positive_int,
    refuse_given,
    seed_number,
    share_of_ce,
)
from engine.meter import Meter  # noqa: E402
from engine.method_flags import refuse_repeated  # noqa: E402
from engine.optimise import adam  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.recipe import resume_point  # noqa: E402
from engine.record import Record, fingerprint, output_folder, provenance  # noqa: E402
from kd_losses.lsp import LSP  # noqa: E402
from models.checkpoint import read_checkpoint  # noqa: E402
from models.gat import GAT  # noqa: E402

MODES = ('teacher', 'alone', 'lsp')


def parse_args(words=None):
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument
    flag('--kd_mode', nargs='+', required=True, choices=MODES, metavar='METHOD',
         help='networks to train; teacher: the large one; alone: the small one from labels; lsp: distilled')
    flag('--t_model', metavar='FILE', help='net.pt of an earlier teacher, for lsp')
    flag('--lambda_kd', type=share_of_ce, default=100.0, metavar='W',
         help="weight of lsp; default 100, the paper's (from memory, unverified)")
    flag('--kernel', choices=('l1exp', 'rbf'), default='l1exp',
         help="likeness of neighbours; l1exp: the authors' code's; rbf: the paper's best (from memory, "
              'unverified); default l1exp')
    flag('--gamma', type=positive_float, default=0.01, help='factor of distances in l1exp, default 0.01')
    flag('--sigma', type=positive_float, default=100.0, help='width of rbf, default 100')
    flag('--train', type=positive_int, default=20, metavar='N', help='training graphs, default 20')
    flag('--labels', type=positive_float, default=1.0, metavar='SHARE',
         help='nodes of a training graph that have a label; cross-entropy sees no others, lsp sees all; '
              'default 1')
    flag('--test', type=positive_int, default=20, metavar='N', help='test graphs, default 20')
    flag('--nodes', type=positive_int, default=100, metavar='N', help='nodes of a graph, default 100')
    flag('--s_layers', type=positive_int, default=3, help="the student's layers, default 3")
    flag('--s_width', type=positive_int, default=8, help='width of each of its 2 heads, default 8')
    flag('--t_layers', type=positive_int, default=3, help="the teacher's layers, default 3")
    flag('--t_width', type=positive_int, default=8, help='width of each of its 4 heads, default 8')
    flag('--epochs', type=positive_int, default=40, help='default 40')
    flag('--batch_size', type=positive_int, default=4, help='graphs of a batch, default 4')
    flag('--lr', type=positive_float, default=5e-3, help="Adam's, falling to 0; default 0.005, the authors'")
    flag('--weight_decay', type=share_of_ce, default=5e-4, help='on all parameters, default 5e-4')
    flag('--seed', type=seed_number, default=1, help='of initial weights and batches, default 1')
    # fmt: on
    add_machine_flags(parser)
    add_output_flags(parser)
    return parser.parse_args(words)


def main():
    args = parse_args()
    refuse_repeated('--kd_mode', args.kd_mode)
    if 'lsp' in args.kd_mode and not args.t_model:
        raise UserError('lsp: a teacher is needed, --t_model FILE of --kd_mode teacher')
    if 'lsp' not in args.kd_mode:
        of_lsp = {'lambda_kd': 100.0, 'kernel': 'l1exp', 'gamma': 0.01, 'sigma': 100.0}
        refuse_given(args, of_lsp, f'{" ".join(args.kd_mode)} would not read it, lsp does')
    if args.labels > 1:
        raise UserError(f'--labels {args.labels:g}: a share of the nodes is wanted, at most 1')
    refuse_amp(args)
    device = setup(args)
    folder = output_folder(Path(args.save_root) / (args.note or f'graphs-s{args.seed}'))
    log, origin = session.Log(folder), provenance(device)
    train, test = (graphs(n, which, args.nodes).to(device) for n, which in ((args.train, 0), (args.test, 1)))
    hide_labels(train, args.labels, args.seed)
    log(
        f'graphs: {args.train} + {args.test} of {args.nodes} nodes, {train.edge_index.shape[1]} edges, '
        f'{int((train.target >= 0).sum())} labels, {device}'
    )

    teacher, facts_t = None, {}
    if args.t_model:
        teacher = load_teacher(args, device)
        facts_t = {'teacher_weights': fingerprint(teacher), 'teacher_top1': accuracy(teacher, test)}
        log(f'teacher: top-1 {facts_t["teacher_top1"]:.2f} on the test graphs')
    torch.manual_seed(args.seed)
    student = GAT(FEATURES, CLASSES, args.s_width, 2, args.s_layers)
    large = GAT(FEATURES, CLASSES, args.t_width, 4, args.t_layers)
    nets = {mode: copy.deepcopy(large if mode == 'teacher' else student) for mode in args.kd_mode}
    runs = [Run(mode, net.to(device), args, folder, origin, facts_t) for mode, net in nets.items()]

    steps = -(-args.train // args.batch_size)
    start = min(run.record.epoch for run in runs)
    records = [run.record for run in runs]
    live = session.start(args, log, origin, records, val=None, done=start, epochs=args.epochs, steps=steps)
    for epoch in range(start, args.epochs):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
        batches = torch.randperm(args.train, generator=generator).split(args.batch_size)
        begun = [run for run in runs if run.record.epoch == epoch]  # a kill left others ahead
        rows = {}
        for run in begun:
            started = time.time()
            run.meter.reset(epoch)
            run.net.train()
            for group in run.opt.param_groups:
                group['lr'] = args.lr * (1 - epoch / args.epochs)
            for numbers in batches:
                train_step(run, train.some(numbers.to(device)), teacher, args)
                if run.meter.failure:
                    break
                if run is begun[0]:
                    live.bar.update()
            row = {'epoch': epoch + 1, **run.meter.read(run.net)}
            if not run.meter.failure:
                row['test_top1'] = accuracy(run.net.eval(), test)
            rows[run.name] = row | {'seconds': time.time() - started}
        session.drop_failed(live, begun, runs)
        kept = [(run.record, rows[run.name], run.line(args.epochs), f'{run.name}/') for run in begun]
        if code := session.end_epoch(live, epoch, epoch + 1 == args.epochs, kept):
            return code
        if not runs:
            break
    session.finish(live, [(run.record, 'net.pt', run.facts(args), run.name, '') for run in runs])


class Run:
    """One network in training: what belongs to it and to no other."""

    def __init__(self, name: str, net: nn.Module, args, folder: Path, origin: dict, facts_t: dict) -> None:
        self.name, self.net, self.teacher = name, net, facts_t if name == 'lsp' else {}
        with user_errors():
            self.kd = LSP(args.kernel, args.gamma, args.sigma)
        names = ('train', 'test', 'nodes', 's_layers', 's_width', 't_layers', 't_width', 'epochs')
        names += ('batch_size', 'lr', 'weight_decay', 'seed')
        names += ('labels',) * (args.labels != 1)  # older checkpoints do not know it
        names += ('lambda_kd', 'kernel', 'gamma', 'sigma') * bool(self.teacher)
        recipe = {key: getattr(args, key) for key in names} | self.teacher
        recipe |= {'script': 'graphs', 'method': name, 'initial': fingerprint(net)}
        self.opt = adam(net.parameters(), args.lr, weight_decay=args.weight_decay)
        self.meter = Meter(name, 0, next(net.parameters()).device)
        self.record = Record(folder / name, {'net': net, 'opt': self.opt}, recipe, origin, 'test')
        self.record.resume(resume_point(args.resume, folder / name))

    def line(self, epochs: int):
        return lambda row: (
            f'epoch {row["epoch"]}/{epochs}  {self.name:7s} ce {row["ce"]:.4f}  '
            f'train {row["train_top1"]:.2f}  test {row["test_top1"]:.2f}  {row["seconds"]:.1f} s'
        )

    def facts(self, args) -> dict:
        return {'script': 'graphs', 'method': self.name, 'data': 'graphs', 'seed': args.seed,
                'epochs': args.epochs, **self.teacher,
                'parameters': sum(p.numel() for p in self.net.parameters())}  # fmt: skip


def train_step(run: Run, batch, teacher, args) -> None:
    """Forward, backward, update."""
    out, seen = run.net(batch.feat, batch.edge_index)
    known = batch.target >= 0
    ce = F.cross_entropy(out[known], batch.target[known])
    loss, terms, out_t = ce, {'ce': ce}, None
    if run.name == 'lsp':
        with torch.no_grad():
            out_t, seen_t = teacher(batch.feat, batch.edge_index)
        terms['lsp'] = run.kd(middle(seen), middle(seen_t), batch.edge_index)
        loss = ce + args.lambda_kd * terms['lsp']
    if not run.meter.guard(loss, run.opt, *([] if out_t is None else [out_t])):
        return
    run.opt.zero_grad(set_to_none=True)
    loss.backward()
    run.opt.step()
    run.meter.add(out[known], batch.target[known], **terms)


def hide_labels(data, share: float, seed: int) -> None:
    """Label -100 for all nodes but this share of every graph, at least one; the same for all students."""
    generator = torch.Generator().manual_seed(seed)
    for k in range(data.count):
        nodes = (data.part == k).nonzero()[:, 0]
        kept = max(1, round(share * len(nodes)))
        data.target[nodes[torch.randperm(len(nodes), generator=generator)[kept:]]] = -100


def middle(seen: list) -> torch.Tensor:
    """The output of the layer before the last, as the authors have it."""
    return seen[-min(2, len(seen))]


def load_teacher(args, device) -> nn.Module:
    net = GAT(FEATURES, CLASSES, args.t_width, 4, args.t_layers)
    with user_errors():
        state = read_checkpoint(Path(args.t_model))
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(
            f'--t_model {args.t_model}: is no net.pt of --kd_mode teacher with --t_layers {args.t_layers} '
            f'and --t_width {args.t_width}'
        ) from None
    return net.to(device).eval().requires_grad_(False)


@torch.no_grad()
def accuracy(net, data) -> float:
    out, _ = net(data.feat, data.edge_index)
    return 100 * int((out.argmax(dim=1) == data.target).sum()) / len(data.target)


if __name__ == '__main__':
    errors.run(main)
