"""One job worked off: variants interleaved over rounds, one fresh worker a series, accuracy afterwards, one Run at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from typing import Any, Callable, Dict, List, Optional

from device_agents import wire
from device_agents.boards import detect_board
from device_agents.clock import utc_now
from device_agents.errors import Refused
from device_agents.install import artifact_of, verify_installed
from device_agents.probe import collect_facts
from device_agents.sampling import BoardSampler
from device_agents.spool import PartWriter
from device_agents.store import Store
from device_agents.supervise import Message, agent_argv, root_of_boards, run_worker, runtime_python


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


class JobWorker:
    """Works one job. Raises :class:`Refused` where not even a list of what failed can be given."""

    def __init__(self, store: Store, agent_sha256: str, job: wire.Job, part: PartWriter, attempt: int) -> None:
        self._store, self._job, self._part, self._attempt = store, job, part, attempt
        self._agent_sha256 = agent_sha256
        self._argv = agent_argv(runtime_python(store), agent_sha256, store, "worker")
        self._board = detect_board(root_of_boards())
        self._deadline = time.monotonic() + job.timeout_seconds

    def work(self) -> wire.Run:
        """The whole Run; failures of single variants are in its measurements."""
        started_at = utc_now()
        self._part.progress("series", 0, len(self._job.variants), "", "reading the facts of this device")
        facts = collect_facts(self._store, self._agent_sha256, False, lambda message: None)
        governor = self._board.governor()
        states = self._open_variants()
        self._time_all(states)
        self._score_all(states)
        failed = [s for s in states if s.failure is not None]
        return wire.Run(
            schema=wire.RUN_SCHEMA,
            job=self._job,
            status="failed" if len(failed) == len(states) else "completed",
            reason="; ".join(dict.fromkeys(str(s.failure) for s in failed))[:4000],
            attempt=self._attempt,
            started_at=started_at,
            ended_at=utc_now(),
            facts=facts,
            governor=governor,
            measurements=tuple(_measurement(s) for s in states),
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
        """A B C A B C …: what drifts over the minutes meets every variant alike."""
        total = len(states) * self._job.plan.processes
        done = 0
        for process in range(self._job.plan.processes):
            for number, state in enumerate(states):
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
        sampler = BoardSampler(self._board)

        def hear(message: Message) -> None:
            if message.get("type") == "timing-begins":
                sampler.start()
            elif message.get("type") == "timing-ends":
                sampler.stop()

        try:
            value = run_worker(self._argv, request, self._share(shares), hear)
        finally:
            sampler.stop()
        try:
            series = wire.decode(wire.Series, value, "series")
        except wire.WireError as e:
            raise Refused("worker-failed", "the worker's result has another shape: {}".format(e)) from e
        return dataclasses.replace(series, readings=sampler.readings())

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
        path = self._store.accuracy_path(_accuracy_key(state, evaluation))
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
            if message.get("type") == "progress" and time.monotonic() - last[0] > 1.0:
                last[0] = time.monotonic()
                self._part.progress("accuracy", int(message["done"]), evaluation.count, "images", state.artifact.name)

        value = run_worker(self._argv, request, self._share(1), hear)
        document = dict(value, images=len(value["labels"]), evaluation=evaluation.name, reused=False)
        try:
            accuracy = wire.decode(wire.Accuracy, document, "accuracy")
        except wire.WireError as e:
            raise Refused("worker-failed", "the worker's result has another shape: {}".format(e)) from e
        self._store.write(path, wire.dumps(accuracy))
        return accuracy


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
