"""Records, storage and templating: how data looks and where it lies."""
