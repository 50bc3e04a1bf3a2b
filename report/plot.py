"""Where figures come from, if matplotlib is there: it is optional."""


def pyplot(missing: str, log=print):
    """matplotlib.pyplot, to draw into files; without matplotlib None, and `missing` and the remedy said."""
    try:
        import matplotlib
    except ImportError:
        log(f'{missing} matplotlib is not installed (pip install matplotlib)')
        return None
    matplotlib.use('Agg')
    from matplotlib import pyplot

    return pyplot
