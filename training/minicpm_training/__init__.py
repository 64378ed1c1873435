"""Data, schedule, trainer."""
