"""Shared by all commands: the terminal, errors as one line, requests to stop. Nothing here shapes an output."""
