"""Tables, figures and pages: `python -m report COMMAND ...`.

    table FOLDER... --out FOLDER      accuracies of base, kd and dml runs: table.md, accuracy.png
    ka FOLDER... --out FOLDER         train_ka.py and the tools of its losses: table.md, table.csv
    figures FOLDER --out FOLDER       figures of a run of train_ka.py
    dfkd FOLDER... --out FOLDER       table and images of train_dfkd.py: table.md, images.png
    dense FOLDER... --out FOLDER      table and pictures of train_dense.py: table.md, panels-TASK.png
    tasks FOLDER                      table and figure of tools/sequences.py or tools/graphs.py: curves.png
    page                              docs/index.html and a page per method: what the page shows, made anew
    overview FOLDER                   one table and one figure of all that was trained below a folder
    explain FILE... --out PNG         accuracy against images per class of tools/graft.py
    refresh [--check]                 rewrite every generated file of the repository, or say which are stale

`python -m report COMMAND --help` tells more.
"""

import importlib
import sys

from engine import errors
from engine.errors import UserError

COMMANDS = ('table', 'ka', 'figures', 'dfkd', 'dense', 'tasks', 'overview', 'explain', 'page', 'refresh')


def main() -> int | None:
    name = sys.argv[1] if len(sys.argv) > 1 else ''
    if name in ('-h', '--help'):
        print(__doc__)
        return 0
    if name not in COMMANDS:
        raise UserError(f'{name or "nothing to do"}: say one of {", ".join(COMMANDS)} (--help tells more)')
    del sys.argv[1]
    sys.argv[0] = f'python -m report {name}'  # for the usage line
    return importlib.import_module(f'report.{name}').main()


if __name__ == '__main__':
    sys.argv[0] = 'report'  # what error lines begin with
    errors.run(main)
