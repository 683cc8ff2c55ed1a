"""Maths: problems solved step by step, where a response should be right and a pleasure to follow."""
