"""Decoding: many conversations at once over a shared-trunk cache, and guidance by a process reward model. No
Ray."""
