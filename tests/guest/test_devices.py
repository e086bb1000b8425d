"""Entropy, console and balloon in a guest, on both transports."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.conftest import StartGuest
from tests.guest.guest import PROMPT, Guest
from tests.guest.machine import BALLOON_MIB, MIB, Machine

BALLOON_PAGES = BALLOON_MIB * MIB // 4096
# Takes, writes and gives back most of what is free.
EAT = """
import sys
size = int(sys.argv[1])
block = bytearray(size << 20)
marks = bytes(range(256)) * size  # one for each page
block[::4096] = marks
assert block[::4096] == marks
"""


@pytest.mark.needs("--disk", "--net", "--balloon")
class TestOneOfEach:
    def test_hwrng_is_the_devices_and_gives_bytes(self, machine: Machine) -> None:
        machine.check("modprobe virtio_rng")
        assert machine.check("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
        first, second = (machine.check("head -c 512 /dev/hwrng | sha256sum") for _ in range(2))
        assert first != second
        assert machine.check("head -c 512 /dev/hwrng | wc -c") == "512"

    def test_a_login_waits_on_the_console_and_what_is_written_there_comes_out(self, machine: Machine) -> None:
        machine.check("echo on the console of virtio >/dev/hvc0")
        _until(lambda: "on the console of virtio" in machine.console.read_text(errors="replace"))
        assert "cloud login:" in machine.console.read_text(errors="replace")  # the reference's test 23

    def test_the_devices_are_where_they_should_be(self, machine: Machine) -> None:
        count = machine.check("ls /sys/bus/virtio/devices | wc -l")
        assert int(count) == 8 + 3 + 3  # disks with the root's, interfaces; rng, console, balloon
        buses = machine.check("readlink -f /sys/bus/virtio/devices/* | grep -c pci || true")
        assert int(buses) == (int(count) if machine.pci else 0)

    def test_the_balloon_goes_up_and_comes_down_when_memory_runs_out(self, machine: Machine) -> None:
        inflated = "sed -n 's/^balloon_inflate //p' /proc/vmstat"
        deflated = "sed -n 's/^balloon_deflate //p' /proc/vmstat"
        _until(lambda: int(machine.check(inflated)) >= BALLOON_PAGES)
        assert int(machine.check(inflated)) - int(machine.check(deflated)) >= BALLOON_PAGES
        # The kernel's own handler of an empty memory, called by hand: filling the memory would make the
        # guest read its programs from the disk again and again first. It asks the balloon, then kills.
        machine.check("sleep 1000 & echo 1000 >/proc/$!/oom_score_adj; echo f >/proc/sysrq-trigger")
        _until(lambda: int(machine.check(deflated)) > 0)

    def test_memory_that_the_guest_frees_goes_back_to_the_host(self, machine: Machine) -> None:
        machine.check(f"cat >/tmp/eat.py <<'EOF'\n{EAT}\nEOF\npython3 /tmp/eat.py 256")
        machine.check("echo 3 >/proc/sys/vm/drop_caches; echo 1 >/proc/sys/vm/compact_memory")
        _until(lambda: _resident(machine, "VmRSS") < _resident(machine, "VmHWM") - 128 * MIB)

    @pytest.mark.long
    def test_a_guest_short_of_memory_reads_its_disks_right(self, machine: Machine) -> None:
        machine.check(
            f"""
            cat >/tmp/eat.py <<'EOF'
{EAT}
EOF
            head -c 32M /dev/urandom >/root/data
            sync
            sha256sum /root/data >/root/sums
            available=$(sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)
            python3 /tmp/eat.py $((available / 1024 - 96)) &
            for round in 1 2 3; do echo 3 >/proc/sys/vm/drop_caches; sha256sum -c --quiet /root/sums; done
            wait $!
            sha256sum -c --quiet /root/sums
            rm /root/data
            """
        )


@pytest.mark.needs("--pci")
@pytest.mark.parametrize("pci", ["on", "off"])
def test_the_console_takes_what_is_typed(start: StartGuest, pci: str) -> None:
    guest: Guest = start(
        "--pci",
        pci,
        do="shell",
        serial="off",
        console="tty",
        cmdline="console=hvc0 quiet pileus.modules=virtio",
    )
    guest.expect_log("Userspace code 0x60")
    guest.shell()
    assert guest.run("cat /proc/consoles | cut -c 1-4") == "hvc0"
    guest.type(f"echo {'x' * 700} | wc -c\n")  # more than the console's buffer for one chain may be
    guest.expect(r"701\r*\n")
    guest.expect(PROMPT)
    guest.type("echo ready; cat\n")
    guest.expect(r"ready\r*\n")  # what is typed before that may end in the shell's own buffer
    guest.type("a line typed on the console\n\x04")
    guest.expect("a line typed on the console\r*\n(.*\n)?a line typed on the console")
    guest.expect(PROMPT)
    guest.type("poweroff -f\n")
    assert guest.wait() == 0


def _resident(machine: Machine, key: str) -> int:
    """Return the bytes of pileus and its guest that the host holds now (VmRSS), or held at most (VmHWM)."""
    for line in Path(f"/proc/{machine.guest.process.pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("pileus has ended")


def _until(holds: Callable[[], bool], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.5)
