"""From the flags of train_dfkd.py to what each method is asked to do."""

from dataclasses import dataclass, fields, replace

from engine.errors import UserError
from engine.method_flags import key_values, refuse_many_processes, refuse_repeated, refuse_unknown
from methods.dfkd import DFKD, Method, Recipe, soft_targets

WEIGHTS = sorted({name for row in DFKD.values() for name in row.weights})


@dataclass
class Wanted:
    """A row with what the flags make of it."""

    row: Method
    recipe: Recipe
    weights: dict[str, float]
    options: dict


def read_methods(args) -> dict[str, Wanted]:
    """{word of --kd_mode: its row with the recipe, weights and options that the flags ask for}"""
    names = args.kd_mode
    refuse_unknown('--kd_mode', names, DFKD)
    refuse_many_processes(names, DFKD)
    refuse_repeated('--kd_mode', names)
    if args.amp == 'fp16':
        raise UserError('--amp fp16: distances to running statistics overflow; use bf16')
    if len(args.t_name) != 1 or len(args.t_model) > 1 or not (args.t_model or args.dry_run):
        raise UserError('--t_name and --t_model are needed: one teacher and its checkpoint')
    weights = {name: getattr(args, name) for name in WEIGHTS if getattr(args, name) is not None}
    for key in weights:
        if not any(key in DFKD[name].weights for name in names):
            having = ', '.join(name for name, row in DFKD.items() if key in row.weights)
            raise UserError(f'--{key}: is a weight of {having}, not of {" ".join(names)}')
    options = given_options(args)
    given, made = {'ood': args.ood_name, 'pool': args.pool_init}, {}
    recipes = {name: recipe_of(args, name) for name in names}
    pooling = [name for name in names if DFKD[name].images.kind == 'pool']
    making = [name for name in names if recipes[name].g_steps]
    generating = [name for name in making if DFKD[name].images.generator]
    # generators of the kind fixed have no width, and are done when the student's rate begins to fall
    fixed = [name for name in names if DFKD[name].images.kind == 'fixed']
    reads = {'pool_init': pooling, 'pool_max': pooling,
             'ood_name': [name for name in names if DFKD[name].needs.ood],
             'g_steps': [name for name in names if DFKD[name].feed],
             'T': [name for name in names if DFKD[name].student is soft_targets],
             'lr_g': making, 'synth_batch_size': making, 'nz': generating,
             'width': [name for name in generating if name not in fixed],
             'sched_g': [name for name in making if name not in fixed],
             'lr_z': [name for name in pooling if DFKD[name].images.generator],
             'milestones': [name for name in names if recipes[name].sched == 'steps'],
             'eta_min': [name for name in names if recipes[name].sched == 'cosine'],
             'momentum': [name for name in names if recipes[name].optim == 'sgd']}  # fmt: skip
    for key, readers in reads.items():
        if getattr(args, key) is not None and not readers:
            raise UserError(f'--{key}: {" ".join(names)} would not read it')
    for name in names:
        row = DFKD[name]
        for need, flag in (('ood', '--ood_name'), ('pool', '--pool_init')):
            if getattr(row.needs, need) and not given[need]:
                raise UserError(f'{flag}: {name} needs it')
        own = {key: value for key, value in weights.items() if key in row.weights}
        if row.weights and not any((row.weights | own).values()):
            raise UserError(f'--{" --".join(row.weights)}: with all at 0 nothing is left to make images by')
        recipe = recipes[name]
        if row.images.kind == 'fixed' and not recipe.warmup:
            raise UserError(f'--warmup 0: {name} trains its generators in these epochs alone')
        if not recipe.g_steps and not (name in pooling and args.pool_init):
            raise UserError(
                f'--g_steps 0: {name} has no image then; only a pool of --pool_init may stay as it is'
            )
        made[name] = Wanted(row, recipe, row.weights | own, row.options | options[name])
    return made


def recipe_of(args, name: str) -> Recipe:
    """The preset, with what flags say otherwise."""
    given = {f.name: getattr(args, f.name, None) for f in fields(Recipe)}
    given = {key: value for key, value in given.items() if value is not None}
    if not DFKD[name].feed:  # beside others: it makes no image
        given.pop('g_steps', None)
    recipe = replace(DFKD[name].recipe, **given)
    if args.dry_run:
        few, warmup = min(recipe.kd_steps, 3), min(recipe.warmup, 1)
        recipe = replace(
            recipe, kd_steps=few, ep_steps=3 * few, g_steps=min(recipe.g_steps, 3), batch_size=32,
            synth_batch_size=32, warmup=warmup, epochs=warmup + 1,
        )  # fmt: skip
    if not recipe.synth_batch_size:
        recipe = replace(recipe, synth_batch_size=recipe.batch_size)
    if recipe.warmup >= recipe.epochs:
        raise UserError(f'--epochs {recipe.epochs}: {name} has {recipe.warmup} of warm-up, --warmup, before')
    if recipe.ep_steps % recipe.kd_steps:
        raise UserError(
            f'--ep_steps {recipe.ep_steps}: {name} has {recipe.kd_steps} --kd_steps a round: take a multiple'
        )
    if args.sched == 'steps' != DFKD[name].recipe.sched and args.milestones is None:
        raise UserError(f'--sched steps: {name} has no milestones of its own, say where with --milestones')
    if DFKD[name].images.sample != 'fresh' and recipe.batch_size != recipe.synth_batch_size:
        raise UserError(
            f'--synth_batch_size {recipe.synth_batch_size}: the student of {name} learns from the batch that '
            f'the generator makes, --batch_size is {recipe.batch_size}: take the same number'
        )
    return recipe


def given_options(args) -> dict[str, dict]:
    """{method: what --kd_args says}"""
    options = {name: {} for name in args.kd_mode}
    for key, value in key_values(args.kd_args, '--kd_args').items():
        name, _, key = key.rpartition('.')
        if not name and len(args.kd_mode) > 1:
            raise UserError(f'--kd_args {key}: with several methods say METHOD.{key}=VALUE')
        name = name or args.kd_mode[0]
        if name not in options:
            raise UserError(f'--kd_args: {name!r} is not among --kd_mode {" ".join(args.kd_mode)}')
        known = DFKD[name].options
        if key not in known:
            raise UserError(f'--kd_args: {name} has no {key!r}; it has {", ".join(known) or "none"}')
        kind = type(known[key])
        if not isinstance(value, (int, float) if kind is float else kind) or (
            isinstance(value, bool) and kind is not bool
        ):
            raise UserError(
                f'--kd_args: {key}={value!r} of {name} has the wrong type, its default is {known[key]!r}'
            )
        options[name][key] = value
    return options
