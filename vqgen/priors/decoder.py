"""The pass of a transformer over new tokens of growing sequences, whose earlier keys and values are in a cache."""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

PLAIN = ("llama", "mistral", "qwen3")  # the model types whose layers `LlamaDecoder` has
FEW = 16  # columns; MKL multiplies fewer columns two to three times as fast if each is contiguous


Places = slice | Tensor  # places in the sequences: a slice; or a tensor (1,), so that one CUDA graph serves them all
EVERYWHERE = slice(None)


class Decoder(Protocol):
    """Appends tokens to a fixed number of sequences, and tells what follows."""

    def __call__(self, tokens: Tensor, rows: slice, places: Places) -> Tensor:
        """Logits (R, V) of what follows the tokens (R, n), which become the sequences `rows` at n places in a row.

        These sequences must have tokens at all earlier places already.
        """
        ...


def decoder_of(
    lm: Any,
    batch: int,
    length: int,
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    added: Tensor | None = None,
) -> Decoder:
    """The fastest decoder of a causal language model of transformers. It must not outlive a change of the weights.

    Args:
        lm: the model, in eval mode.
        batch: number of sequences of a group.
        length: largest number of tokens of a sequence.
        groups: number of groups. Sequences of a group must be passed together.
        dtype: torch.bfloat16 computes in bf16.
        added: (groups batch, length, width), what is added to the embeddings of the tokens.
    """
    if is_plain(lm):
        return LlamaDecoder(lm, groups * batch, length, dtype, added)
    return AnyDecoder(lm, batch, dtype, added)


def is_plain(lm: Any) -> bool:
    """Whether `LlamaDecoder` computes what this model does."""
    config = lm.config
    return (
        config.model_type in PLAIN
        and config.rope_parameters["rope_type"] == "default"
        and config.hidden_act == "silu"
        and (getattr(config, "sliding_window", None) or math.inf) >= config.max_position_embeddings
        and all(module.bias is None for module in lm.modules() if isinstance(module, nn.Linear))
    )


def cache_bytes(lm: Any, length: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of a sequence of so many tokens; of any model, as if all its layers had some."""
    config = lm.config
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    width *= getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers * 2 * width * length * dtype.itemsize


class AnyDecoder:
    """The model's own pass in transformers, one for each group of sequences."""

    def __init__(self, lm: Any, batch: int, dtype: torch.dtype, added: Tensor | None = None):
        self.lm, self.batch, self.dtype, self.added = lm, batch, dtype, added
        self.inputs: dict[int, Tensor] = {}  # by the group's first row: all its inputs, for models without a cache
        self.caches: dict[int, Any] = {}

    def __call__(self, tokens: Tensor, rows: slice, places: Places) -> Tensor:
        name, inputs = "input_ids", tokens
        if self.added is not None:
            name, inputs = "inputs_embeds", self.lm.get_input_embeddings()(tokens) + self.added[rows, places]
        firsts = range(rows.start, rows.stop, self.batch)
        # On CPUs with several threads torch's fused attention rounds a sequence otherwise in other company.
        attention = sdpa_kernel(SDPBackend.MATH) if tokens.device.type == "cpu" else nullcontext()
        with attention, torch.autocast(tokens.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return torch.cat([self._one(name, *each) for each in zip(inputs.split(self.batch), firsts, strict=True)])

    def _one(self, name: str, inputs: Tensor, first: int) -> Tensor:
        whole = torch.cat([self.inputs[first], inputs], dim=1) if first in self.inputs else inputs
        cache = self.caches.get(first)
        output = self.lm(**{name: whole if cache is None else inputs}, past_key_values=cache, use_cache=True)
        self.caches[first] = getattr(output, "past_key_values", None)
        if self.caches[first] is None:
            self.inputs[first] = whole
        return output.logits[:, -1]


class Layer(NamedTuple):
    """One layer's weights.

    Attributes:
        qkv: (heads of q, k and v times D, width), the norm's weight included.
        norm: (heads of q and k, D), the weights of the norms of queries and keys; None if the model has none.
        out: (width, heads of q times D).
        gate_up: (2 times the inner width, width), the norm's weight included.
        down: (width, inner width).
    """

    qkv: Tensor
    norm: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor


class LlamaDecoder:
    """The pass of Llama (Touvron et al. 2023), and of Qwen3, which has norms of queries and keys.

    Tokens are columns here, (width, R n), and weights stand on the left: CPUs multiply few tokens faster so, and from
    12 columns on a column's result does not depend on the others. RoFormer rotates each pair of features; the two stand
    side by side here, as one complex number, and the queries have the 1 / sqrt(D) of the attention in their weights.

    With bf16, the products between norms and the cache are in bf16; the sums of the layers, norms, rotations and logits
    are in float32, as under autocast.
    """

    def __init__(
        self, lm: Any, batch: int, length: int, dtype: torch.dtype = torch.float32, added: Tensor | None = None
    ):
        self.added = added
        config, model = lm.config, lm.model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size, self.eps = model.layers[0].self_attn.head_dim, config.rms_norm_eps  # size: D
        self.embedding = model.embed_tokens.weight  # (V, width)
        device, width = self.embedding.device, self.embedding.shape[1]
        cos, sin = model.rotary_emb(self.embedding, torch.arange(length, device=device)[None])
        self.rotation = torch.complex(cos, sin)[0, :, None, : self.size // 2]  # (length, 1, D / 2)
        self.layers = [self._layer(layer, dtype) for layer in model.layers]
        self.head = lm.lm_head.weight * model.norm.weight  # (V, width)
        shape = (len(self.layers), 2, batch, self.kv_heads, length, self.size)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)  # keys and values; masked places must be finite
        self.everywhere = torch.arange(length, device=device)
        self.mean = self.embedding.new_full((1, width), 1 / width)

    def _layer(self, layer: Any, dtype: torch.dtype) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        scale = self.size**-0.5
        if hasattr(attention, "q_norm"):
            q, k = self._paired(attention.q_norm.weight * scale), self._paired(attention.k_norm.weight)
            norm, scale = torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)]), 1.0
        else:
            norm = None
        q, k = self._paired(attention.q_proj.weight * scale), self._paired(attention.k_proj.weight)
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        return Layer(
            qkv=(torch.cat([q, k, attention.v_proj.weight]) * layer.input_layernorm.weight).to(dtype),
            norm=norm,
            out=attention.o_proj.weight.to(dtype),
            gate_up=(gate_up * layer.post_attention_layernorm.weight).to(dtype),
            down=mlp.down_proj.weight.to(dtype),
        )

    def _paired(self, weight: Tensor) -> Tensor:
        """The rows of a weight (heads times D, ...), so that the two features of a rotation stand side by side."""
        return weight.unflatten(0, (-1, 2, self.size // 2)).transpose(1, 2).flatten(0, 2)

    def __call__(self, tokens: Tensor, rows: slice, places: Places) -> Tensor:
        (count, n), rotated = tokens.shape, self.heads + self.kv_heads
        if isinstance(places, slice):
            end = places.stop
            seen = self.everywhere[:end] <= self.everywhere[places, None] if n > 1 else None  # (n, end)
        else:
            end, seen = len(self.everywhere), self.everywhere <= places[:, None]
        x = F.embedding(tokens, self.embedding)  # (R, n, width)
        x = x if self.added is None else x + self.added[rows, places]
        x = x.flatten(0, 1).t().contiguous()  # (width, R n)
        rotation = self.rotation[places]  # (n, 1, D / 2)
        for layer, cache in zip(self.layers, self.cache[:, :, rows, :, :end], strict=True):
            qkv = product(layer.qkv, self.normed(x)).t().contiguous().float()  # (R n, heads times D)
            qkv = qkv.view(count, n, -1, self.size)
            qk = qkv[:, :, :rotated]  # (R, n, heads, D)
            if layer.norm is not None:
                qk.mul_(torch.rsqrt(qk.square().mean(3, keepdim=True) + self.eps) * layer.norm)
            torch.view_as_complex(qk.unflatten(3, (-1, 2))).mul_(rotation)  # RoFormer, eq. 34
            q, kv = qkv.split([self.heads, 2 * self.kv_heads], dim=2)
            cache[:, :, :, places] = kv.unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4)  # (2, R, kv heads, n, D)
            keys, values = cache  # (R, kv heads, end, D)
            y = attention(q.transpose(1, 2).to(cache.dtype), keys, values, seen)  # (R, heads, n, D)
            x = added(x, layer.out, y.transpose(1, 2).reshape(count * n, -1).t())
            gate, up = product(layer.gate_up, self.normed(x)).chunk(2)
            x = added(x, layer.down, F.silu(gate).mul_(up))
        return product(self.head, self.normed(x.view(-1, count, n)[..., -1])).t()

    def normed(self, x: Tensor) -> Tensor:
        """RMSNorm (Zhang and Sennrich 2019) of columns (width, R n), without a weight."""
        squares = x * x
        # On CPUs a product sums in half of the time. On GPUs it could be in TF32, whose sums are not exact enough.
        mean = torch.mm(self.mean, squares) if x.device.type == "cpu" else squares.mean(dim=0, keepdim=True)
        return x * (mean + self.eps).rsqrt_()


def product(weight: Tensor, x: Tensor) -> Tensor:
    """The product (m, n) of a weight (m, k) and columns (k, n), in the weight's precision."""
    x = x.to(weight.dtype)
    return torch.mm(weight, x if x.shape[1] >= FEW else x.t().contiguous().t())


def added(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """x (m, n) and the product of a weight (m, k) and columns (k, n)."""
    return x.addmm_(weight, y) if weight.dtype == x.dtype and y.shape[1] >= FEW else x + product(weight, y)


def attention(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """softmax(q k^T) v, which is Vaswani et al. (2017), eq. 1, for queries divided by sqrt(D); (R, heads, n, D).

    Args:
        q: (R, heads, n, D).
        keys: (R, kv heads, end, D), each for a group of the heads of q.
        values: as the keys.
        seen: (n, end) bool, the places that each query sees; None means all.
    """
    if q.is_cuda:
        shared = q.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(q, keys, values, seen, scale=1.0, enable_gqa=shared)
    # Not torch's attention: its fused one depends on the company of a sequence, and its own products take longer.
    scores = q.reshape(*keys.shape[:2], -1, q.shape[3]) @ keys.mT  # (R, kv heads, group n, end)
    if seen is not None:
        scores = scores.unflatten(2, (-1, q.shape[2])).masked_fill(~seen, -torch.inf).flatten(2, 3)
    return (scores.softmax(dim=3) @ values).view_as(q)
