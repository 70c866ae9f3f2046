"""Boards read from file trees laid out as their kernels do."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents.boards import detect_board
from device_agents.boards.jetson import Jetson
from device_agents.boards.raspberry_pi import RaspberryPi, parse_throttled
from device_agents.sampling import BoardSampler


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


PI5 = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd crc32 atomics fphp asimdhp asimddp\n"
    "CPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "61450\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "50005\n",
}
ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=7W >\n",
    "var/lib/nvpmodel/status": "pmode:0001 fmode:fanNull\n",
    "sys/class/thermal/thermal_zone0/type": "CPU-therm\n",
    "sys/class/thermal/thermal_zone0/temp": "48000\n",
    "sys/class/thermal/thermal_zone1/type": "GPU-therm\n",
    "sys/class/thermal/thermal_zone1/temp": "52000\n",
    "sys/class/thermal/thermal_zone2/type": "PMIC-Die\n",
    "sys/class/thermal/thermal_zone2/temp": "100000\n",
    "sys/class/hwmon/hwmon3/name": "soctherm_oc\n",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "4\n",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "0\n",
}


def test_raspberry_pi(tmp_path: Path) -> None:
    board = detect_board(lay_out(tmp_path, PI5))
    assert isinstance(board, RaspberryPi) and board.model() == "Raspberry Pi 5 Model B Rev 1.0"
    assert board.cpu() == ("Cortex-A76", ("fp", "asimd", "crc32", "atomics", "fphp", "asimdhp", "asimddp"))
    assert (board.temperature_c(), board.frequency_mhz(), board.governor()) == (61.45, 2400.0, "ondemand")
    assert board.throttle() == ("under-voltage", "throttled")
    assert board.sensors() == ("temperature:cpu-thermal", "frequency", "throttle")
    assert board.jetpack() is None


def test_raspberry_pi_by_vcgencmd(tmp_path: Path) -> None:
    files = {k: v for k, v in PI5.items() if "get_throttled" not in k}
    root = lay_out(tmp_path, {**files, "usr/bin/vcgencmd": '#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x8\n'})
    assert detect_board(root).throttle() is None, "a program that cannot be run tells nothing"
    (root / "usr/bin/vcgencmd").chmod(0o755)
    assert detect_board(root).throttle() == ("soft-temperature-limit",)


@pytest.mark.parametrize(
    ("text", "now"),
    [("throttled=0x0", ()), ("0", ()), ("throttled=0x70000", ()), ("throttled=0x4", ("throttled",)), ("f", 4), ("?", None)],
)
def test_throttle_bits(text: str, now: object) -> None:
    found = parse_throttled(text)
    assert (len(found) if isinstance(now, int) and found else found) == now


def test_jetson(tmp_path: Path) -> None:
    board = detect_board(lay_out(tmp_path, ORIN))
    assert isinstance(board, Jetson) and board.jetpack() == "L4T 35.4.1" and board.power_mode() == "7W"
    assert board.temperature_c() == 48.0, "the PMIC's constant 100 °C is no temperature of the processor"
    assert board.throttle() == (), "events of the past"
    (tmp_path / "sys/class/hwmon/hwmon3/oc3_event_cnt").write_text("2\n")
    assert board.throttle() == ("over-current-oc3",)
    assert board.throttle() == ()
    assert "power-mode:7W" in board.sensors()


def test_events_between_two_measurements_belong_to_neither(tmp_path: Path) -> None:
    board = detect_board(lay_out(tmp_path, ORIN))
    count = tmp_path / "sys/class/hwmon/hwmon3/oc1_event_cnt"

    def measured(during: str) -> list[tuple[str, ...] | None]:
        sampler = BoardSampler(board)
        sampler.start()
        count.write_text(during)
        sampler.stop()
        return [r.throttle for r in sampler.readings() if r.throttle]

    assert measured("4\n") == []
    count.write_text("9\n")
    assert measured("9\n") == [], "what limited the board before the measurement was held against it"
    assert measured("10\n") == [("over-current-oc1",)]


def test_a_board_that_tells_nothing(tmp_path: Path) -> None:
    board = detect_board(tmp_path)
    assert board.name == "generic"
    assert (board.model(), board.cpu(), board.sensors(), board.jetpack()) == (None, (None, ()), (), None)
    assert (board.temperature_c(), board.frequency_mhz(), board.governor(), board.throttle()) == (None, None, None, None)


def test_files_that_hold_rubbish(tmp_path: Path) -> None:
    board = detect_board(lay_out(tmp_path, {**PI5, "sys/class/thermal/thermal_zone0/temp": "warm\n"}))
    assert board.temperature_c() is None and board.sensors() == ("frequency", "throttle")
