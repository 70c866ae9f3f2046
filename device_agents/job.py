"""One job worked off: variants interleaved over rounds, one fresh worker a series, accuracy afterwards, one Run at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from typing import Any, Callable, Dict, List, Optional

from device_agents import wire
from device_agents.boards import detect_board
from device_agents.clock import utc_now
from device_agents.conditions import cool_down, restore_system, tune_system
from device_agents.errors import Refused
from device_agents.install import artifact_of, verify_installed
from device_agents.probe import collect_facts
from device_agents.sampling import BoardSampler, idle_power_mw
from device_agents.servers import agent_argv
from device_agents.spool import PartWriter
from device_agents.store import Store
from device_agents.supervise import Message, root_of_boards, run_worker, runtime_python

SAY_EVERY_S = 10.0
LOADING_S = 1200.0
"""What a worker may take beyond warming up and timing: a small board compiles an engine for minutes."""


@dataclasses.dataclass
class _Progress:
    """What is known of one variant so far; the one mutable thing here, frozen into a Measurement at the end."""

    variant: wire.Variant
    manifest: wire.Manifest
    artifact: wire.Artifact
    series: List[wire.Series] = dataclasses.field(default_factory=list)
    failure: Optional[Refused] = None
    accuracy: Optional[wire.Accuracy] = None
    accuracy_absent: str = ""
    profile: Optional[wire.OperatorProfile] = None
    profile_absent: str = ""


class JobWorker:
    """Works one job. Raises :class:`Refused` where not even a list of what failed can be given.

    ``check_wanted`` is called about twice a second while a worker is at work, and ends the job by raising.
    """

    def __init__(
        self,
        store: Store,
        agent_sha256: str,
        job: wire.Job,
        part: PartWriter,
        attempt: int,
        check_wanted: Callable[[], None],
    ) -> None:
        self._store, self._job, self._part, self._attempt = store, job, part, attempt
        self._check_wanted = check_wanted
        self._agent_sha256 = agent_sha256
        self._argv = agent_argv(runtime_python(store), agent_sha256, store, "worker")
        self._board = detect_board(root_of_boards())
        self._deadline = time.monotonic() + job.timeout_seconds
        self._idle_c: Optional[float] = None
        self._idle_mw: Optional[float] = None
        self._told_at = -math.inf

    def work(self) -> wire.Run:
        """The whole Run; failures of single variants are in its measurements."""
        started_at = utc_now()
        self._idle_c = self._board.temperature_c()
        self._part.progress("series", 0, len(self._job.variants), "", "reading the facts of this device")
        facts = collect_facts(self._store, self._agent_sha256, False, lambda message: None)
        states = self._open_variants()
        before = tune_system(self._store, root_of_boards()) if self._job.plan.tune_system else None
        try:
            governor = self._board.governor()
            if self._board.power_scope() is not None:
                self._part.progress("series", 0, len(states), "", "reading the power of the idle board")
                self._idle_mw = idle_power_mw(self._board, min(max(self._job.plan.min_seconds, 2.0), 5.0))
            self._time_all(states)
        finally:
            left_tuned = restore_system(self._store, root_of_boards())
        self._score_all(states)
        self._profile_all(states)
        failed = [s for s in states if s.failure is not None]
        return wire.Run(
            schema=wire.RUN_SCHEMA,
            job=self._job,
            status="failed" if len(failed) == len(states) else "completed",
            reason="; ".join(dict.fromkeys([str(s.failure) for s in failed] + [left_tuned] * bool(left_tuned)))[:4000],
            attempt=self._attempt,
            started_at=started_at,
            ended_at=utc_now(),
            facts=facts,
            governor=governor,
            measurements=tuple(_measurement(s) for s in states),
            governor_before=before,
        )

    def _open_variants(self) -> List[_Progress]:
        """Verify each bundle's manifest and every blob that will be used, once each. Raises what makes the job impossible."""
        manifests: Dict[str, wire.Manifest] = {}
        checked: Dict[str, Optional[Refused]] = {}
        states = []
        for variant in self._job.variants:
            if variant.bundle not in manifests:
                manifests[variant.bundle] = verify_installed(self._store, variant.bundle).manifest
            manifest = manifests[variant.bundle]
            artifact = manifest.artifact(variant.artifact)
            if artifact is None:
                artifact_of(manifest, variant)  # raises, naming what there is
                raise Refused("no-such-artifact", "no artifact {!r}".format(variant.artifact))
            state = _Progress(variant, manifest, artifact)
            try:
                artifact_of(manifest, variant)
                for blob in (artifact.blob, artifact.golden.blob, manifest.golden.blob):
                    self._check_once(blob, checked)
            except Refused as e:
                state.failure = e
            states.append(state)
        return states

    def _check_once(self, blob: wire.Blob, checked: Dict[str, Optional[Refused]]) -> None:
        if blob.sha256 not in checked:
            try:
                self._store.check_blob(blob)
                checked[blob.sha256] = None
            except Refused as e:
                checked[blob.sha256] = e
        known = checked[blob.sha256]
        if known is not None:
            raise Refused(known.code, str(known), known.hint)

    # ---- time ------------------------------------------------------------------------------------------------------

    def _time_all(self, states: List[_Progress]) -> None:
        """A B C A B C …, or A B C C B A …: what drifts over the minutes meets every variant alike."""
        total = len(states) * self._job.plan.processes
        done = 0
        for process in range(self._job.plan.processes):
            backwards = self._job.plan.order == "mirrored" and process % 2 == 1
            for number, state in enumerate(reversed(states) if backwards else states):
                if state.failure is None:
                    text = "{} on {}, {} thread(s)".format(state.artifact.name, state.variant.runtime, state.variant.threads)
                    self._part.progress("series", done, total, "series", text)
                    try:
                        left = sum(1 for s in states if s.failure is None)
                        state.series.append(self._time_one(state, process, max(1, (total - done) if left > 1 else 1)))
                    except Refused as e:
                        state.failure = e
                        self._part.progress("series", done, total, "series", "{}: {}".format(text, e)[:2000])
                done = process * len(states) + number + 1
        self._part.progress("series", total, total, "series", "timed")

    def _time_one(self, state: _Progress, process: int, shares: int) -> wire.Series:
        request = self._request(state, "series")
        request.update(plan=wire.encode(self._job.plan), process=process)
        cooling = self._cool(state)
        sampler = BoardSampler(self._board, self._idle_mw)

        def hear(message: Message) -> None:
            self._check_wanted()
            self._tell_minutes(message, state)
            if message.get("type") == "timing-begins":
                sampler.start()
            elif message.get("type") == "timing-ends":
                sampler.stop()

        try:
            most_s = min(self._share(shares), series_limit_s(self._job.plan))
            value = run_worker(self._argv, request, most_s, hear, memory_limit_mb=self._job.memory_limit_mb)
        finally:
            sampler.stop()
        try:
            series = wire.decode(wire.Series, value, "series")
        except wire.WireError as e:
            raise Refused("worker-failed", "the worker's result has another shape: {}".format(e)) from e
        return dataclasses.replace(sampler.record(series), cooling=cooling)

    def _cool(self, state: _Progress) -> Optional[wire.Cooling]:
        """Wait for the temperature that the plan wants, if it wants one, and say so now and then."""
        plan = self._job.plan
        last = [-math.inf]

        def say(now_c: float, target_c: float, waited_s: float) -> None:
            self._check_wanted()
            if waited_s - last[0] >= SAY_EVERY_S:
                last[0] = waited_s
                text = "cooling before {}: {:.1f} °C now, {:.1f} °C wanted".format(state.artifact.name, now_c, target_c)
                self._part.progress("cooling", int(waited_s), int(plan.cool_seconds), "s", text)

        left = max(self._deadline - time.monotonic(), 0.0)
        return cool_down(self._board.temperature_c, plan, self._idle_c, say, min(plan.cool_seconds, left))

    def _tell_minutes(self, message: Message, state: _Progress) -> None:
        """Of a series that takes minutes, how far it is; seldom, since what is told is fsynced while it is timed."""
        plan = self._job.plan
        if message.get("type") != "progress" or not plan.sustained or time.monotonic() - self._told_at < SAY_EVERY_S:
            return
        self._told_at = time.monotonic()
        text = "{}: {:,} inferences".format(state.artifact.name, int(message["done"]))
        self._part.progress("sustained", int(message["seconds"]), int(plan.max_seconds), "s", text)

    def _share(self, shares: int) -> float:
        """Seconds one worker may take: half of what is left, so one that hangs leaves the others time; all for the last."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Refused("worker-timeout", "the job's {:.0f} s were over before this".format(self._job.timeout_seconds))
        return left if shares <= 1 else left / 2

    def _request(self, state: _Progress, kind: str) -> Dict[str, Any]:
        return {
            "kind": kind,
            "root": str(self._store.root),
            "variant": wire.encode(state.variant),
            "artifact": wire.encode(state.artifact),
            "preprocessing": wire.encode(state.manifest.preprocessing),
            "golden": wire.encode(state.manifest.golden),
        }

    # ---- accuracy --------------------------------------------------------------------------------------------------

    def _score_all(self, states: List[_Progress]) -> None:
        for state in states:
            if not self._job.plan.accuracy:
                state.accuracy_absent = "plan {!r} leaves accuracy out".format(self._job.plan.name)
            elif state.manifest.evaluation is None:
                state.accuracy_absent = state.manifest.evaluation_absent or "the bundle has no labelled images"
            elif state.failure is not None or not state.series:
                state.accuracy_absent = "the variant could not be measured"
            else:
                try:
                    state.accuracy = self._score(state, state.manifest.evaluation)
                except Refused as e:
                    state.accuracy_absent = "{}: {}".format(e.code, e)[:400]

    def _score(self, state: _Progress, evaluation: wire.EvaluationSet) -> wire.Accuracy:
        """Once for each artifact, images and what is made of them, runtime build and provider on this device."""
        path = self._store.accuracy_path(state.artifact.blob.sha256, _accuracy_key(state, evaluation))
        known = self._store.read(path, wire.MAX_RUN_BYTES)
        if known is not None:
            try:
                scored = wire.loads(wire.Accuracy, known, "accuracy", wire.MAX_RUN_BYTES)
                return dataclasses.replace(scored, evaluation=evaluation.name, reused=True)
            except wire.WireError:
                self._store.remove(path)  # damaged: counted anew
        self._part.progress("accuracy", 0, evaluation.count, "images", state.artifact.name)
        for blob in (evaluation.images, evaluation.labels):
            self._store.check_blob(blob)
        request = self._request(state, "accuracy")
        request["evaluation"] = wire.encode(evaluation)
        last = [time.monotonic()]

        def hear(message: Message) -> None:
            self._check_wanted()
            if message.get("type") == "progress" and time.monotonic() - last[0] > 1.0:
                last[0] = time.monotonic()
                self._part.progress("accuracy", int(message["done"]), evaluation.count, "images", state.artifact.name)

        value = run_worker(self._argv, request, self._share(1), hear, memory_limit_mb=self._job.memory_limit_mb)
        document = dict(value, images=len(value["labels"]), evaluation=evaluation.name, reused=False)
        try:
            accuracy = wire.decode(wire.Accuracy, document, "accuracy")
        except wire.WireError as e:
            raise Refused("worker-failed", "the worker's result has another shape: {}".format(e)) from e
        self._store.write(path, wire.dumps(accuracy))
        return accuracy

    # ---- operators -------------------------------------------------------------------------------------------------

    def _profile_all(self, states: List[_Progress]) -> None:
        """Each variant's operators by the runtime's own profiler, in a worker of their own: profiling slows it."""
        for state in states if self._job.plan.profile_ops else ():
            if state.failure is not None or not state.series:
                state.profile_absent = "the variant could not be measured"
                continue
            self._part.progress("profile", 0, 1, "", state.artifact.name)
            request = self._request(state, "profile")
            request.update(plan=wire.encode(self._job.plan))
            limit = self._job.memory_limit_mb
            try:
                value = run_worker(self._argv, request, self._share(1), self._hear_nothing, memory_limit_mb=limit)
                state.profile = wire.decode(wire.OperatorProfile, value, "profile")
            except (Refused, wire.WireError) as e:
                state.profile_absent = "{}: {}".format(e.code, e) if isinstance(e, Refused) else str(e)

    def _hear_nothing(self, message: Message) -> None:
        self._check_wanted()


def series_limit_s(plan: wire.RunPlan) -> float:
    """How long one series may take, whatever the job's own limit, which also covers hours of counting accuracy."""
    return 1.5 * plan.max_seconds + plan.warmup_seconds + LOADING_S


def _accuracy_key(state: _Progress, evaluation: wire.EvaluationSet) -> str:
    """Everything that a prediction depends on. The pixels are the model's input only after the manifest's preprocessing: the
    same file and images with another mean are another input."""
    parts = [
        wire.AGENT_VERSION,
        state.artifact.blob.sha256,
        evaluation.images.sha256,
        evaluation.labels.sha256,
        wire.encode(state.artifact.input),
        wire.encode(state.manifest.preprocessing),
        [state.variant.runtime, state.series[0].runtime_version, state.variant.provider],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()


def _measurement(state: _Progress) -> wire.Measurement:
    manifest, artifact = state.manifest, state.artifact
    return wire.Measurement(
        variant=state.variant,
        model=manifest.model.name,
        recipe=manifest.recipe.name,
        bundle_name=manifest.name,
        format=artifact.format,
        scheme=artifact.scheme,
        artifact_sha256=artifact.blob.sha256,
        artifact_bytes=artifact.blob.size,
        batch=artifact.batch,
        series=tuple(state.series),
        accuracy=state.accuracy,
        accuracy_absent="" if state.accuracy else state.accuracy_absent[:400],
        failure=state.failure.to_wire() if state.failure else None,
        profile=state.profile,
        profile_absent=state.profile_absent[:400],
    )


def predict(store: Store, agent_sha256: str, header: Any, payload: bytes, alive: Callable[[Message], None]) -> Dict[str, Any]:
    """Classify images with the variant asked for, of any installed bundle, or with the active one where none is named."""
    from device_agents.activate import read_active

    if not isinstance(header, dict) or set(header) != {"variant", "count", "bytes"}:
        raise Refused("bad-request", 'predict: expected {"variant": variant or null, "count": n, "bytes": m}')
    if header["variant"] is not None:
        variant = wire.decode(wire.Variant, header["variant"], "variant")
    else:
        state = read_active(store)
        if state is None:
            raise Refused("no-active", "nothing is active on this device", "deploy a bundle")
        variant = state.active.variant
    manifest = verify_installed(store, variant.bundle).manifest
    artifact = artifact_of(manifest, variant)
    for blob in (artifact.blob,) + ((manifest.labels,) if manifest.labels else ()):
        store.check_blob(blob)
    request = {
        "kind": "predict",
        "root": str(store.root),
        "variant": wire.encode(variant),
        "artifact": wire.encode(artifact),
        "preprocessing": wire.encode(manifest.preprocessing),
        "labels": wire.encode(manifest.labels),
        "count": header["count"],
        "bytes": len(payload),
    }
    value = run_worker(agent_argv(runtime_python(store), agent_sha256, store, "worker"), request, 600.0, alive, payload)
    return {"predictions": value["predictions"], "variant": wire.encode(variant)}
