"""The loops that step through time."""
