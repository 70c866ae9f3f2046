"""Energy per inference from recorded readings, idle power and counters: by hand, by its laws, and as it is shown."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from device_agents.verdict import judge
from device_agents.wire import Power, Reading, Run, Sampling, Series, decode, encode
from edgevit.report.page_data import Shown, page_data
from edgevit.report.table import json_rows, render_table
from edgevit.results.energy import measure_energy
from edgevit.results.stats import summarize_all
from tests.support.runs import measurement, run


def watched(series: Series, milliwatts: list[float | None], idle: float | None = 2000.0, **power: Any) -> Series:
    """``series`` timed for as many seconds as there are readings, one each; the last one comes after the end."""
    readings = tuple(Reading(i * 1000, 50.0, 1800.0, (), power_mw=mw) for i, mw in enumerate(milliwatts))
    return dataclasses.replace(
        series,
        readings=readings,
        sampling=Sampling(wall_ms=(len(milliwatts) - 1) * 1000 - 1, cpu=0.002, readings_every_ms=1000),
        power=Power("board", "the rail VDD_IN that feeds the module", idle, "" if idle else "no reading while idle", **power),
    )


def measured(*each: Series) -> Run:
    m = dataclasses.replace(measurement(processes=1, samples=100), series=each)
    return run(measurements=(m,))


def one(*milliwatts: float | None, **changes: Any) -> Run:
    return measured(watched(measurement(processes=1, samples=100).series[0], list(milliwatts), **changes))


def test_by_hand() -> None:
    """5 W on the mean over 3.999 s, 2 W idle, 100 inferences; the reading after the end is left out."""
    energy = measure_energy(one(4000.0, 5000.0, 6000.0, 5000.0, 99_000.0).measurements[0])
    assert energy.gross_mj == pytest.approx(5000 * 3.999 / 100)
    assert energy.net_mj == pytest.approx(3000 * 3.999 / 100)
    assert (energy.power_mw, energy.idle_mw, energy.scope) == (pytest.approx(5000.0), 2000.0, "board")


def test_a_counter_goes_before_readings() -> None:
    energy = measure_energy(one(4000.0, 9000.0, counted_mw=6000.0).measurements[0])
    assert energy.gross_mj == pytest.approx(6000 * 0.999 / 100)


@pytest.mark.parametrize(
    ("made", "net", "gross"),
    [
        (one(5000.0, 5000.0, 5000.0, 5000.0, idle=None), "no reading while idle", ""),
        (one(1900.0, 1900.0, 1900.0, 1900.0), "cannot tell them apart", ""),
        (one(5000.0, 5000.0), "3 are needed", "3 are needed"),
        (one(None, None, None, None, None), "no reading while timed", "no reading while timed"),
        (measured(measurement(processes=1).series[0]), "recorded before power was", "recorded before power was"),
        (
            measured(dataclasses.replace(measurement(processes=1).series[0], power_absent="no sensor there")),
            "no sensor there",
            "no sensor there",
        ),
    ],
)
def test_what_is_absent_has_its_reason(made: Run, net: str, gross: str) -> None:
    energy = measure_energy(made.measurements[0])
    assert energy.net_mj is None and net in energy.absent
    assert (energy.gross_mj is None) == bool(gross) and gross in energy.gross_absent


def test_a_timed_part_without_a_length_or_an_inference_has_no_energy() -> None:
    known = one(3000.0, 3000.0, 3000.0, 3000.0, counted_mw=3000.0).measurements[0]
    for changes in ({"sampling": Sampling(0, 0.0, 1000)}, {"samples_ns": ()}):
        energy = measure_energy(dataclasses.replace(known, series=(dataclasses.replace(known.series[0], **changes),)))
        assert energy.gross_mj is None and energy.absent == energy.gross_absent == "nothing was timed"


def test_not_all_samples_of_a_long_series_are_kept_but_all_count() -> None:
    series = watched(measurement(processes=1, samples=100).series[0], [5000.0] * 5)
    assert measure_energy(measured(dataclasses.replace(series, stride=10)).measurements[0]).gross_mj == pytest.approx(
        5000 * 3.999 / 1000
    )


@given(st.lists(st.lists(st.floats(2100, 50_000), min_size=4, max_size=9), min_size=1, max_size=4), st.floats(0.1, 10.0))
def test_energy_scales_with_power_and_net_is_gross_less_idle(powers: list[list[float]], factor: float) -> None:
    base = measurement(processes=1, samples=50).series[0]
    energy = measure_energy(measured(*(watched(base, list(p)) for p in powers)).measurements[0])
    scaled = measure_energy(
        measured(*(watched(base, [v * factor for v in p], idle=2000.0 * factor) for p in powers)).measurements[0]
    )
    assert energy.gross_mj is not None and energy.net_mj is not None
    assert scaled.gross_mj == pytest.approx(energy.gross_mj * factor)
    assert scaled.net_mj == pytest.approx(energy.net_mj * factor)
    seconds = sum((len(p) - 1) * 1000 - 1 for p in powers) / 1000
    assert energy.gross_mj - energy.net_mj == pytest.approx(2000 * seconds / (50 * len(powers)))


def test_runs_recorded_before_power_still_decode() -> None:
    document = encode(run())
    for m in document["measurements"]:
        for series in m["series"]:
            for name in ("sampling", "power", "power_absent"):
                del series[name]
            for reading in series["readings"]:
                for name in ("clusters", "gpu_load", "gpu_frequency_mhz", "rails", "power_mw", "full"):
                    del reading[name]
    old = decode(Run, document, "run")
    assert old.measurements[0].series[0].power is None and old.measurements[0].series[0].readings[0].full


# ---- as it is shown -------------------------------------------------------------------------------------------------


def shown(made: Run, wide: bool) -> str:
    stream = io.StringIO()
    Console(file=stream, width=400).print(render_table(summarize_all([made]), wide))
    return stream.getvalue()


def test_the_wide_table_and_json_give_both_figures_with_their_scope() -> None:
    made = one(4000.0, 5000.0, 6000.0, 5000.0, 5000.0)
    text = shown(made, wide=True)
    assert "119.97" in text and "199.95" in text and "scope board: the rail VDD_IN" in text and "0.20" in text
    assert "scope board" not in shown(made, wide=False)
    (row,) = json_rows(summarize_all([made]))
    assert row["energy_mj"] == pytest.approx(119.97) and row["energy_scope"] == "board"
    assert row["sampler_cpu"] == 0.002 and row["idle_power_mw"] == 2000.0


def test_without_a_sensor_the_wide_table_says_why_once() -> None:
    series = dataclasses.replace(measurement(processes=1).series[0], power_absent="no sensor of power there")
    assert shown(measured(series), wide=True).count("no sensor of power there") == 1


def test_the_page_has_energy_where_it_was_measured_and_else_the_reason() -> None:
    data = page_data(shown_on_page(one(4000.0, 5000.0, 6000.0, 5000.0, 5000.0)))
    assert data["table"]["numbers"]["energy"] == [119.97] and data["table"]["texts"]["scope"]["values"] == ["board"]
    assert any("the rail VDD_IN" in text for text in map(str, data["scopes"]))
    without = dataclasses.replace(measurement(processes=1).series[0], power_absent="no sensor of power there")
    table = page_data(shown_on_page(measured(without)))["table"]
    assert "energy" not in table["numbers"]
    assert table["texts"]["energy_absent"]["values"] == ["no sensor of power there"]


def shown_on_page(made: Run) -> Shown:
    return Shown(summarize_all([made]), [made], 1)


def test_a_sensor_that_went_away_is_a_warning_and_nothing_worse() -> None:
    made, whole = one(5000.0, 5000.0, None, 5000.0, None), one(5000.0, 5000.0, 5000.0, 5000.0, 5000.0)
    verdict, other = judge(made, made.measurements[0]), judge(whole, whole.measurements[0])
    assert verdict.reasons == other.reasons
    assert any("power stopped being readable" in w for w in verdict.warnings)
    assert not any("readable" in w for w in other.warnings)


def test_a_reading_that_left_programs_out_does_not_look_like_a_sensor_that_went_away() -> None:
    made = one(5000.0, None, None, 5000.0, 5000.0)
    series = made.measurements[0].series[0]
    readings = tuple(dataclasses.replace(r, full=r.power_mw is not None) for r in series.readings)
    made = measured(dataclasses.replace(series, readings=readings))
    assert not any("readable" in w for w in judge(made, made.measurements[0]).warnings)
