"""What the cells of a notebook in JupyterLab call in place of Sphinx: copied beside them."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

#: name -> what a cell of the page has put under it
_glued: dict[str, object] = {}


class Shown:
    """A text that a notebook shows without quotation marks.

    Parameters
    ----------
    text : str
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def glue(name: str, variable: object, display: bool = False) -> None:
    """Keep a value under a name, as ``myst_nb.glue`` does for the built pages.

    Parameters
    ----------
    name : str
    variable : object
    display : bool
        As in MyST-NB, show it at once as well.
    """
    _glued[name] = variable
    if display:
        print(variable)


def glued(name: str, form: str = "") -> Shown:
    """What a sentence shows of a value that a cell has kept: a text, or '…' before the cell ran.

    Parameters
    ----------
    name : str
        As it was given to :func:`glue`.
    form : str
        A format, such as ``".2f"``.
    """
    return Shown(format(_glued[name], form) if name in _glued else "…")


def show(path: str) -> Any:
    """A figure with sliders, as an output of the cell.

    Parameters
    ----------
    path : str
        Of a page with the figure, from the notebook's folder.

    Returns
    -------
    IPython.display.HTML
        The page in a frame, so that its style stays its own.
    """
    from IPython.display import HTML

    page = html.escape(Path(path).read_text(encoding="utf-8"), quote=True)
    # IPython takes what begins with an iframe for a mistake, hence the div.
    return HTML(
        f'<div><iframe srcdoc="{page}" title="a figure with sliders" '
        'style="width: 36rem; max-width: 100%; height: 52rem; border: 0"></iframe></div>'
    )
