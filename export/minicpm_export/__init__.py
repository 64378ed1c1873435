"""Exports and their certificate."""
