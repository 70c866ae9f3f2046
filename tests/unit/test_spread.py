"""Device-to-device spread of a batch: grouped by profile and variant, VALID figures only, told in words that fit a table."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from device_agents.wire import Run
from edgevit.report.spread_view import json_spreads, render_spreads
from edgevit.results.spread import device_spreads, devices_of, extremes
from edgevit.results.summary import Summary
from tests.support.judged import summaries
from tests.support.runs import run


def measured(target: str, p50s: tuple[float, ...], number: int = 0, **changes: object) -> tuple[Run, Summary]:
    one = run(target)
    job = dataclasses.replace(one.job, run_id=f"{target}-{number}", batch_id=f"batch-{number}")
    one = dataclasses.replace(one, job=job)
    made = summaries(one, run_id=job.run_id, target=target, process_p50_ms=p50s, p50_ms=p50s[0], **changes)[0]
    return one, made


def shown(found: object) -> str:
    console = Console(width=100, highlight=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    return console.export_text()


def test_devices_that_differ_are_told_from_those_that_do_not() -> None:
    """Three devices 10 % apart with two runs each that hardly differ: the device's share is nearly all of it."""
    fleet = [
        measured(name, (level * (1 + 0.001 * n), level * (1 - 0.001 * n)), n)
        for name, level in (("a", 10.0), ("b", 11.0), ("c", 12.0))
        for n in (0, 1)
    ]
    (found,) = device_spreads([r for r, _ in fleet], [s for _, s in fleet])
    assert found.found is not None and found.found.devices == 3 and found.found.runs == 6
    device, process = found.found.component("device"), found.found.component("process")
    assert device.levels == ("device",) and 0.07 < (device.spread or 0) < 0.12
    assert (process.spread or 0) < 0.01 and found.found.devices_differ
    text = shown(render_spreads([found]))
    assert "3 × raspberry-pi-4b" in text and "differ by more than the noise" in text and "fastest a" in text
    assert max(map(len, text.splitlines())) <= 100
    (values,) = json_spreads([found])
    assert values["found"]["devices"] == 3


def test_one_run_each_says_what_it_cannot_tell_apart() -> None:
    pairs = [measured(name, (level, level * 1.01)) for name, level in (("a", 10.0), ("b", 10.4), ("c", 10.2))]
    (found,) = device_spreads([r for r, _ in pairs], [s for _, s in pairs])
    assert found.found is not None and found.found.component("device").levels == ("device", "run")
    assert "run-to-run noise with it" in shown(render_spreads([found]))


def test_only_valid_figures_enter_and_the_others_are_named() -> None:
    good = [measured(name, (10.0, 10.1)) for name in ("a", "b")]
    one, bad = measured("c", (20.0, 30.0))
    bad = dataclasses.replace(bad, verdict=dataclasses.replace(bad.verdict, valid=False, reasons=("load of others",)))
    (found,) = device_spreads([r for r, _ in good] + [one], [s for _, s in good] + [bad])
    assert found.found is not None and found.found.devices == 2 and found.not_valid == ("c",)
    assert "left out, not VALID: c" in shown(render_spreads([found]))
    (alone,) = device_spreads([good[0][0], one], [good[0][1], bad])
    assert alone.found is None and "fewer than two devices" in shown(render_spreads([alone]))


def test_another_board_variant_or_batch_is_another_matter() -> None:
    a, b = (measured(name, (10.0, 10.1)) for name in ("a", "b"))
    pi5 = dataclasses.replace(b[0], facts=dataclasses.replace(b[0].facts, board_model="Raspberry Pi 5 Model B Rev 1.0"))
    assert device_spreads([a[0], pi5], [a[1], b[1]]) == []
    threads = dataclasses.replace(b[1], threads=b[1].threads + 1)
    assert device_spreads([a[0], b[0]], [a[1], threads]) == []
    assert device_spreads([a[0], b[0]], [a[1], b[1]], "another") == []


def test_a_machine_of_two_names_is_one_device() -> None:
    """``local`` and its own sshd share the kernel's boot id; after a reboot each name still is the same machine."""
    named = [("local", "boot-1"), ("box", "boot-1"), ("box", "boot-2"), ("other", "boot-3")]
    one = [measured(name, (10.0, 10.1), n, boot_id=boot) for n, (name, boot) in enumerate(named)]
    found = [s for _, s in one]
    assert devices_of(found) == {"local": "local", "box": "local", "other": "other"}
    assert devices_of(found[::-1]) == {"other": "other", "box": "box", "local": "box"}
    assert device_spreads([r for r, _ in one[:3]], found[:3]) == []
    (spread,) = device_spreads([r for r, _ in one], found)
    assert spread.found is not None and spread.found.devices == 2


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["1", "2", "3", None])), max_size=12))
def test_targets_are_one_device_exactly_where_boots_connect_them(pairs: list[tuple[str, str | None]]) -> None:
    template = measured("x", (10.0, 10.1))[1]
    found = devices_of([dataclasses.replace(template, target=t, boot_id=b) for t, b in pairs])
    near = {t: {t} | {u for u, c in pairs for v, b in pairs if v == t and b and b == c} for t, _ in pairs}
    for _ in pairs:
        near = {t: set().union(*(near[u] for u in seen)) for t, seen in near.items()}
    assert {t: {u for u in found if found[u] == found[t]} for t in found} == near


def test_extremes_name_both_ends() -> None:
    assert extremes({"a": 2.0, "b": 1.0, "c": 3.0}) == (("b", 1.0), ("c", 3.0))
