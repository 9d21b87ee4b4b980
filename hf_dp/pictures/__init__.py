"""Numbers and words go in; pictures come out, as files by matplotlib or as SVG text. Nothing is computed here."""

from hf_dp.pictures.figure import PLAIN, PRIVATE, Line, Panel, save_figure
from hf_dp.pictures.line_chart import Axes, Point, line_chart
from hf_dp.pictures.tradeoff import tradeoff_svg

__all__ = ["PLAIN", "PRIVATE", "Axes", "Line", "Panel", "Point", "line_chart", "save_figure", "tradeoff_svg"]
