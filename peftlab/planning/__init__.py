"""The verb plan: what an experiment will need, worked out before a weight is loaded."""

from peftlab.planning.schema import Plan
from peftlab.planning.verb import plan, plan_shape

__all__ = ["Plan", "plan", "plan_shape"]
