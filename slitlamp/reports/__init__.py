"""Figures and the HTML report of a run, made from nothing but its folder."""

from slitlamp.reports.figures import FIGURES, figure, figure_names
from slitlamp.reports.report import write_report

__all__ = ["FIGURES", "figure", "figure_names", "write_report"]
