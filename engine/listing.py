"""What a row says to a reader: `--kd_mode list`, `--ka_mode list`, docs/methods.md.

Nothing here is written down twice: the title and the paper are the first paragraphs of the loss's file, what
it needs is what its feed reads and what its row asks for, and the arguments are those of its constructor.
"""

import argparse
import ast
import inspect
import re
import sys
import textwrap

from dataset.views import VIEWS
from methods import LM, Method

# what a feed reads of Feats and of the batch, and how a reader calls it
READS = {
    r'\.out\b|\bouts?\b': 'logits',
    r'\.feat\b': 'embeddings',
    r'\.(fms|pyramid)\b': 'maps',
    r'\.towers\b': 'maps inside the head',
    r'\.pres\b(?!.*sums)': 'maps before the ReLU',  # of wide networks alone: as good as fms
    r'\.tokens\b': 'patch tokens',
    r'\.extra\b': 'layers added to the student',
    r'\.target\b': 'labels',
    r'\.boxes\b': 'boxes',
    r'\.index\b': 'image numbers',
    r'\.views\b': '',  # the row says which
    r'classifier_layer|\.after\(': 'parts of the networks themselves',
    r'batch\.(teacher|student)\(': 'further forward passes',
}


def facts(name: str, row) -> dict[str, str]:
    """Title, paper, needs, weight and arguments of a row; its file as `module`.

    `ce` is the weight of cross-entropy beside it: nothing if that is 1, 'later' if it has a schedule.
    """
    module = module_of(name, row)
    title, paper = opening(module)
    ce = getattr(getattr(row, 'when', None), 'ce', 1)
    return {
        'name': name,
        'title': getattr(row, 'says', '') or title,
        'paper': short(paper),
        'needs': ', '.join(needs(row)),
        'weight': f'{row.weight:g}' if hasattr(row, 'weight') else 'preset',
        'ce': 'later' if callable(ce) else '' if ce == 1 else f'{ce:g}',
        'arguments': arguments(row),
        'module': module.__name__ if module else '',
    }


def module_of(name: str, row):
    """The file of a loss: where its optimiser or class is, or the file of the row's name."""
    optimiser = getattr(getattr(row, 'own', None), 'optimiser', None)
    places = [getattr(thing, '__module__', '') for thing in (optimiser, row.loss)]
    package = next((place.split('.')[0] for place in places if '_losses' in place), 'ka_losses')
    for place in (*places, f'{package}.{name}'):
        if '_losses.' in place and place in sys.modules:
            return sys.modules[place]
    return None


def opening(module) -> tuple[str, str]:
    """The first two paragraphs of a loss file: what it is, and whose."""
    if not module:
        return '', ''
    paragraphs = [' '.join(text.split()) for text in (inspect.getdoc(module) or '').split('\n\n')]
    if len(paragraphs) < 2:
        raise ValueError(
            f'{module.__file__}: the docstring must begin with a title, an empty line, and the paper'
        )
    return paragraphs[0].rstrip('.'), paragraphs[1]


def short(paper: str) -> str:
    """'K. He, X. Zhang, S. Ren, "Deep", CVPR 2016, arXiv:...' -> 'He et al., CVPR 2016'; several: all."""
    found = []
    for authors, place in re.findall(r'((?:[^";]|; )*), "[^"]*", ([^;]*)', paper):
        names = [name.split('. ')[-1].strip() for name in authors.split(',')]
        who = (
            names[0] if len(names) == 1 else ' and '.join(names) if len(names) == 2 else f'{names[0]} et al.'
        )
        found.append(f'{who}, {place.split(", arXiv")[0].strip(" .")}')
    return '; '.join(found) or 'none found'


def needs(row) -> list[str]:
    """What a training must give the loss, in a reader's words."""
    if hasattr(row, 'images'):
        return _without_data(row)
    source = inspect.getsource(row.feed)
    words = [word for pattern, word in READS.items() if word and re.search(pattern, source)]
    adds = not isinstance(row, Method) or row.own.student or row.own.peers
    if 'layers added to the student' in words and not adds:
        words[words.index('layers added to the student')] = 'a distillation head, if the student has one'
    if 'maps' in words and 'maps before the ReLU' in words:
        words.remove('maps')
    if any(row is other for other in LM.values()):
        words = ['tokens' if word == 'patch tokens' else word for word in words]
    if getattr(row, 'task', ''):  # a feat of theirs is a map
        words = list(dict.fromkeys('maps' if word == 'embeddings' else word for word in words))
    if isinstance(row, Method):
        return words + _of_distillation(row)
    needed, soft = row.needs, row.when.soft  # an amalgamation
    words += ['teachers that share classes'] * needed.shared_classes
    words += [f'by default at rb{" rb".join(map(str, needed.layers))}'] * bool(needed.layers)
    words += [f'beside soft targets at {soft:g}'] * bool(soft)
    only = {'dense': 'dense tasks', 'attributes': 'attributes', 'backbones': 'several tasks, no logits'}
    return words + ([only[needed.setting]] if needed.setting in only else [])


def _without_data(row) -> list[str]:
    kind = {'online': 'a generator beside the student', 'pool': 'a pool of images',
            'fixed': 'generators before the student'}  # fmt: skip
    return [
        kind[row.images.kind],
        *(["the teacher's batch norms"] if row.needs.statistics else []),
        *(['the student'] if row.needs.student else []),
        *(['real images of another domain'] if row.needs.ood else []),
        *(['images made before'] if row.needs.pool else []),
    ]


def _preset(row) -> str:
    """Weights, options and the recipe's main figures: '2000 x 120 updates, batch 1024, ...; oh=0.05'."""
    r = row.recipe
    rates = f'lr {r.lr:g}' + (f', images {r.lr_g:g}' if r.g_steps else '')
    steps = f'{r.epochs} x {r.ep_steps or "one pass of"} updates, {r.g_steps} of images to {r.kd_steps}'
    values = ', '.join(f'{key}={value}' for key, value in {**row.weights, **row.options}.items())
    return f'{steps}, batch {r.batch_size}, {rates}' + (f'; {values}' if values else '')


def _of_distillation(row) -> list[str]:
    needed, when = row.needs, row.when
    return [
        *({(): ['stages: all'], (-1,): ['stages: the last']}.get(needed.stages, [])),
        *(VIEWS[view].says if view in VIEWS else view for view in needed.views),
        *(['all teachers'] if needed.all_teachers else []),
        *(['relations in the batch'] if needed.relations else []),
        *(['full batches'] if needed.full_batches else []),
        *(['the gradient in the image'] if needed.image_gradient else []),
        *(['vision transformers'] if needed.tokens else []),
        *(['one process'] if row.limits.one_process else []),
        *(['no --compile'] if row.limits.no_compile else []),
        *([f'{when.alone} of 200 epochs alone'] if when.alone else []),
        *(['a look at the training set before'] if row.own.before else []),
        *dense(row),
        *([f'{when.pretrain} of 200 epochs for its own modules'] if when.pretrain else []),
    ]


def dense(row) -> list[str]:
    """What a row of train_dense.py is for."""
    task = getattr(row, 'task', '')
    return [f'for {task}'] * bool(task) + [f'only {head}' for head in getattr(row, 'heads', ())]


def arguments(row) -> str:
    """The constructor's arguments that have a default, as the row's build sets them: 'T=4.0, p=2'.

    Those that the build works out of the networks or the data stand by name at the end.
    """
    if hasattr(row, 'images'):
        return _preset(row)
    parameters = [p for made in (row.loss, row.build) for p in inspect.signature(made).parameters.values()]
    values = {p.name: repr(p.default) for p in parameters if p.default is not inspect.Parameter.empty}
    values |= {key: value for key, value in told(row.build).items() if key in values}
    worked_out = ' '.join(key for key, value in values.items() if not value)
    named = [f'{key}={value}' for key, value in values.items() if value]
    return ', '.join([*named, *([f'worked out: {worked_out}'] if worked_out else [])])


def unlike_defaults(row) -> str:
    """What the row's build tells the constructor where its class says otherwise: "T=2.0"; '' for nothing."""
    defaults = {p.name: repr(p.default) for p in inspect.signature(row.loss).parameters.values()}
    return ', '.join(f'{k}={v}' for k, v in told(row.build).items() if v and v != defaults.get(k, v))


def told(build) -> dict:
    """What a build tells a constructor, loss(mode='mse', **{'margin': 2.0, **options}); '': worked out."""
    found = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(build)))):
        pairs = zip(node.keys, node.values) if isinstance(node, ast.Dict) else ()
        pairs = [(key.value, value) for key, value in pairs if isinstance(key, ast.Constant)]
        pairs += [(k.arg, k.value) for k in node.keywords] if isinstance(node, ast.Call) else []
        found |= {key: repr(v.value) if isinstance(v, ast.Constant) else '' for key, v in pairs if key}
    return found


def text(rows: dict, width: int = 110) -> str:
    """The table that `list` prints: a line of facts per method, its arguments below."""
    lines = ['METHOD          weight  paper; what it needs; arguments of its loss with their defaults']
    for name, row in sorted(rows.items()):
        f = facts(name, row)
        beside = f'cross-entropy {f["ce"]}' if f['ce'] else ''
        parts = (f['paper'], f['needs'] or 'nothing', beside, f['arguments'])
        said = '; '.join(part for part in parts if part)
        start = f'{name:16s}{f["weight"]:>6s}  '
        lines += textwrap.wrap(said, width, initial_indent=start, subsequent_indent=' ' * 24,
                               break_long_words=False)  # fmt: skip
    return '\n'.join(lines)


def lists(rows: dict) -> type[argparse.Action]:
    """For add_argument(action=...): the word `list` alone prints the table and ends, as --help does."""

    class OrList(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            if values == ['list']:
                print(text(rows))
                parser.exit()
            setattr(namespace, self.dest, values)

    return OrList
