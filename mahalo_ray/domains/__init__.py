"""What each kind of problem looks like: prompts, step boundaries, checkers, judges, data."""
