"""The run as a chain of stages: fingerprints, manifests, the Ray session, progress, the stages themselves."""
