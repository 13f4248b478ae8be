"""Test rows and general text → what baseline asks of a model, as tokens."""
