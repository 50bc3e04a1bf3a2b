"""Where figures come from, if matplotlib is there: it is optional."""

from engine.errors import UserError


def pyplot(missing: str, log=print):
    """matplotlib.pyplot for files; None without matplotlib, and `missing` with the remedy is said."""
    try:
        import matplotlib
    except ImportError:
        log(f'{missing} matplotlib is not installed (pip install matplotlib)')
        return None
    matplotlib.use('Agg')
    from matplotlib import pyplot

    return pyplot


def pyplot_or_error(missing: str = 'no figure,'):
    """The same, for what has nothing to do without it."""

    def refuse(why: str):
        raise UserError(why)

    return pyplot(missing, refuse)
