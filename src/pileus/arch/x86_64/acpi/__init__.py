"""ACPI for a hardware-reduced machine: what the guest's kernel learns its hardware from."""
