# SPDX-License-Identifier: Apache-2.0
"""SAM-Med3D's network in plain torch, under the parameter names of its published weights.

Image encoder (a vision transformer on 16^3 patches), prompt encoder and mask decoder of SAM carried over
to volumes. Two habits of the published network are part of what its weights have learned and are kept:
relative positions are indexed as `_relative` says, and "windowed" attention runs over a grid padded with
zeros to the window's side, where the padding takes part in the softmax. The padded keys of a head differ
in their relative positions alone, so that all of them together act like one more key; `exact_shortcut`
computes that key's score in closed form instead of 2 744 tokens for 512.

Papers: SAM-Med3D (arXiv 2310.15161), Segment Anything (arXiv 2304.02643).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semisam import ops

__all__ = ["Architecture", "SamMed3DNetwork"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network; the defaults are the published ones.

    `side` of the cube it sees, `patch` of a token, `width`, `depth` and `heads` of the encoder,
    `global_blocks` without a window, `window` the side that the others are padded to, `channels` of
    embeddings and decoder (a multiple of 48), `hidden` of the decoder's MLPs and of its quality head.

    >>> from semisam.generalists.sam_med3d_network import Architecture
    >>> Architecture().grid, Architecture.small().grid
    (8, 4)
    """

    side: int = 128
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    window: int = 14
    channels: int = 384
    decoder_heads: int = 8
    hidden: tuple[int, int] = (2048, 256)

    @property
    def grid(self) -> int:
        """Tokens along one axis."""
        return self.side // self.patch

    @property
    def mask_size(self) -> tuple[int, int, int]:
        """Resolution of mask prompts and of the decoder's answers: 4 x the grid."""
        return (4 * self.grid,) * 3

    @classmethod
    def small(cls) -> Architecture:
        """Return the same design with 0.2 M parameters on a cube of 32^3: for tests and trials."""
        return cls(32, 8, 48, 2, 4, (1,), 7, 48, 4, (64, 32))


class SamMed3DNetwork(nn.Module):
    """Image encoder, prompt encoder and mask decoder; names and shapes of `state_dict()` are published ones.

    Use: `embed(images)` once, `decode(...)` for every round of prompts.

    >>> import torch
    >>> from semisam.generalists.sam_med3d_network import Architecture, SamMed3DNetwork
    >>> network = SamMed3DNetwork(Architecture.small()).eval()
    >>> with torch.no_grad():
    ...     features = network.embed(torch.zeros(1, 1, 32, 32, 32))
    ...     points, labels = torch.full((1, 1, 3), 16.0), torch.ones(1, 1, dtype=torch.int64)
    ...     logits, quality = network.decode(features, points, labels, torch.zeros(1, 1, 16, 16, 16))
    >>> features.shape, logits.shape, quality.shape
    (torch.Size([1, 48, 4, 4, 4]), torch.Size([1, 1, 16, 16, 16]), torch.Size([1]))
    """

    def __init__(self, architecture: Architecture | None = None) -> None:
        """Build it with random weights."""
        super().__init__()
        a = self.architecture = architecture or Architecture()
        if a.channels % 48 or a.side % a.patch or a.width % a.heads or a.window < a.grid:
            raise ValueError(
                "SamMed3DNetwork(): architecture: expected channels in multiples of 48, a side in multiples "
                f"of the patch, a width in multiples of the heads and a window of at least the grid, got {a}"
            )
        self.image_encoder = ImageEncoder(a)
        self.prompt_encoder = PromptEncoder(a)
        self.mask_decoder = MaskDecoder(a)

    def embed(self, images: Tensor, *, exact_shortcut: bool = True) -> Tensor:
        """Return the features [B, channels, grid, grid, grid] of prepared images [B, 1, side, side, side].

        `exact_shortcut=False` computes padded windows as published, token by token: the same up to rounding.
        """
        result: Tensor = self.image_encoder(images, exact_shortcut)
        return result

    def decode(
        self, features: Tensor, points: Tensor, labels: Tensor, masks: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return mask logits [N, 1, *mask_size] and the predicted quality [N] for N prompts.

        `features` [N, ...] (one row per prompt), `points` [N, K, 3] in array order within the cube, `labels`
        [N, K] 1, 0 or -1 (not a point), `masks` [N, 1, *mask_size] logits, zeros for none. With K = 0 the
        mask is all there is. `hidden` [N, K + 1] (bool): the clicks that a row shall be answered without, and
        whether without the token that goes with clicks, too.
        """
        sparse = self.prompt_encoder.sparse(points, labels)
        position = self.prompt_encoder.positions()
        asked = features + self.prompt_encoder.dense(masks)
        logits, quality = self.mask_decoder(asked, position, sparse, hidden)
        return logits, quality


class LayerNorm3d(nn.Module):
    """Normalisation over the channels of every voxel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, D, H, W] to the same."""
        normal = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, 1e-6)
        return normal.movedim(-1, 1)


# ---- image encoder ------------------------------------------------------------------------------


class ImageEncoder(nn.Module):
    """Patches -> tokens -> transformer -> neck."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, a.grid, a.grid, a.grid, a.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(1, a.width, a.patch, a.patch)})
        self.blocks = nn.ModuleList(
            Block(a.width, a.heads, a.grid, a.grid if i in a.global_blocks else a.window)
            for i in range(a.depth)
        )
        self.neck = nn.Sequential(
            nn.Conv3d(a.width, a.channels, 1, bias=False),
            LayerNorm3d(a.channels),
            nn.Conv3d(a.channels, a.channels, 3, padding=1, bias=False),
            LayerNorm3d(a.channels),
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor, exact_shortcut: bool) -> Tensor:
        """[B, 1, side, side, side] to [B, channels, grid, grid, grid]."""
        x = self.patch_embed["proj"](images).movedim(1, -1) + self.pos_embed
        for block in self.blocks:
            x = block(x, exact_shortcut)
        result: Tensor = self.neck(x.movedim(-1, 1))
        return result


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, grid: int, window: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, grid, window)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"lin1": nn.Linear(width, 4 * width), "lin2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, exact_shortcut: bool) -> Tensor:
        """[B, grid, grid, grid, width] to the same."""
        x = x + self.attn(self.norm1(x), exact_shortcut)
        result: Tensor = x + self.mlp["lin2"](F.gelu(self.mlp["lin1"](self.norm2(x))))
        return result


class Attention(nn.Module):
    """Attention over a cube of tokens with relative positions, padded with zeros to `window` per side."""

    def __init__(self, width: int, heads: int, grid: int, window: int) -> None:
        super().__init__()
        self.heads, self.grid, self.window = heads, grid, window
        rows = 2 * window - 1
        self.rel_pos_d = nn.Parameter(torch.zeros(rows, width // heads))
        self.rel_pos_h = nn.Parameter(torch.zeros(rows, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(rows, width // heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, exact_shortcut: bool) -> Tensor:
        """[B, n, n, n, width] to the same."""
        n, padding = self.grid, self.window - self.grid
        if padding and not exact_shortcut:
            x = F.pad(x, (0, 0) + (0, padding) * 3)
        batch, side = len(x), x.shape[1]
        qkv = self.qkv(x).reshape(batch, side, side, side, 3, self.heads, -1)
        q, k, v = qkv.movedim((4, 5), (0, 2)).unbind(0)  # each [B, heads, side, side, side, c]
        if padding and exact_shortcut:
            out = self._with_padding_as_one_key(q, k, v)
        else:
            out = F.scaled_dot_product_attention(
                q.flatten(2, 4), k.flatten(2, 4), v.flatten(2, 4), _summed(*self._relative(q, q), q.dtype)
            )
        out = out.reshape(batch, self.heads, side, side, side, -1).movedim(1, 4).flatten(4)
        result: Tensor = self.proj(out[:, :n, :n, :n])
        return result

    def _relative(self, q: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Relative position's three summands in the score of query i = (i0, i1, i2) and key j:

            A [.., i0, i1, i2, j2] = q(i0, i1, i2) . Rd[i0, j2]
            B [.., i0, i1, j0, j2] = q(i0, i1, j0) . Rh[i1, j2]
            C [.., i0, i1, j1, j2] = q(i0, i1, j1) . Rw[j1, j2],     R[i, j] = table[i - j + window - 1]

        The queries of B and C, `along`, are taken at the key's index. That is how the weights were trained.
        Sums of exponentials follow: float32 at least.
        """
        i = torch.arange(self.window, device=q.device)
        index = i[:, None] - i[None, :] + self.window - 1
        d, h, w = (table[index].to(q.dtype) for table in (self.rel_pos_d, self.rel_pos_h, self.rel_pos_w))
        a = torch.einsum("bhxyzc,xkc->bhxyzk", q, d[: q.shape[2]])
        b = torch.einsum("bhxyjc,ykc->bhxyjk", along, h[: q.shape[3]])
        c = torch.einsum("bhxyjc,jkc->bhxyjk", along, w[: along.shape[4]])
        wide = torch.promote_types(q.dtype, torch.float32)
        return a.to(wide), b.to(wide), c.to(wide)

    def _with_padding_as_one_key(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the real queries; padded keys at once, as they share key and value, the bias of qkv.

        Their scores differ in the relative position alone; their exponentials add up to that of

            scale q . b_k + ln sum over padded (j0, j1, j2) of exp(A[j2] + B[j0, j2] + C[j1, j2])

        where the sum runs over {j2 padded} + {j2 real, j0 padded} + {j2 and j0 real, j1 padded}.
        """
        n, batch = self.grid, len(q)
        bias_q, bias_k, bias_v = self.qkv.bias.to(q.dtype).reshape(3, 1, self.heads, 1, -1).unbind(0)
        beyond = bias_q[:, :, None, None].expand(batch, -1, n, n, self.window - n, -1)
        a, b, c = self._relative(q, torch.cat([q, beyond], 4))
        # Logarithms of sums over j0 and j1: [B, heads, n, n, 1, window]
        b_in, b_out, c_in, c_out = (
            part.logsumexp(4, keepdim=True) for x in (b, c) for part in (x[..., :n, :], x[..., n:, :])
        )
        b_all, c_all = torch.logaddexp(b_in, b_out), torch.logaddexp(c_in, c_out)
        parts = [(a + b_all + c_all)[..., n:], (a + b_out + c_all)[..., :n], (a + b_in + c_out)[..., :n]]
        padded = torch.cat(parts, -1).logsumexp(-1).flatten(2)
        # The product with bias_k comes from the attention itself, which sees it as the last key.
        mask = _summed(a[..., :n], b[..., :n, :n], c[..., :n, :n], q.dtype, padded)
        keys = torch.cat([k.flatten(2, 4), bias_k.expand(batch, -1, -1, -1)], 2)
        values = torch.cat([v.flatten(2, 4), bias_v.expand(batch, -1, -1, -1)], 2)
        return F.scaled_dot_product_attention(q.flatten(2, 4), keys, values, mask)


def _summed(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype, last: Tensor | None = None) -> Tensor:
    """A + B + C as a mask [B, heads, queries, keys]; `last` [B, heads, queries] is one key more."""
    head, n, m = a.shape[:2], a.shape[2], a.shape[-1]
    made: Tensor = ops.empty((*head, n**3, m**3 + (last is not None)), dtype, a.device)
    if last is not None:
        made[..., -1] = last
    # [.., i0, i1, i2, j0, j1, j2]
    total = made[..., : m**3].view(*head, n, n, n, m, m, m)
    ab, c = a[..., :, None, None, :] + b[..., None, :, None, :], c[..., None, None, :, :]
    if torch.is_grad_enabled():
        total.copy_(ab + c)
    else:
        torch.add(ab, c, out=total)
    return made


# ---- prompt encoder -----------------------------------------------------------------------------


class PromptEncoder(nn.Module):
    """Points to tokens, a mask to an embedding of the features' size."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.side, self.grid = a.side, a.grid
        self.pe_layer = _Positions(a.channels // 3)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, a.channels) for _ in range(2))
        self.not_a_point_embed = nn.Embedding(1, a.channels)
        self.mask_downscaling = nn.Sequential(
            nn.Conv3d(1, 4, 2, 2),
            LayerNorm3d(4),
            nn.GELU(),
            nn.Conv3d(4, 16, 2, 2),
            LayerNorm3d(16),
            nn.GELU(),
            nn.Conv3d(16, a.channels, 1),
        )
        # Part of the published weights, and never used: every training round had a mask prompt.
        self.no_mask_embed = nn.Embedding(1, a.channels)

    def sparse(self, points: Tensor, labels: Tensor) -> Tensor:
        """Tokens [N, K + 1, channels]: the points and one that is none; [N, 0, channels] for K = 0."""
        kinds = [self.not_a_point_embed, *self.point_embeddings]
        embeddings = torch.cat([kind.weight for kind in kinds])  # of the labels -1, 0, 1
        if not points.shape[1]:
            return embeddings.new_zeros(len(points), 0, embeddings.shape[1])
        labels = F.pad(labels, (0, 1), value=-1)
        points = F.pad(points, (0, 0, 0, 1))
        code = self.pe_layer((points.to(embeddings.dtype) + 0.5) / self.side)
        return torch.where(labels[..., None] < 0, 0, code) + embeddings[labels + 1]

    def dense(self, masks: Tensor) -> Tensor:
        """The embedding [N, channels, grid, grid, grid] of mask logits [N, 1, *mask_size]."""
        result: Tensor = self.mask_downscaling(masks)
        return result

    def positions(self) -> Tensor:
        """The code of every cell, [1, channels, grid, grid, grid].

        Cell (a, b, c) has the code of ((b + 0.5), (a + 0.5), (c + 0.5)) / grid: axes 0 and 1 are exchanged
        against points, as in the published network.
        """
        g = self.pe_layer.positional_encoding_gaussian_matrix
        at = (torch.arange(self.grid, device=g.device, dtype=g.dtype) + 0.5) / self.grid
        a, b, c = torch.meshgrid(at, at, at, indexing="ij")
        code: Tensor = self.pe_layer(torch.stack([b, a, c], -1))
        return code.movedim(-1, 0)[None]


class _Positions(nn.Module):
    """Random Fourier features of points in the unit cube."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(3, width))

    def forward(self, at: Tensor) -> Tensor:
        """[..., 3] to [..., 3 width]: sine, cosine and the sine again."""
        angle = 2 * math.pi * ((2 * at - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angle.sin(), angle.cos(), angle.sin()], -1)


# ---- mask decoder -------------------------------------------------------------------------------


class MaskDecoder(nn.Module):
    """Tokens and features look at each other, then the first mask token becomes a mask."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        c = a.channels
        self.transformer = TwoWayTransformer(c, a.decoder_heads, a.hidden[0])
        self.iou_token = nn.Embedding(1, c)
        self.mask_tokens = nn.Embedding(4, c)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose3d(c, c // 4, 2, 2),
            LayerNorm3d(c // 4),
            nn.GELU(),
            nn.ConvTranspose3d(c // 4, c // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(_Mlp(c, c, c // 8) for _ in range(4))
        self.iou_prediction_head = _Mlp(c, a.hidden[1], 4)

    def forward(
        self, source: Tensor, position: Tensor, sparse: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features [N, C, g, g, g] to logits [N, 1, 4g, 4g, 4g] and quality [N]: mask 0 of four, alone."""
        n, seen = len(sparse), None
        if hidden is not None:  # for every head and query: which tokens are looked at
            seen = F.pad(~hidden, (len(self.iou_token.weight) + len(self.mask_tokens.weight), 0), value=True)
            seen = seen[:, None, None]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own[None].expand(n, -1, -1).to(sparse.dtype), sparse], 1)
        flat = source.flatten(2).transpose(1, 2)
        tokens, flat = self.transformer(tokens, flat, position.flatten(2).transpose(1, 2), seen)
        fine = self.output_upscaling(flat.transpose(1, 2).reshape(source.shape))
        weights = self.output_hypernetworks_mlps[0](tokens[:, 1])
        logits = torch.einsum("nc,ncxyz->nxyz", weights, fine)[:, None]
        return logits, self.iou_prediction_head(tokens[:, 0])[:, 0]


class TwoWayTransformer(nn.Module):
    """Two blocks and a last look of the tokens at the features."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(channels, heads, hidden, first=i == 0) for i in range(2))
        self.final_attn_token_to_image = _DecoderAttention(channels, channels // 2, heads)
        self.norm_final_attn = nn.LayerNorm(channels)

    def forward(
        self, tokens: Tensor, image: Tensor, position: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens [N, T, C] and features [N, V, C], both as they come out; positions [1, V, C]."""
        asked = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, asked, position, seen)
        tokens = tokens + self.final_attn_token_to_image(tokens + asked, image + position, image)
        return self.norm_final_attn(tokens), image


class TwoWayBlock(nn.Module):
    """Tokens among themselves, tokens to features, MLP, features to tokens."""

    def __init__(self, channels: int, heads: int, hidden: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = _DecoderAttention(channels, channels, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.cross_attn_token_to_image = _DecoderAttention(channels, channels // 2, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.ModuleDict({"lin1": nn.Linear(channels, hidden), "lin2": nn.Linear(hidden, channels)})
        self.norm3 = nn.LayerNorm(channels)
        self.norm4 = nn.LayerNorm(channels)
        self.cross_attn_image_to_token = _DecoderAttention(channels, channels // 2, heads)

    def forward(
        self, tokens: Tensor, image: Tensor, asked: Tensor, position: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One round; `asked` and `position` go to queries and keys, never to values."""
        if self.first:  # nothing to add yet, and the result replaces the tokens
            tokens = self.self_attn(tokens, tokens, tokens, seen)
        else:
            tokens = tokens + self.self_attn(tokens + asked, tokens + asked, tokens, seen)
        tokens = self.norm1(tokens)
        tokens = tokens + self.cross_attn_token_to_image(tokens + asked, image + position, image)
        tokens = self.norm2(tokens)
        tokens = self.norm3(tokens + self.mlp["lin2"](F.relu(self.mlp["lin1"](tokens))))
        image = image + self.cross_attn_image_to_token(image + position, tokens + asked, tokens, seen)
        return tokens, self.norm4(image)


class _DecoderAttention(nn.Module):
    def __init__(self, channels: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, inner)
        self.k_proj = nn.Linear(channels, inner)
        self.v_proj = nn.Linear(channels, inner)
        self.out_proj = nn.Linear(inner, channels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        projected = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        out = F.scaled_dot_product_attention(q, k, v, seen)
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result


class _Mlp(nn.Module):
    """Three layers with ReLU between."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        sizes = (inputs, hidden, hidden, outputs)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        result: Tensor = self.layers[-1](x)
        return result
