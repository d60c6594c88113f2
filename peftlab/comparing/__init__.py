"""The verb compare: recipes × seeds on one task, each in a fresh process."""

from peftlab.comparing.verb import CompareResult, compare

__all__ = ["CompareResult", "compare"]
