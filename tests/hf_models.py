# SPDX-License-Identifier: Apache-2.0
"""Small models of the SAM families, with random weights that leave nothing at zero."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

WIDTH = 32
DECODER = {"hidden_size": WIDTH, "mlp_dim": 64, "num_attention_heads": 8, "iou_head_hidden_dim": WIDTH}
MAPS = [[16, 16], [8, 8], [4, 4]]  # of SAM 2 and 3: of a square in 4 x 4 patches


def sam_config() -> Any:
    """A square of 64 pixels in 8 x 8 patches: mask prompts of 32 x 32."""
    import transformers  # noqa: PLC0415

    square = {"image_size": 64, "patch_size": 8}
    vision = {"hidden_size": WIDTH, "output_channels": WIDTH, "num_hidden_layers": 2, "window_size": 3}
    vision |= {
        "num_attention_heads": 4,
        "global_attn_indexes": [1],
        "num_pos_feats": WIDTH // 2,
        "mlp_dim": 64,
    }
    return transformers.SamConfig(
        vision_config=vision | square,
        prompt_encoder_config={"hidden_size": WIDTH, "mask_input_channels": 8, **square},
        mask_decoder_config=DECODER,
    )


def sam2_parts() -> dict[str, Any]:
    """A square of 64 pixels in 4 x 4 patches: mask prompts of 16 x 16."""
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [64, 64]}
    backbone |= {"embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 2, 2, 4]}
    backbone |= {"blocks_per_stage": [1, 1, 2, 1], "window_size_per_stage": [4, 2, 2, 2]}
    backbone |= {"global_attention_blocks": [3], "window_positional_embedding_background_size": [2, 2]}
    vision = {"backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8]}
    vision |= {"backbone_feature_sizes": MAPS, "fpn_hidden_size": WIDTH}
    square = {"hidden_size": WIDTH, "image_size": 64, "patch_size": 16, "mask_input_channels": 8}
    return {"vision_config": vision, "prompt_encoder_config": square, "mask_decoder_config": DECODER}


def sam2_config() -> Any:
    import transformers  # noqa: PLC0415

    return transformers.Sam2Config(**sam2_parts())


def sam3_config() -> Any:
    """A square of 56 pixels in 4 x 4 patches: mask prompts of 16 x 16, cells of 3.5 pixels."""
    import transformers  # noqa: PLC0415

    square = {"image_size": 56, "patch_size": 14}
    backbone = {"model_type": "sam3_vit_model", "hidden_size": WIDTH, "intermediate_size": 64, **square}
    backbone |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "window_size": 2,
        "global_attn_indexes": [1],
    }
    backbone |= {"pretrain_image_size": 28}
    vision = {"model_type": "sam3_vision_model", "backbone_config": backbone, "fpn_hidden_size": WIDTH}
    return transformers.Sam3TrackerConfig(
        vision_config=vision | {"backbone_feature_sizes": MAPS},
        prompt_encoder_config={"hidden_size": WIDTH, "mask_input_channels": 8, **square},
        mask_decoder_config=DECODER,
    )


def randomised(model: Any, seed: int = 0) -> Any:
    """The model with weights that make every part of it matter."""
    generator = torch.Generator().manual_seed(seed)
    codes = [(n, b) for n, b in model.named_buffers() if n.endswith("positional_embedding")]
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *codes]:
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif parameter.ndim == 1 or "embed" in name or "token" in name or "rel_pos" in name:
                parameter.copy_(0.5 * noise)
            else:
                # Ratings of masks are sigmoids, which large weights would make equal.
                gain = 0.1 if name.endswith("iou_prediction_head.proj_out.weight") else 1.0
                parameter.copy_(gain * noise / math.sqrt(parameter[0].numel()))
    return model.eval()


@functools.cache
def small(name: str) -> Any:
    """The small model of a generalist, by its name; do not change it."""
    import transformers  # noqa: PLC0415

    if name == "sam2":
        return randomised(transformers.Sam2Model(sam2_config()))
    if name == "sam3":
        return randomised(transformers.Sam3TrackerModel(sam3_config()))
    return randomised(transformers.SamModel(sam_config()), seed=int(name == "medsam"))
