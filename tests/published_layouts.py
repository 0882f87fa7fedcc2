"""Names and shapes of the tensors in published VAR and M-VAR checkpoints (spec sections 1.6, 2.6 and 6.3), for any
size."""

from collections.abc import Sequence
from typing import Any

import torch
from golden_weights import State, scale_numbers

Layout = dict[str, tuple[int, ...]]
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "patch_nums")


def var_layout(
    *,
    scales: Sequence[int],
    width: int,
    depth: int,
    heads: int,
    code_dim: int = 32,
    vocab_size: int = 4096,
    classes: int = 1000,
    shared: bool = False,
    qk_norm: bool = True,
) -> Layout:
    """The transformer's table 2.6."""
    c, length = width, sum(side * side for side in scales)

    def linear(name: str, rows: int, columns: int) -> Layout:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    table: Layout = {
        "pos_start": (1, scales[0] ** 2, c),
        "pos_1LC": (1, length, c),
        "lvl_1L": (1, length),
        "attn_bias_for_masking": (1, 1, length, length),
        "class_emb.weight": (classes + 1, c),
        "lvl_embed.weight": (len(scales), c),
        **linear("word_embed", c, code_dim),
        **linear("head_nm.ada_lin.1", 2 * c, c),
        **linear("head", vocab_size, c),
    }
    for i in range(depth):
        block = f"blocks.{i}"
        table |= {f"{block}.attn.{name}": (c,) for name in ("q_bias", "v_bias", "zero_k_bias")}
        table |= {f"{block}.attn.mat_qkv.weight": (3 * c, c), **linear(f"{block}.attn.proj", c, c)}
        table |= linear(f"{block}.ffn.fc1", 4 * c, c) | linear(f"{block}.ffn.fc2", c, 4 * c)
        table |= {f"{block}.ada_gss": (1, 1, 6, c)} if shared else linear(f"{block}.ada_lin.1", 6 * c, c)
        table |= {f"{block}.attn.scale_mul_1H11": (1, heads, 1, 1)} if qk_norm else {}
    return table | (linear("shared_ada_lin.1", 6 * c, c) if shared else {})


def mvar_layout(
    *,
    scales: Sequence[int],
    width: int,
    depth: int,
    expand: int = 2,
    head_width: int = 64,
    state_size: int = 64,
    conv_width: int = 4,
    shared: bool = False,
    **sizes: Any,
) -> Layout:
    """The M-VAR transformer's table 6.3: VAR's with nine modulations, and Mamba-2 in every block."""
    c, inner = width, expand * width
    heads, mixed = inner // head_width, inner + 2 * state_size
    table = var_layout(scales=scales, width=width, depth=depth, shared=shared, **sizes)
    for name in [name for name in table if "ada_lin.1" in name and "head" not in name]:
        table[name] = (9 * c, *table[name][1:])
    for i in range(depth):
        table |= {f"blocks.{i}.ada_gss": (1, 1, 9, c)} if shared else {}
        table[f"blocks.{i}.attn.patch_nums"] = (len(scales),)
        mamba = {
            "dt_bias": (heads,),
            "A_log": (heads,),
            "D": (heads,),
            "in_proj.weight": (inner + mixed + heads, c),  # z, x, B, C, dt
            "conv1d.weight": (mixed, 1, conv_width),
            "conv1d.bias": (mixed,),
            "norm.weight": (inner,),
            "out_proj.weight": (c, inner),
        }
        table |= {f"blocks.{i}.mamba.{name}": shape for name, shape in mamba.items()}
    return table


def tokenizer_layout(
    *,
    num_scales: int,
    base: int = 160,
    multipliers: Sequence[int] = (1, 1, 2, 2, 4),
    blocks: int = 2,
    code_dim: int = 32,
    vocab_size: int = 4096,
    channels: int = 3,
    phi: Sequence[str] = ("qresi_ls.0", "qresi_ls.1", "qresi_ls.2", "qresi_ls.3"),
) -> Layout:
    """The tokenizer's table 1.6: attention at the lowest resolution only."""
    table: Layout = {}
    widths = [base * multiplier for multiplier in multipliers]
    last = len(widths) - 1

    def conv(name: str, rows: int, columns: int, side: int = 3) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = (rows, columns, side, side), (rows,)

    def norm(name: str, size: int) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = (size,), (size,)

    def residual(name: str, width_in: int, width_out: int) -> None:
        norm(f"{name}.norm1", width_in)
        conv(f"{name}.conv1", width_out, width_in)
        norm(f"{name}.norm2", width_out)
        conv(f"{name}.conv2", width_out, width_out)
        if width_in != width_out:
            conv(f"{name}.nin_shortcut", width_out, width_in, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        conv(f"{name}.qkv", 3 * width, width, 1)
        conv(f"{name}.proj_out", width, width, 1)

    def half(name: str, level: str, widths_in: list[int], count: int) -> None:
        for i, width in enumerate(widths):
            for j in range(count):
                residual(f"{name}.{level}.{i}.block.{j}", widths_in[i] if j == 0 else width, width)
                if i == last:
                    attention(f"{name}.{level}.{i}.attn.{j}", width)
        residual(f"{name}.mid.block_1", widths[-1], widths[-1])
        attention(f"{name}.mid.attn_1", widths[-1])
        residual(f"{name}.mid.block_2", widths[-1], widths[-1])

    conv("encoder.conv_in", base, channels)
    half("encoder", "down", [widths[0], *widths[:-1]], blocks)
    for i in range(last):
        conv(f"encoder.down.{i}.downsample.conv", widths[i], widths[i])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", code_dim, widths[-1])
    conv("decoder.conv_in", widths[-1], code_dim)
    half("decoder", "up", [*widths[1:], widths[-1]], blocks + 1)
    for i in range(1, last + 1):
        conv(f"decoder.up.{i}.upsample.conv", widths[i], widths[i])
    norm("decoder.norm_out", base)
    conv("decoder.conv_out", channels, base)
    table["quantize.ema_vocab_hit_SV"] = (num_scales, vocab_size)
    table["quantize.embedding.weight"] = (vocab_size, code_dim)
    for name in (*(f"quantize.quant_resi.{item}" for item in phi), "quant_conv", "post_quant_conv"):
        conv(name, code_dim, code_dim)
    return table


def on_meta(table: Layout, scales: Sequence[int]) -> State:
    """Tensors of these shapes that take no memory; only `lvl_1L` has values."""
    state = {name: torch.empty(shape, device="meta") for name, shape in table.items()}
    return state | ({"lvl_1L": scale_numbers(list(scales))[None]} if "lvl_1L" in table else {})
