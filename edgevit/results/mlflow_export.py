"""Figures as runs of an MLflow experiment: one a measurement, each once however often it is exported."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgevit.errors import EdgevitError, MissingExtra
from edgevit.places import shown_url
from edgevit.progress import Progress
from edgevit.results.exports import FIGURES, Row

if TYPE_CHECKING:
    from edgevit.results.summary import Summary

TAG = "edgevit.measurement"
"""Names the measurement an MLflow run was made from: run, bundle, artifact, runtime, provider and threads. A run often measures
several bundles, and their artifacts are called alike."""

MAX_PARAM = 500


def export_to_mlflow(
    summaries: Sequence[Summary], rows: Sequence[Row], uri: str | None, experiment: str, progress: Progress
) -> tuple[int, int]:
    """(how many were added, how many were there). ``rows`` are those of ``summaries``; ``uri``: MLflow's own default where none
    is given. Numbers become metrics, words parameters and tags. MissingExtra without MLflow; EdgevitError says what it said."""
    # Seven retries with growing pauses would look like a hang where no server is; what a person sets stands.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ModuleNotFoundError as e:
        raise MissingExtra("mlflow-skinny", "mlflow") from e
    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        where = found.experiment_id if found is not None else client.create_experiment(experiment)
        added = 0
        progress.start("mlflow", "to MLflow", total=len(rows), unit="measurements")
        for done, (s, row) in enumerate(zip(summaries, rows, strict=True), 1):
            added += _add(client, where, s, row)
            progress.advance("mlflow", done)
        progress.finish("mlflow", "in MLflow")
    except (MlflowException, OSError) as e:
        place = shown_url(uri or os.environ.get("MLFLOW_TRACKING_URI", "its default place"))
        said = re.sub(r"://[^/\s@]*@", "://", str(e).strip().splitlines()[0])  # it repeats the address, password and all
        raise EdgevitError(f"MLflow at {place} said: {said}", hint="edgevit results export --format mlflow --to URI") from e
    return added, len(rows) - added


def _add(client: Any, experiment: str, s: Summary, row: Row) -> bool:
    from mlflow.entities import Metric, Param, RunTag

    name = f"{s.run_id}/{s.bundle}/{s.artifact}/{s.runtime}/{s.provider}/{s.threads}"
    quoted = name.replace("'", "")
    if client.search_runs([experiment], f"tags.`{TAG}` = '{quoted}'", max_results=1):
        return False
    at_ms = _milliseconds(s.started_at)
    made = client.create_run(experiment, start_time=at_ms, run_name=f"{s.target} {s.label}")
    metrics = [Metric(key, float(row[key]), at_ms, 0) for key, _ in _of(float, int, bool) if row[key] is not None]
    params = [Param(key, str(row[key])[:MAX_PARAM]) for key, _ in _of(str) if row[key]]
    # The tag that makes it known comes last: what was cut off before is not taken for whole.
    client.log_batch(made.info.run_id, metrics=metrics, params=params)
    client.log_batch(made.info.run_id, tags=[RunTag(TAG, quoted), RunTag("edgevit.target", s.target)])
    client.set_terminated(made.info.run_id, "FAILED" if s.failure else "FINISHED", at_ms)
    return True


def _of(*kinds: type) -> list[tuple[str, type]]:
    return [(name, kind) for name, kind in FIGURES if kind in kinds]


def _milliseconds(moment: str) -> int:
    from datetime import datetime

    return int(datetime.fromisoformat(moment).timestamp() * 1000)
