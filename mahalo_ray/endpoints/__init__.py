"""Other people's servers: many requests to one OpenAI-compatible endpoint.

    with Endpoint(config) as endpoint:
        for number, answer in endpoint.chat(ChatRequest([{"role": "user", "content": q}]) for q in questions):
            ...  # Reply or Failure, in the order they finish; `number` is the request's place

A request that fails for good is an answer like another: one bad reply never ends a job.
"""

from mahalo_ray.endpoints.client import ChatRequest, CompletionRequest, Endpoint, Failure, Reply, Usage

__all__ = ["ChatRequest", "CompletionRequest", "Endpoint", "Failure", "Reply", "Usage"]
