# SPDX-License-Identifier: Apache-2.0
"""SAM's and MedSAM's own files (sam_vit_b_01ec64.pth, medsam_vit_b.pth) under the names of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["architecture", "renamed"]

_POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_TRANSFORMER = r"^mask_decoder\.transformer\."
_MLP = r"^mask_decoder\.(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.layers\."
_RULES = [  # in this order, each on what the ones before have made
    (r"^image_encoder\.", "vision_encoder."),
    (r"^vision_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^vision_encoder\.blocks\.(\d+)\.norm", r"vision_encoder.layers.\1.layer_norm"),
    (r"^vision_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^vision_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^vision_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^vision_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^vision_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"^prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (rf"{_TRANSFORMER}layers\.(\d+)\.norm", r"mask_decoder.transformer.layers.\1.layer_norm"),
    (rf"{_TRANSFORMER}norm_final_attn\.", "mask_decoder.transformer.layer_norm_final_attn."),
    (r"^mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (rf"{_MLP}0\.", r"mask_decoder.\1.proj_in."),
    (rf"{_MLP}1\.", r"mask_decoder.\1.layers.0."),
    (rf"{_MLP}2\.", r"mask_decoder.\1.proj_out."),
]


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return SAM's own tensors by the names of transformers' SamModel; other names stay as they are.

    >>> import torch
    >>> from semisam.generalists.sam_names import renamed
    >>> list(renamed({"image_encoder.neck.0.weight": torch.zeros(1)}))
    ['vision_encoder.neck.conv1.weight']
    """
    made = {}
    for name, value in state.items():
        if name == _POSITIONS:  # points and the image's grid share it
            made["shared_image_embedding.positional_embedding"] = value
            made["prompt_encoder.shared_embedding.positional_embedding"] = value
            continue
        new = name
        for pattern, replacement in _RULES:
            new = re.sub(pattern, replacement, new)
        made[new] = value
    return made


def architecture(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return what transformers' SamConfig needs to know of SAM's own tensors: ViT-B, -L, -H or another.

    The decoder's heads leave no trace in the tensors: SAM has 8. Raises KeyError for a missing tensor.

    >>> from semisam.generalists.sam_names import architecture
    >>> architecture({})
    Traceback (most recent call last):
    KeyError: 'image_encoder.pos_embed'
    """
    blocks = _count(state, r"^image_encoder\.blocks\.(\d+)\.")
    grid, width = state["image_encoder.pos_embed"].shape[1::2]
    patch = state["image_encoder.patch_embed.proj.weight"].shape[-1]
    tables = [state[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape for i in range(blocks)]
    windowed = [(length + 1) // 2 for length, _ in tables if length != 2 * grid - 1]
    square = {"image_size": int(grid * patch), "patch_size": int(patch)}
    channels = int(state["image_encoder.neck.0.weight"].shape[0])
    inner = state["mask_decoder.transformer.layers.0.cross_attn_token_to_image.q_proj.weight"].shape[0]
    return {
        "vision_config": {
            "hidden_size": int(width),
            "output_channels": channels,
            "num_hidden_layers": blocks,
            "num_attention_heads": int(width // tables[0][1]),
            "window_size": int(windowed[0]) if windowed else 0,
            "global_attn_indexes": [i for i, (length, _) in enumerate(tables) if length == 2 * grid - 1],
            "num_pos_feats": int(state[_POSITIONS].shape[1]),
            "mlp_dim": int(state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0]),
            **square,
        },
        "prompt_encoder_config": {
            "hidden_size": channels,
            "mask_input_channels": int(state["prompt_encoder.mask_downscaling.3.weight"].shape[0]),
            **square,
        },
        "mask_decoder_config": {
            "hidden_size": channels,
            "num_hidden_layers": _count(state, r"^mask_decoder\.transformer\.layers\.(\d+)\."),
            "mlp_dim": int(state["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0]),
            "attention_downsample_rate": int(channels // inner),
            "num_multimask_outputs": int(state["mask_decoder.mask_tokens.weight"].shape[0] - 1),
            "iou_head_hidden_dim": int(state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0]),
        },
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for match in (re.match(pattern, name) for name in state) if match})
