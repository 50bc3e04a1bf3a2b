"""Of the methods of a training command, print those whose result is not in results/ yet.

    python tools/missing.py at rkd -- train_kd.py --t_name resnet20 ... --epochs 12

The words after -- are the command without --kd_mode. A result counts if its data, its networks' names, the
weight of the loss and every flag that changes the numbers are the same. Weights are not compared: a teacher
trained here and one that somebody else trained by the same flags are the same to it.
example_train_script.sh asks before it trains.
"""

import importlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

from dataset.soft_labels import SoftLabelStore  # noqa: E402
from engine import errors  # noqa: E402
from engine.build import recipe_of  # noqa: E402
from engine.errors import UserError  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.recipe import NEWER, math_args  # noqa: E402
from report.table import read_json  # noqa: E402

ROOT = Path(__file__).parent.parent
SCRIPTS = ('train_base.py', 'train_kd.py', 'train_dml.py')
OF_METHODS = ('--lambda_kd', '--kd_args', '--kd_layers')  # their words may begin with a method's name


def wanted(script: str, token: str | None, words: list[str]) -> dict:
    """The recipe that a run of this method (None: without one) would note down, as far as the words tell."""
    module = importlib.import_module(script.removesuffix('.py'))
    sys.argv = [script, *(['--kd_mode', token] if token else []), *words]
    args = module.parse_args()
    recipe = math_args(args, script=module.__name__)
    if getattr(args, 'soft_labels', None):
        recipe |= labels_of(args)
    if token is None:
        recipe |= {'net': args.net_name}
    elif hasattr(args, 's_name'):
        recipe |= {'student': args.s_name, 'teacher': '+'.join(args.t_name)}
        recipe |= recipe_of(module.read_methods(args)[token], args)
    else:
        _, weight, options = module.read_method(args)
        recipe |= {'nets': args.net_names, 'method': [token, weight, options]}
    return recipe


def labels_of(args) -> dict:
    """What a recipe says of stored labels; of a folder that holds none (yet) what no recipe says."""
    try:
        stored = SoftLabelStore(args.soft_labels)
    except ValueError:
        return {'teacher_weights': None}
    teacher = f'{stored.meta["teacher_weights"]} {stored.meta["kind"]}'
    return {'teacher_weights': teacher, 'soft_labels': stored.named(args.epochs)}


def words_for(token: str, tokens: list[str], words: list[str]) -> list[str]:
    """The words without what they say of the other students' losses: NAME=.. and NAME.key=.. of each."""
    others = {name for other in tokens for name in other.split('+')} - {*token.split('+')}
    groups = []
    for word in words:
        if word.startswith('--') or not groups:
            groups.append([])
        groups[-1].append(word)
    kept = []
    for flag, *values in groups:
        own = [value for value in values if re.split('[.=]', value)[0] not in others]
        if '--' + flag[2:].replace('-', '_') not in OF_METHODS:
            kept += [flag, *values]
        elif own or not values:  # or nothing would stand after the flag
            kept += [flag, *own]
    return kept


def done(recipe: dict, results: list[dict]) -> bool:
    """Older results do not know newer flags: those that are named only where they are set were not."""
    wanted = NEWER | recipe
    return any(all(r.get(k, NEWER.get(k, v)) == v for k, v in wanted.items()) for r in results)


def main():
    parser = Parser(__doc__)
    parser.add_argument('methods', nargs='*', metavar='METHOD', help='names of methods')
    parser.add_argument('command', nargs='*', metavar='-- SCRIPT FLAG', help='the command without --kd_mode')
    cut = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
    tokens, (script, *words) = parser.parse_args(sys.argv[1:cut]).methods, sys.argv[cut + 1 :] or ['']
    if script not in SCRIPTS:
        raise UserError(f'after -- comes a command of {", ".join(SCRIPTS)}, got {script!r}')
    if not tokens or script == 'train_base.py':
        raise UserError(f'name methods before --, those of {" or ".join(SCRIPTS[1:])}')
    results = [read_json(path) for path in sorted((ROOT / 'results').rglob('*.json'))]
    recipes = [r['recipe'] for r in results if isinstance(r, dict) and 'recipe' in r]
    lacking = [t for t in tokens if not done(wanted(script, t, words_for(t, tokens, words)), recipes)]
    print(' '.join(lacking))


if __name__ == '__main__':
    errors.run(main)
