"""Pictures of a search: the cell as a graph, α over the epochs, the most likely cell as an animation, learning curves.

They need matplotlib, which is imported only when a picture is made. Nothing here touches pyplot or leaves rcParams changed. Every file is written whole or not
at all. The same input gives the same bytes, with the same matplotlib and fonts.
"""

from .alpha import plot_alpha
from .animation import animate_cell
from .canvas import OP_COLOURS
from .cell import plot_cell
from .curves import plot_curves
from .geometry import layout

__all__ = ["OP_COLOURS", "animate_cell", "layout", "plot_alpha", "plot_cell", "plot_curves"]
