"""The page, docs/index.html and docs/page/: structure, what it says, its formulas, and a browser."""

import json
import re
import sys
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from methods import KA, KD, LM, PEERS
from methods.dfkd import DFKD
from report import page, refresh
from report.page import facts, formula, index, method, outcomes, svg
from report.page.shared import prose
from tests import browser
from tests.conftest import ROOT

INDEX = page.DOCS / 'index.html'


@pytest.fixture(scope='module')
def made():
    return page.texts()


@pytest.fixture(scope='module')
def entries():
    found = facts.entries()
    outcomes.attach(found)
    return {entry.key: entry for entry in found}


# ------------------------------------------------------------------------------------------------ structure


class Tree(HTMLParser):
    """Whether tags meet, and what a page names."""

    EMPTY = {'meta', 'input', 'br', 'hr'}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.loads, self.controls = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs.get('id')] * ('id' in attrs)
        self.links += [attrs.get('href')] * (tag == 'a')
        self.loads += [tag] * (tag in ('link', 'img', 'iframe', 'object', 'base') or 'src' in attrs)
        if tag in ('input', 'select') and not (attrs.get('aria-label') or 'label' in self.open):
            self.controls.append(attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f'</{tag}> closes {self.open[-3:]}'
        self.open.pop()


def test_every_method_and_every_file_has_a_page(made, entries):
    rows = {*KD, *PEERS, *LM, *KA, *DFKD} - {'ce', 'scratch', 'kd_pool'}  # references without a loss
    assert sum(len(table) for _, table in facts.tables()) >= len(rows)
    assert rows <= entries.keys()
    assert {e.path for e in entries.values()} == {*ROOT.glob('*_losses/[!_]*.py')}
    assert made.keys() == {INDEX} | {page.DOCS / 'page' / f'{key}.html' for key in entries}
    assert re.findall(r'href="page/([\w-]+)\.html"', made[INDEX]) == [*entries]


def test_the_pages_are_small_and_fetch_nothing(made):
    assert len(made[INDEX].encode()) < 600_000
    assert sum(len(text.encode()) for text in made.values()) < 6_000_000
    for path, text in made.items():
        tree = Tree(text)
        assert not tree.loads and not re.search(r'url\(|@import|@font-face', text.split('</style>')[0]), path
        assert len(tree.ids) == len({*tree.ids}) and not tree.controls, path
        for link in tree.links:
            here = link.startswith(('https://arxiv.org/abs/', 'https://github.com/')) or link.startswith('#')
            target = (path.parent / link.partition('#')[0]).resolve()
            assert here or target in made or target.suffix == '.md' and target.exists(), link


def test_a_page_holds_its_file_and_the_three_lines(made, entries):
    for key, entry in entries.items():
        text = made[page.DOCS / 'page' / f'{key}.html']
        code = [unescape(block) for block in re.findall(r'<pre id="\w+"[^>]*><code>(.*?)</code>', text, re.S)]
        assert code[1] == entry.path.read_text() and f'from {entry.path.stem} import' in code[0], key
        assert len(re.findall('<h2', text)) >= 5 and '{{' not in text.split('<h2 id="file"')[0], key


def test_pages_of_the_same_state_are_the_same(made):
    assert page.texts() == made


def test_what_is_left_over_is_stale(monkeypatch, capsys, tmp_path):
    (tmp_path / 'page').mkdir()
    old = tmp_path / 'page' / 'gone.html'
    old.write_text('x')
    monkeypatch.setattr(page, 'DOCS', tmp_path)
    monkeypatch.setattr(refresh, 'ROOT', tmp_path)
    monkeypatch.setattr(refresh, 'texts', lambda trust: {tmp_path / 'index.html': 'new'})
    monkeypatch.setattr(refresh, 'stale_figures', list)
    monkeypatch.setattr(sys, 'argv', ['report', '--check'])
    assert refresh.main() == 1
    assert capsys.readouterr().out.split() == ['stale:', 'index.html', 'stale:', 'page/gone.html']
    monkeypatch.setattr(sys, 'argv', ['report'])
    assert refresh.main() == 0 and not old.exists() and (tmp_path / 'index.html').read_text() == 'new'


def test_a_further_table_and_a_file_without_a_row(monkeypatch):
    """Whoever adds methods/dense.py gets its pages; a row of the name of another one gets one of its own."""
    row = SimpleNamespace(
        loss=__import__('kd_losses').CWD, feed=lambda kd, s, t, batch: kd(s.fms[-1], t.fms[-1]),
        needs=SimpleNamespace(), limits=SimpleNamespace(),
    )  # fmt: skip
    tables = facts.tables()
    monkeypatch.setattr(facts, 'tables', lambda: [*tables, ('further', {'mine': row, 'at': row})])
    made = facts.entries()
    found = {entry.key: entry for entry in made}
    outcomes.attach(made)
    assert found['mine'].paradigm == 'further' and found['mine'].taps == {'s': {3}, 't': {3}}
    assert found['at'].place == 'kd_losses/at.py' and found['at'].runs
    assert found['at-further'].place == 'kd_losses/cwd.py' and not found['at-further'].runs
    text = method.page(found['at-further'], made[0], made[1])
    assert 'No script trains with it' in text and 'further' in index.page(made, [])
    assert {entry.paradigm for entry in made if entry.row is None} <= {'copy', 'ka', 'dfkd'}


# -------------------------------------------------------------------------------------- what it says of them


def test_needs_taps_and_verification(entries):
    needs = {key: entry.needs for key, entry in entries.items()}
    assert needs['st'] == {'logits'} and needs['dkd'] == {'logits', 'labels'}
    assert needs['at'] == {'maps'} and needs['rkd'] == {'embeddings'}
    assert needs['crd'] == {'embeddings', 'memory'} and 'views' in needs['cskd'] & needs['mlkd_strong']
    with_gradient = {
        key for key, entry in entries.items() if entry.paradigm == 'kd' and 'gradient' in needs[key]
    }
    assert {'sobolev', 'lwm', 'bss'} <= with_gradient and not {'clipkd', 'crld', 'kdsvd'} & with_gradient
    taps = {key: entry.taps for key, entry in entries.items()}
    assert taps['at'] == {'s': {1, 2, 3}, 't': {1, 2, 3}} and taps['fitnet'] == {'s': {3}, 't': {3}}
    assert taps['rkd'] == {'s': {'feat'}, 't': {'feat'}} and taps['cskd'] == {'s': {'out'}, 't': set()}
    assert taps['uskd'] == {'s': {2, 'out'}, 't': set()} and taps['simkd'] == {'s': {3}, 't': {3}}
    kinds = {key: entry.verified[1] for key, entry in entries.items()}
    assert (kinds['rkd'], kinds['cc'], kinds['eel']) == ('authors', 'reference', 'formula')
    assert all(entry.needs and (entry.taps['s'] or entry.taps['t']) for entry in entries.values())
    assert all(re.fullmatch(r'(19|20)\d\d', entry.year) for entry in entries.values())


def test_pairs_and_arguments_are_those_of_their_sources(made, entries):
    assert entries['fsp'].pairs == dict(
        channels='refuses', size='works', depth='refuses', networks='refuses', transformer='refuses'
    )
    assert entries['dml'].pairs is None
    ((name, rows),) = facts.constructor(entries['crd'])
    known = {names: default for names, default, _ in rows}
    assert name == 'CRD' and known['nce_n'] == '16384' and known['nce_t'] == '0.07'
    assert '<td><code>nce_t</code></td><td><code>0.07</code></td>' in made[page.DOCS / 'page' / 'crd.html']


def test_numbers_are_those_of_the_results(made, entries):
    folder = ROOT / 'results' / 'cifar10-resnet20-resnet8-12epochs-steps'
    last = {n: json.loads((folder / f'{n}.json').read_text()) for n in ('sp', 'baseline-resnet8')}
    value, alone = (last[name]['last']['top1'] for name in last)
    data = json.loads(re.search(r'id="data">(.*?)</script>', made[INDEX], re.S)[1])
    (run,) = [run for run in data['runs'] if run['key'] == folder.name]
    assert run['m']['sp']['v'] == [value] and run['m']['sp']['c'] == last['sp']['curve']
    assert run['m']['sp']['a'] == [alone] and run['m']['sp']['g'] == [pytest.approx(value - alone), None, 1]
    assert f'<b class="up">+{value - alone:.2f}</b>' in made[page.DOCS / 'page' / 'sp.html']
    (e,) = [e for e in entries['gkd-lm'].runs if e.key == 'lm-markov']  # three seeds, less is better
    gains = [e.alone['gkd'][seed] - e.values['gkd'][seed] for seed in (1, 2, 3)]
    mean, deviation, n = e.gain('gkd')
    assert n == 3 and mean == pytest.approx(sum(gains) / 3) and deviation > 0


def test_curves_end_at_the_last_epoch(made):
    """Phases inside the training have no figure: a shorter curve begins later."""
    drawn = svg.curves([('a', 'own', [1.0, 2.0]), ('b', 'alone', [0.0, 1.0, 2.0, 3.0])], 'x', [])
    own, alone = (re.findall(r'[ML]([\d.]+) ', path) for path in re.findall(r'line" d="([^"]*)"', drawn))
    assert len(alone) == 4 and own == alone[2:]
    assert 'grey: the reference, mean over its seeds' in made[page.DOCS / 'page' / 'ab.html']
    runs = json.loads(re.search(r'id="data">(.*?)</script>', made[INDEX], re.S)[1])['runs']
    late = {run['label']: run['late'] for run in runs}
    assert late['CIFAR-10, resnet20 → resnet8, 12 epochs, one cycle'] and False in late.values()


def test_a_gain_and_its_reference_are_over_the_same_seeds(entries):
    checked = 0
    for entry in entries.values():
        for e in entry.runs:
            said = re.search(
                r'<p>([\d.]+) \(.*>([−+])([\d.]+).*</b>[^,]*, (\d+\.\d+)', method.run(entry.name, e)
            )
            if said and len(e.both(entry.name)) == len(e.values[entry.name]):
                checked += 1
                value, gain, alone = float(said[1]), float(said[3]), float(said[4])
                gain *= e.better * (1 if said[2] == '+' else -1)
                assert value - alone == pytest.approx(gain, abs=0.011), (entry.name, e.key)
    assert checked > 50


def test_costs_are_shown_where_they_were_measured(monkeypatch):
    row = {
        'row': 'at',
        'ms': 100.0,
        'ms_alone': 60.0,
        'ratio': 1.67,
        'ratio_low': 1.6,
        'ratio_high': 1.7,
        'mib': 22.4,
    }
    read = outcomes.read
    monkeypatch.setattr(outcomes, 'read', lambda name: [row] if 'steps' in name else read(name))
    found = facts.entries()
    outcomes.attach(found)
    at = next(entry for entry in found if entry.key == 'at')
    line = index.line(at, None)
    assert 'data-c="1.67" data-m="22.4"' in line and '>1.67×<' in line and '>22<' in line
    text = method.page(at, at, at)
    assert 'takes 1.67 times the student’s own (1.60 to 1.70 over rounds) and 22 MiB more' in text
    speed = next(r['speed'] for r in read('benchmarks-losses.json') if r['loss'] == 'at')
    assert f'{speed:.2f} times as fast as the plain form' in text


def test_links_between_documents_lead_from_the_pages_of_methods():
    said = prose('gains ([why](results.md#the-lower-end)) of `x[0](y)`, arXiv:2301.12345')
    assert '(<a href="../results.md#the-lower-end">why</a>)' in said and '<code>x[0](y)</code>' in said
    assert said.count('<a ') == 2


def test_only_repositories_are_linked(entries):
    found = {
        repository
        for entry in entries.values()
        for _, said in entry.doc.source
        for repository in method.REPOSITORY.findall(said)
    }
    assert {'lenscloth/RKD', 'AberHu/Knowledge-Distillation-Zoo', 'zju-vipa/KamalEngine'} <= found
    inside = {
        'kamal',
        'models',
        'losses',
        'helper',
        'utils',
        'examples',
        'distiller_zoo',
        'mdistiller',
        'code',
    }
    assert len(found) > 90 and not {name.split('/')[0] for name in found} & inside
    assert not [name for name in found if name.endswith(('.py', '.')) or name.count('/') != 1]


# ------------------------------------------------------------------------------------------------- formulas


def read(x) -> str:
    """What MathML says, in the docstrings' language; brackets where a fraction or a power stands for them."""
    inside = [read(child) for child in x]
    if x.tag in ('math', 'mrow'):
        return ''.join(inside)
    if x.tag == 'mi':
        return x.get('title') or x.text
    if x.tag == 'mn':
        return x.text
    if x.tag == 'mtext':
        return x.text.replace('\xa0', ' ') + (' ' if x.text == '\xa0of' else '')
    if x.tag == 'mspace':
        return ' '
    if x.tag == 'mo':
        if x.text == '−':
            return '-' if x.get('form') == 'prefix' else ' - '
        marks = {'∥': '||', '←': '<-', '→': '->', '≤': '<=', '≥': '>=', '≠': '!=', '∼': '~', '·': '*'}
        if x.text in marks or x.text in '=<>+/':
            return f' {marks.get(x.text, x.text)} '
        return {
            '∑': 'sum of',
            '∏': 'product of',
            '⋅': '.',
            '‖': '||',
            ',': ', ',
            '…': '...',
            '′': "'",
            '′′': "''",
        }.get(x.text, x.text)
    if x.tag == 'mfrac':
        return f'({inside[0]}) / ({inside[1]})'
    if x.tag == 'msqrt':
        return f'sqrt({inside[0]})'
    if x.tag == 'munder':
        return f'{inside[0].removesuffix(" of")} over {inside[1]} of'
    if x.tag == 'msub':
        return f'{inside[0]}_' + (inside[1].replace(', ', '_') if re.fullmatch(r'[\w, ]+', inside[1]) else
                                  f'({inside[1]})')  # fmt: skip
    if x.tag == 'msup':
        return f'{inside[0]}^({inside[1]})'
    raise AssertionError(x.tag)


def bare(x):
    """A tree without the brackets that fractions and powers make superfluous."""
    if not isinstance(x, tuple):
        return x
    x = tuple(map(bare, x))
    if x[0] == 'term':
        parts = list(x)
        for i in range(2, len(parts), 2):
            if parts[i] == '/':
                parts[i + 1] = without(parts[i + 1])
                parts[1] = without(parts[1]) if i == 2 else parts[1]
        first = parts[1]  # (a * b) / c is a * b / c
        return ('term', *(first[1:] if first[0] == 'term' else (first,)), *parts[2:])
    if x[0] in ('power', 'sub'):
        return (*x[:2], without(x[2]))
    if x[0] == 'line' and len(x) == 2:
        return x[1]
    return x


def without(x):
    return x[2] if x[0] == 'group' and x[1] == '(' and x[2][0] != 'line' else x


def test_what_is_typeset_says_what_the_source_says(entries, monkeypatch):
    """Every formula of every file: the MathML, read back, is the tree of the source, symbol by symbol."""
    seen, heads, parse, mathml = [], [], formula.parse, formula.mathml
    monkeypatch.setattr(formula, 'parse', lambda text: heads.append(text) or parse(text))
    monkeypatch.setattr(formula, 'mathml', lambda tree: seen.append((heads[-1], tree)) or mathml(tree))
    for path in {entry.path for entry in entries.values()}:
        doc = facts.parts_of(path)
        for kind, paragraph in [*doc.formulas, *doc.tap, *doc.differences]:
            if kind == 'formula':
                formula.paragraph(paragraph)
    assert len(seen) > 350
    for head, tree in seen:
        back = read(ElementTree.fromstring(mathml(tree)))
        assert words(back) == words(head)
        assert bare(parse(back)) == bare(tree), f'{back}\n{tree}'


def words(text: str) -> list[str]:
    """The symbols of a formula, but for its round brackets."""
    return [word for _, word, _, _ in formula.tokens(text) if word not in '()']


@pytest.mark.parametrize(
    'line',
    [
        'loss = mean over n of cross-entropy-like(a, b)',  # a word, no difference
        'loss = sum over i of a_i + b_i',  # what does the operator cover?
        'loss = mean over n of a + v',
        'x = a / b c',  # divided by c or not?
        'right = x.log() + y.mean()',  # Python
        'x = (memory @ e).squeeze(2)',
        'p = softmax of a / T, b / T over the classes',
        'G = d (sum over n of a) / d f',  # a derivative
        "A = the teacher's map",
        'w = a constant',
        'B = unit(z),\n        C = other',
        'x = 1 -y',
        'f = E[x | x < 0]',
        'loss = {a}',
        'a x + b',
        'the loss is small',
    ],
)
def test_what_is_not_sure_stays_as_it_is(line):
    (item,) = formula.paragraph(f'    {line}')
    assert item == ('pre', re.sub('\n    ', '\n', line))


def test_how_a_formula_is_typeset():
    ((kind, label, [(shown, rest)], comment),) = formula.paragraph(
        '    kl: loss = T^2 * mean over n of a / b     note'
    )
    assert (kind, label, rest, comment) == ('math', 'kl:', '', 'note')
    assert shown == (
        '<math displaystyle="true"><mrow><mi>loss</mi><mo>=</mo><msup><mrow><mi>T</mi></mrow><mrow><mn>2</mn>'
        '</mrow></msup><mo>·</mo><mrow><munder><mi>mean</mi><mrow><mi>n</mi></mrow></munder>'
        '<mspace width="0.17em"/>'
        '<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac></mrow></mrow></math>'
    )
    ((_, _, [(first, comma), (second, rest)], _),) = formula.paragraph(
        '    d = x - y,  w = p_t[i] where p > 0, say'
    )
    assert comma == ',' and rest == ', say' and '<msub><mi>p</mi><mrow><mi>t</mi></mrow></msub>' in second
    ((_, _, ((_, said),), _),) = formula.paragraph('    p = softmax(z / T) over the classes')
    assert said == ' over the classes'
    two = formula.paragraph('    soft:  a = b * c\n           d = a + b')
    assert [item[0] for item in two] == ['math', 'math'] and two[0][1] == 'soft:'
    (hung,) = formula.paragraph('    term = a^2  where it is off\n           b^2  where it is on')
    assert hung[0] == 'pre' and hung[1].count('\n') == 1


# -------------------------------------------------------------------------------------------------- browser


@pytest.mark.skipif(not browser.find(), reason='the page in a browser needs Chromium')
def test_the_page_in_a_browser(made, tmp_path):
    """Search, filter, sort, compare, open, copy, keys, dark, narrow; nothing is fetched, nothing thrown."""
    docs, count = tmp_path / 'docs', len(made) - 1
    (docs / 'page').mkdir(parents=True)
    for path, text in made.items():
        (docs / path.relative_to(page.DOCS)).write_text(text)
    with browser.Browser(browser.find(), tmp_path / 'profile', 240) as b:
        b.open((docs / 'index.html').as_uri())

        def shown():
            return b.js('[...document.querySelectorAll(".list tbody tr")].filter(r => !r.hidden)'
                        '.map(r => r.dataset.k)')  # fmt: skip

        def choose(which, value):
            b.js(f'{{ const e = document.getElementById({which!r}); e.value = {value!r}; '
                 'e.dispatchEvent(new Event(e.type === "search" ? "input" : "change")); }')  # fmt: skip

        def press(selector):
            b.js(f'document.querySelector({selector!r}).click()')

        def fits(width):
            size = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': False}
            b.call('Emulation.setDeviceMetricsOverride', **size)
            return b.js('document.documentElement.scrollWidth <= innerWidth')

        assert (
            len(shown()) == count and b.js('document.getElementById("count").innerText') == f'{count} methods'
        )
        choose('q', 'relational park')
        assert shown() == ['rkd'] and 'q=relational' in b.js('location.hash')
        choose('q', 'no such thing')
        assert shown() == []
        press('#clear')
        assert len(shown()) == count

        press('[data-need=labels]')
        needed = shown()
        assert 'dkd' in needed and 'st' not in needed
        press('[data-need=labels]')  # must not be needed
        assert {*shown()} | {*needed} and len(shown()) + len(needed) == count
        assert b.js('document.querySelector("[data-need=labels]").getAttribute("aria-label")').endswith(
            'must not be needed'
        )
        choose('paradigm', 'kd')
        choose('unlike', 'all')
        choose('verified', 'authors')
        assert 'dist' in shown() and not {'dkd', 'fsp', 'cc', 'cskd'} & {*shown()}
        press('#clear')

        b.js('document.querySelector("th[data-key=lines] button").focus()')
        b.call('Input.dispatchKeyEvent', type='keyDown', key='Enter', text='\r', windowsVirtualKeyCode=13)
        lines = b.js('[...document.querySelectorAll(".list tbody tr")].map(r => +r.dataset.l)')
        assert lines == sorted(lines)
        assert b.js('document.querySelector("th[data-key=lines]").getAttribute("aria-sort")') == 'ascending'
        press('th[data-key=gain] button')
        first = b.js('[...document.querySelectorAll(".list tbody tr .gain b")].map(e => e.innerText)')
        gains = [float(word.replace('−', '-')) for word in first]
        assert len(gains) >= 6 and gains == sorted(gains, reverse=True)

        for name in ('st', 'at'):
            press(f'tr[data-k={name}] .pick input')
        press('#go')
        runs = json.loads(re.search(r'id="data">(.*?)</script>', made[INDEX], re.S)[1])['runs']
        here = [run['m'] for run in runs if {'st', 'at'} & run['m'].keys()]
        dots = sum(len(m[name]['v']) for m in here for name in ('st', 'at') if name in m)
        assert b.js('document.querySelectorAll("#panels circle.s").length') == dots
        curves = sum(len(m[n]['c']) > 2 for m in here for n in ('st', 'at') if n in m)
        assert b.js('document.querySelectorAll("#panels path.s.line").length') == curves
        table = b.js('document.querySelector(".facts").innerText')
        assert 'teacher and student' in table and b.js('document.activeElement.innerText') == 'Side by side'
        press('tr[data-k=st] .pick input')
        assert 'st' not in b.js('document.querySelector(".facts thead").innerText').split()

        b.js('document.activeElement.blur()')
        b.call('Input.dispatchKeyEvent', type='keyDown', key='/', text='/')
        assert b.js('document.activeElement.id') == 'q'
        colour = 'getComputedStyle(document.body).backgroundColor'
        light = b.js(colour)
        b.call('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': 'dark'}])
        dark = b.js(colour)
        assert sum(map(int, re.findall(r'\d+', dark))) < 150 < sum(map(int, re.findall(r'\d+', light)))
        for width in (360, 800, 1280):
            assert fits(width)

        b.open((docs / 'page' / 'rkd.html').as_uri())
        for width in (360, 800, 1280):
            assert fits(width)
        assert b.js('document.querySelector("math").getBoundingClientRect().width') > 50
        write = '{writeText: async text => { window.got = text; }}'
        b.js(f'Object.defineProperty(navigator, "clipboard", {{value: {write}}})')
        press('[data-copy="#source code"]')
        assert b.js('window.got') == (ROOT / 'kd_losses' / 'rkd.py').read_text()
        assert b.js('document.getElementById("said").innerText') == 'Copied'
        b.js('navigator.clipboard.writeText = async () => { throw new Error(); }; window.other = "";')
        b.js('addEventListener("copy", () => { window.other = document.activeElement.value; })')
        button = 'document.querySelector(\'[data-copy="#use code"]\')'
        b.js(f'{button}.scrollIntoView({{block: "center"}})')
        x, y = b.js(f'(r => [r.x + 9, r.y + 9])({button}.getBoundingClientRect())')
        for kind in ('mousePressed', 'mouseReleased'):  # a copy needs a real click
            b.mouse(kind, x, y)
        assert b.js('window.other').startswith('import torch\nfrom rkd import RKD')
        press('nav a')
        for _ in range(100):
            if b.js('document.readyState === "complete" && !!document.getElementById("q")'):
                break
        assert b.js('document.title') == 'Knowledge Zoo'
        files = [
            e['params']['request']['url'] for e in b.events if e.get('method') == 'Network.requestWillBeSent'
        ]
        assert {url.split('/')[-1].split('#')[0] for url in files} == {'index.html', 'rkd.html'}
        assert not [e for e in b.events if e.get('method') in ('Runtime.exceptionThrown', 'Log.entryAdded')]
