"""Boards read from file trees laid out as their kernels do: the recorded cases, and what happens to them in between."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agents.boards import detect_board
from device_agents.boards.jetson import Jetson
from device_agents.boards.rapl import find_rapl
from device_agents.boards.raspberry_pi import parse_pmic, parse_throttled
from device_agents.sampling import BoardSampler, _Cadence, idle_power_mw, read_board
from device_agents.wire import Reading, Series
from edgevit.profile import list_profiles, load_profile
from tests.support.boards import board_cases, describe, expected_of, lay_out, lay_out_case
from tests.support.runs import measurement

BOARDS = {"raspberry-pi-zero-2w", "raspberry-pi-3b-plus", "raspberry-pi-4b", "raspberry-pi-5"} | {
    "jetson-nano",
    "jetson-xavier-nx",
    "jetson-orin-nano",
    "jetson-agx-orin",
}


@pytest.mark.parametrize("case", board_cases())
def test_every_case_is_read_as_expected(case: str, tmp_path: Path) -> None:
    assert describe(detect_board(lay_out_case(case, tmp_path))) == expected_of(case)


def test_every_board_of_the_wish_has_a_case_and_each_is_its_profiles() -> None:
    assert set(board_cases()) >= BOARDS
    for case in set(board_cases()) & set(list_profiles()):
        pattern = load_profile(case).board_model
        if pattern is not None:
            assert re.search(pattern.value, expected_of(case)["model"]), case


@pytest.mark.parametrize("case", board_cases())
def test_what_cannot_be_read_has_a_reason_and_what_can_has_none(case: str, tmp_path: Path) -> None:
    board = detect_board(lay_out_case(case, tmp_path))
    reading = read_board(board, 0, True)
    told = {
        "temperature": reading.temperature_c,
        "frequency": reading.frequency_mhz,
        "governor": board.governor(),
        "throttle": reading.throttle,
        "gpu": reading.gpu_load,
        "power": board.power_scope(),
    }
    assert {name for name, value in told.items() if value is None} == set(board.absent())
    assert all(len(reason) <= 400 for reason in board.absent().values())


def test_a_board_that_tells_nothing(tmp_path: Path) -> None:
    board = detect_board(tmp_path)
    assert (board.name, board.model(), board.cpu(), board.sensors(), board.jetpack()) == ("generic", None, (None, ()), (), None)
    assert set(board.absent()) == {"temperature", "frequency", "governor", "throttle", "gpu", "power"}
    assert read_board(board, 7, True) == Reading(7, None, None, None)


def test_files_that_hold_rubbish_and_cpus_without_policies(tmp_path: Path) -> None:
    cpus = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_cur_freq"
    board = detect_board(
        lay_out(
            tmp_path,
            {
                "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
                "sys/class/thermal/thermal_zone0/temp": "warm\n",
                cpus.format(10): "1500000\n",
                cpus.format(2): "1200000\n",
                cpus.format(3): "<unsupported>\n",
            },
        )
    )
    assert board.temperature_c() is None
    assert board.clusters_mhz() == (("cpu2", 1200.0), ("cpu10", 1500.0))


# ---- Raspberry Pi ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "now"),
    [
        ("throttled=0x0", ()),
        ("0", ()),
        ("throttled=0x70000", ()),
        ("throttled=0x4", ("throttled",)),
        ("f", ("under-voltage", "frequency-capped", "throttled", "soft-temperature-limit")),
        ("?", None),
        ("", None),
        ('error=1 error_msg="Command not registered"', None),
    ],
)
def test_throttle_bits(text: str, now: object) -> None:
    assert parse_throttled(text) == now


def test_a_limit_between_two_readings_is_told_by_the_bit_that_stays(tmp_path: Path) -> None:
    """Bits 16 to 19 stay until the board restarts: one that rises belongs to the measurement, one that was set does not."""
    board = detect_board(lay_out_case("raspberry-pi-4b", tmp_path))  # under-voltage has happened, long ago
    (path,) = tmp_path.rglob("get_throttled")
    board.begin()
    assert board.throttle() == ()
    path.write_text("70000\n")  # capped and over, both since the last look
    assert board.throttle() == ("frequency-capped",)
    assert board.throttle() == ()
    board.begin()
    assert board.throttle() == ()


def test_a_program_that_fails_or_hangs_is_an_absent_sensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = detect_board(lay_out_case("raspberry-pi-5", tmp_path))
    assert board.total_mw(board.rails_mw()) is not None
    program = tmp_path / "usr/bin/vcgencmd"
    program.write_text("#!/bin/sh\necho VCHI initialization failed\nexit 255\n")
    assert board.rails_mw() == ()
    monkeypatch.setattr("device_agents.boards.raspberry_pi.PROGRAM_TIMEOUT_S", 0.1)
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    began = time.monotonic()
    assert board.rails_mw() == ()
    assert time.monotonic() - began < 30
    program.chmod(0o644)
    assert board.rails_mw() == ()
    assert "group video" in detect_board(tmp_path).absent()["power"]


def test_rails_of_the_pmic_need_both_a_current_and_a_voltage() -> None:
    text = "   VDD_CORE_A current(7)=2.0A\n  VDD_CORE_V volt(15)=0.8V\n  EXT5V_V volt(24)=5.1V\nHDMI_A current(22)=0.1A\nnoise"
    assert parse_pmic(text) == (("VDD_CORE", 1600.0),)


# ---- Jetson ---------------------------------------------------------------------------------------------------------


def test_over_current_events_between_two_measurements_belong_to_neither(tmp_path: Path) -> None:
    board = detect_board(lay_out_case("jetson-agx-orin", tmp_path))
    assert isinstance(board, Jetson) and board.power_mode() == "MODE_30W"
    (count,) = tmp_path.rglob("oc1_event_cnt")

    def measured(during: str) -> list[tuple[str, ...] | None]:
        sampler = BoardSampler(board)
        sampler.start()
        count.write_text(during)
        sampler.stop()
        return [r.throttle for r in sampler.readings() if r.throttle]

    assert measured("3\n") == []
    count.write_text("9\n")
    assert measured("9\n") == [], "what limited the board before the measurement was held against it"
    assert measured("10\n") == [("over-current-oc1",)]


def test_a_jetson_whose_total_is_unknown_gives_its_rails_alone(tmp_path: Path) -> None:
    root = lay_out_case("jetson-xavier-nx", tmp_path, in1_label="SYS_VIN_HV\n")
    board = detect_board(root)
    assert [name for name, _ in board.rails_mw()] == ["SYS_VIN_HV", "VDD_CPU_GPU_CV", "VDD_SOC"]
    assert board.power_scope() is None and board.total_mw(board.rails_mw()) is None
    assert "SYS_VIN_HV" in board.absent()["power"]


# ---- counters of energy ---------------------------------------------------------------------------------------------


def test_counters_are_summed_over_their_wrap(tmp_path: Path) -> None:
    root = lay_out_case("generic-x86-64", tmp_path)
    counter = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    (root / "sys/class/powercap/intel-rapl:0/max_energy_range_uj").write_text("5000000\n")
    rapl = find_rapl(root)
    assert rapl is not None
    rapl.begin(10.0)
    counter.write_text("4000000\n")
    assert dict(rapl.look(12.0))["package-0"] == pytest.approx(1500.0)  # 3 J in 2 s
    counter.write_text("500000\n")  # past its end: 1 J to the end and half a joule on
    rails = rapl.look(13.0)
    assert rapl.total_mw(rails) == pytest.approx(1500.0)
    assert rapl.mean_mw() == pytest.approx(1500.0)  # 4.5 J in 3 s


def test_a_counter_with_a_gap_counts_no_more_but_still_reads(tmp_path: Path) -> None:
    root = lay_out_case("generic-x86-64", tmp_path)
    counter = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    rapl = find_rapl(root)
    assert rapl is not None
    rapl.begin(0.0)
    counter.unlink()
    assert rapl.total_mw(rapl.look(1.0)) is None
    counter.write_text("9000000\n")
    assert rapl.total_mw(rapl.look(2.0)) is None, "what it counted while it was away belongs to no interval"
    counter.write_text("9500000\n")
    assert rapl.total_mw(rapl.look(3.0)) == pytest.approx(500.0)
    assert rapl.mean_mw() is None
    rapl.begin(3.0)
    counter.write_text("9600000\n")
    rapl.look(4.0)
    assert rapl.mean_mw() == pytest.approx(100.0)


def test_counters_for_root_alone_say_how_to_read_them(tmp_path: Path) -> None:
    root = lay_out_case("generic-x86-64", tmp_path)
    for path in root.rglob("energy_uj"):
        path.unlink()  # as good as unreadable: tests may run as root, who reads everything
    board = detect_board(root)
    assert board.power_scope() is None
    assert "chmod a+r" in board.absent()["power"]


@given(st.lists(st.integers(0, 10**9 - 1), min_size=1, max_size=20), st.integers(10**9, 10**10))
def test_however_often_one_looks_the_sum_is_what_was_used(used: list[int], wraps: int) -> None:
    from device_agents.boards.rapl import _used_uj

    counter, total = 0.0, 0.0
    for step in used:
        after = (counter + step) % wraps
        total += _used_uj(counter, after, wraps) or 0.0
        counter = after
    assert total == sum(used)


# ---- sampling -------------------------------------------------------------------------------------------------------


def series() -> Series:
    return measurement(processes=1).series[0]


def sampled(sampler: BoardSampler, seconds: float = 0.0) -> Series:
    sampler.start()
    time.sleep(seconds)
    sampler.stop()
    return sampler.record(series())


def test_a_sampler_reads_everything_a_board_tells_and_says_what_it_cost(tmp_path: Path) -> None:
    board = detect_board(lay_out_case("jetson-orin-nano", tmp_path))
    made = sampled(BoardSampler(board, idle_mw=3100.0))
    assert len(made.readings) >= 2
    first = made.readings[0]
    assert (first.power_mw, first.gpu_load, first.gpu_frequency_mhz) == (6048.0, 0.215, 624.75)
    assert [(c.name, c.mhz) for c in first.clusters] == [("cpu0-3", 1510.4), ("cpu4-5", 729.6)]
    assert [r.name for r in first.rails] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    assert made.power is not None and (made.power.scope, made.power.idle_mw, made.power_absent) == ("board", 3100.0, "")
    assert made.sampling is not None and made.sampling.cpu > 0


def test_a_board_without_a_sensor_of_power_has_the_reason_in_each_series(tmp_path: Path) -> None:
    made = sampled(BoardSampler(detect_board(lay_out_case("raspberry-pi-4b", tmp_path))))
    assert made.power is None and "no sensor of power" in made.power_absent
    assert all(r.power_mw is None and r.rails == () for r in made.readings)


def test_a_counter_is_read_from_the_beginning_of_the_timed_part_on(tmp_path: Path) -> None:
    root = lay_out_case("generic-x86-64", tmp_path)
    board = detect_board(root)
    sampler = BoardSampler(board, idle_mw=1.0)
    sampler.start()
    later = root / "later"
    later.write_text("3000000\n")
    later.replace(root / "sys/class/powercap/intel-rapl:0/energy_uj")  # whole: a reader must never meet an empty counter
    sampler.stop()
    made = sampler.record(series())
    assert made.power is not None and made.power.scope == "package"
    assert made.power.counted_mw is not None and made.power.counted_mw > 0


def test_sensors_that_vanish_in_between_read_as_none_and_the_rest_goes_on(tmp_path: Path) -> None:
    root = lay_out_case("jetson-orin-nano", tmp_path)
    sampler = BoardSampler(detect_board(root))
    sampler.start()
    while not sampler.readings():
        time.sleep(0.01)
    for path in [*root.rglob("curr1_input"), *root.rglob("temp"), *root.rglob("oc*_event_cnt"), *root.rglob("load")]:
        path.unlink()
    sampler.stop()
    first, last = sampler.readings()[0], sampler.readings()[-1]
    assert None not in (first.temperature_c, first.throttle, first.power_mw, first.gpu_load)
    assert (last.temperature_c, last.throttle, last.power_mw, last.gpu_load) == (None, None, None, None)
    assert last.frequency_mhz == 1510.4 and [r.name for r in last.rails] == ["VDD_CPU_GPU_CV", "VDD_SOC"]


def test_the_power_of_an_idle_board(tmp_path: Path) -> None:
    assert idle_power_mw(detect_board(lay_out_case("raspberry-pi-zero-2w", tmp_path / "zero")), 60.0) is None
    idle = idle_power_mw(detect_board(lay_out_case("raspberry-pi-5", tmp_path / "five")), 0.1)
    assert idle == pytest.approx(expected_of("raspberry-pi-5")["power_mw"], abs=0.001)


def test_programs_are_asked_at_both_ends_and_seldom_in_between(tmp_path: Path) -> None:
    root = lay_out_case("raspberry-pi-5", tmp_path)
    board = detect_board(root)
    sampler = BoardSampler(board)
    asked = root / "usr/bin/vcgencmd.asked"
    asked.write_text("")
    made = sampled(sampler)
    full = [r for r in made.readings if r.full]
    assert full[0] is made.readings[0] and full[-1] is made.readings[-1]
    assert len(asked.read_text()) == len(full)
    assert read_board(board, 0, False) == Reading(0, 61.45, 2400.0, (), clusters=made.readings[0].clusters, full=False), (
        "without the program, only what it would have told is left out"
    )


@given(
    st.floats(1e-5, 0.05),
    st.floats(1e-4, 0.2),
    st.booleans(),
)
def test_the_cadence_keeps_the_cost_within_its_budget(files: float, programs: float, asks: bool) -> None:
    """Over ten minutes, whatever a reading costs up to what half a minute allows; the first reading of each kind aside."""

    class Board:
        asks_programs = frozenset({"power"} if asks else ())

        def power_scope(self) -> object:
            return object()

    cadence = _Cadence(Board())  # type: ignore[arg-type]
    now = spent = 0.0
    asked = []
    while now < 600:
        full = cadence.is_full(now)
        cost = programs if full and asks else 0.0
        if now > 0:
            spent += files + cost
        if full:
            asked.append(now)
        cadence.count(now, full, files, cost)
        now += cadence.every_s
    share = 0.005 * 600 / (2 if asks else 1)
    bounds = [max(share * 1.01 + cost, cost * (600 / 30 + 1)) for cost in ((files, programs) if asks else (files,))]
    assert spent <= sum(bounds), "more than the share of each, where half a minute between two readings allows it"
    assert all(b - a <= 60 for a, b in itertools.pairwise(asked))
