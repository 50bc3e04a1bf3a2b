"""From the flags of train_kd.py to the methods of each student."""

from dataset.labels import NO_LABEL
from engine.errors import UserError
from engine.method_flags import refuse_many_processes, refuse_repeated, refuse_unknown, weights_and_options
from engine.stages import read_stages
from engine.student import Term
from methods import KD, PEERS, schedules

# flags that some rows read: which do, and what is said where none does
READ_BY_SOME = {
    'ramp_epochs': (lambda row: isinstance(row.when.ramp, schedules.linear), 'the weight has no ramp'),
    'init_epochs': (lambda row: row.when.alone, 'the training does not begin with a loss alone'),
    'pretrain_epochs': (lambda row: row.when.pretrain, 'no loss has modules that learn before the training'),
    'global_relations': (
        lambda row: row.needs.relations,
        'no loss here can relate the samples of all processes',
    ),
}


def read_methods(args) -> dict[str, list[Term]]:
    """{'pkt+st': [Term('pkt', ...), Term('st', ...)], ...} from --kd_mode and what goes with it."""
    tokens = {token: token.split('+') for token in args.kd_mode}
    names = {name for terms in tokens.values() for name in terms}
    elsewhere = {name: 'trains networks that learn from each other, use train_dml.py' for name in PEERS}
    refuse_unknown('--kd_mode', names, KD, elsewhere)
    refuse_repeated('--kd_mode', args.kd_mode)
    check_teachers(args, names)
    weights, options = weights_and_options(args, sorted(names), KD)
    stages = read_stages(args, sorted(names), KD)
    wanted = {
        token: [
            Term(name, KD[name], weights[name], options[name], KD[name].when.ramp, stages[name])
            for name in terms
        ]
        for token, terms in tokens.items()
    }
    for token, terms in wanted.items():
        for column, what in (
            ('student', 'change the student'),
            ('update', 'have a training step of their own'),
        ):
            several = [term.name for term in terms if getattr(term.method.own, column)]
            if len(several) > 1:
                raise UserError(f'--kd_mode {token}: {" and ".join(several)} {what}, only one can')
        if args.amp == 'fp16' and any(term.method.own.update for term in terms):
            raise UserError(f'--amp fp16: {token} has a training step of its own; use bf16')
        for term in terms:
            if args.compile and term.method.limits.no_compile:
                raise UserError(f'--compile: {term.name}: {term.method.limits.no_compile}')
    return wanted


def refuse_unread(args, wanted: dict[str, list[Term]]) -> None:
    rows = {term.name: term.method for terms in wanted.values() for term in terms}
    for flag, (reads, why) in READ_BY_SOME.items():
        if getattr(args, flag) and not any(map(reads, rows.values())):
            raise UserError(f'--{flag}: {", ".join(sorted(rows))}: {why}')


def check_teachers(args, names: set[str]) -> None:
    if len(args.t_name) != len(args.t_model):
        raise UserError(f'--t_name and --t_model: {len(args.t_name)} names and {len(args.t_model)} files')
    if (args.t_mean or args.t_std) and not args.t_name:
        raise UserError('--t_mean and --t_std: are of the images of a teacher, go with --t_name')
    needy = sorted(name for name in names if KD[name].needs.teacher)
    if args.soft_labels and args.t_name:
        raise UserError('--soft_labels: stands for the teacher, leave out --t_name and --t_model')
    if needy and not args.t_name and not args.soft_labels:
        raise UserError(f'--t_name and --t_model are needed: {", ".join(needy)} distils a teacher')
    if len(args.t_name) > 1 and not any(KD[name].needs.all_teachers for name in names):
        teams = [name for name, method in KD.items() if method.needs.all_teachers]
        raise UserError(f'--t_name: got {len(args.t_name)} teachers; several are for {", ".join(teams)}')
    refuse_many_processes(names, KD)


def check_labels(wanted: dict[str, list[Term]], train, log) -> None:
    """Say how many images have no label, and refuse methods that need everybody's."""
    without = int((train.targets == NO_LABEL).sum())
    if not without:
        return
    for terms in wanted.values():
        for term in terms:
            needs = term.method.needs
            if not needs.teacher or 'pair' in needs.views:
                raise UserError(f'{term.name}: needs the labels of all images, and {without} have none')
    log(f'{without} of {len(train)} training images have no label: the teacher alone speaks of them')
