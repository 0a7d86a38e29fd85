"""The cheapest forms of all layers for a loss: greedy along the lower hulls, which solves the relaxed knapsack.

Every layer offers options of (cost, loss). Losses of layers are taken to add up, as divergences of small, unrelated
errors do. For a multiplier t, the best option of each layer is that with the least loss + t * cost; as t grows from
0, a layer moves along the lower convex hull of its options, and a step is taken at t = loss per saved cost. All
steps of all layers sorted by t are therefore a chain of assignments, each of which has the least loss for its cost
(Everett, "Generalized Lagrange multiplier method", 1963); between two of them lies the difference of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Option = tuple[float, float]  #: cost, loss


@dataclass(frozen=True)
class Step:
    """Layer ``item`` moves to ``option``. rate: loss per saved cost."""

    item: int
    option: int
    rate: float


def hull(options: Sequence[Option]) -> list[tuple[int, float]]:
    """The options that a layer passes on its way from option 0 to the cheapest, each with its rate, which rises."""
    found, at, least = [], 0, 0.0
    while True:
        cost, loss = options[at]
        cheaper = [
            (max((other[1] - loss) / (cost - other[0]), least), other[0], index)
            for index, other in enumerate(options)
            if other[0] < cost
        ]
        if not cheaper:
            return found
        least, _, at = min(cheaper)
        found.append((at, least))


def steps(items: Sequence[Sequence[Option]]) -> list[Step]:
    """All steps from "option 0 everywhere" to "the cheapest everywhere", those that cost the least first."""
    made = [
        Step(index, option, rate) for index, options in enumerate(items) for option, rate in hull(options)
    ]
    return sorted(made, key=lambda step: step.rate)  # stable: a layer's own steps keep their order


@dataclass(frozen=True)
class Chain:
    """Assignments 0 (option 0 everywhere) to len(steps)."""

    items: Sequence[Sequence[Option]]
    steps: Sequence[Step]

    def choice(self, position: int) -> list[int]:
        """The option of every layer after ``position`` steps."""
        chosen = [0] * len(self.items)
        for step in self.steps[:position]:
            chosen[step.item] = step.option
        return chosen

    def totals(self) -> tuple[list[float], list[float]]:
        """Cost and loss at every position, from 0 on."""
        cost = sum(options[0][0] for options in self.items)
        loss = sum(options[0][1] for options in self.items)
        costs, losses, at = [cost], [loss], [0] * len(self.items)
        for step in self.steps:
            before, after = self.items[step.item][at[step.item]], self.items[step.item][step.option]
            at[step.item] = step.option
            costs.append(costs[-1] + after[0] - before[0])
            losses.append(losses[-1] + after[1] - before[1])
        return costs, losses
