"""The search: draw, hold against what this machine can tell, measure on the boards what may be worth it, tell the sampler.

Every decision stands in the trials before the next is taken, and everything measured in the results store; so whatever kills a
search, the next run of the same goes on behind the last thing it knew.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from device_agents.wire import Run, RunPlan
from edgevit.plans import PLANS
from edgevit.progress import Progress
from edgevit.results.stats import summarize
from edgevit.results.summary import Summary
from edgevit.tune.boundary import Outcome, draw_at_boundary
from edgevit.tune.candidate import Candidate
from edgevit.tune.figures import Figures, read_figures
from edgevit.tune.host import Host
from edgevit.tune.latency import LatencyTable, Timed, learn
from edgevit.tune.limits import Limits, Reached, misses, not_known, shares
from edgevit.tune.size import sift
from edgevit.tune.space import Draw, Drawn, Space, Trial, Value, draw, recipe_of, seeds
from edgevit.tune.trials import Trials

SEARCH_PLAN = dataclasses.replace(PLANS["quick"], name="tune", processes=2, min_seconds=0.7, max_seconds=4.0, accuracy=False)
"""Two fresh processes a candidate, interleaved with all others of the job; top-1 was counted on this machine."""

AT_ONCE = 4
"""Draws that go through the gates together; their survivors share a job, so one baseline serves them all."""

IN_A_JOB = 8
ATTEMPTS = 2
"""How often a candidate is measured whose figures were INVALID, or did not come."""

TRAINING_SHARE = 0.1
"""One candidate's training may take so much of the budget: else the first that trains, at whatever strength, eats it up."""

LEAST_TOO_LONG = 0.1
"""By what share a training counts as too long at least: also where it would have fitted earlier in the search."""

SAME_IN_A_ROW = 60
"""So many draws in a row of what was drawn before: there is nothing new left within reach."""


@dataclass(frozen=True)
class Measured:
    """What came of one visit to the boards: ``runs`` that came home by target, targets that did not answer, and candidates that
    a target cannot run, by (target, key)."""

    runs: Mapping[str, Sequence[Run]]
    dead: Mapping[str, str]
    left_out: Mapping[tuple[str, str], str]


class Boards(Protocol):
    """The road to the targets."""

    def measure(self, wanted: Mapping[str, Sequence[Candidate]], plan: RunPlan) -> Measured: ...

    def recall(self, target: str, bundles: Sequence[str]) -> Sequence[Run]:
        """What the results store has of ``bundles`` on ``target``, also from another search."""
        ...


@dataclass(frozen=True)
class Effort:
    """How long to search: ``seconds`` in all, over every run of this search; at most ``trials`` candidates, if not None."""

    seconds: float
    trials: int | None = None


@dataclass
class Search:
    """A search as it stands. ``runs`` by target: all that is known of its candidates."""

    space: Space
    limits: Limits
    effort: Effort
    targets: tuple[str, ...]
    trials: Trials
    host: Host
    boards: Boards
    progress: Progress
    confirm_plan: RunPlan
    anyway: bool = False
    runs: dict[str, list[Run]] = field(default_factory=dict)
    dead: dict[str, str] = field(default_factory=dict)
    candidates: dict[int, Candidate] = field(default_factory=dict)
    least_mb: Callable[[Drawn], float] = lambda drawn: 0.0
    """The size in 10⁶ bytes below which no file of a draw can be."""
    on_front: Callable[[str, Candidate, Figures], None] = lambda target, candidate, figures: None
    ended: str = ""
    _known: dict[tuple[str, str], dict[str, Figures]] = field(default_factory=dict)
    _summaries: dict[str, Sequence[Summary]] = field(default_factory=dict)
    _announced: set[tuple[str, str]] = field(default_factory=set)

    # ---- the way -----------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Search until the effort is spent or nothing new is drawn, then confirm the best on each target."""
        began = time.monotonic()
        open_trials, untold = self._recall()
        self._remember(self.candidates.values())
        self._say()
        self._measure_pending()
        for number in untold:
            self._tell(self.candidates[number])
        if open_trials or not self.trials.get("ended"):
            self._spend(began)
        first = True
        while True:
            self.ended = self._over()
            if self.ended and (not open_trials or (not first and self.spent >= self.effort.seconds)):
                break
            began, first = time.monotonic(), False
            batch, open_trials = open_trials[:AT_ONCE], open_trials[AT_ONCE:]
            if not batch:
                batch = self._draw()
            if not batch:
                self.ended = "nothing new is left to draw"
                break
            training_s = min(self.effort.seconds - self.spent, self.effort.seconds * TRAINING_SHARE)
            rest, large = sift(batch, self.space, self.limits.size_mb, self.least_mb)
            made = sorted([*large, *self.host.evaluate(rest, training_s)], key=lambda c: c.number)
            for one in made:
                self._keep(one)
            self._remember(made)
            began = self._spend(began)
            self._measure_pending()
            for one in made:
                self._tell(self.candidates[one.number])
            self._spend(began)
            self._say()
        self.trials.set("ended", self.ended)
        self._confirm()

    @property
    def spent(self) -> float:
        """Seconds of searching in all runs of this search so far."""
        return float(self.trials.get("spent_s") or 0.0)

    @property
    def baseline(self) -> Candidate:
        """fp32: the first of all."""
        return self.candidates[min(self.candidates)]

    @property
    def living(self) -> tuple[str, ...]:
        return tuple(t for t in self.targets if t not in self.dead)

    def _over(self) -> str:
        """Why the search is over, or nothing."""
        if not self.living:
            return "no target is left"
        if self.effort.trials is not None and len(self.candidates) >= self.effort.trials:
            return f"{len(self.candidates)} candidates were tried"
        if self.spent >= self.effort.seconds:
            return f"{self.effort.seconds / 60:g} minutes are spent"
        if self.trials.get("exhausted"):
            return "nothing new is left to draw"
        return ""

    def _recall(self) -> tuple[list[tuple[int, Drawn]], list[int]]:
        """Take up what earlier runs left: the baseline and every candidate. Draws that a kill left without an evaluation, or
        whose training was too long for a smaller budget, and the numbers of those evaluated of which the sampler does not know
        yet."""
        kept = self.trials.kept() or [self.trials.ask(self._by_space, seeds(self.space), self._at_boundary)]
        base = self.host.baseline(kept[0].number, recipe_of(kept[0].drawn, self.space))
        before = kept[0].candidate
        if before is not None and before.bundle != base.bundle:
            text = "the builds of this search are no longer in the cache: it begins anew"
            self.progress.start("begin anew", text)
            self.progress.finish("begin anew", text)
            self.trials.begin_anew()
            kept = [self.trials.ask(self._by_space, seeds(self.space), self._at_boundary)]
        grown = self.effort.seconds > float(self.trials.get("budget_s") or 0.0)
        self._keep(base)
        open_trials, untold = [], [] if kept[0].told else [base.number]
        for one in kept[1:]:
            drawn = recipe_of(one.drawn, self.space)
            if one.candidate is not None and one.candidate.state == "too long" and grown:
                self.trials.reopen(one.number)
                open_trials.append((one.number, drawn))
            elif one.candidate is not None:
                self.candidates[one.number] = one.candidate
                untold += [] if one.told else [one.number]
            elif not one.told:
                open_trials.append((one.number, drawn))
        self.trials.set("budget_s", self.effort.seconds)
        return open_trials, untold

    def _draw(self) -> list[tuple[int, Drawn]]:
        """The next draws that are new; what was drawn before is told as it ended and drawn over."""
        batch: list[tuple[int, Drawn]] = []
        known = {c.key: c for c in self.candidates.values()}
        room = self._room()
        same = 0
        shipped = seeds(self.space)
        while len(batch) < room and same < SAME_IN_A_ROW:
            kept = self.trials.ask(self._by_space, shipped, self._at_boundary)
            drawn = recipe_of(kept.drawn, self.space)
            before = known.get(drawn.key)
            if before is None and drawn.key not in {d.key for _, d in batch}:
                batch.append((kept.number, drawn))
                same = 0
                continue
            same += 1
            value = None if before is None else self._value(before)
            self.trials.tell(self._by_space, kept.number, value, {} if before is None else self._shares(before))
        if not batch:
            self.trials.set("exhausted", True)
        return batch

    def _room(self) -> int:
        """How many draws the next batch has: no more than the effort allows, as candidates have taken so far."""
        each = self.spent / len(self.candidates)
        room = min(AT_ONCE, max(1, int((self.effort.seconds - self.spent) / each))) if each else AT_ONCE
        return room if self.effort.trials is None else min(room, self.effort.trials - len(self.candidates))

    def _by_space(self, trial: Trial) -> dict[str, Value]:
        return draw(trial, self.space)

    def _at_boundary(self) -> Draw | None:
        return draw_at_boundary((drawn, self._outcome(number)) for number, drawn in self.trials.drawn().items())

    def _outcome(self, number: int) -> Outcome | None:
        c = self.candidates.get(number)
        value, beyond = (None, {}) if c is None else (self._value(c), self._shares(c))
        return Outcome(value, max(beyond.values())) if value is not None and beyond else None

    def _keep(self, candidate: Candidate) -> None:
        self.candidates[candidate.number] = candidate
        self.trials.note(candidate)

    def _remember(self, candidates: Iterable[Candidate]) -> None:
        """What was measured of them before: nothing is measured twice because another search asked for it first."""
        bundles = sorted({c.bundle for c in candidates if c.built})
        for target in self.targets if bundles else ():
            here = self.runs.setdefault(target, [])
            known = {r.job.run_id for r in here}
            here += [r for r in self.boards.recall(target, bundles) if r.job.run_id not in known]
        self._known.clear()

    def _spend(self, began: float) -> float:
        now = time.monotonic()
        self.trials.set("spent_s", self.spent + now - began)
        return now

    # ---- the boards --------------------------------------------------------------------------------------------------

    def figures(self, target: str, plan: RunPlan = SEARCH_PLAN) -> dict[str, Figures]:
        """What is known of candidates on a target, by key."""
        if (target, plan.name) not in self._known:
            built = [c for c in self.candidates.values() if c.built]
            runs = self.runs.get(target, [])
            self._known[target, plan.name] = read_figures(
                runs, built, self.baseline, plan, anyway=self.anyway, summarized=self._summarized
            )
        return self._known[target, plan.name]

    def _summarized(self, run: Run) -> Sequence[Summary]:
        run_id = run.job.run_id
        if run_id not in self._summaries:
            self._summaries[run_id] = summarize(run)
        return self._summaries[run_id]

    def table(self, target: str) -> LatencyTable:
        """The latency table learned on a target."""
        found = self.figures(target)
        timed = []
        for c in self.candidates.values():
            f = found.get(c.key)
            if f is not None and f.p50_ms is not None and c.macs:
                timed.append(Timed(c.kind, c.macs, f.p50_ms))
        return learn(timed)

    def front(self, target: str) -> list[Candidate]:
        """Candidates measured there that hold the limits and that no other beats: as fast, as exact, as small, and better at
        one. Fastest first."""
        found = self.figures(target)
        points = {}
        for c in self.candidates.values():
            f = found.get(c.key)
            if f is not None and f.p50_ms is not None and not misses(f.reached(c), self.limits):
                points[c.number] = (f.p50_ms, c.loss, c.size_mb)
        best = [
            n
            for n, p in points.items()
            if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points.values())
        ]
        return [self.candidates[n] for n in sorted(best, key=lambda n: points[n])]

    def _measure_pending(self) -> None:
        """Bring every candidate that may still be worth it to each target that answers."""
        while True:
            wanted: dict[str, list[Candidate]] = {}
            for target in self.living:
                pending = self._pending(target)[:IN_A_JOB]
                if pending:
                    best = self.front(target)[:1]
                    beside = [self.baseline, *(c for c in best if c != self.baseline)]
                    wanted[target] = [*(c for c in beside if c not in pending), *pending]
            if not wanted:
                return
            self._take(wanted, SEARCH_PLAN)

    def _take(self, wanted: Mapping[str, Sequence[Candidate]], plan: RunPlan) -> None:
        """Measure, and note what came of it."""
        came = self.boards.measure(wanted, plan)
        self.dead.update(came.dead)
        for target, runs in came.runs.items():
            self.runs.setdefault(target, []).extend(runs)
        for (target, key), reason in came.left_out.items():
            for c in [c for c in self.candidates.values() if c.key == key]:
                self._give_up(c, target, reason)
        self._known.clear()
        for target in self.living:
            for c in self.front(target):
                if (target, c.key) not in self._announced:
                    self._announced.add((target, c.key))
                    self.on_front(target, c, self.figures(target)[c.key])

    def _give_up(self, c: Candidate, target: str, reason: str) -> None:
        self._keep(replace(c, hopeless={**c.hopeless, target: reason}))

    def _pending(self, target: str) -> list[Candidate]:
        """Candidates to be measured on a target; those that cannot reach its front any more are noted and left out."""
        found = self.figures(target)
        table, front = self.table(target), self.front(target)
        pending = []
        for c in sorted(self.candidates.values(), key=lambda c: c.number):
            if c.state != "passed" or target in c.hopeless:
                continue
            f = found.get(c.key)
            if f is not None and (f.usable or f.failure or len(f.runs) >= ATTEMPTS):
                continue
            reason = "" if c == self.baseline else self._hopeless(c, target, table, front)
            if reason:
                self._give_up(c, target, reason)
            else:
                pending.append(c)
        return pending

    def _hopeless(self, c: Candidate, target: str, table: LatencyTable, front: Sequence[Candidate]) -> str:
        least = table.optimistic(c.kind, c.macs)
        if least is None:
            return ""
        said = f"predicted {table.predict(c.kind, c.macs):.2f} ms, at the very least {least:.2f}"
        if self.limits.p90_ms is not None and least > self.limits.p90_ms:
            return f"{said}, above the limit of {self.limits.p90_ms:g}"
        found = self.figures(target)
        for f in front:
            ms = found[f.key].p50_ms
            if ms is not None and ms <= least and f.loss <= c.loss and f.size_mb <= c.size_mb:
                return f"{said}; {f.label} ({f.format}) has {ms:.2f} ms, loses no more and is no larger"
        return ""

    # ---- the sampler -------------------------------------------------------------------------------------------------

    def _tell(self, c: Candidate) -> None:
        self.trials.tell(self._by_space, c.number, self._value(c), self._shares(c))

    def _value(self, c: Candidate) -> float | None:
        """What the sampler is to make small: the logarithm of p50 ÷ the baseline's, the mean over targets; measured, else
        predicted, else as MACs have it. Of what is too large to be built, or takes too long, that of the baseline: what it
        misses is told beside it. None for what could not be built."""
        if not c.built:
            return 0.0 if c.size_mb or c.training_s else None
        ratios = []
        for target in self.targets:
            found, table = self.figures(target), self.table(target)
            own, base = found.get(c.key), found.get(self.baseline.key)
            predicted = table.predict(c.kind, c.macs)
            if own is not None and own.ratio:
                ratios.append(own.ratio)
            elif predicted and base is not None and base.p50_ms:
                ratios.append(predicted / base.p50_ms)
        if not ratios:
            ratios = [c.macs / self.baseline.macs if c.macs and self.baseline.macs else 1.0]
        return sum(math.log(max(r, 1e-6)) for r in ratios) / len(ratios)

    def _shares(self, c: Candidate) -> dict[str, float]:
        """How far it is beyond each limit, on the worst target, and beyond what one training may take."""
        worst: dict[str, float] = {}
        if c.training_s:
            worst["training"] = max(LEAST_TOO_LONG, c.training_s / (self.effort.seconds * TRAINING_SHARE) - 1)
        for reached in self._reached(c) or [c.reached]:
            for name, share in shares(reached, self.limits).items():
                worst[name] = max(share, worst.get(name, -math.inf))
        return worst

    def _reached(self, c: Candidate) -> list[Reached]:
        found = [self.figures(t).get(c.key) for t in self.targets]
        return [f.reached(c) for f in found if f is not None]

    # ---- the end -----------------------------------------------------------------------------------------------------

    def ranked(self, target: str) -> list[Candidate]:
        """Candidates that miss no limit on a target as far as the search measured it, fastest first. What its few samples do
        not tell of a slow board or a slow sensor, the confirmation does."""
        found = self.figures(target)
        fit = []
        for c in self.candidates.values():
            f = found.get(c.key)
            if f is None or f.p50_ms is None or not c.built:
                continue
            if not misses(f.reached(c), self.limits):
                fit.append((f.p50_ms, c.number))
        return [self.candidates[n] for _, n in sorted(fit)]

    def winner(self, target: str) -> tuple[Candidate, Figures] | None:
        """The fastest that holds every limit as confirmed on the target, top-1 counted there."""
        confirmed = self.figures(target, self.confirm_plan)
        fit = []
        for c in self.ranked(target):
            f = confirmed.get(c.key)
            if f is not None and f.ratio is not None:
                reached = f.reached(c)
                if not misses(reached, self.limits) and not not_known(reached, self.limits):
                    fit.append((f.ratio, c.number, f))
        if not fit:
            return None
        _, number, figures = min(fit, key=lambda one: one[:2])
        return self.candidates[number], figures

    def _confirm(self, best: int = 3) -> None:
        """Measure the ``best`` of each target once more, at length and with top-1, beside the baseline; the next where none of
        them holds the limits."""
        while True:
            wanted: dict[str, list[Candidate]] = {}
            for target in self.living:
                known = self.figures(target, self.confirm_plan)
                open_ = [c for c in self.ranked(target) if not _done(known.get(c.key)) and target not in c.hopeless]
                first = [c for c in self.ranked(target)[:best] if c in open_]
                take = first or (open_[:best] if self.winner(target) is None and not self._untellable(target) else [])
                if take:
                    wanted[target] = [*([self.baseline] if self.baseline not in take else []), *take]
            if not wanted:
                return
            self._take(wanted, self.confirm_plan)

    def _untellable(self, target: str) -> bool:
        """Whether a limit stayed unknown of all that was confirmed there: it would of any other candidate, too."""
        known = self.figures(target, self.confirm_plan)
        told = [f.reached(c) for c in self.ranked(target) if (f := known.get(c.key)) is not None and f.usable]
        return bool(told) and all(not_known(one, self.limits) for one in told)

    def _say(self) -> None:
        text = f"{len(self.candidates)} candidates"
        for target in self.living:
            front = self.front(target)
            if front:
                f = self.figures(target)[front[0].key]
                text += f"; {target}: {len(front)} on the front, {f.p50_ms or 0:.2f} ms ({1 / (f.ratio or 1):.2f} × fp32)"
        self.progress.advance("tune", round(self.spent), text)


def _done(f: Figures | None) -> bool:
    """Whether measuring once more would tell nothing new."""
    return f is not None and bool(f.usable or f.failure or len(f.runs) >= ATTEMPTS)
