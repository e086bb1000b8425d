"""A pileus process with a guest in it, as a test sees both: the console, the keyboard, the log, the end."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ASSETS = ROOT / ".cache" / "guests"
PILEUS = Path(sys.prefix) / "bin" / "pileus"
IRQCHIP = os.environ.get("PILEUS_TEST_IRQCHIP")  # for all guests: "split"
PROMPT = "guest# "
# Generous: a boot takes 6 to 25 s in an emulated machine whose two cores others use as well. A test waits
# for events, never for time, so only a failing one gets here.
TIMEOUT = 150.0
LOCAL_MODES = 3  # index in what termios.tcgetattr returns


class NotSeenError(AssertionError):
    """What was waited for did not come; says what came instead."""


@dataclass
class Kernel:
    """A kernel of .cache/guests: by default the bzImage, with ``file="vmlinux"`` the ELF inside it."""

    suite: str
    file: str = "vmlinuz"

    @property
    def path(self) -> Path:
        return ASSETS / self.suite / self.file

    @property
    def initramfs(self) -> Path:
        return ASSETS / self.suite / "initramfs.cpio"

    @property
    def release(self) -> str:
        return (ASSETS / self.suite / "release").read_text()

    def __str__(self) -> str:
        return f"{self.suite}-{self.file}"


TRIXIE = Kernel("trixie")
TRIXIE_PVH = Kernel("trixie", "vmlinux")  # starts soonest: nothing to decompress
TRIXIE_ELF = Kernel("trixie", "vmlinux-nopvh")


@dataclass
class Facts:
    """What the guest's command ``report`` printed."""

    values: dict[str, str] = field(default_factory=dict)
    dmesg: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> str:
        return self.values[key]

    def number(self, key: str) -> int:
        return int(self.values[key])

    @classmethod
    def parse(cls, text: str) -> "Facts":
        facts = cls()
        for line in text.splitlines():
            key, equals, value = line.strip().partition("=")
            if key == "dmesg":
                facts.dmesg.append(value)
            elif equals and key.isidentifier():
                facts.values[key] = value.strip()
        return facts


class Guest:
    """Starts pileus with ``options``; reads its terminal, or what it writes to a pipe, all the time.

    With ``terminal`` it runs in a session of its own on a new pseudo-terminal, whose modes before and
    after can be compared by ``terminal_is_sane``. Close it, or use it as a context manager.
    """

    def __init__(self, options: list[str], log: Path, *, terminal: bool = True) -> None:
        irqchip = ["--irqchip", IRQCHIP] if IRQCHIP and "--irqchip" not in options else []
        self.command = [str(PILEUS), *options, *irqchip, "-vvv", "--log-file", str(log)]
        self.log_file = log
        self.console = Reader()
        self.started = time.monotonic()
        if terminal:
            master, slave = os.openpty()
            self._modes = termios.tcgetattr(slave)
            self._slave: int | None = slave
            # setsid makes the terminal the controlling one and becomes pileus: the same process.
            self.process = subprocess.Popen(
                ["setsid", "--ctty", *self.command], stdin=slave, stdout=slave, stderr=slave
            )
            self._input = master
            self.console.follow(master)
        else:
            reader, writer = os.pipe()
            self._slave = None
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, start_new_session=True
            )
            os.close(writer)
            self.console.follow(reader)

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what still runs and free the terminal."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self._slave is not None:
            os.close(self._slave)
            self._slave = None
        self.console.close()

    @property
    def output(self) -> str:
        """All that pileus and the guest have shown so far."""
        return self.console.text

    @property
    def log(self) -> str:
        """The log of pileus so far, at level debug."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def threads(self) -> str:
        """What each thread of pileus is at, for whoever looks into a hang; CPU time twice, a second apart."""
        text = ""
        for _ in range(2):
            for task in sorted(Path(f"/proc/{self.process.pid}/task").glob("*")):
                try:
                    stack = " < ".join(
                        line.split()[-1] for line in (task / "stack").read_text().splitlines()[:5]
                    )
                    ran = int((task / "schedstat").read_text().split()[0]) / 1e9
                    text += f"{task.name} {(task / 'comm').read_text().strip()}: {ran:.3f} s, in {stack}\n"
                except OSError:
                    continue  # it ended, or we may not look
            time.sleep(1)
        return f"threads:\n{text}"

    def expect(self, pattern: str, timeout: float = TIMEOUT) -> str:
        """Wait for the regular expression after what was matched last; return the text up to its end."""
        return self.console.expect(pattern, timeout, lambda: self.process.poll() is not None)

    def expect_log(self, text: str, timeout: float = TIMEOUT) -> str:
        """Wait until the log holds ``text``; return the log."""
        deadline = time.monotonic() + timeout
        while text not in self.log:
            if time.monotonic() > deadline or (self.process.poll() is not None and text not in self.log):
                raise NotSeenError(f"no {text!r} in the log:\n{self.log}\nconsole:\n{self.output[-2000:]}")
            time.sleep(0.1)
        return self.log

    def type(self, text: str) -> None:
        """Type ``text`` on the terminal that pileus runs on."""
        os.write(self._input, text.encode())

    def shell(self, timeout: float = TIMEOUT) -> None:
        """Wait for the prompt of the guest's shell (``pileus.do=shell``)."""
        self.expect(re.escape(PROMPT), timeout)

    def run(self, command: str, timeout: float = TIMEOUT) -> str:
        """Run ``command`` in the guest's shell; return what it printed."""
        self.type(f"{command}\n")
        self.expect(re.escape(command) + r"\r*\n", timeout)
        text = self.expect(re.escape(PROMPT), timeout)
        return text.removesuffix(PROMPT).replace("\r", "").strip()

    def facts(self, timeout: float = TIMEOUT) -> Facts:
        """Return what a guest with ``pileus.do=report`` says."""
        return Facts.parse(self.expect(r"report=done", timeout))

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for the end of pileus; return its exit status (-N for signal N)."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise NotSeenError(
                f"pileus still runs; console:\n{self.output[-3000:]}\nlog:\n{self.log}"
            ) from None
        self.console.drain()
        return status

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def terminal_is_raw(self) -> bool:
        assert self._slave is not None
        return not termios.tcgetattr(self._slave)[LOCAL_MODES] & (termios.ICANON | termios.ECHO)

    def terminal_is_sane(self) -> bool:
        """Return whether the terminal's modes are what they were before pileus started."""
        assert self._slave is not None
        return termios.tcgetattr(self._slave) == self._modes

    def children(self) -> list[int]:
        """Return the processes of the session that pileus led, itself aside."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid != int(folder.name):
                    found.append(int(folder.name))
        return found


class Reader:
    """Collects what a file descriptor delivers, in a thread, so that no writer ever waits for the test."""

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._news = threading.Condition()
        self._ended = False
        self._fd = -1
        self._thread: threading.Thread | None = None
        self._stop, self._stopper = os.pipe()

    @property
    def text(self) -> str:
        with self._news:
            return self._text

    def follow(self, fd: int) -> None:
        """Take ``fd`` over and read it from now on."""
        self._fd = fd
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def expect(self, pattern: str, timeout: float, silent: Callable[[], bool] = lambda: False) -> str:
        """See Guest.expect; ``silent`` returns whether nobody writes any more."""
        deadline = time.monotonic() + timeout
        wanted = re.compile(pattern)
        with self._news:
            while True:
                last = silent()  # before the look: what was written before is found by it, or drained
                if last:
                    self._news.release()
                    self.drain()
                    self._news.acquire()
                if found := wanted.search(self._text, self._position):
                    text = self._text[self._position : found.end()]
                    self._position = found.end()
                    return text
                left = deadline - time.monotonic()
                if self._ended or last or left <= 0:
                    why = "output ended" if self._ended or last else f"not within {timeout:g} s"
                    raise NotSeenError(f"{pattern!r}: {why}; what came:\n{self._text[-4000:]}")
                self._news.wait(min(left, 1.0))

    def drain(self) -> None:
        """Read what is left after the writer's end, without waiting for more."""
        deadline = time.monotonic() + 5
        while not self._ended and select.select([self._fd], [], [], 0.05)[0] and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        os.write(self._stopper, b"x")
        if self._thread is not None:
            self._thread.join()
            os.close(self._fd)
        os.close(self._stop)
        os.close(self._stopper)

    def _read(self) -> None:
        while True:
            ready, _, _ = select.select([self._fd, self._stop], [], [])
            if self._fd not in ready:
                break
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # EIO: the last holder of the terminal is gone
                data = b""
            if not data:
                break
            with self._news:
                self._text += data.decode(errors="replace")
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()
