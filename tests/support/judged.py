"""Summaries of built runs: realistic rows for tables and pages."""

from __future__ import annotations

import dataclasses
from typing import Any

from device_agents.wire import Measurement, Run, Verdict
from edgevit.results.stats import summarize_all
from edgevit.results.summary import Summary
from tests.support.runs import failed, measurement, run


def valid(_run: Run, measured: Measurement) -> Verdict:
    """A judge that calls everything measured VALID: for tests of what is shown, not of the rules."""
    if measured.failure:
        return Verdict(1, False, (measured.failure.message,), ())
    return Verdict(1, True, (), ())


def summaries(*runs: Run, **changes: Any) -> list[Summary]:
    """Related summaries of ``runs``, each with ``changes``."""
    return [dataclasses.replace(s, **changes) for s in summarize_all(runs, valid)]


def mixed() -> list[Run]:
    """Two targets; on one a failure, a short series, one without accuracy and one that never started."""
    short = measurement("int8-static", "tflite", 24.0, samples=20, processes=1, seed=9, accuracy=None)
    short = dataclasses.replace(short, accuracy_absent="no labelled images in the bundle")
    second = run("attic-pi5-with-a-long-name", measurements=(*run().measurements, failed(), short))
    lost = measurement("fp16", "onnx")
    job = dataclasses.replace(second.job, variants=(*second.job.variants, lost.variant))
    return [run(), dataclasses.replace(second, job=job, status="interrupted", reason="the power went away three times")]
