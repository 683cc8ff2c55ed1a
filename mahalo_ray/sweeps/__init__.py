"""Sweeps over decoding weights and what their fronts look like."""
