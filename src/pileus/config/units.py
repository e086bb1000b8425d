"""Sizes, counts and switches as the user writes them. Each reader raises ValueError for anything else."""

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
SUFFIXES = {"K": KIB, "M": MIB, "G": GIB, "T": TIB}  # powers of two, upper case only
SIZE_MAX = (1 << 64) - 1
SWITCHES = {"on": True, "off": False, "true": True, "false": False}


def parse_count(text: str) -> int:
    """A decimal number without a sign; blanks around it do not matter."""
    return _digits(text.strip())


def parse_size(text: str) -> int:
    """Bytes: a decimal number and perhaps one of ``SUFFIXES``."""
    number = text.strip()
    unit = SUFFIXES.get(number[-1:], 1)
    size = _digits(number[:-1] if unit > 1 else number) * unit
    if size > SIZE_MAX:
        raise ValueError(f"{text!r} does not fit into 64 bits")
    return size


def format_size(size: int) -> str:
    """The shortest exact form that ``parse_size`` reads back."""
    for suffix, unit in reversed(SUFFIXES.items()):
        if size and size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)


def parse_switch(text: str) -> bool:
    try:
        return SWITCHES[text.strip()]
    except KeyError:
        raise ValueError(f"{text!r} is neither on nor off") from None


def format_switch(value: bool) -> str:
    return "on" if value else "off"


def _digits(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is not a decimal number")
    return int(text)
