"""Recipe "auto": the cheapest form of every layer that keeps a model inside a budget, proven on data kept apart.

1. Data is split in three: calibration (statistics, ranges, GPTQ, sensitivities), selection, and a final part.
2. Each form of each layer is tried alone: what it does to the outputs (:mod:`.sensitivity`), what it costs
   (:mod:`.cost`).
3. Losses and costs make a chain of assignments from "float32 everywhere" to "the cheapest everywhere"
   (:mod:`.knapsack`). Losses do not add up exactly, so the chain only says in which order layers give up precision.
4. How far along it a plan may go is found by making plans and measuring them on the selection part. A plan counts as
   inside when an upper bound of what the *final part* will show lies inside: :class:`Judge`. Going back along the
   chain reverts the layers that lose most for what they save.
5. The final part measures the plan that was chosen, once. Should it be outside all the same, the plan goes further
   back, and the record and a warning say that the final part was looked at more than once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from narrowcast.errors import ArgumentError
from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes.match import Layer
from narrowcast.runtime.executor import Executor

from . import cost, knapsack
from .calibrate import collect
from .cnn import SEARCHED, some
from .conv_forms import ConvInt8, Unpacked, apply_forms, round_forms
from .equalize import equalize
from .forms import FORMS, Draft, Form, Item, Known, items_of
from .gptq import Rounded
from .judge import Judge, Verdict
from .search_memory import Memory, Parts
from .sensitivity import Progress, scan
from .sequential import round_in_sequence
from .transformer import Decision, int4_targets, layer_name

ops = torch.ops.narrowcast

KINDS = ("decoder", "encoder", "image")
#: Batches of calibration data for statistics of a decoder's inputs and for the ranges of a CNN.
STATISTICS_BATCHES = {"decoder": 8, "encoder": 1000, "image": 16}
#: Plans that are made and measured, at most; and what is left to gain, as a share of float32's cost, to stop before.
MOST_PLANS, WORTH = 12, 0.004
#: Plans that are shown to the final part, before float32 ends the search.
MOST_LOOKS = 4
#: GPTQ runs for the layers that are int4 where the predicted loss is this many times the budget.
GENEROUS = 4.0
#: It runs once more for the layers that are left, where they are fewer than this share: MiniLM at 1 % lost 0.0070
#: with 23 of 24 layers as they had been rounded together, and 0.0065 rounded anew.
ROUND_AGAIN = 0.85
#: A budget on agreement grows with the square root of a divergence, the others with the divergence itself.
POWER = {"decoder": 1.0, "encoder": 1.0, "image": 2.0}
BITS4 = "int4"


@dataclass
class Tried:
    """One plan of the search. ``predicted``: the sum of its layers' losses, each changed alone."""

    position: int
    cost: float
    predicted: float
    loss: float
    bound: float


class Search:
    """See the module's text.

    finish(graph, decisions): the plan of a rewritten graph. certify(plan): measures it on the final part and
    fills its certificate. work: a folder for what was measured and rounded, so that a run that was cut short
    goes on and ends with the same plan; None: nothing is kept.
    """

    def __init__(
        self, kind: str, fused: Graph, data: Parts, budget: float, objective: str, keep_float: set[str],
        finish: Callable[[Graph, list[Decision]], Plan], certify: Callable[[Plan], None],
        progress: Progress | None = None, work: str | Path | None = None, forms: Sequence[Form] = FORMS,
    ):  # fmt: skip
        self.kind, self.data, self.budget, self.objective = kind, data, budget, objective
        self.finish, self.certify, self.progress = finish, certify, progress
        self.fused = fused
        graph = fused.clone()
        if kind == "image":
            few = data.calibration[: STATISTICS_BATCHES[kind]]
            equalize(graph, few, some(few, SEARCHED))
        self.memory = Memory(work, graph, data, forms, keep_float)
        self.why: dict[str, str] = dict.fromkeys(keep_float, "asked for")
        self.items = [item for item in items_of(graph, forms) if item.name not in keep_float]
        names = {item.name for item in items_of(graph, forms)}
        if keep_float - names:
            raise ArgumentError(
                f"keep_float must name layers; there is no {sorted(keep_float - names)[0]!r} "
                f"(there are {', '.join(sorted(names)[:8])} ...)"
            )
        self.known = self._observe(graph)
        self.judge = Judge(kind, fused, data.selection, data.held_out)
        self.tried: list[Tried] = []
        self.chain = knapsack.Chain([], [])  #: empty until :meth:`price`
        self._sets: dict[tuple[str, ...], dict[str, Rounded]] = {}  # rounded together -> what came out

    def _observe(self, graph: Graph) -> Known:
        few = self.data.calibration[: STATISTICS_BATCHES[self.kind]]
        dense = [
            n for i in self.items for n in i.nodes if i.kind in ("dense", "tied") and not _settled(graph, i)
        ]
        statistics = collect(graph, dense, few, self.data.valid, self.progress) if dense else {}
        return Known(graph, statistics, None, few)

    # --- prices -----------------------------------------------------------------------------------

    def price(self) -> None:
        """Bytes, costs and losses of all forms, and the chain; forms that can never be chosen are dropped."""
        self.bytes = cost.weight_bytes(self.known, self.items)
        self.ms: dict[str, dict[str, dict]] = {}
        if self.objective == "latency":
            self.ms = self.memory.once(
                "ms", lambda: cost.latency(self.kind, self.known, self.items, self.progress)
            )
            share = cost.shares(self.ms)
            self.cost = {
                name: share.get(name, dict.fromkeys(forms, 0.0)) for name, forms in self.bytes.items()
            }
        else:
            self.cost = self.bytes
        for item in self.items:
            self._drop(item)
        self.items = [item for item in self.items if len(item.forms) > 1]
        if self.kind == "image":  # few layers, and coarse: their losses are those of rounded weights
            round_forms(self.known, self.items, self.progress)
            self._round(
                [i.name for i in self.items if i.kind == "dense" and BITS4 in {f.name for f in i.forms}]
            )
        self.loss = self.memory.once(
            "loss", lambda: scan(self.kind, self.known, self.items, self.data.calibration, self.progress)
        )
        options = [
            [(self.cost[i.name][f.name], self.loss[i.name][f.name]) for f in i.forms] for i in self.items
        ]
        self.chain = knapsack.Chain(options, knapsack.steps(options))
        self.costs, self.predicted = self.chain.totals()

    def _drop(self, item: Item) -> None:
        price = self.cost[item.name]
        if self.objective == "latency":
            out = item.forms[1:] if item.kind == "table" else cost.slower(item, price)
            if out and len(out) == len(item.forms) - 1:
                self.why[item.name] = self._not_faster(item)
            item.forms = [f for f in item.forms if f not in out]
        elif any(isinstance(f, Unpacked) for f in item.forms):
            # The same codes take the same bytes, and images that stay in float lose nothing.
            item.forms = [f for f in item.forms if not isinstance(f, ConvInt8)]
        # Nothing that costs as much as a form without loss is worth its loss.
        free = min((price[f.name] for f in item.forms if f.exact), default=math.inf)
        item.forms = [f for f in item.forms if f.exact or price[f.name] < free]

    def _not_faster(self, item: Item) -> str:
        if item.kind == "table":
            return "a gather is no faster quantised"
        times = self.ms[item.name]
        told = [
            ", ".join(f"{name} {cases[case]:.3g}" for name, cases in times.items()) + f" ms at {case}"
            for case in next(iter(times.values()))
        ]
        return f"not faster quantised here: {'; '.join(told)}"

    # --- plans ------------------------------------------------------------------------------------

    def _choice(self, position: int) -> dict[str, Form]:
        return {item.name: item.forms[o] for item, o in zip(self.items, self.chain.choice(position))}

    def _int4(self, position: int) -> list[str]:
        return [name for name, form in self._choice(position).items() if form.name == BITS4]

    def _dense_int4(self, position: int) -> list[str]:
        dense = {item.name for item in self.items if item.kind == "dense"}
        return [name for name in self._int4(position) if name in dense]

    def _round(self, names: Sequence[str]) -> None:
        """GPTQ for these layers, one after the other, the rest of the model in float32."""
        if not names:
            return
        if tuple(names) in self._sets:
            self.known.rounded = self._sets[tuple(names)]
            return
        graph = self.known.graph
        layers = {layer_name(Layer(n)) for n in graph.calls(ops.linear.default)}
        targets = int4_targets(graph, 32, 8, layers - set(names))
        folder = self.memory.rounds(graph, self.data, [t.name for t in targets.values()])
        few = STATISTICS_BATCHES[self.kind] if self.kind == "image" else None  # images take much memory
        seen = self.data.calibration[:few] + self.data.synthetic
        made = round_in_sequence(graph, targets, seen, self.data.valid, self.progress, folder)
        self.known.rounded = {targets[node].name: rounded for node, rounded in made.items()}
        self._sets[tuple(names)] = self.known.rounded

    def make(self, position: int) -> Plan:
        """The plan at a position of the chain."""
        draft, choice = Draft.begin(self.known), self._choice(position)
        decisions: dict[str, Decision] = {}
        chosen = [(item, choice[item.name]) for item in self.items]
        decisions |= {d.name: d for d in apply_forms(draft, chosen)}
        draft.graph.clean()
        listed = []
        for item in items_of(self.known.graph, FORMS):
            op = {"conv": "conv2d", "table": "embedding"}.get(item.kind, "linear")
            decision = decisions.get(item.name) or Decision(item.name, op, "float32")
            self._explain(decision, choice.get(item.name))
            listed.append(decision)
        return self.finish(draft.graph, listed)

    def _explain(self, decision: Decision, form: Form | None) -> None:
        item = next((i for i in self.items if i.name == decision.name), None)
        if item is None or form is None:
            decision.why = self.why.get(decision.name, "no form of it is cheaper")
            return
        decision.candidates = [
            {
                "form": f.name, "bytes": int(self.bytes[item.name][f.name]), "loss": self.loss[item.name][f.name],
                "ms": self.ms.get(item.name, {}).get(f.name), "chosen": f is form,
            }
            for f in item.forms
        ]  # fmt: skip
        told = [f"{c['form']} {c['bytes'] / 1e6:.3g} MB, loss {c['loss']:.1e}" for c in decision.candidates]
        decision.why = "; ".join([f"{form.name} of: " + ", ".join(told), *filter(None, [decision.why])])

    def _try(self, position: int) -> Verdict:
        verdict = self.judge(Executor(self.make(position), device="cpu"))
        self.tried.append(
            Tried(position, self.costs[position], self.predicted[position], verdict.loss, verdict.bound)
        )
        if self.progress is not None:
            self.progress("searching", min(len(self.tried), MOST_PLANS), MOST_PLANS)
        return verdict

    # --- the search -------------------------------------------------------------------------------

    def run(self) -> Plan:
        """The plan. Another run, for another ``budget``, uses what has been measured."""
        if not self.chain.items:
            self.price()
        self.tried, self.known.rounded = [], {}
        position = self._furthest()
        first = self._dense_int4(position)
        if first and len(first) < ROUND_AGAIN * len(self.known.rounded):
            self._round_again(position, first)
        looks = 0
        while True:
            plan = self.make(position)
            self.certify(plan)
            looks += 1
            loss = plan.certificate["loss"]
            if loss is None or loss <= self.budget or position == 0:
                break
            position = self._back(position, loss) if looks < MOST_LOOKS else 0
        plan.record["search"] = self.record(looks)
        if looks > 1:
            plan.record["warnings"].append(
                f"the first choice was outside the budget on the final part of the data: it was looked at {looks} "
                "times, so the loss is a little better than on data never looked at; give more data"
            )
        self.memory.remove()
        return plan

    def record(self, looks: int) -> dict[str, Any]:
        return {
            "objective": self.objective,
            "budget": self.budget,
            "batches": {
                "calibration": len(self.data.calibration), "selection": len(self.data.selection),
                "final": len(self.data.held_out),
            },
            "steps": len(self.chain.steps),
            "plans": [asdict(t) for t in self.tried],
            "looks_at_final_part": looks,
        }  # fmt: skip

    def _furthest(self) -> int:
        """The last position found inside the budget; positions are tried where the losses so far point to."""
        last = len(self.chain.steps)
        limit = self._limit(self.budget)
        self._round(self._dense_int4(limit))
        low, high = 0, limit + 1  # low is inside (float32 loses nothing), high is not, or not rounded for
        kept = self.known.rounded  # what the plan at ``low`` was made of
        guess = self._at(self.budget if POWER[self.kind] == 1 else self.budget**2)
        while len(self.tried) < MOST_PLANS:
            guess = min(max(guess, low + 1), high - 1)
            if guess <= low:
                break
            verdict = self._try(guess)
            if verdict.bound <= self.budget:
                low, kept = guess, self.known.rounded
            else:
                high = guess
            if low == limit and limit < last:
                limit = self._limit(self.predicted[limit])
                if set(self._dense_int4(limit)) - set(self.known.rounded):
                    self._round(self._dense_int4(limit))
                high = limit + 1
            if high - low <= 1 or self.costs[low] - self.costs[high - 1] < WORTH * self.costs[0]:
                break
            guess = self._aim(guess, verdict.bound)
            if not low < guess < high:
                guess = self._between(low, high)
        self.known.rounded = kept
        return low

    def _limit(self, loss: float) -> int:
        power = POWER[self.kind]
        if power != 1 or not any(f.name == BITS4 and i.kind == "dense" for i in self.items for f in i.forms):
            return len(self.chain.steps)
        return max(self._at(GENEROUS * loss), 1) if self.chain.steps else 0

    def _at(self, predicted: float) -> int:
        """The furthest position with at most this predicted loss."""
        return max(p for p, loss in enumerate(self.predicted) if loss <= predicted or p == 0)

    def _aim(self, position: int, bound: float) -> int:
        """Where the bound would be the budget, if bounds grew like the predicted losses."""
        ratio = self.budget / max(bound, self.budget / 100)
        return self._at(max(self.predicted[position], 1e-12) * ratio ** POWER[self.kind])

    def _between(self, low: int, high: int) -> int:
        """Half the cost that is left."""
        middle = (self.costs[low] + self.costs[min(high, len(self.costs) - 1)]) / 2
        return next((p for p in range(low + 1, high) if self.costs[p] <= middle), high - 1)

    def _back(self, position: int, loss: float) -> int:
        ratio = (self.budget / loss) ** POWER[self.kind]
        return min(self._at(self.predicted[position] * ratio / 2), position - 1)

    def _round_again(self, position: int, names: list[str]) -> None:
        """GPTQ once more for exactly the layers that stayed: each then makes up for the errors that are there."""
        before = self.known.rounded
        inside = [t.bound for t in self.tried if t.position == position]
        self._round(names)
        verdict = self._try(position)
        if verdict.bound > min([self.budget, *inside]):
            self.known.rounded = before


def _settled(graph: Graph, item: Item) -> bool:
    """Whether the file's own codes are there, which need no statistics."""
    return item.weight in graph.native
