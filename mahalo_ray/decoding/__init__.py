"""Decoding: many conversations at once over a shared-prefix cache, and guidance by a process reward model. No
Ray."""
