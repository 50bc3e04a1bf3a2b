"""Plain equations of the docstrings as MathML, or, where they are not surely understood, as they stand.

A line is typeset only if a small grammar reads all of it: names, numbers, + - * / ^, subscripts, calls,
indices, norms, relations, and operators like `sum over n, k of`. What is typeset is the line, symbol by
symbol in its order: nothing is simplified, and what an operator covers is as clear as in the source. Where
that is open (`sum over i of a_i + b`) the line is not typeset. What else a line says is shown as text, and
a line whose beginning is no formula stays preformatted, together with the lines that hang on it.
"""

import re
from html import escape

GREEK = dict(
    alpha='α', beta='β', gamma='γ', delta='δ', eps='ε', theta='θ', kappa='κ', iota='ι', mu='μ', rho='ρ',
    sigma='σ', tau='τ', phi='φ', psi='ψ', lam='λ', Phi='Φ', Psi='Ψ', Tau='Τ',
)  # fmt: skip
OPERATORS = ('sum', 'mean', 'softmax', 'min', 'max', 'product')  # followed by "over ... of" or "of"
PREFIX = ('log', 'log2', 'log10', 'mean', 'sqrt', 'exp', 'cos')  # of what follows after a space
JOINERS = ('where', 'else', 'for', 'if', 'and', 'or', 'otherwise')
RELATIONS = {'=': '=', '<-': '←', '->': '→', '<=': '≤', '>=': '≥', '!=': '≠', '<': '<', '>': '>', '~': '∼'}
WORDS = {'a', 'A', 'I'}
TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<number>\d+(?:\.\d+)?(?:e-?\d+)?(?![\w]))
      | (?P<name>cross-entropy|[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*'*)
      | (?P<sub>_[A-Za-z0-9]+)
      | (?P<op>\|\||<-|->|<=|>=|!=|\.\.\.|[-+*/^()\[\]|=<>,.~_])""",
    re.VERBOSE,
)


class Unsure(ValueError):
    """Not surely a formula."""


# ---------------------------------------------------------------------------------------------- reading


def tokens(text: str) -> list[tuple[str, str, bool, int]]:
    """[(kind, text, whether a space is before it, position)]"""
    found, at, space = [], 0, True
    while at < len(text):
        match = TOKEN.match(text, at)
        if not match:
            raise Unsure(text[at:])
        if match.lastgroup == 'space':
            space = True
        else:
            found.append((match.lastgroup, match[0], space, at))
            space = False
        at = match.end()
    for (kind, word, _, at), (_, mark, space, _), after in zip(found, found[1:], [*found[2:], None]):
        if kind == 'name' and mark == '-' and not space and after and not after[2]:
            if after[0] == 'name' and len(word) + len(after[1].rstrip("'")) > 3:
                raise Unsure(f'{word}-{after[1]} is a word')
        if word.endswith("'") and text[at + len(word) : at + len(word) + 1].isalnum():
            raise Unsure('a possessive')
    return found


class Reader:
    """A recursive descent; trees are tuples, see parse."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.at = text, tokens(text), 0

    def peek(self, ahead: int = 0) -> tuple[str, str, bool, int]:
        place = self.at + ahead
        return self.tokens[place] if place < len(self.tokens) else ('end', '', True, len(self.text))

    def take(self, wanted: str | None = None) -> str:
        kind, word, _, _ = self.peek()
        if kind == 'end' or wanted not in (None, word):
            raise Unsure(f'{word!r} instead of {wanted}')
        self.at += 1
        return word

    def line(self):
        """Pieces with commas and words between them."""
        parts = [self.relation()]
        while self.peek()[0] != 'end':
            word = self.take()
            if word not in (',', *JOINERS):
                raise Unsure(word)
            parts.append(('word', word))
            if word == ',' and self.peek()[1] in JOINERS:
                parts.append(('word', self.take()))
            if self.peek()[0] == 'end' and word == 'otherwise':
                break
            parts.append(self.relation())
        return ('line', *parts)

    def relation(self):
        parts = [self.sum()]
        while self.peek()[1] in RELATIONS:
            parts += [self.take(), self.sum()]
        return ('relation', *parts) if len(parts) > 1 else parts[0]

    def sum(self):
        parts = [self.signed()]
        while self.peek()[1] in ('+', '-'):
            if self.peek()[2] != self.peek(1)[2]:
                raise Unsure('a sign or a difference')
            parts += [self.take(), self.term()]
        if len(parts) == 1:
            return parts[0]
        for i, part in enumerate(parts[::2]):  # does the sum over i of a_i + b_i cover b_i?
            for later in parts[2 * i + 2 :: 2] if operated(part) else ():
                if not operated(later) or letters(part) & indices(later):
                    raise Unsure('where does the operator end?')
        return ('sum', *parts)

    def signed(self):
        if self.peek()[1] == '-':
            self.take()
            return ('minus', self.term())
        return self.term()

    def term(self):
        parts = [self.factor()]
        while True:
            kind, word, space, _ = self.peek()
            if parts[-1][0] == 'over':  # it has taken the rest
                break
            if word in ('*', '/'):
                if word == '/' and '/' in parts[1::2] and parts[-2] == ' ':
                    raise Unsure('several fractions')
                parts += [self.take(), self.factor()]
            elif word == '.':
                self.dot(parts[-1], space)
                parts += ['.', self.factor()]
            elif self.side_by_side(parts[-1], kind, word, space):
                if len(parts) > 1 and parts[-2] == '/':
                    raise Unsure('is a / b c divided by c?')
                parts += [' ', self.factor()]
            else:
                break
        return ('term', *parts) if len(parts) > 1 else parts[0]

    def dot(self, left, space: bool) -> None:
        """The product of two vectors, not a method of Python and not the end of a sentence."""
        self.take('.')
        kind, word, after, _ = self.peek()
        if kind != 'name' or after != space or not short(word) or not short(base(left)):
            raise Unsure('a full stop')

    def side_by_side(self, left, kind: str, word: str, space: bool) -> bool:
        """Whether a product without a sign goes on: 2 N, a b, b log q, p (log p - log q)."""
        if not space or word in JOINERS:
            return False
        starts = kind == 'name' or word in ('(', '[')
        if not starts:
            return False
        if word in PREFIX or word in ('(', '[') or word in OPERATORS or short(word):
            if left[0] in ('number', 'power', 'sub', 'index', 'group') or short(base(left)):
                if left[0] == 'name' and left[1] in WORDS and kind == 'name' and not short(word):
                    raise Unsure('an article')
                return True
        raise Unsure(f'{word} after {left}: prose')

    def factor(self):
        kind, word, _, start = self.peek()
        if kind == 'name' and word in OPERATORS and self.peek(1)[1] == 'over':
            return self.over()
        if kind == 'name' and word in ('sum', 'mean') and self.peek(1)[1] == 'of':
            return self.over()
        if kind == 'name' and word in PREFIX and self.peek(1)[2] and self.peek(1)[1] not in ('', '='):
            self.take()
            if self.peek()[0] not in ('name', 'number') and self.peek()[1] not in ('(', '|', '||'):
                raise Unsure(word)
            return ('of', word, self.factor())
        x = self.postfix(self.atom())
        return x

    def over(self):
        """sum over n, k of ..., mean of ...: the rest of the product belongs to it, or part of it."""
        word = self.take()
        among = None
        if self.take() == 'over':
            start = self.peek()[3]
            while self.peek()[1] != 'of':
                self.take()
            among = self.text[start : self.peek()[3]].strip()
            if not among or '(' in among and ')' not in among:
                raise Unsure('over what?')
            self.take('of')
        return ('over', word, among, self.signed())

    def atom(self):
        kind, word, _, _ = self.peek()
        if kind == 'number':
            return ('number', self.take())
        if kind == 'name':
            if word in ('over', 'of', 'True', 'False', 'None', *JOINERS):
                raise Unsure(word)
            return ('name', self.take())
        if word == '...':
            self.take()
            return ('name', '...')
        if word in ('(', '['):
            self.take()
            return ('group', word, self.arguments(')' if word == '(' else ']'))
        if word in ('|', '||'):
            self.take()
            inner = self.sum()
            self.take(word)
            return ('norm', word, inner)
        raise Unsure(word)

    def arguments(self, end: str):
        parts = [self.relation()]
        while self.peek()[1] in (',', '||'):
            parts += [self.take(), self.relation()]
        self.take(end)
        return ('line', *parts)

    def postfix(self, x):
        """Calls, indices, subscripts and powers that touch it."""
        while True:
            kind, word, space, _ = self.peek()
            if space:
                return x
            if word == '(' and x[0] in ('name', 'sub', 'power'):
                if x[0] == 'power' and x[1][0] != 'name':
                    raise Unsure('a call of a power')
                self.take()
                x = ('call', x, self.arguments(')'))
            elif word == '[' and x[0] in ('name', 'sub', 'call', 'index'):
                self.take()
                x = ('index', x, self.arguments(']'))
            elif kind == 'sub':
                x = ('sub', x, ('name', self.take()[1:]))
            elif word == '_' and self.peek(1)[1] == '(':
                self.take()
                self.take()
                x = ('sub', x, ('group', '(', self.arguments(')')))
            elif word == '^':
                self.take()
                x = ('power', x, self.exponent())
            else:
                return x

    def exponent(self):
        if self.peek()[2]:
            raise Unsure('a space in a power')
        if self.peek()[1] == '-':
            self.take()
            return ('minus', self.atom())
        return self.atom()


def parse(text: str):
    """The tree of a line, or Unsure."""
    reader = Reader(text)
    tree = reader.line()
    if reader.peek()[0] != 'end':
        raise Unsure(reader.peek()[1])
    return tree


def base(x) -> str:
    """The name at the beginning of a factor; '' of others."""
    while x[0] in ('power', 'sub', 'index', 'call'):
        x = x[1]
    return x[1] if x[0] == 'name' else 'x' if x[0] == 'group' else ''


def short(word: str) -> bool:
    """Whether it is surely a symbol, not an English word."""
    head = word.rstrip("'").split('_')[0]
    return len(head) == 1 or head in GREEK or word == '...'


def operated(x) -> bool:
    """Whether a term ends with an operator and what it covers."""
    return x[0] == 'over' or x[0] in ('term', 'minus') and operated(x[-1])


def letters(x) -> set[str]:
    """Letters over which the operators of a term run."""
    if not isinstance(x, tuple):
        return set()
    own = set(re.findall(r'(?<![A-Za-z])[a-zA-Z](?![A-Za-z])', x[2] or '')) if x[0] == 'over' else set()
    inside = (letters(part) for part in x[1:]) if x[0] in ('term', 'minus', 'over') else ()
    return own.union(*inside)


def indices(x) -> set[str]:
    """Letters that a tree has as an index and that no operator inside it runs over."""
    if not isinstance(x, tuple):
        return set()
    if x[0] == 'name':
        return set(''.join(x[1].split('_')[1:])) if '_' in x[1] else {x[1]}
    inside = set().union(*(indices(part) for part in x[1:]))
    return inside - letters(x) if x[0] == 'over' else inside


# --------------------------------------------------------------------------------------------- typesetting


def mathml(tree) -> str:
    return f'<math displaystyle="true"><mrow>{typeset(tree)}</mrow></math>'


def typeset(x) -> str:
    """A tree as MathML: every symbol of the source in its order, / and ^ as they are drawn."""
    kind, *parts = x
    if kind == 'number':
        return f'<mn>{parts[0]}</mn>'
    if kind == 'name':
        return name(parts[0])
    if kind == 'word':
        return '<mo>,</mo>' if parts[0] == ',' else f'<mtext>&#xa0;{parts[0]}&#xa0;</mtext>'
    if kind == 'line':
        return ''.join(between(part) if isinstance(part, str) else typeset(part) for part in parts)
    if kind in ('relation', 'sum'):
        return ''.join(sign(part) if isinstance(part, str) else typeset(part) for part in parts)
    if kind == 'minus':
        return f'<mo form="prefix">−</mo>{typeset(parts[0])}'
    if kind == 'term':
        return product(parts)
    if kind == 'over':
        return operator(*parts)
    if kind == 'of':
        return f'<mi>{parts[0]}</mi><mspace width="0.17em"/>{typeset(parts[1])}'
    if kind == 'group':
        return fenced(parts[0], typeset(parts[1]), ')' if parts[0] == '(' else ']')
    if kind == 'norm':
        bar = '‖' if parts[0] == '||' else '|'
        return fenced(bar, typeset(parts[1]), bar)
    if kind == 'call' and parts[0] == ('name', 'sqrt') and len(parts[1]) == 2:
        return f'<msqrt>{row(typeset(parts[1]))}</msqrt>'
    if kind == 'call':
        return row(typeset(parts[0]) + fenced('(', typeset(parts[1]), ')'))
    if kind == 'index':
        return row(typeset(parts[0]) + fenced('[', typeset(parts[1]), ']'))
    if kind == 'sub':
        under = subscript(parts[1][1]) if parts[1][0] == 'name' else typeset(bare(parts[1]))
        return f'<msub>{row(typeset(parts[0]))}{row(under)}</msub>'
    if kind == 'power':
        return f'<msup>{row(typeset(parts[0]))}{row(typeset(bare(parts[1])))}</msup>'
    raise AssertionError(kind)


def row(content: str) -> str:
    return f'<mrow>{content}</mrow>'


def bare(x):
    """Without brackets that a fraction or a power makes superfluous."""
    return x[2] if x[0] == 'group' and x[1] == '(' and len(x[2]) == 2 else x


def fenced(left: str, inner: str, right: str) -> str:
    """Brackets, which grow only around what is higher than a line."""
    grow = 'true' if re.search('<mfrac|<munder|<msqrt|<mo largeop', inner) else 'false'
    mark = '<mo fence="true" form="{}" stretchy="' + grow + '">{}</mo>'
    return row(mark.format('prefix', left) + inner + mark.format('postfix', right))


def between(mark: str) -> str:
    return '<mo>,</mo>' if mark == ',' else '<mo lspace="0.28em" rspace="0.28em">∥</mo>'


def sign(mark: str) -> str:
    return f'<mo>{escape(RELATIONS.get(mark, {"-": "−"}.get(mark, mark)))}</mo>'


def product(parts: list) -> str:
    """A fraction where everything before / is one product and what follows is one factor; else a slash."""
    made, drawn = typeset(parts[0]), False
    first = parts[0]
    for i in range(1, len(parts), 2):
        mark, factor = parts[i], parts[i + 1]
        if mark == '/' and factor[0] != 'over' and not drawn and i <= 3:
            made = (
                f'<mfrac>{row(typeset(bare(first)) if i == 1 else made)}{row(typeset(bare(factor)))}</mfrac>'
            )
            drawn = True
        elif mark == '/':
            made += f'<mo>/</mo>{typeset(factor)}'
        else:
            gap = {
                '*': '<mo>·</mo>',
                '.': '<mo lspace="0" rspace="0">⋅</mo>',
                ' ': '<mspace width="0.17em"/>',
            }
            made += gap[mark] + typeset(factor)
    return made


def operator(word: str, among: str | None, body) -> str:
    large = {'sum': '∑', 'product': '∏'}.get(word)
    sign = f'<mo largeop="true" movablelimits="false">{large}</mo>' if large else f'<mi>{word}</mi>'
    if among is None:
        head = sign if large else sign + '<mtext>&#xa0;of</mtext>'
    else:
        try:
            under = typeset(parse(among))
        except Unsure:
            under = f'<mtext>{escape(among, quote=False)}</mtext>'
        head = f'<munder>{sign}{row(under)}</munder>'
    return f'<mrow>{head}<mspace width="0.17em"/>{typeset(body)}</mrow>'


def name(word: str) -> str:
    """x_s as x with an index; names of several letters stay names."""
    plain = word.rstrip("'")
    primes = word[len(plain) :]
    head, *subs = plain.split('_')
    if word == '...':
        return '<mo>…</mo>'
    if subs and (len(head) == 1 or head in GREEK or all(len(part) <= 2 for part in subs)):
        shown = f'<msub>{letter(head)}{row("<mo>,</mo>".join(map(subscript, subs)))}</msub>'
    else:
        shown = letter(plain)
    return row(f'{shown}<mo lspace="0" rspace="0">{"′" * len(primes)}</mo>') if primes else shown


def letter(word: str) -> str:
    if word in GREEK:
        return f'<mi title="{word}">{GREEK[word]}</mi>'
    return f'<mi>{escape(word)}</mi>'


def subscript(word: str) -> str:
    """ij is two indices, `off` is a word."""
    if re.fullmatch(r'[ijkmnuv]{2,3}', word):
        return ''.join(f'<mi>{c}</mi>' for c in word)
    if word.isdigit():
        return f'<mn>{word}</mn>'
    return letter(word)


# ---------------------------------------------------------------------------------------- whole paragraphs


def paragraph(text: str) -> list[tuple]:
    """[('math', label, [(MathML, text after it)], comment) or ('pre', lines)] of an indented paragraph."""
    lines = text.strip('\n').split('\n')
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    lines = [line[indent:].rstrip() for line in lines]
    groups = []
    for line in lines:
        if line.startswith(' ') and groups:
            groups[-1].append(line)
        else:
            groups.append([line])
    made = []
    for group in groups:
        shown = group_as_math(group)
        if shown and shown[0] == 'rows':
            made += shown[1]
        elif shown is None and made and made[-1][0] == 'pre':
            made[-1] = ('pre', made[-1][1] + '\n' + '\n'.join(group))
        else:
            made.append(shown or ('pre', '\n'.join(group)))
    return made


def group_as_math(group: list[str]):
    """A line with what hangs on it, as one row or several, or None: it is not sure."""
    first, *rest = group
    if not rest:
        return line_as_math(first)
    if all(re.match(r'\s+[-+*/] ', line) for line in rest) and '   ' not in first:
        return line_as_math(' '.join([first, *(line.strip() for line in rest)]), whole=True)
    labelled = re.match(r"[\w,' ()+=-]+:\s+", first)
    if labelled and all(re.match(r'\s*', line).end() == labelled.end() for line in rest):
        rows = [line_as_math(first), *(line_as_math(line.strip()) for line in rest)]
        if all(rows) and all(row[0] == 'math' and row[2] for row in rows):
            return ('rows', rows)
    return None


def line_as_math(line: str, whole: bool = False):
    line = re.sub(r"(?<=[\w)\]'])\s{2,}(?=(=|<-|\+|\*) )", ' ', line)  # aligned signs
    segments = [part for part in re.split(r'\s{2,}', line) if part]
    label = ''
    if len(segments) > 1 and re.fullmatch(r"[\w,' ()+=-]+:|[A-Za-z_]+", segments[0]):
        label, *segments = segments
    elif found := re.match(r"([\w' ]{1,24}:) (?=[^:]*=)", segments[0]):
        label, segments[0] = found[1], segments[0][found.end() :]
    shown, comment = [], ''
    for i, segment in enumerate(segments):
        made = statement(segment, bool(label))
        if made is None:
            if i == 0:
                return None
            comment = ' '.join(segments[i:])
            break
        shown.append(made)
    if whole and (comment or len(shown) != 1 or shown[0][1]):
        return None
    return ('math', label, shown, comment)


def statement(text: str, labelled: bool):
    """(MathML, text that follows); None: it does not begin with a formula."""
    cuts, depth = [len(text)], 0
    for i, c in enumerate(text):
        if depth == 0 and re.match(r'[,;:] |[,;]$| where | with ', text[i:]):
            cuts.append(i)
        elif depth == 0 and re.match(r' \([^()]*(\([^()]*\)[^()]*)*\)[,;]?($| )', text[i:]):
            cuts.append(i)
        elif depth == 0 and text[i - 1 : i] == ')' and re.match(r' over the | of | at ', text[i:]):
            cuts.append(i)
        depth += (c in '([') - (c in ')]')
    for cut in sorted(cuts, reverse=True):
        head, rest = text[:cut], text[cut:]
        if re.search(r'(^|[,)]) ?[-+*/^=] ', rest):
            continue  # what follows belongs to the formula
        try:
            tree = parse(head)
        except Unsure:
            continue
        if is_formula(tree, labelled and cut == len(text), bool(rest.strip(',; '))):
            return mathml(tree), rest
    return None


def is_formula(tree, labelled: bool, cut: bool) -> bool:
    """A relation, or, after a label, any term but a lone word."""
    first, last = tree[1], tree[-1]
    if len(tree) > 2 and last[0] == 'name' and (cut or not short(last[1])):
        return False  # `..., each` is no list of two
    if first[0] == 'relation' and first[2] in ('=', '<-', '~', '->'):
        return True
    if any(part[0] == 'relation' and part[2] == '=' for part in tree[2:] if part[0] != 'word'):
        return all(part[0] in ('name', 'sub', 'relation', 'word', 'call') for part in tree[1:])
    return labelled and first[0] in ('sum', 'term', 'over', 'minus', 'call', 'of')
