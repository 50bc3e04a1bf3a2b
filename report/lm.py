"""The table of docs/language-models.md, from the results of train_lm.py."""

import statistics
from pathlib import Path

from report.speed import table
from report.table import by_recipe, extremes, in_brackets, read_results

FIGURES = {
    'loss': 'loss',
    'perplexity': 'perplexity',
    'agreement': 'agreement',
    'kl_ts': 'KL(teacher, student)',
    'kl_st': 'KL(student, teacher)',
    'gen_nll': 'gen_nll',
}
OWN = ('method', 'weight', 'ce', 'options', 'lmbda', 'teacher', 'second_teacher')  # of a row or of its seed


def text_of(folder: Path) -> str:
    """Means over the seeds with their range; less is better in every column but agreement."""
    results = [r for r in read_results([str(folder)]) if r['script'] == 'train_lm']
    rows, better = {}, []
    for label, alike in by_recipe(results, OWN).items():
        found, more = {}, in_brackets(label)
        for result in alike:
            found.setdefault(name_of(result), []).append(result)
        alone = {r['seed']: r['last'] for r in found.get('ce', [])}
        for name, runs in found.items():
            rows[name + more] = [r['last'] for r in runs]
            same_seeds = {r['seed'] for r in runs} == alone.keys()
            if name != 'ce' and same_seeds and all(ahead(r, alone) for r in runs):
                better.append(f'`{name}{more}`')
    teacher = results[0]['teacher']
    seeds = sorted({r['seed'] for r in results})
    ordered = sorted(rows.items(), key=lambda row: statistics.mean(last['loss'] for last in row[1]))
    steps = {r['steps'] for r in results}
    numbers, steps = (', '.join(map(str, sorted(x))) for x in (seeds, steps))
    one = len(seeds) == 1
    said = f'Seed {numbers}' if one else f'Seeds {numbers}'
    said += f'; {steps} steps.\n\n' if one else f'; {steps} steps; mean (smallest to largest).\n\n'
    if better:
        said += (
            f'Better than the student alone (`ce`) in every figure{"" if one else " with every seed"}: '
            f'{", ".join(better)}.\n\n'
        )
    return said + table(
        ('', *FIGURES.values()),
        ('teacher', *(f'{teacher[key]:.3f}' for key in FIGURES)),
        *(
            (f'`{name}`', *(extremes([last[key] for last in lasts], 3) for key in FIGURES))
            for name, lasts in ordered
        ),
    )


def name_of(result: dict) -> str:
    """The method, with what else was asked of it: other settings are other rows."""
    recipe = result['recipe']
    words = [result['method'], *(f'{key}={value}' for key, value in recipe['options'].items())]
    return ' '.join(words + ([f'--lmbda {recipe["lmbda"]}'] if recipe['lmbda'] else []))


def ahead(result: dict, alone: dict) -> bool:
    other, own = alone[result['seed']], result['last']
    return all(own[key] > other[key] if key == 'agreement' else own[key] < other[key] for key in FIGURES)
