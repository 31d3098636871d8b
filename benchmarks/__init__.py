"""Measurements behind the figures of the README; `make bench` runs those that fit a CPU."""
