from pileus.net import mac


def test_a_new_address_is_local_and_of_one_interface() -> None:
    made = {mac.make() for _ in range(100)}
    assert len(made) == 100
    for address in made:
        assert len(address) == mac.SIZE
        assert address[0] & 2
        assert mac.is_unicast(address)


def test_addresses_are_written_as_they_are_read() -> None:
    assert mac.encode("2e:00:ff:0a:b0:01") == b"\x2e\0\xff\x0a\xb0\x01"
    assert mac.decode(mac.encode("2e:00:ff:0a:b0:01")) == "2e:00:ff:0a:b0:01"


def test_groups_and_nobody_are_no_interface() -> None:
    assert not mac.is_unicast(mac.BROADCAST)
    assert not mac.is_unicast(b"\1\0\x5e\0\0\1")
    assert not mac.is_unicast(bytes(6))
