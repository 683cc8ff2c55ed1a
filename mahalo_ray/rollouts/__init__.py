"""Tutor and student play dialogues: candidates, Monte-Carlo continuations, scores, pairs; on Ray actors."""
