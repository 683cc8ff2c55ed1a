"""Tutor and student play dialogues: candidates, Monte-Carlo continuations, scores, pairs; spread over Ray actors."""
