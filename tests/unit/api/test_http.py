"""Requests out of bytes, whole, in pieces and with a tail; answers that a narrow parser understands."""

import os

import pytest

from pileus.api.http import MAX_BODY, MAX_FDS, MAX_HEADER, Conversation, RefusedError, Request, Response

GET = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n"
PUT = b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: localhost\r\nContent-Length: 7\r\n\r\n" + b'{"a":1}'
LOWER = PUT.replace(b"Content-Length", b"content-length").replace(b": ", b":")
CHUNKED = (
    b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'3\r\n{"a\r\n4\r\n":1}\r\n0\r\n\r\n'
)
ABSOLUTE = b"GET http://localhost/api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n"
OLD = b"GET /api/v1/vmm.ping HTTP/1.0\r\n\r\n"
GOOD = {
    "get": (GET, "GET", "/api/v1/vmm.ping", b""),
    "put": (PUT, "PUT", "/api/v1/vm.create", b'{"a":1}'),
    "lower case": (LOWER, "PUT", "/api/v1/vm.create", b'{"a":1}'),
    "chunked": (CHUNKED, "PUT", "/api/v1/vm.create", b'{"a":1}'),
    "absolute": (ABSOLUTE, "GET", "http://localhost/api/v1/vmm.ping", b""),
    "1.0": (OLD, "GET", "/api/v1/vmm.ping", b""),
}


def shown(request: Request | None) -> tuple[str, str, bytes]:
    assert request is not None
    return request.method, request.target, request.body


@pytest.mark.parametrize(("data", "method", "target", "body"), GOOD.values(), ids=GOOD)
def test_a_request_is_the_same_in_any_pieces(data: bytes, method: str, target: str, body: bytes) -> None:
    whole = Conversation()
    whole.receive(data)
    assert shown(whole.next_request()) == (method, target, body)
    pieces = Conversation()
    for byte in data[:-1]:
        pieces.receive(bytes([byte]))
        assert pieces.next_request() is None
        assert not pieces.idle
    pieces.receive(data[-1:])
    assert shown(pieces.next_request()) == (method, target, body)


@pytest.mark.parametrize("data", [GET, PUT, LOWER, CHUNKED, ABSOLUTE])
def test_pipelined_requests_come_one_after_the_other(data: bytes) -> None:
    talk = Conversation()
    talk.receive(data * 3 + data[:10])
    for _ in range(3):
        request = talk.next_request()
        assert request is not None
        assert talk.next_request() is None, "the next one waits for the answer"
        talk.respond(Response(204))
    assert talk.next_request() is None
    assert not talk.idle
    talk.receive(data[10:])
    assert talk.next_request() is not None
    talk.respond(Response(204))
    assert talk.idle


def test_an_answer_is_laid_out_for_the_narrow_parser_of_todays_client() -> None:
    talk = Conversation()
    talk.receive(GET)
    talk.next_request()
    assert talk.respond(Response(200, {"a": "é"})) == (
        b"HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
        b'Content-Type: application/json\r\nContent-Length: 15\r\n\r\n{"a": "\\u00e9"}'
    )
    talk.receive(PUT)
    talk.next_request()
    answer = talk.respond(Response(204))
    assert answer == b"HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"


def test_a_body_that_waits_for_leave_gets_it() -> None:
    talk = Conversation()
    head, body = PUT.split(b"\r\n\r\n")
    talk.receive(head + b"\r\nExpect: 100-continue\r\n\r\n")
    assert talk.next_request() is None
    assert talk.take_interim() == b"HTTP/1.1 100 \r\n\r\n"
    assert talk.take_interim() == b""
    talk.receive(body)
    assert shown(talk.next_request())[2] == body


BAD = {
    "no HTTP": (b"hello\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "a NUL": (b"GET / HTTP/1.1\r\nHost: x\0\r\n\r\n", 400),
    "two lengths": (PUT.replace(b"Host: localhost", b"Host: x\r\nContent-Length: 8"), 400),
    "a negative length": (PUT.replace(b": 7", b": -7"), 400),
    "a header without a colon": (b"GET / HTTP/1.1\r\nHost: x\r\nhello\r\n\r\n", 400),
    "TLS": (bytes.fromhex("16030100a5010000a10303") + bytes(100), 400),
    "a huge line": (b"GET /" + b"a" * 2 * MAX_HEADER, 431),
    "a huge header": (b"GET / HTTP/1.1\r\nHost: " + b"a" * 2 * MAX_HEADER, 431),
    "a body of 1 GiB": (PUT.replace(b": 7", b": %d" % (1 << 30)), 413),
    "a body of 10^19": (PUT.replace(b": 7", b": 9999999999999999999"), 413),
    "bad chunks": (CHUNKED.replace(b"\r\n3\r\n", b"\r\nzz\r\n"), 400),
}


@pytest.mark.parametrize(("data", "status"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("step", [1 << 20, 7])
def test_what_is_no_request_is_refused_and_ends_the_conversation(data: bytes, status: int, step: int) -> None:
    talk = Conversation()

    def converse() -> None:
        for start in range(0, len(data), step):
            talk.receive(data[start : start + step])
            assert talk.next_request() is None

    with pytest.raises(RefusedError) as refusal:
        converse()
    answer = talk.refuse(refusal.value)
    assert answer.startswith(b"HTTP/1.1 %d \r\n" % status)
    assert b"Connection: close\r\n" in answer
    assert talk.over


def test_chunks_without_an_end_are_refused() -> None:
    talk = Conversation()
    talk.receive(CHUNKED.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
    sent = 0

    def converse() -> None:
        nonlocal sent
        while sent <= 2 * MAX_BODY:
            talk.receive(b"8000\r\n" + bytes(0x8000) + b"\r\n")
            sent += 0x8000
            assert talk.next_request() is None

    with pytest.raises(RefusedError) as refusal:
        converse()
    assert refusal.value.response.status == 413
    assert sent <= MAX_BODY + 0x10000


def test_the_end_within_a_request_is_refused_and_between_two_is_not() -> None:
    talk = Conversation()
    talk.receive(PUT[:-1])
    assert talk.next_request() is None
    talk.receive(b"")
    with pytest.raises(RefusedError):
        talk.next_request()
    talk = Conversation()
    talk.receive(GET)
    talk.receive(b"")
    assert talk.next_request() is not None
    talk.respond(Response(204))
    assert talk.next_request() is None
    assert talk.over


@pytest.mark.parametrize("data", [OLD, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")])
def test_who_wants_one_answer_gets_one(data: bytes) -> None:
    talk = Conversation()
    talk.receive(data)
    assert talk.next_request() is not None
    assert b"onnection: close" in talk.respond(Response(200, {}))
    assert talk.over


def test_head_has_no_body() -> None:
    talk = Conversation()
    talk.receive(GET.replace(b"GET", b"HEAD"))
    assert talk.next_request() is not None
    assert talk.respond(Response(405, ["No."])).endswith(b"Content-Length: 7\r\n\r\n")
    assert talk.idle


def test_descriptors_belong_to_the_request_that_is_complete_next() -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    talk = Conversation()
    talk.receive(PUT[:5], fds[:1])
    talk.receive(PUT[5:], fds[1:])
    request = talk.next_request()
    assert request is not None
    assert request.fds == fds
    request.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


def test_descriptors_of_nobody_are_closed_and_there_are_not_many() -> None:
    before = len(os.listdir("/proc/self/fd"))
    talk = Conversation()
    for _ in range(3):
        talk.receive(b"P", [os.open("/dev/null", os.O_RDONLY) for _ in range(MAX_FDS)])
    assert len(os.listdir("/proc/self/fd")) == before + MAX_FDS
    talk.close()
    assert len(os.listdir("/proc/self/fd")) == before
