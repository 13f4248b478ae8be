"""Prepared rows → token ids and loss masks."""
