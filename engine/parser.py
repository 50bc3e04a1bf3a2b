"""How a script reads its flags: --help on a screen or two, errors in one line."""

import argparse
import re
import sys

from engine.errors import UserError


class Short(argparse.RawDescriptionHelpFormatter):
    """--help on a screen or two: the first clause of each text, and the default."""

    def __init__(self, prog: str, **more) -> None:
        super().__init__(prog, max_help_position=26, **more)

    def _format_args(self, action, default_metavar: str) -> str:
        if action.nargs in ('+', '*'):
            return f'{self._metavar_formatter(action, default_metavar)(1)[0]} ...'
        return super()._format_args(action, default_metavar)

    def _get_default_metavar_for_optional(self, action) -> str:
        return 'X'

    def _split_lines(self, text: str, width: int) -> list[str]:
        first, *others = ' '.join(text.split()).split('; ')
        default = [clause for clause in others if clause.startswith('default')]
        return super()._split_lines('; '.join([first, *default[-1:]]), width)


class Parser(argparse.ArgumentParser):
    """argparse with the house's habits: --a-b means --a_b, no abbreviations, defaults shown by --help."""

    def __init__(self, description: str) -> None:
        super().__init__(
            usage='%(prog)s FLAGS', description=description, allow_abbrev=False, formatter_class=Short,
            epilog='docs/flags.md has what each flag means in full.',
        )  # fmt: skip
        self.add_argument(
            '--debug', action='store_true', help='with an error message show where it was raised'
        )

    def parse_args(self, args=None):
        def underscores(word):
            if re.match(r'-\d+[,:]', word):  # stages like -2,-1: argparse takes them for a flag
                return f' {word}'
            flag, equals, value = word.partition('=')
            return '--' + flag[2:].replace('-', '_') + equals + value if flag.startswith('--') else word

        return super().parse_args([underscores(word) for word in (sys.argv[1:] if args is None else args)])

    def error(self, message):
        raise UserError(f'{message} (--help lists all flags)')
