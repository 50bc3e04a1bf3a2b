"""What the tests know of one method: NAME.py beside its vector NAME.npz; of amalgamation in ka/, of data-free
distillation in dfkd/.

A file holds, as plain names of the module, what it needs of these:

golden(z)       yields a Case for every value of the vector z and compares the rest itself, see shared.py; all
                sizes and hyperparameters come from the vector
without_vector  instead of golden: why there is none, and what is tested instead
more_vectors    {name of a further npz: its function like golden}
exceptions      {kind: reason}: where tests/test_contract.py asks something else of this method, see KINDS
rows            {row of METHODS: {kind: reason}} instead, for rows whose exceptions are others than the file's
extra(n, dtype, num_classes): what a changed student hands out besides the usual features;
                extra_as_teacher(t): the same where it agrees with the teacher
tokens(n, dtype, width): of a transformer, for rows that read them
options, before(kd, t, dtype): what a row with own.before is built with, and what is done instead of that
image_size      (12, 8) if it does not say
networks        how many learn from each other; three if it does not say
arrange(s, t)   changes random features that say nothing to the loss
arguments(w)    those of forward, where the trainer calls a part of the loss only
alone           text like that of cases: how it is called where test_standalone.py cannot guess it

Of amalgamation and data-free losses also:
cases           {name: text that builds the loss and its inputs}, see ka_cases.py
one_logit(inputs): the same with one class
to_float64(inputs): the same with what is neither of S nor of T in float64
"""

import importlib
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

# kind of exception: what is asked of every other method. The reason stands in the method's file; where more
# than a reason is needed, this says what stands there
KINDS = {
    'any_length': 'a list of networks, teachers or paths with an entry less is refused',
    'any_rank': 'maps with an axis more or less are refused',
    'any_size': 'a tensor of another size is refused; {argument: reason}',
    'class_by_class': 'nothing grows with the square of the classes',
    'coarse': 'autocast does not change the value (networks, or parts of them, round inside it)',
    'empty_is_legal': 'no rows at all are refused (of boxes and anchors there may be none: the loss is 0)',
    'equal_channels': 'student and teacher may have different channels',
    'gradient_not_of_value': 'gradcheck (something is a constant by definition)',
    'labels_in_feed': 'labels reach the loss through forward',
    'labels_in_part': 'a row of -100 counts for nothing (part of it needs no label; golden looks)',
    'layers': 'products are exact (those of layers of a network round as the user has asked)',
    'masked_class': "the other way round: these take a teacher's logit of -inf",
    'no_batch_of_one': 'a batch of one is legal; (reason, message)',
    'no_func_grad': 'torch.func.grad, which knows no checkpoints',
    'no_gradcheck': 'gradcheck',
    'no_labels': 'labels that forward could take reach the loss',
    'no_meta': 'meta tensors, as planning tools use them',
    'no_pickle': 'the module can be pickled whole',
    'not_compiled': 'torch.compile(fullgraph=True)',
    'of_triples': 'nothing grows with the cube of the batch (it is taken in parts of bounded size)',
    'one_logit': 'one class is refused (without a softmax over the classes it is as good as several)',
    'open_labels': 'a label above the number of classes is refused',
    'own_order': 'arguments come in the order student, teacher, the rest',
    'redraws_when_compiled': 'the compiled loss draws the same random numbers',
    'resting': 'every parameter gets a gradient; (prefix of their names, reason)',
    'unlabelled_counts': 'a row of -100 counts for nothing',
}


def files(folder: str) -> list[str]:
    """'at', ... of kd_losses and 'ka/afk', ... of ka_losses: names for of()."""
    prefix = '' if folder == 'kd_losses' else folder.split('_')[0] + '/'
    return [prefix + path.stem for path in sorted((ROOT / folder).glob('[!_]*.py'))]


def name_of(path: Path) -> str:
    """The name of a loss file for of()."""
    return next(file for file in files(path.parent.name) if Path(file).name == path.stem)


def exists(file: str) -> bool:
    return (HERE / f'{file}.py').is_file()


def of(file: str) -> ModuleType:
    """The module of a loss file."""
    assert exists(file), (
        f'{file} is a loss, but there is no tests/methods/{file}.py that says how its vector feeds it: '
        f'write one with golden(z), see tests/methods/__init__.py, and put the vector beside it'
    )
    return importlib.import_module(f'tests.methods.{file.replace("/", ".")}')


def exceptions(file: str, row: str) -> dict:
    """{kind: reason} of a row. A file that is missing has none: test_golden.py says that it is missing."""
    if not exists(file):
        return {}
    module = of(file)
    return getattr(module, 'rows', {}).get(row, getattr(module, 'exceptions', {}))
