"""Scores and answers of rows → numbers with intervals, differences, sentences."""
