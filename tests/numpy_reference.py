"""The published recipe in plain NumPy, from the method's description alone: the slow side of `test_faithful.py`.

The method is mclSTExp (2024, https://arxiv.org/abs/2407.08216). Nothing here imports the project or torch, and every
sum is in float64: clarity is bought with speed. Weights come as a plain {name: array} dict.
Shape legend: N images, C channels, H height, W width; B spots of a sentence, D width, G genes, K keys of the bank, Q
query vectors.
"""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Weights = dict[str, Floats]

EPSILON = 1e-5  # batch-norm and layer-norm alike
BLOCK_LAYERS = (6, 12, 24, 16)  # DenseNet-121: arXiv 1608.06993 (2016), table 1
NUM_HEADS, HEAD_DIM = 8, 64
NUM_HIGHEST = 50


# Expression.


def per_spot(counts_BG: Floats) -> Floats:
    """§1a, training expression: log10(1 + 1e4 c_g / the spot's sum over the panel)."""
    return np.log10(1 + 1e4 * counts_BG / counts_BG.sum(axis=1, keepdims=True))


def per_gene(counts_BG: Floats) -> Floats:
    """§1a, stored matrices: log10(1 + 1e4 c_gs / the gene's sum over the spots of one section)."""
    return np.log10(1 + 1e4 * counts_BG / counts_BG.sum(axis=0, keepdims=True))


# Image tower (arXiv 1608.06993, 2016).


def scaled_images(tiles_NHWC: NDArray[np.uint8]) -> Floats:
    """§1a, test: scale to [0, 1] and nothing else; channels first."""
    return np.moveaxis(tiles_NHWC.astype(np.float64) / 255, -1, 1)


def visium_images(tiles_NHWC: NDArray[np.uint8]) -> Floats:
    """§1a, Visium: blue, green, red from 0 to 255."""
    return np.moveaxis(tiles_NHWC[..., ::-1].astype(np.float64), -1, 1)


def relu(values: Floats) -> Floats:
    return np.maximum(values, 0)


def convolve(images_NCHW: Floats, weight: Floats, stride: int, padding: int) -> Floats:
    """Cross-correlation without bias; `weight` is (out, in, height, width)."""
    margin = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(images_NCHW, margin), weight.shape[2:], axis=(2, 3))
    strided = windows[:, :, ::stride, ::stride]
    return np.moveaxis(np.tensordot(strided, weight, axes=((1, 4, 5), (1, 2, 3))), -1, 1)


def batch_norm(images_NCHW: Floats, weights: Weights, name: str) -> Floats:
    """Batch normalisation in eval mode: the running statistics, then the affine map."""
    spread = np.sqrt(weights[f"{name}.running_var"] + EPSILON)
    scale = weights[f"{name}.weight"] / spread
    shift = weights[f"{name}.bias"] - weights[f"{name}.running_mean"] * scale
    return images_NCHW * scale[:, None, None] + shift[:, None, None]


def max_pool(images_NCHW: Floats) -> Floats:
    """Largest of 3 x 3, stride 2, padding 1."""
    padded = np.pad(images_NCHW, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return windows[:, :, ::2, ::2].max(axis=(4, 5))


def average_pool(images_NCHW: Floats) -> Floats:
    """Mean of 2 x 2, stride 2."""
    n, c, h, w = images_NCHW.shape
    return images_NCHW[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5))


def dense_layer(images_NCHW: Floats, weights: Weights, name: str) -> Floats:
    """Norm, ReLU, 1 x 1; norm, ReLU, 3 x 3; the new channels behind the old ones."""
    narrow = relu(batch_norm(images_NCHW, weights, f"{name}.norm1"))
    narrow = convolve(narrow, weights[f"{name}.conv1.weight"], stride=1, padding=0)
    new = relu(batch_norm(narrow, weights, f"{name}.norm2"))
    new = convolve(new, weights[f"{name}.conv2.weight"], stride=1, padding=1)
    return np.concatenate((images_NCHW, new), axis=1)


def densenet121(images_NCHW: Floats, weights: Weights) -> Floats:
    """§1b: features after the last batch-norm without the final ReLU, mean over the pixels, (N, 1024)."""
    x = convolve(images_NCHW, weights["conv0.weight"], stride=2, padding=3)
    x = max_pool(relu(batch_norm(x, weights, "norm0")))
    for block, num_layers in enumerate(BLOCK_LAYERS, start=1):
        for layer in range(1, num_layers + 1):
            x = dense_layer(x, weights, f"denseblock{block}.denselayer{layer}")
        if block < len(BLOCK_LAYERS):
            x = relu(batch_norm(x, weights, f"transition{block}.norm"))
            x = average_pool(convolve(x, weights[f"transition{block}.conv.weight"], stride=1, padding=0))
    return batch_norm(x, weights, "norm5").mean(axis=(2, 3))


# Spot tower, heads and loss.


def linear(x: Floats, weight: Floats, bias: Floats | None = None) -> Floats:
    return x @ weight.T + (0 if bias is None else bias)


def gelu(x: Floats) -> Floats:
    """The exact form, x times the normal distribution function."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return x * (1 + erf(x / math.sqrt(2))) / 2


def layer_norm(x: Floats, weight: Floats, bias: Floats) -> Floats:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON) * weight + bias


def log_softmax(scores: Floats) -> Floats:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def attention(x_BG: Floats, qkv_weight: Floats, out_weight: Floats, out_bias: Floats) -> Floats:
    """§1b: one bias-free map to 3 x 512, 8 heads of 64, scores by 1/8, softmax over the B spots, map back with bias."""
    queries, keys, values = np.split(linear(x_BG, qkv_weight), 3, axis=1)
    mixed = np.zeros_like(values)
    for head in range(NUM_HEADS):
        part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        scores_BB = queries[:, part] @ keys[:, part].T / 8
        mixed[:, part] = np.exp(log_softmax(scores_BB)) @ values[:, part]
    return linear(mixed, out_weight, out_bias)


def spot_tower(expression_BG: Floats, position_B2: Integers, weights: Weights, num_blocks: int = 2) -> Floats:
    """§1b: u = e + X[x] + Y[y]; twice z + Attn(LN(z)), z + FFN(LN(z)); no final norm.

    `weights` uses this module's names: `x_table`, `y_table`, and per block i `i.norm1`, `i.qkv`, `i.out`, `i.norm2`,
    `i.ffn1`, `i.ffn2`, each with `.weight` and, but for qkv, `.bias`.
    """
    z = expression_BG + weights["x_table"][position_B2[:, 0]] + weights["y_table"][position_B2[:, 1]]
    for i in range(num_blocks):
        w = {name.removeprefix(f"{i}."): value for name, value in weights.items() if name.startswith(f"{i}.")}
        normed = layer_norm(z, w["norm1.weight"], w["norm1.bias"])
        z = z + attention(normed, w["qkv.weight"], w["out.weight"], w["out.bias"])
        normed = layer_norm(z, w["norm2.weight"], w["norm2.bias"])
        hidden = gelu(linear(normed, w["ffn1.weight"], w["ffn1.bias"]))
        z = z + linear(hidden, w["ffn2.weight"], w["ffn2.bias"])
    return z


def head(features: Floats, weights: Weights) -> Floats:
    """§1b: p = W1 h + b1; v = LN(p + W2 GELU(p) + b2). Names: `first`, `second`, `norm`."""
    p = linear(features, weights["first.weight"], weights["first.bias"])
    v = p + linear(gelu(p), weights["second.weight"], weights["second.bias"])
    return layer_norm(v, weights["norm.weight"], weights["norm.bias"])


def contrastive_loss(spot_BD: Floats, image_BD: Floats) -> float:
    """§1b: S = V_spot V_image^T at temperature 1, no normalisation; mean of the two cross-entropies with identity."""
    scores_BB = spot_BD @ image_BD.T
    rows, columns = np.diagonal(log_softmax(scores_BB)), np.diagonal(log_softmax(scores_BB.T))
    return float(-(rows.mean() + columns.mean()) / 2)


# Retrieval and metrics.


def retrieve(queries_QD: Floats, keys_KD: Floats, payload_KG: Floats, k: int, distance: str) -> Floats:
    """§1d 2-3: the k keys of highest cosine, weighed by 1/d^2, d = L1 or L2 between un-normalised vectors."""
    predictions = []
    for query in queries_QD:
        cosine = keys_KD @ query / (np.linalg.norm(keys_KD, axis=1) * np.linalg.norm(query))
        nearest = np.argsort(-cosine, kind="stable")[:k]
        gaps = np.abs(keys_KD[nearest] - query)
        d = gaps.sum(axis=1) if distance == "l1" else np.sqrt((gaps**2).sum(axis=1))
        weights = 1 / d**2
        predictions.append((weights[:, None] * payload_KG[nearest]).sum(axis=0) / weights.sum())
    return np.array(predictions)


def pearson_per_gene(predicted_BG: Floats, truth_BG: Floats) -> Floats:
    """§1d 5: over the spots of one section; not a number where either side is constant."""
    result = np.full(truth_BG.shape[1], np.nan)
    for gene in range(truth_BG.shape[1]):
        p, t = predicted_BG[:, gene], truth_BG[:, gene]
        if np.ptp(p) > 0 and np.ptp(t) > 0:
            p, t = p - p.mean(), t - t.mean()
            result[gene] = (p * t).sum() / math.sqrt((p**2).sum() * (t**2).sum())
    return result


def section_scores(predicted_BG: Floats, truth_BG: Floats) -> dict[str, float]:
    """§1d 5: all-gene mean (undefined ones dropped, and counted), HEG of the test truth, MSE and MAE of all entries."""
    correlations_G = pearson_per_gene(predicted_BG, truth_BG)
    highest = np.argsort(-truth_BG.mean(axis=0), kind="stable")[:NUM_HIGHEST]
    return {
        "all": float(np.nanmean(correlations_G)),
        "highest": float(np.nanmean(correlations_G[highest])),
        "undefined": float(np.isnan(correlations_G).sum()),
        "mse": float(((predicted_BG - truth_BG) ** 2).mean()),
        "mae": float(np.abs(predicted_BG - truth_BG).mean()),
    }
