"""One configuration in the words of two generations of clients.

Clients of Cloud Hypervisor 0.3 say ``cpus.cpu_count``, ``kernel.path`` and ``cmdline.args``; those of today
``cpus.boot_vcpus``, ``payload.kernel`` and ``payload.cmdline``. Either is understood, and answers hold both.

Today's clients also send, and want back, fields that ask for what pileus does not have. Each such field is
accepted with the values in ``NEUTRAL``, which ask for nothing, and answered with the first of them.
"""

import json

from pileus.config import wire
from pileus.config.declare import Struct
from pileus.config.kinds import Many, Nested
from pileus.config.model import VmConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Json = Any

OLD = {  # where release 0.3 (or the next few, for the initramfs) had it -> where it is today
    ("cpus", "cpu_count"): ("cpus", "boot_vcpus"),
    ("kernel", "path"): ("payload", "kernel"),
    ("cmdline", "args"): ("payload", "cmdline"),
    ("initramfs", "path"): ("payload", "initramfs"),
}
BACKENDS = {"vhost_user_net": "VhostUserNetConfig", "vhost_user_blk": "VhostUserBlkConfig"}
VU_CFG = ("sock", "num_queues", "queue_size")  # what release 0.3 had one level further down there
NONE: "tuple[Json, ...]" = (None, [])
NEUTRAL: "dict[str, dict[str, tuple[Json, ...]]]" = {  # struct -> field -> values, unless the model has it
    "VmConfig": {
        **dict.fromkeys(("rate_limit_groups", "disks", "fs", "pmem", "devices", "user_devices"), NONE),
        **dict.fromkeys(("vdpa", "sgx_epc", "numa", "pci_segments", "landlock_rules"), NONE),
        **dict.fromkeys(("balloon", "platform", "tpm"), (None,)),
        "vsock": NONE,
        "debug_console": ({"file": None, "mode": "Off", "iobase": 233}, None),
        "iommu": (False, True, None),  # it is there where a device is behind it
        "watchdog": (False, None),
        "pvpanic": (True, False, None),  # always there
        "landlock_enable": (False, None),
    },
    "CpusConfig": {
        "kvm_hyperv": (False, None),
        "nested": (True, None),
        "features": ({"amx": False}, None),
    },
    "MemoryConfig": {
        "hotplug_method": ("Acpi", None),
        "hotplug_size": (None, 0),
        "hotplugged_size": (None, 0),
        "reserve": (False, None),
        "zones": NONE,
    },
    "PayloadConfig": {"firmware": (None,), "igvm": (None,), "host_data": (None,)},
    "SerialConfig": {"iommu": (False, None)},
    "ConsoleConfig": {},
    "RngConfig": {},
    "BalloonConfig": {},
    "PmemConfig": {"pci_segment": (0, None)},
    "FsConfig": {"id": (None,), "pci_segment": (0, None)},
    "DiskConfig": {
        "vhost_user": (False, None),
        "vhost_socket": (None,),
        "rate_limiter_config": (None,),
        "rate_limit_group": (None,),
        "pci_segment": (0, None),
        "queue_affinity": NONE,
        "disable_io_uring": (False, None),
        "disable_aio": (False, None),
        "backing_files": (False, None),
        "sparse": (True, None),
    },
    "NetConfig": {
        "vhost_user": (False, None),
        "vhost_socket": (None,),
        "vhost_mode": ("Client", None),
        "rate_limiter_config": (None,),
        "rate_limit_group": (None,),
        "pci_segment": (0, None),
    },
}
DEFAULTS: "dict[str, dict[str, Json]]" = {  # today's defaults of what its clients cannot read as null
    "CpusConfig": {"max_phys_bits": 46},
}
NEVER_NULL = {
    "NetConfig": ("ip", "mask", "mac"),
    "DiskConfig": ("image_type",),
}  # left out where today's clients cannot read null


def decode(body: "Json") -> VmConfig:
    """The configuration that a vm.create's ``body`` of either generation describes. Raises ConfigError."""
    if type(body) is not dict:
        raise wire.refused("the body", body, "it takes an object")
    return wire.decode(VmConfig, _without_neutral(VmConfig, _renewed(body), ""))


def encode(config: VmConfig) -> "dict[str, Json]":
    """``config`` in the words of both generations."""
    body = _with_neutral(VmConfig, wire.encode(config))
    for (old, old_name), (new, new_name) in OLD.items():
        value = body[new][new_name]
        if old in body:
            body[old] = {**body[old], old_name: value}
        else:
            body[old] = None if value is None else {old_name: value}
    for fs in body["fs"] or ():
        fs["sock"] = fs["socket"] = fs["socket"] or fs["sock"]
    for name in BACKENDS:
        for each in body[name] or ():
            each["vu_cfg"] = {key: each[key] for key in VU_CFG}
    return body


def schemas() -> "dict[str, Json]":
    """What ``decode`` takes: JSON Schemas by the names of the structs."""
    found = {}
    for struct in wire.structs(VmConfig):
        schema = wire.schema(struct)
        for name, values in _neutral(struct).items():
            schema["properties"][name] = {"enum": list(values), "description": "not there yet"}
        found[struct.__name__] = schema
    for (old, old_name), (new, new_name) in OLD.items():
        nested = VmConfig.fields[new].kind
        assert isinstance(nested, Nested)
        today = found[nested.struct.__name__]["properties"][new_name]
        renewed = {**today, "description": f"{new}.{new_name} of release 0.3", "deprecated": True}
        if old == new:
            found[nested.struct.__name__]["properties"][old_name] = renewed
        else:
            found["VmConfig"]["properties"][old] = {
                "type": ["object", "null"],
                "properties": {old_name: renewed},
                "additionalProperties": False,
                "deprecated": True,
            }
    for struct_name in BACKENDS.values():
        schema = found[struct_name]
        schema.pop("required", None)  # it may be in either place
        schema["properties"]["sock"]["type"] = ["string", "null"]
        schema["properties"]["vu_cfg"] = {
            "type": ["object", "null"],
            "properties": {key: schema["properties"][key] for key in VU_CFG},
            "additionalProperties": False,
            "deprecated": True,
        }
    return found


def _renewed(body: "dict[str, Json]") -> "dict[str, Json]":
    """``body`` with what only release 0.3 says said as today."""
    body = {name: dict(value) if type(value) is dict else value for name, value in body.items()}
    for (old, old_name), (new, new_name) in OLD.items():
        parent = body.get(old)
        if parent is None:
            if old != new:
                body.pop(old, None)
            continue
        if type(parent) is not dict:
            raise wire.refused(old, parent, "it takes an object")
        value = parent.pop(old_name, None)
        if old != new:
            for unknown in parent:
                raise wire.refused(wire.join(old, unknown), parent[unknown], f"the only field is {old_name}")
            del body[old]
        if value is not None:
            _say(body, f"{old}.{old_name}", new, new_name, value)
    for name in ("fs", *BACKENDS):
        if type(devices := body.get(name)) is list:
            body[name] = [_renewed_device(each, f"{name}[{index}]") for index, each in enumerate(devices)]
    return body


def _renewed_device(device: "Json", where: str) -> "Json":
    """A shared directory's ``sock`` is its ``socket``; a back-end's ``vu_cfg`` belongs to it itself."""
    if type(device) is not dict:
        return device
    device = dict(device)
    if where.startswith("fs"):
        if (sock := device.pop("sock", None)) is not None:
            _agree(device, "socket", sock, f"{where}.sock")
        return device
    inner = device.pop("vu_cfg", None)
    if inner is None:
        return device
    if type(inner) is not dict:
        raise wire.refused(f"{where}.vu_cfg", inner, "it takes an object")
    for key, value in inner.items():
        if key not in VU_CFG:
            raise wire.refused(wire.join(f"{where}.vu_cfg", key), value, f"fields are {', '.join(VU_CFG)}")
        if value is not None:
            _agree(device, key, value, f"{where}.vu_cfg.{key}")
    return device


def _agree(target: "dict[str, Json]", name: str, value: "Json", old: str) -> None:
    """Put ``value``, found as ``old``, into ``target``, which may not say another thing."""
    today = target.get(name)
    if today is not None and not _same(today, value):
        raise wire.refused(old, value, f"{name} says another thing; one of them is enough")
    target[name] = value


def _say(body: "dict[str, Json]", old: str, new: str, name: str, value: "Json") -> None:
    """Put ``value``, found as ``old``, where it belongs today."""
    target = body.get(new)
    if target is None:
        target = body[new] = {}
    if type(target) is not dict:
        raise wire.refused(new, target, "it takes an object")
    today = target.get(name)
    if today is not None and not _same(today, value):
        raise wire.refused(old, value, f"{new}.{name} says another thing; one of them is enough")
    target[name] = value


def _without_neutral(struct: type[Struct], value: "Json", where: str) -> "Json":
    """``value`` without the fields that ask for nothing. Raises ConfigError for one that asks."""
    if type(value) is not dict:
        return value  # to be refused by who reads it
    kept = dict(value)
    for name, values in _neutral(struct).items():
        if name in kept:
            asked = kept.pop(name)
            if not any(_same(asked, each) for each in values):
                allowed = " or ".join(json.dumps(each) for each in values)
                raise wire.refused(wire.join(where, name), asked, f"only {allowed} is possible yet")
    if kept.get("mode") == "Pty":
        kept.pop("file", None)  # as vm.info told it
    for name, field in wire.wire_fields(struct).items():
        if isinstance(field.kind, Many) and type(kept.get(name)) is list:
            inner = field.kind.struct
            kept[name] = [
                _without_neutral(inner, each, f"{name}[{index}]") for index, each in enumerate(kept[name])
            ]
        elif isinstance(field.kind, Nested) and not isinstance(field.kind, Many) and name in kept:
            kept[name] = _without_neutral(field.kind.struct, kept[name], name)
    return kept


def _with_neutral(struct: type[Struct], value: "dict[str, Json]") -> "dict[str, Json]":
    """``value`` with all fields that clients of today look for."""
    name = struct.__name__
    full = {key: values[0] for key, values in _neutral(struct).items()} | value
    for key, default in DEFAULTS.get(name, {}).items():
        if full[key] is None:
            full[key] = default
    for key in NEVER_NULL.get(name, ()):
        if full[key] is None:
            del full[key]
    for key, field in wire.wire_fields(struct).items():
        if isinstance(field.kind, Many):
            inner = field.kind.struct
            full[key] = [_with_neutral(inner, each) for each in full[key] or ()] or None
        elif isinstance(field.kind, Nested) and full[key] is not None:
            full[key] = _with_neutral(field.kind.struct, full[key])
    return full


def _neutral(struct: type[Struct]) -> "dict[str, tuple[Json, ...]]":
    """What the model has is no matter of this table any more."""
    own = wire.wire_fields(struct)
    table = NEUTRAL.get(struct.__name__, {})
    return {name: values for name, values in table.items() if name not in own}


def _same(one: "Json", other: "Json") -> bool:
    """Equal in JSON, where false is not 0."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
