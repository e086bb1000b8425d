"""The devices of a PC that have no bus of their own: ports at fixed addresses."""
