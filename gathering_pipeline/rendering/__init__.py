"""Graphs and runs for people: Mermaid, SVG, and the report of a run; pure.

Names and other texts of users are escaped everywhere.
"""

from .graph import MOST_DRAWN, NodeLook, to_mermaid, to_svg
from .report import RunRecord, render_report

__all__ = ["MOST_DRAWN", "NodeLook", "RunRecord", "render_report", "to_mermaid", "to_svg"]
