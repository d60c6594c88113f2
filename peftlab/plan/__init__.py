"""Planning: what an experiment will need, worked out before a weight is loaded."""

from peftlab.plan.answer import Plan, PlannedMemory, Suggestion, TimelinePoint, answer
from peftlab.plan.fit import fit, largest_micro_batch
from peftlab.plan.simulate import PlanRequest, Simulation, measure, simulate

__all__ = [
    "Plan",
    "PlanRequest",
    "PlannedMemory",
    "Simulation",
    "Suggestion",
    "TimelinePoint",
    "answer",
    "fit",
    "largest_micro_batch",
    "measure",
    "simulate",
]
