"""Judges applied, the comparison table and the report."""
