"""Serving: an OpenAI-compatible endpoint on Ray Serve with decoding and guidance weights per request."""
