"""Answers of the API as people read them; what is not set is left out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pileus import log
from pileus.config.units import format_size

GAP = "  "


def columns(rows: Iterable[Sequence[object]], right: Iterable[int] = ()) -> str:
    """``rows`` in columns, those with an index in ``right`` flush right; no blanks at the ends of lines."""
    shown = [[log.one_line(str(cell)) for cell in row] for row in rows]
    if not shown:
        return ""
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    flush = set(right)
    return "\n".join(
        GAP.join(
            cell.rjust(width) if index in flush else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in shown
    )


def ping(body: dict[str, Any]) -> str:
    rows = {
        "Build": body.get("build_version"),
        "API of release": body.get("version"),
        "Process": body.get("pid"),
        "Features": ", ".join(body.get("features") or ()),
    }
    return columns(row for row in rows.items() if row[1])


def counters(body: dict[str, dict[str, int]]) -> str:
    rows: list[tuple[object, ...]] = [("DEVICE", "COUNTER", "VALUE")]
    for device, counts in body.items():
        rows += [(device, name, count) for name, count in counts.items()]
    return columns(rows, right=(2,))


def info(body: dict[str, Any]) -> str:
    config = body["config"]
    rows = [("State", body["state"]), *_machine(config)]
    if operation := body.get("operation"):
        rows.insert(1, ("Under way", progress(operation)))
    told = columns(row for row in rows if row[1])
    devices = list(_devices(config))
    return f"{told}\n\n{columns([('DEVICE', 'NAME', 'WHAT'), *devices])}" if devices else told


def progress(operation: dict[str, Any]) -> str:
    """How far a long operation is."""
    total = operation["total"]
    share = 100 * operation["done"] // total if total else 100
    return f"{operation['name']}, {share} % of {format_size(total)}"


def _machine(config: dict[str, Any]) -> Iterator[tuple[str, object]]:
    cpus, payload = config["cpus"], config.get("payload") or {}
    boot, most = cpus["boot_vcpus"], cpus["max_vcpus"]
    yield "vCPUs", boot if boot == most else f"{boot}, at most {most}"
    yield "Memory", format_size(config["memory"]["size"])
    yield "Kernel", payload.get("kernel")
    yield "Command line", payload.get("cmdline")
    yield "Initramfs", payload.get("initramfs")
    for name in ("serial", "console"):
        terminal = config.get(name) or {}
        where = terminal.get("file") or terminal.get("socket") or ""
        yield name.capitalize(), f"{terminal.get('mode', '')} {where}".strip()


def _devices(config: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for index, disk in enumerate(config.get("disks") or ()):
        flags = [name for name in ("readonly", "direct") if disk.get(name)]
        backing = disk.get("path") or disk.get("vhost_socket") or ""
        yield "disk", disk.get("id") or f"_disk{index}", ", ".join([backing, *flags])
    for index, net in enumerate(config.get("net") or ()):
        parts = [net.get(name) for name in ("tap", "vhost_socket", "mac", "ip")]
        yield "net", net.get("id") or f"_net{index}", ", ".join(filter(None, parts))
    for index, fs in enumerate(config.get("fs") or ()):
        yield "fs", f"_fs{index}", f"{fs['tag']}, {fs['socket']}"
    for kind in ("vhost_user_net", "vhost_user_blk"):
        for index, each in enumerate(config.get(kind) or ()):
            yield kind.rpartition("_")[2], f"_{kind}{index}", each["sock"]
    if balloon := config.get("balloon"):
        yield "balloon", "", format_size(balloon["size"])
    if vsock := config.get("vsock"):
        yield "vsock", vsock.get("id") or "_vsock0", f"cid {vsock['cid']}, {vsock['socket']}"
