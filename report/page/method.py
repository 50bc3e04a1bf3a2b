"""docs/page/NAME.html: all about one method."""

import re
import statistics

from engine import listing
from report.page import formula, svg
from report.page.facts import NEEDS, Entry, constructor
from report.page.outcomes import Experiment
from report.page.shared import chip, document, paradigm, paragraphs, prose, text
from report.pairs import PAIRS

# owner/name where a sentence of a docstring may name a repository, not a path inside one
REPOSITORY = re.compile(
    r'(?:(?<=^)|(?<=; )|(?<=[:.=] )|(?<=and )|(?<=from )|(?<=only )|(?<=code, )|(?<=repository, )|(?<=is ))'
    r"([A-Za-z0-9][\w-]*/(?![\w./-]*\.py)[\w.-]*\w)(?=[,;. ')]|$)"
)


def page(entry: Entry, before: Entry, after: Entry) -> str:
    doc = entry.doc
    chips = [paradigm(entry), entry.year, *(f'needs {NEEDS[key]}' for key in NEEDS if key in entry.needs)]
    differences = parts(doc.differences)
    if entry.difference and entry.difference != 'none':
        differences += f'<p class="soft">In one line: {prose(entry.difference)}.</p>'
    return document(
        'method', f'{entry.name} · Knowledge Zoo', doc.title,
        before=before.key, after=after.key, name=entry.name, title=prose(doc.title), paper=prose(doc.paper),
        chips=''.join(chip(word) for word in chips if word),
        formulas=parts(doc.formulas), diagram=svg.diagram(entry), tap=parts(doc.tap),
        use=text('\n'.join(doc.use)), place=entry.place, lines=entry.lines, torch=imports(entry),
        command=command(entry), arguments=arguments(entry),
        differences=differences or '<p>None that we know of.</p>',
        verified=prose(entry.verified[0]), source=' '.join(source_link(said) for _, said in doc.source),
        accuracy=accuracy(entry), cost=costs(entry), pairs=unlike_networks(entry), text=text(entry.source),
    )  # fmt: skip


def imports(entry: Entry) -> str:
    """What the file needs besides the standard library."""
    return 'torch and scipy' if re.search(r'^\s*(import|from) scipy', entry.source, re.M) else 'torch'


def number(x: float, digits: int = 2) -> str:
    return f'{x:.{digits}f}'


def signed(x: float, digits: int = 2) -> str:
    return ('−' if x < 0 else '+') + number(abs(x), digits)


def parts(said: list[tuple[str, str]]) -> str:
    """Paragraphs of a docstring, text and formulas."""
    made = []
    for kind, paragraph in said:
        if kind == 'text':
            made.append(f'<p>{prose(begun(paragraph))}</p>')
        else:
            lines = map(formula_line, formula.paragraph(paragraph))
            made.append(f'<div class="formulas">{"".join(lines)}</div>')
    return '\n'.join(made)


def begun(said: str) -> str:
    """With a capital, if an English word is in front."""
    return said[0].upper() + said[1:] if re.match(r'[a-z]{2,} ', said) else said


def formula_line(item: tuple) -> str:
    if item[0] == 'pre':
        return f'<pre>{text(item[1])}</pre>'
    _, label, shown, comment = item
    made = f'<span class="label">{text(label)}</span>' if label else ''
    for mathml, rest in shown:
        made += f'<span>{mathml}' + (f'<span class="said">{text(rest)}</span>' if rest else '') + '</span>'
    made += f'<span class="note">{text(comment)}</span>' if comment else ''
    return f'<div class="formula">{made}</div>'


def command(entry: Entry) -> str:
    if not entry.script:
        return '<p class="soft">No script trains with it: it is there to copy.</p>'
    mode = 'ka' if entry.paradigm == 'ka' else 'kd'
    said = f'<p><code>python {entry.script} --{mode}_mode {entry.name} ...</code> trains with it'
    if hasattr(entry.row, 'weight'):
        weight = listing.facts(entry.name, entry.row)['weight']
        said += f'; the weight of the loss is {weight} unless <code>--lambda_{mode}</code> says otherwise'
    return f'{said}.</p>'


def arguments(entry: Entry) -> str:
    told = listing.told(entry.row.build) if hasattr(entry.row, 'build') else {}
    tables = []
    for name, rows in constructor(entry):
        ours = [[told[part] for part in names.split(', ') if told.get(part)] for names, _, _ in rows]
        heads = ['argument', 'default', *(['in the script'] if any(ours) else []), 'meaning']
        lines = []
        for (names, default, meaning), own in zip(rows, ours):
            cells = [code(names), code(default) if default else 'yours']
            cells += [', '.join(map(code, own))] if any(ours) else []
            lines.append([*cells, prose(meaning)])
        tables.append(f'<h3>{code(name)}</h3>{table(heads, lines)}')
    if hasattr(entry.row, 'images'):
        tables.append(f'<p>The preset of the script: {text(listing.arguments(entry.row))}.</p>')
    if not tables:
        return ''
    note = '<p class="soft">Defaults are the authors’ values, unless the text says otherwise.</p>'
    return f'<section><h2>Arguments</h2>\n{note}{"".join(tables)}</section>'


def code(word: str) -> str:
    return f'<code>{text(word)}</code>'


def table(heads: list[str], lines: list[list[str]]) -> str:
    head = ''.join(f'<th scope="col">{word}</th>' for word in heads)
    body = ''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in line) + '</tr>' for line in lines)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def source_link(said: str) -> str:
    """The text with links to the repositories it names."""
    return REPOSITORY.sub(r'<a href="https://github.com/\1">\1</a>', text(said))


def accuracy(entry: Entry) -> str:
    if not entry.runs:
        none = '<section><h2>Accuracy</h2><p class="soft">No run of it is in results/ yet.</p></section>'
        return none if entry.script else ''
    runs = sorted(entry.runs, key=lambda e: (e.smoke, e.key))
    return f'<section><h2>Accuracy</h2>\n{"".join(run(entry.name, e) for e in runs)}</section>'


def run(name: str, e: Experiment) -> str:
    """Dots per seed beside the reference and the teacher, and curves where there are some."""
    values, alone = list(e.values[name].values()), list((e.alone[name] or {}).values())
    teachers, curve, digits = e.teachers[name], e.curves[name], 3 if e.better < 0 else 2
    reference = short(e.reference)
    rows = [(name, 'own', values)]
    rows += [(reference, 'alone', alone)] if alone else []
    rows += [('teacher', 'teacher', teachers)] if teachers else []
    said = f'{number(statistics.mean(values), digits)} ({len(values)} seeds)'.replace(
        '(1 seeds)', '(one seed)'
    )
    if gain := e.gain(name):
        spread = f' ± {number(gain[1], digits)}' if gain[1] is not None else ''
        kind = 'up' if gain[0] >= 0 else 'down'
        said += f'; <b class="{kind}">{signed(gain[0], digits)}{spread}</b> '
        said += 'better ' if e.better < 0 else ''
        both = [e.alone[name][seed] for seed in e.both(name)]
        said += f'against {e.reference}, {number(statistics.mean(both or alone), digits)}'
        partly = 0 < len(both) < max(len(values), len(alone))
        said += ', over the seeds that both have' if partly else ''
    if teachers:
        said += f'; teacher {number(statistics.mean(teachers), digits)}'
    said += '. Less is better.' if e.better < 0 else '.'
    said += ' A smoke test: it shows that the method trains, and ranks nothing.' if e.smoke else ''
    drawn = svg.dots(rows, e.metric)
    if len(curve) > 2:
        lines = [(name, 'own', curve)]
        lines += [(reference, 'alone', e.alone_curves[name])] if alone else []
        drawn += '<p class="soft">Evaluation by evaluation; grey: the reference, mean over its seeds; '
        drawn += 'dashed: the teacher.</p>'
        drawn += svg.curves(lines, e.metric, teachers)
    return f'<div class="run"><h3>{text(e.label)}</h3><p>{said}</p>{drawn}</div>'


def short(reference: str) -> str:
    return {'a network that reads labels': 'with labels', 'cross-entropy alone': 'cross-entropy'}.get(
        reference, reference.removeprefix('the ')
    )


def costs(entry: Entry) -> str:
    lines = []
    if c := entry.cost:
        lines.append(
            f'A training step takes {c["ratio"]:.2f} times the student’s own ({c["ratio_low"]:.2f} to '
            f'{c["ratio_high"]:.2f} over rounds) and {c["mib"]:.0f} MiB more at its peak: resnet20 teaches '
            'resnet8, 64 images of 32 pixels, float32, one thread; the teacher’s forward pass is counted.'
        )
    for r in entry.benches:
        if 'speed' in r:
            lines.append(
                f'{r["loss"]}, {r["size"]}: {r["speed"]:.2f} times as fast as the plain form, '
                f'{r["mib"]:.1f} MiB instead of {r["mib_plain"]:.1f}.'
            )
        else:
            said = f'{r["tokens"]} tokens of {r["classes"]} classes: {r["seconds"]:.1f} s, {r["mib"]:.0f} MiB'
            if 'plain_mib' in r:
                said += f'; in plain form {r["plain_seconds"]:.1f} s, {r["plain_mib"]:.0f} MiB'
            lines.append(said + '.')
    return f'<section><h2>Cost</h2>\n{paragraphs(lines)}</section>' if lines else ''


def unlike_networks(entry: Entry) -> str:
    if not entry.pairs:
        return ''
    words = {'works': 'works as it is', 'adapter': 'works, with layers of its own', 'refuses': 'refuses'}
    lines = [
        [PAIRS[kind], f'<span class="{said}">{words.get(said, "not tried yet")}</span>']
        for kind, said in entry.pairs.items()
    ]
    return f'<section><h2>Unlike networks</h2>\n{table(["the pair", ""], lines)}</section>'
