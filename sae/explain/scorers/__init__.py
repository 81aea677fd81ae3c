"""Scores of explanations; each has an interval, a chance floor and its failures in the count."""
