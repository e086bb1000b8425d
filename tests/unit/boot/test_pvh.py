"""struct hvm_start_info through a ctypes mirror of Xen's public/arch-x86/hvm/start_info.h."""

from ctypes import Structure, c_uint32, c_uint64

from pileus.boot import pvh

START = 0x6000
MAP = [(0, 0xA0000, 1), (0x100000, 1 << 29, 1), (0xE8000000, 1 << 28, 2)]


class StartInfo(Structure):
    _fields_ = (
        ("magic", c_uint32),
        ("version", c_uint32),
        ("flags", c_uint32),
        ("nr_modules", c_uint32),
        ("modlist_paddr", c_uint64),
        ("cmdline_paddr", c_uint64),
        ("rsdp_paddr", c_uint64),
        ("memmap_paddr", c_uint64),
        ("memmap_entries", c_uint32),
        ("reserved", c_uint32),
    )


class Module(Structure):
    _fields_ = (("paddr", c_uint64), ("size", c_uint64), ("cmdline_paddr", c_uint64), ("reserved", c_uint64))


class MemmapEntry(Structure):
    _fields_ = (("addr", c_uint64), ("size", c_uint64), ("type", c_uint32), ("reserved", c_uint32))


def test_hands_over_memory_map_command_line_and_rsdp() -> None:
    data = pvh.encode(MAP, initramfs=(0, 0), rsdp=0xA0000)
    info = StartInfo.from_buffer_copy(data)
    assert (info.magic, info.version, info.flags, info.nr_modules) == (0x336EC578, 1, 0, 0)
    assert (info.cmdline_paddr, info.rsdp_paddr) == (0x20000, 0xA0000)
    rows = [
        MemmapEntry.from_buffer_copy(data, info.memmap_paddr - START + 24 * index)
        for index in range(info.memmap_entries)
    ]
    assert [(row.addr, row.size, row.type) for row in rows] == MAP


def test_an_initramfs_is_a_module() -> None:
    data = pvh.encode(MAP, initramfs=(0x7F00000, 0x12345), rsdp=0)
    info = StartInfo.from_buffer_copy(data)
    module = Module.from_buffer_copy(data, info.modlist_paddr - START)
    assert info.nr_modules == 1
    assert (module.paddr, module.size, module.cmdline_paddr) == (0x7F00000, 0x12345, 0)


def test_a_long_memory_map_is_cut_to_what_fits() -> None:
    data = pvh.encode(MAP * 100, initramfs=(0, 0), rsdp=0)
    assert len(data) <= 0x1000
    assert StartInfo.from_buffer_copy(data).memmap_entries == pvh.MEMMAP_MAX > 128
