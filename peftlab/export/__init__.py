"""The verb export: a finished run as a model that needs nothing of ours, with the proof of it."""

from peftlab.export.report import ExportReport
from peftlab.export.verb import ExportResult, export

__all__ = ["ExportReport", "ExportResult", "export"]
