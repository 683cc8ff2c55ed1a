"""A transformers base model run over the decoding cache: its own forward, or, for Llama-like models, the same
arithmetic with far fewer calls.

A token of a small model costs what its calls cost: transformers makes some eighty per layer, and as much
Python around them. `LlamaLayers` makes about half of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import SiLUActivation

from mahalo_ray.decoding.cpu_matmul import OneDNNLinears, SideBySide
from mahalo_ray.decoding.kv_cache import Branches, RaggedCache, cached_attention
from mahalo_ray.models.attention import View
from mahalo_ray.models.backbone import row_independent_context
from mahalo_ray.models.lean_layers import LLAMA_LIKE


@contextmanager
def memory_errors_alike() -> Iterator[None]:
    """OutOfMemoryError in the block where the CPU has no memory, as on a GPU: PyTorch has a RuntimeError."""
    try:
        yield
    except RuntimeError as error:  # OutOfMemoryError is one
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" not in str(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


class CachedBackbone:
    """A transformers base model (no head) run over the decoding cache. Architectures for which the cache
    would give other hidden states than the model itself are refused at load, by name (ValueError)."""

    def __init__(
        self, backbone: nn.Module, around: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        """`around` gives a context for every forward (an adapter switched off)."""
        # Models that also see keep their language model's settings one level down.
        config = cast(PretrainedConfig, backbone.config).get_text_config()
        self.model, self.config, self._around = backbone, config, around
        self._onednn = OneDNNLinears(backbone)
        self._layers = LlamaLayers.of(backbone, self._onednn)
        self.name = type(backbone).__name__
        values = config.to_dict()
        unsupported = sorted(set(values.get("layer_types") or ()) - {"full_attention", "sliding_attention"})
        if unsupported:
            raise self._refusal(
                f"it has {', '.join(unsupported)} layers, and the decoding cache keeps keys and values only"
            )
        self.device = next(backbone.parameters()).device
        self._check()
        if not hasattr(config, "max_position_embeddings"):
            raise self._refusal("its config does not say how long a context may be")
        self.max_context = min(
            config.max_position_embeddings, _window(values), row_independent_context(config)
        )

    def __call__(self, input_ids: Tensor, position_ids: Tensor, kv_cache: View) -> Tensor:
        """[B, T] -> [B, T, D], no gradients."""
        if self._layers is not None and not self.model.training:
            # Plain linear layers are multiplied by the layers' own calls; what others hold is swapped.
            swapped = nullcontext() if self._layers.all_plain else self._onednn()
            with torch.no_grad(), self._around(), swapped:
                return self._layers(input_ids, position_ids, kv_cache)
        with torch.no_grad(), cached_attention(self.config), self._around(), self._onednn():
            out = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=False,
                kv_cache=kv_cache,
            )
        return out.last_hidden_state

    def _check(self) -> None:
        """Decode a few tokens over the cache and compare every state with one whole forward.

        Two prompts of different lengths are read together, then each is continued by two branches, token by
        token: a family may be right in a prefill and wrong in what follows (a state of its own that the cache
        does not keep), for one row and wrong for its neighbours, or crash at the first single token.
        ValueError, naming the family and what to do, for one that differs or cannot be called this way.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with memory_errors_alike():
                decoded, expected, cached = self._probe()
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # What the families' own code does when it meets a cache that it does not know.
            raise self._refusal(f"{type(error).__name__}: {error}") from error
        finally:
            self.model.train(was_training)
        if cached != self.config.num_hidden_layers:
            layers = self.config.num_hidden_layers
            raise self._refusal(f"{cached} of its {layers} layers use transformers' attention interface")
        if not same_states(decoded, expected):
            raise self._refusal("its states differ from those of one forward over the whole text")

    def _probe(self) -> tuple[Tensor, Tensor, int]:
        """States [N, D] of the same tokens over the cache and by whole forwards, and the layers cached."""
        vocabulary, device = self.config.vocab_size, self.device
        prompts = torch.tensor([[0, 1], [2, 0]], device=device) % vocabulary
        lengths, width = np.array([2, 1]), 2  # the second row is padded
        # Two steps of 2 rows x 2 branches.
        steps = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]], device=device) % vocabulary
        cache = RaggedCache(initial_capacity=2)
        slots = cache.add(2)
        view = cache.append(slots, lengths, width)
        states = self(prompts, view.positions(width, device), view)
        view.commit()
        decoded = [states[0, :2], states[1, :1]]
        branches = Branches(cache, slots, columns=2)
        following = []
        for tokens in steps:
            following.append(self(tokens[:, None], branches.positions(1, device), branches)[:, 0])
            branches.advance(1)
        expected: list[Tensor] = []
        whole_states = []
        for row, length in enumerate(lengths.tolist()):
            for branch in range(2):
                ids = torch.cat([prompts[row, :length], steps[:, 2 * row + branch]])[None]
                with torch.no_grad(), self._around():
                    whole_states.append(self.model(input_ids=ids, use_cache=False).last_hidden_state[0])
            expected.append(whole_states[2 * row][:length])
        decoded += following
        expected += [torch.stack([states[number - 2] for states in whole_states]) for number in range(2)]
        return torch.cat(decoded), torch.cat(expected), len(cache.keys)

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.name} cannot be decoded over the shared cache: {reason}. Choose a Llama-like, Qwen, "
            "Gemma or GPT-2 model, or let a completion server decode this one (`CompletionDecoder`)"
        )


def _window(config: dict[str, Any]) -> int:
    """The sliding window of the layers that have one, else no limit: the cache keeps whole contexts, so a
    model with windows is decoded as far as its window reaches.
    """
    kinds, window = config.get("layer_types"), config.get("sliding_window")
    used = config.get("use_sliding_window", True) if kinds is None else "sliding_attention" in kinds
    return int(window) if used and window else sys.maxsize


def same_states(decoded: Tensor, expected: Tensor) -> bool:
    """Whether states [N, D] are equal up to rounding, relative to the largest value.

    In half precision a quarter of the tokens may differ: where a router chooses among experts, rounding alone
    can send a token to another one.
    """
    exact = expected.dtype == torch.float32
    tolerance = (1e-4 if exact else 0.05) * max(float(expected.abs().max()), 1e-6)
    different = ((decoded - expected).abs().amax(dim=-1) > tolerance).float().mean()
    return bool(different <= (0.0 if exact else 0.25)) and bool(decoded.isfinite().all())


class _Layers:
    """Linear layers that read one input: through one product where that is faster, else one by one. LoRA and
    other layers that stand for linear ones are called as they are."""

    def __init__(self, layers: Sequence[nn.Module], fast: OneDNNLinears) -> None:
        self._layers = layers
        self._together: SideBySide | None = fast.together(layers)
        self._plain = [layer for layer in layers if type(layer) is nn.Linear]

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """The output of every layer."""
        if self._together is not None:
            return self._together.parts(x)
        if len(self._plain) == len(self._layers):  # without what Module does around a call
            return [F.linear(x, layer.weight, layer.bias) for layer in self._plain]
        return [layer(x) for layer in self._layers]

    def whole(self, x: Tensor) -> Tensor:
        """All outputs behind each other."""
        product = None if self._together is None else self._together.product(x)
        return torch.cat(tuple(self.parts(x)), dim=-1) if product is None else product


class _LlamaLayer:
    """One layer of a Llama-like model: the module's own parameters, the same operations on the same
    numbers."""

    def __init__(self, layer: Any, fast: OneDNNLinears) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._number: int = attention.layer_idx
        self._scaling: float = attention.scaling
        self._size: int = attention.head_dim
        self._input_norm = _Norm(layer.input_layernorm)
        self._mlp_norm = _Norm(layer.post_attention_layernorm)
        children = dict(attention.named_children())
        self._head_norms = (
            (_Norm(attention.q_norm), _Norm(attention.k_norm)) if "q_norm" in children else None
        )
        self._queries: int = attention.config.num_attention_heads
        self._values: int = attention.config.num_key_value_heads
        self._qkv = _Layers([attention.q_proj, attention.k_proj, attention.v_proj], fast)
        self._out, self._down = _Layers([attention.o_proj], fast), _Layers([mlp.down_proj], fast)
        self._gate_up = _Layers([mlp.gate_proj, mlp.up_proj], fast)
        self._activation = F.silu if type(mlp.act_fn) is SiLUActivation else mlp.act_fn

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, view: View) -> Tensor:
        """hidden [B, T, D]; cos, sin [B, T, 1, size of a head], sin with its first half negated."""
        rows, width, _ = hidden.shape
        heads = self._qkv.whole(self._input_norm(hidden)).view(rows, width, -1, self._size)
        to_turn = heads[:, :, : -self._values]
        if self._head_norms is not None:
            query, key = to_turn[:, :, : self._queries], to_turn[:, :, self._queries :]
            to_turn = torch.cat([self._head_norms[0](query), self._head_norms[1](key)], dim=2)
        # Queries and keys are turned together. x * cos + (-x2, x1) * sin is what transformers computes; the
        # minus stands in the table instead, and rolling by half a head exchanges x1 and x2.
        turned = (to_turn * cos).add_(to_turn.roll(self._size // 2, -1).mul_(sin)).transpose(1, 2)
        attended = view.attend(
            self._number,
            turned[:, : self._queries],
            turned[:, self._queries :],
            heads[:, :, -self._values :].transpose(1, 2),
            self._scaling,
            None,
        )
        hidden = hidden + self._out.whole(attended.reshape(rows, width, -1))
        gate, up = self._gate_up.parts(self._mlp_norm(hidden))
        return hidden + self._down.whole(self._activation(gate).mul_(up))


class _Norm:
    """A root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, module: nn.Module) -> None:
        self._module = cast(Any, module)
        self._shape, self._epsilon = tuple(self._module.weight.shape), self._module.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:  # torch rounds once, transformers twice
            normalised: Tensor = self._module(x)
            return normalised
        return F.rms_norm(x, self._shape, self._module.weight, self._epsilon)


class LlamaLayers:
    """The forward of a Llama-like base model in evaluation: as transformers', with fewer calls."""

    @classmethod
    def of(cls, backbone: nn.Module, fast: OneDNNLinears) -> LlamaLayers | None:
        """None for a model of another kind, or with hooks, which want to see every module called."""
        model = backbone.get_base_model() if isinstance(backbone, PeftModel) else backbone
        if type(model) not in LLAMA_LIKE:
            return None
        if any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules()):
            return None
        return cls(cast(Any, model), fast)

    def __init__(self, model: Any, fast: OneDNNLinears) -> None:
        self.all_plain = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        self._embed, self._rotary = model.embed_tokens, model.rotary_emb
        self._layers = [_LlamaLayer(layer, fast) for layer in model.layers[: model.config.num_hidden_layers]]
        self._norm = _Norm(model.norm)

    def __call__(self, input_ids: Tensor, position_ids: Tensor, view: View) -> Tensor:
        """[B, T] -> [B, T, D]."""
        hidden: Tensor = self._embed(input_ids)
        cos, sin = self._rotary(hidden, position_ids)
        first, second = sin.chunk(2, dim=-1)
        cos, sin = cos.unsqueeze(2), torch.cat([-first, second], dim=-1).unsqueeze(2)
        for layer in self._layers:
            hidden = layer(hidden, cos, sin, view)
        return self._norm(hidden)
