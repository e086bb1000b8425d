"""The serial port and its ends on the host."""

import hashlib
import os
import re
import socket
import termios
import tty
from pathlib import Path

from tests.guest.conftest import StartGuest
from tests.guest.guest import PROMPT, Guest, Reader


def test_a_command_typed_on_the_terminal_answers(start: StartGuest) -> None:
    guest: Guest = start(do="shell", cpus="2")
    guest.shell()
    assert guest.terminal_is_raw()
    assert guest.run("nproc") == "2"
    assert guest.run("echo $((6 * 7))") == "42"
    guest.type("poweroff -f\n")
    assert guest.wait() == 0
    assert guest.terminal_is_sane()


def test_the_escape_key_ends_the_vm(start: StartGuest) -> None:
    guest: Guest = start(do="shell")
    guest.shell()
    guest.type("\x01x")
    assert guest.wait(30) == 0
    assert guest.terminal_is_sane()


def test_output_goes_to_a_pipe_as_well(start: StartGuest) -> None:
    guest: Guest = start(terminal=False)
    assert guest.facts().number("cpus") == 1
    assert guest.wait() == 0


def test_a_long_paste_arrives_whole(start: StartGuest) -> None:
    guest: Guest = start(do="shell")
    guest.shell()
    guest.run("stty -icanon -echo")
    text = "".join(f"{number:04}" for number in range(750))
    guest.type(f"head -c {len(text)} | md5sum\n")
    guest.expect(r"\n?")
    guest.type(text)
    guest.expect(hashlib.md5(text.encode()).hexdigest())
    guest.type("poweroff -f\n")
    assert guest.wait() == 0


def test_a_program_on_the_pty_talks_to_the_guest(start: StartGuest) -> None:
    guest: Guest = start(do="shell", serial="pty")
    path = guest.expect(r"Serial: /dev/pts/\d+").partition("Serial: ")[2]
    line = os.open(path, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(line, termios.TCSANOW)
    _talk(os.dup(line), lambda text: os.write(line, text.encode()))
    os.close(line)
    assert guest.wait() == 0


def test_a_client_of_the_socket_talks_to_the_guest(start: StartGuest, tmp_path: Path) -> None:
    path = tmp_path / "serial.sock"
    guest: Guest = start(do="shell", serial=f"socket={path}")
    guest.expect_log("kernel entered")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        _talk(os.dup(client.fileno()), lambda text: client.sendall(text.encode()))
    assert guest.wait() == 0
    assert not path.exists()


def _talk(fd: int, send: "object") -> None:
    """Use the guest's shell over ``fd``, which is closed afterwards, then power it off."""
    assert callable(send)
    console = Reader()
    console.follow(fd)
    try:
        console.expect(re.escape(PROMPT), 150)
        send("echo answer=$((6 * 7))\n")
        console.expect("answer=42", 60)
        send("poweroff -f\n")
        console.expect("Power down|power down|poweroff -f", 60)
    finally:
        console.close()
