"""The way of ``edgevit tune`` to the targets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevit.cli.connect import Session, each_target, open_session
from edgevit.cli.console import say

if TYPE_CHECKING:
    from device_agents.wire import Facts, Run, RunPlan, Variant
    from edgevit.fleet.agent import Agent
    from edgevit.progress import Progress
    from edgevit.results.store import Store
    from edgevit.tune.candidate import Candidate
    from edgevit.tune.host import Host
    from edgevit.tune.search import Measured
    from edgevit.tune.trials import Trials

SHIPPED = "shipped"
"""Under this name the search keeps which bundles it sent to which target."""


def visit(names: Sequence[str], store: Store, progress: Progress, key: Path) -> tuple[dict[str, Facts], int]:
    """The facts of every target that answers and has a runtime, once what an interrupted search left there is home; and the
    exit code of what did not answer."""
    from edgevit.bench import bring_home
    from edgevit.cli.run import require_a_runtime

    def work(session: Session) -> Facts:
        require_a_runtime(session)
        for old in bring_home(session.agent, store, progress, wait=True):
            say(f"{session.target.name}: brought home {old.run.job.run_id}, measured {old.run.ended_at}")
        return session.agent.probe()

    done, code = each_target(names, work, sign_key=key)
    return dict(done), code


class Road:
    """The way to the targets, by which every measurement of the house goes. ``code``: the exit code of what did not answer."""

    def __init__(
        self, store: Store, progress: Progress, key: Path, facts: Mapping[str, Facts], host: Host, kept: Trials
    ) -> None:
        self.store, self.progress, self.key, self.facts, self.host, self.kept = store, progress, key, facts, host, kept
        self.code = 0

    def recall(self, target: str, bundles: Sequence[str]) -> Sequence[Run]:
        """What the store has of them there."""
        return self.store.runs(target=target, bundles=bundles)

    def measure(self, wanted: Mapping[str, Sequence[Candidate]], plan: RunPlan) -> Measured:
        """One job a target with all that is wanted of it, interleaved."""
        from edgevit.tune.search import Measured

        bundles = {}
        for c in {c.recipe.name: c for group in wanted.values() for c in group}.values():
            bundles[c.recipe.name] = self.host.pack(c, self.host.root / "ship" / c.recipe.name)
        self._note_shipped({name: [bundles[c.recipe.name].digest for c in group] for name, group in wanted.items()})
        batch = self.store.new_batch(f"tune {self.host.asked.model.title} on {', '.join(wanted)}: {plan.name}")
        left_out: dict[tuple[str, str], str] = {}

        def work(session: Session) -> Run:
            return self._one_job(session, wanted[session.target.name], bundles, plan, batch, left_out)

        done, code = each_target(list(wanted), work, sign_key=self.key)
        self.code = max(self.code, code)
        came = dict(done)
        dead = {name: "it was lost on the way, or refused" for name in wanted if name not in came}
        return Measured({name: [run] for name, run in came.items()}, dead, left_out)

    def tidy(self, dead: Collection[str]) -> None:
        """Take off the targets what this search shipped there: a board's card is small, and a search ships dozens. What the
        ``dead`` have goes when the search is next run."""
        shipped: dict[str, list[str]] = self.kept.get(SHIPPED) or {}
        alive = [name for name in shipped if name not in dead]
        if not alive:
            return

        def work(session: Session) -> None:
            session.agent.uninstall(shipped[session.target.name])

        done, code = each_target(alive, work, sign_key=self.key)
        self.code = max(self.code, code)
        gone = {name for name, _ in done}
        self.kept.set(SHIPPED, {name: digests for name, digests in shipped.items() if name not in gone})

    def _note_shipped(self, more: Mapping[str, Sequence[str]]) -> None:
        """Before anything is sent: whatever ends the search, the next run of it knows what to take away."""
        shipped: dict[str, list[str]] = self.kept.get(SHIPPED) or {}
        self.kept.set(SHIPPED, {**shipped, **{n: list(dict.fromkeys([*shipped.get(n, []), *d])) for n, d in more.items()}})

    def _one_job(
        self,
        session: Session,
        candidates: Sequence[Candidate],
        bundles: Mapping[str, Any],
        plan: RunPlan,
        batch: str,
        left_out: dict[tuple[str, str], str],
    ) -> Run:
        from edgevit.bench import make_job, measure
        from edgevit.plans import memory_limit_mb
        from edgevit.variants import list_variants

        name = session.target.name
        facts = self.facts[name]
        profile = session.profile(facts)
        variants: list[Variant] = []
        for c in candidates:
            bundle = bundles[c.recipe.name]
            found = list_variants(bundle.manifest, bundle.digest, facts, profile, threads=(c.threads,))
            if found.variants:
                session.agent.install(bundle, self.progress, allow_older=True)  # measuring replaces nothing
                variants += found.variants[:1]
            else:
                left_out[name, c.key] = "; ".join(left.reason for left in found.left_out)
        limit = None if session.target.is_local else memory_limit_mb(facts)
        job = make_job(name, batch, plan, list(dict.fromkeys(variants)), memory_limit_mb=limit)
        with ExitStack() as links:
            return measure(session.agent, job, self.store, self.progress, self._reconnect(links, session)).run

    def _reconnect(self, links: ExitStack, session: Session) -> Any:
        def again() -> Agent:
            return links.enter_context(open_session(session.target, self.key)).agent

        return again
