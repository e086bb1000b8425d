"""Bytes to messages and back, for both roles."""

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.errors import RemoteProtocolError
from pileus.vhost_user import protocol
from pileus.vhost_user.protocol import (
    BACKEND,
    FRONTEND,
    HEADER,
    NEED_REPLY,
    NO_FD,
    REGION,
    REPLY,
    VERSION,
    BackendRequest,
    Message,
    Payload,
    Request,
    check_fds,
    decode,
    encode,
    missing,
)

TABLES = {"front-end": FRONTEND, "back-end": BACKEND}


def _values(draw: st.DrawFn, payload: Payload) -> tuple[tuple[int, ...], bytes]:
    raw = draw(st.binary(min_size=payload.head.size, max_size=payload.head.size))
    values = list(payload.head.unpack(raw))
    tail = b""
    if payload.item:
        values[payload.count] = draw(st.integers(0, payload.most))
        size = values[payload.count] * payload.item
        tail = draw(st.binary(min_size=size, max_size=size))
    return tuple(values), tail


@st.composite
def messages(draw: st.DrawFn) -> tuple[dict[int, Any], Message]:
    """Any message that either role may send, in either direction."""
    table = draw(st.sampled_from(list(TABLES.values())))
    request = draw(st.sampled_from(list(table)))
    call, reply = table[request], draw(st.booleans())
    values, tail = _values(draw, protocol._layout(call, reply))
    flags = VERSION | (REPLY if reply else draw(st.sampled_from([0, NEED_REPLY])))
    return table, Message(request, *values, tail=tail, flags=flags)


@given(messages())
def test_what_was_encoded_is_decoded(case: tuple[dict[int, Any], Message]) -> None:
    table, message = case
    buffer = bytearray(encode(table, message))
    assert decode(table, buffer, message.is_reply) == message
    assert buffer == b""


@given(messages())
def test_a_message_may_come_byte_by_byte(case: tuple[dict[int, Any], Message]) -> None:
    table, message = case
    data = encode(table, message)
    buffer = bytearray()
    for index, byte in enumerate(data):
        assert 0 < missing(table, buffer, message.is_reply) <= len(data) - index
        assert decode(table, buffer, message.is_reply) is None
        buffer.append(byte)
    assert missing(table, buffer, message.is_reply) == 0
    assert decode(table, buffer, message.is_reply) == message


@given(messages(), st.binary(max_size=40))
def test_what_follows_a_message_is_left(case: tuple[dict[int, Any], Message], rest: bytes) -> None:
    table, message = case
    buffer = bytearray(encode(table, message) + rest)
    assert decode(table, buffer, message.is_reply) == message
    assert buffer == rest


@given(st.sampled_from(list(TABLES.values())), st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_message_or_an_error(table: dict[int, Any], data: bytes, reply: bool) -> None:
    try:
        message = decode(table, bytearray(data), reply)
    except RemoteProtocolError:
        return
    assert message is None or message.is_reply == reply


@given(messages(), st.integers(0, 1 << 32 - 1))
def test_a_payload_of_another_size_is_refused_before_it_comes(
    case: tuple[dict[int, Any], Message], size: int
) -> None:
    table, message = case
    layout = protocol._layout(table[message.request], message.is_reply)
    header = bytearray(HEADER.pack(message.request, message.flags, size))
    if layout.allows(size):
        assert missing(table, header, message.is_reply) == size
    else:
        with pytest.raises(RemoteProtocolError, match=f"{size} bytes"):
            missing(table, header, message.is_reply)


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_no_message_is_longer_than_a_page(table: dict[int, Any]) -> None:
    for call in table.values():
        for payload in filter(None, (call.payload, call.reply)):
            assert payload.head.size + payload.item * payload.most <= 4096


BAD_HEADERS = {
    "no such request": (999, VERSION, 0),
    "of another version": (Request.GET_FEATURES, 2, 0),
    "with flags of the future": (Request.GET_FEATURES, VERSION | 1 << 4, 0),
    "a reply to nobody": (Request.GET_FEATURES, VERSION | REPLY, 8),
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=list(BAD_HEADERS))
def test_a_header_that_is_none_is_refused(header: tuple[int, int, int]) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(FRONTEND, bytearray(HEADER.pack(*header)), reply=False)


def test_a_memory_table_holds_as_many_regions_as_it_says() -> None:
    data = struct.pack("=II", 3, 0) + REGION.pack(0, 1, 2, 3)
    header = HEADER.pack(Request.SET_MEM_TABLE, VERSION, len(data))
    with pytest.raises(RemoteProtocolError, match="3"):
        decode(FRONTEND, bytearray(header + data), reply=False)


def test_an_inflight_message_may_lack_its_padding() -> None:
    data = struct.pack("=QQHH", 4096, 0, 2, 128)
    buffer = bytearray(HEADER.pack(Request.GET_INFLIGHT_FD, VERSION | REPLY, len(data)) + data)
    message = decode(FRONTEND, buffer, reply=True)
    assert message is not None
    assert message.values == (4096, 0, 2, 128)


DESCRIPTORS = {
    "a memory table has one for each region": (
        Message(Request.SET_MEM_TABLE, 2, tail=REGION.pack(0, 1, 2, 3) * 2), {2}
    ),
    "a kick has one": (Message(Request.SET_VRING_KICK, 3), {1}),
    "unless it says otherwise": (Message(Request.SET_VRING_KICK, 3 | NO_FD), {0}),
    "a question has none": (Message(Request.GET_FEATURES), {0}),
    "a region to forget may have one": (Message(Request.REM_MEM_REG, 0, 1, 2, 3), {0, 1}),
    "an inflight region may not be there": (
        Message(Request.GET_INFLIGHT_FD, 0, 0, 0, 0, flags=VERSION | REPLY), {0, 1}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("message", "allowed"), DESCRIPTORS.values(), ids=list(DESCRIPTORS))
def test_descriptors_are_counted(message: Message, allowed: set[int]) -> None:
    for count in range(9):
        if count in allowed:
            check_fds(FRONTEND, message, count)
        else:
            with pytest.raises(RemoteProtocolError, match=f"{count} descriptors"):
                check_fds(FRONTEND, message, count)


def test_a_back_end_asks_for_a_mapping_with_one_descriptor() -> None:
    check_fds(BACKEND, Message(BackendRequest.SHMEM_MAP, 0, 0, 0, 4096, 1), 1)
    with pytest.raises(RemoteProtocolError):
        check_fds(BACKEND, Message(BackendRequest.SHMEM_MAP, 0, 0, 0, 4096, 1), 0)
