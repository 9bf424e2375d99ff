"""Turns the records of a run, finished or not, into one HTML file."""

from reports.report import render_report

__all__ = ["render_report"]
