"""The human values miniature: questions about facts, of which the model knows a part."""
