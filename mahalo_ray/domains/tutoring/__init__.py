"""Multi-turn tutoring: problems, simulated students, scripted tutors, and the judge of a dialogue."""
