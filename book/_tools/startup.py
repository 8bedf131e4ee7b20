"""What a notebook's kernel runs first in ``make test`` and ``make book`` (as ``PYTHONSTARTUP``).

No garbage collection during the first cell, which imports; and what is imported by its end is not
walked again. The collections took 2 of the cell's 8 seconds, and half a second of each training
later on, before which accelerate collects. No name is left behind for the cells to use by mistake.
"""


def _collect_after_the_first_cell() -> None:
    import gc

    from IPython import get_ipython

    events = get_ipython().events

    def switch_on(result: object) -> None:
        gc.freeze()
        gc.enable()
        events.unregister("post_run_cell", switch_on)

    gc.disable()
    events.register("post_run_cell", switch_on)


_collect_after_the_first_cell()
del _collect_after_the_first_cell
