"""The devices that the back-ends' commands serve, made of their options."""
