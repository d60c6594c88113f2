"""The verb export: a finished run as a model that needs nothing of ours, with the proof of it."""

from peftlab.exporting.report import ExportReport
from peftlab.exporting.verb import ExportResult, export

__all__ = ["ExportReport", "ExportResult", "export"]
