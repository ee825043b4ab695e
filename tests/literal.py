"""The products once more, in NumPy and as plainly as the formulas: an oracle of its own."""

import itertools

import numpy as np


def potential(clip, difference):
    """ρ, the function that ψ is the derivative of: quadratic, then linear."""
    scale, bound = clip
    d = np.abs(difference)
    if np.isinf(scale):
        return bound * d
    if np.isinf(bound):
        return 0.5 * scale * d**2
    return np.where(d * scale <= bound, 0.5 * scale * d**2, bound * d - 0.5 * bound**2 / scale)


def matmul(x, w, rho=np.abs):
    """-Σ_k ρ(x[b, m, k] - w[b, k, n])."""
    return -rho(x[:, :, :, None] - w[:, None]).sum(2)


def conv(x, w, strides, padding, lhs_dilation, rhs_dilation, groups, rho=np.abs):
    """-Σ ρ(patch - filter), output by output and tap by tap; channels last."""
    spatial, window = x.shape[1:-1], w.shape[:-2]
    span = [(n - 1) * d + 1 for n, d in zip(spatial, lhs_dilation, strict=True)]
    wide = np.zeros((x.shape[0], *span, x.shape[-1]), x.dtype)
    wide[(slice(None), *(slice(None, None, d) for d in lhs_dilation))] = x
    out = [
        (s + low + high - (k - 1) * r - 1) // stride + 1
        for s, (low, high), k, r, stride in zip(
            span, padding, window, rhs_dilation, strides, strict=True
        )
    ]
    features = w.shape[-1] // groups
    y = np.zeros((x.shape[0], *out, w.shape[-1]), np.result_type(x, w))
    for position in np.ndindex(*out):
        for tap in itertools.product(*(range(k) for k in window)):
            at = [
                o * stride + t * r - low
                for o, stride, t, r, (low, _) in zip(
                    position, strides, tap, rhs_dilation, padding, strict=True
                )
            ]
            inside = all(0 <= a < s for a, s in zip(at, span, strict=True))
            seen = (
                wide[(slice(None), *at)]
                if inside
                else np.zeros_like(x, shape=(x.shape[0], x.shape[-1]))
            )
            for group in range(groups):
                channels = np.split(seen, groups, axis=-1)[group]
                chosen = slice(group * features, (group + 1) * features)
                y[(slice(None), *position, chosen)] -= rho(
                    channels[:, :, None] - w[(*tap, slice(None), chosen)]
                ).sum(1)
    return y


def gradient(function, at, step=1e-6):
    """Central differences of a scalar function, element by element."""
    result = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        ahead, behind = at.copy(), at.copy()
        ahead[index] += step
        behind[index] -= step
        result[index] = (function(ahead) - function(behind)) / (2 * step)
    return result
