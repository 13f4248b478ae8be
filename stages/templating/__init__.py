"""Conversations → text by the tokenizer's chat template, and where the answers stand in it."""
