"""The parser of today's Rust client, as narrow as it is: ours to suit, since others use it."""

import socket

from tests.unit.api.harness import Api, connect
from tests.unit.api.test_http import GET, PUT


def answer(connection: socket.socket) -> tuple[int, str | None]:
    """Status and body, read 256 bytes at a time, each piece decoded alone."""
    text, length, end = "", None, None
    while length is None or end is None or len(text) < end + length:
        text += connection.recv(256).decode()  # UTF-8 cut in two would raise
        if end is None and "\r\n\r\n" in text:
            end = text.index("\r\n\r\n") + 4
            if "Content-Length: " not in text:
                return status(text), None
            length = int(text.partition("Content-Length: ")[2].partition("\r\n")[0])
    return status(text), text[end:]


def status(text: str) -> int:
    """All between the version and the end of the line: a reason phrase would be no number."""
    return int(text.removeprefix("HTTP/1.1 ").partition("\r")[0].strip())


def test_all_kinds_of_answers_suit_it_on_one_connection(api: Api) -> None:
    body = b'{"payload": {"kernel": "/\xc3\xa9"}, "cmdline": {"args": ""}}'
    head = b"PUT /api/v1/vm.%s HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n"
    with connect(api.path) as connection:
        connection.send(GET)
        assert answer(connection)[0] == 200
        # As it sends: the first line with what belongs to it, then the length and the body.
        for name, wanted in ((b"create", 204), (b"create", 409), (b"boot", 204), (b"reboot", 204)):
            connection.send(head % name)
            if name == b"create":
                connection.send(b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body))
            connection.send(b"\r\n")
            if name == b"create":
                connection.send(body)
            assert answer(connection)[0] == wanted
        connection.send(GET.replace(b"vmm.ping", b"vm.info"))
        code, text = answer(connection)
        assert code == 200
        assert text is not None
        assert "/\\u00e9" in text
        assert text.isascii()
        connection.send(PUT)
        assert answer(connection)[0] == 400
