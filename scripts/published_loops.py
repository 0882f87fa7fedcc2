"""Slow ways of doing what vgen does, to be measured against: not used by the package.

Written from descriptions of the published code, to spend time where it does; they give the same tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vgen.generators.mvar import MVAR
from vgen.generators.next_scale import MAX_LOG_SCALE, modulate, unit
from vgen.generators.var import VAR
from vgen.layers import attention


class PublishedVAR:
    """VAR's published inference: modulations computed at every scale, keys and values concatenated at every scale."""

    def __init__(self, model: VAR) -> None:
        self.model, self.config, self.null_class = model, model.config, model.null_class

    def condition(self, class_labels: Tensor) -> Tensor:
        return class_labels

    def new_cache(self, batch: int) -> dict[str, Any]:
        return {"start": 0, "keys": [None] * len(self.model.blocks), "values": [None] * len(self.model.blocks)}

    def __call__(self, context: Tensor, condition: Tensor, cache: dict[str, Any]) -> Tensor:
        model, start = self.model, cache["start"]
        now = model.condition(condition)  # every modulation anew
        x = model.code_embed(context) if start else now.start[:, None] + model.start_position
        place = slice(start, start + x.shape[1])
        x = x + (model.position + model.scale_embed(model._scale_ids(x.device)))[place]
        for layer, (block, modulation) in enumerate(zip(model.blocks, now.blocks, strict=True)):
            gate1, gate2, scale1, scale2, shift1, shift2 = modulation
            normed = modulate(x, scale1, shift1)
            x = x + self._attend(block.attn, normed, cache, layer) * gate1
            normed = modulate(x, scale2, shift2)
            x = x + block.ffn(normed) * gate2
        cache["start"] = place.stop
        return model.head(modulate(x, *now.head))

    def _attend(self, attn: Any, x: Tensor, cache: dict[str, Any], layer: int) -> Tensor:
        batch, length, width = x.shape
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        qkv = F.linear(x, attn.qkv.weight, bias).view(batch, length, 3, attn.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q = unit(q) * attn.log_scale.clamp_max(MAX_LOG_SCALE).exp()
        k = unit(k)
        if cache["keys"][layer] is not None:
            k = torch.cat([cache["keys"][layer], k], dim=2)
            v = torch.cat([cache["values"][layer], v], dim=2)
        cache["keys"][layer], cache["values"][layer] = k, v
        mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return attn.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class RecomputedVAR:
    """No cache at all: every scale runs the whole prefix again under the training mask."""

    def __init__(self, model: VAR) -> None:
        self.model, self.config, self.null_class = model, model.config, model.null_class

    def condition(self, class_labels: Tensor) -> Any:
        return self.model.condition(class_labels)

    def new_cache(self, batch: int) -> list[Tensor]:
        return []

    def __call__(self, context: Tensor, condition: Any, cache: list[Tensor]) -> Tensor:
        cache.append(context if cache else context[:, :0])  # the first scale reads no context
        return self.model(torch.cat(cache, dim=1), condition)[:, -context.shape[1] :]


class PrefixMVAR:
    """M-VAR's published inference: every block keeps the stream of all scales so far, as it is after attention, and at
    each scale runs Mamba over all of it again. With `modulate_again` the modulations are computed at every scale, too,
    as published."""

    def __init__(self, model: MVAR, modulate_again: bool) -> None:
        self.model, self.config, self.null_class = model, model.config, model.null_class
        self.modulate_again = modulate_again

    def condition(self, class_labels: Tensor) -> Any:
        return class_labels if self.modulate_again else self.model.condition(class_labels)

    def new_cache(self, batch: int) -> dict[str, Any]:
        return {"start": 0, "streams": [None] * len(self.model.blocks)}

    def __call__(self, context: Tensor, condition: Any, cache: dict[str, Any]) -> Tensor:
        model, start = self.model, cache["start"]
        now = model.condition(condition) if self.modulate_again else condition
        x = (
            model.code_embed(context.to(model.head.weight.dtype))
            if start
            else now.start[:, None] + model.start_position
        )
        place = slice(start, start + x.shape[1])
        x = x.to(model.stream) + (model.position + model.scale_embed(model._scale_ids(x.device)))[place]
        for layer, (block, modulation) in enumerate(zip(model.blocks, now.blocks, strict=True)):
            x = self._block(block, x, modulation, cache["streams"], layer)
        cache["start"] = place.stop
        return model.head(modulate(x, *now.head).to(model.head.weight.dtype)).to(model.stream)

    def _block(self, block: Any, x: Tensor, modulation: Tensor, streams: list[Any], layer: int) -> Tensor:
        gate1, gate2, gate3, scale1, scale2, scale3, shift1, shift2, shift3 = modulation
        dtype = self.model.head.weight.dtype
        x = x + gate1 * block.attn(modulate(x, scale1, shift1).to(dtype), _plain_attention)
        streams[layer] = x if streams[layer] is None else torch.cat([streams[layer], x], dim=1)
        mixed = block.mamba(modulate(streams[layer], scale2, shift2).to(dtype), None, layer, "auto")
        x = x + gate2 * mixed[:, -x.shape[1] :]
        return x + gate3 * block.ffn(modulate(x, scale3, shift3).to(dtype))


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return attention(q, k, v, None, scale)
