"""The host's side of a guest's network: TAP interfaces, their addresses, MAC addresses."""
