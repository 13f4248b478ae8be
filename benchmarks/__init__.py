"""Measurements beside other trainers: `make bench`."""
