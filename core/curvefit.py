"""Two fits of the sigmoid of eq. (2), arXiv 2512.11470: a posterior, and bounded least squares.

ceiling.py decides what the fits mean; this file is their arithmetic, with numpy only.
The posterior: in each cell (B, C_mid) of a logarithmic grid P_sft, eps and the gain enter linearly,
so their posterior has a closed form. The grid is zoomed to where its mass lies, then drawn from.
Least squares: that of the paper's Appendix F, with the bounds that reproduce its Table 4.
Shapes: N points, H noise settings, K grid cells, M draws, X values of compute. Units: points
(0..100) and FLOPs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

B_RANGE = (0.3, 10.0)
C_RANGE = (0.005, 20.0)  # of C_mid, relative to the last x
# The grid of noise settings, chosen in docs/ceiling.md
SIGMA_FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0)  # noise of a change, over its estimate by point_noise
DRIFT_SIZES = (0.5, 1.0, 2.0, 3.0)  # points; there is always some drift
DRIFT_LENGTHS = (0.3, 1.5)  # correlation lengths of the drift, relative to the last x
TOP = 100.0  # the metric's maximum, points
N_DRAWS = 1500  # gives an end of a 90% interval to about 3% of its width
LEAST_SEEN = 6  # points whose noise can be seen in their second differences
UNKNOWNS = 5  # P_sft, eps, gain, B, C_mid: the fewest points that a fit is tried on


def sigmoid(x, b, c) -> np.ndarray:
    """Share of the gain, 1 / (1 + (x / c)^-b), 0 at x = 0: x (X,), b and c (K,) -> (K, X)."""
    x = np.asarray(x, float)
    z = np.asarray(b)[:, None] * np.log(np.maximum(x, 1e-300) / np.asarray(c)[:, None])
    return (x > 0) / (1 + np.exp(-np.clip(z, -700, 700)))


def point_noise(y) -> float:
    """Standard deviation of one point, from second differences: a smooth curve has next to none."""
    if len(y) < LEAST_SEEN:
        return 0.5
    deviation = 1.4826 * float(np.median(np.abs(np.diff(y, 2))))
    return max(deviation / math.sqrt(6), 0.05)


# --------------------------------------------------------------------------------- the posterior
class Posterior(NamedTuple):
    """M draws of eq. (2), and the points behind them. Performance in points."""

    p_sft: np.ndarray  # (M,)
    eps: np.ndarray  # (M,)
    gain: np.ndarray  # (M,) A_post - base
    b: np.ndarray  # (M,)
    c: np.ndarray  # (M,) C_mid, FLOPs
    sigma: np.ndarray  # (M,) noise of one evaluation
    tau: np.ndarray  # (M,) size of the drift
    length: np.ndarray  # (M,) its correlation length, relative to the last x
    x: np.ndarray  # (N,) fitted points
    y: np.ndarray  # (N,)
    relative: np.ndarray  # (N,) noise variance of a point over that of the mean point


class Noise(NamedTuple):
    """H settings of the noise with their prior, in points."""

    sigma: np.ndarray  # (H,) of one evaluation
    tau: np.ndarray  # (H,) size of the drift
    length: np.ndarray  # (H,) its correlation length, relative to the last x
    log_prior: np.ndarray  # (H,)
    relative: np.ndarray  # (N,) noise variance of a point over that of the mean point


class Grid(NamedTuple):
    """The posterior on K cells of (log B, log C_mid) for each of H noise settings."""

    log_b: np.ndarray  # (K,)
    log_c: np.ndarray  # (K,)
    half: np.ndarray  # (2,) half the size of a cell
    mass: np.ndarray  # (H, K) posterior, not normalised
    mean: np.ndarray  # (H, K, 3) of (p_sft, eps, gain) within a cell
    covariance: np.ndarray  # (H, K, 3, 3)


def sample(x, y, n=None, seed: int = 0) -> Posterior:
    """M draws from the posterior of eq. (2): x (N,) sorted, y (N,), responses n (N,) or None.

    y = p_sft + eps [x > 0] + gain sigmoid(x; B, C) + drift(x) + noise, where the noise is
    N(0, sigma^2 relative) and the drift an Ornstein-Uhlenbeck process of size tau."""
    rng = np.random.default_rng(seed)
    noise = _noise_settings(y, n)
    level = y.mean()
    grid = _grid_posterior(x, y - level, noise)  # p_sft is then about 0
    drawn = rng.choice(grid.mass.size, 4 * N_DRAWS, p=grid.mass.ravel() / grid.mass.sum())
    h, k = np.divmod(drawn, len(grid.log_b))
    root = np.linalg.cholesky(grid.covariance[h, k])
    linear = grid.mean[h, k] + np.einsum("mij,mj->mi", root, rng.normal(size=(len(h), 3)))
    linear[:, 0] += level
    allowed = (linear[:, 1:] >= 0).all(1) & (linear.sum(1) <= TOP)
    if allowed.sum() < N_DRAWS // 5:
        # the data pull against a bound (a falling run): put the draws on the bound
        linear[:, 1:] = np.maximum(linear[:, 1:], 0)
        linear[:, 2] = np.clip(TOP - linear[:, 0] - linear[:, 1], 0, linear[:, 2])
        allowed[:] = True
    h, k, linear = (v[allowed][:N_DRAWS] for v in (h, k, linear))
    within = grid.half[:, None] * rng.uniform(-1, 1, (2, len(k)))
    b, c = np.exp(np.stack([grid.log_b[k], grid.log_c[k]]) + within)
    settings = (noise.sigma[h], noise.tau[h], noise.length[h])
    return Posterior(*linear.T, b, c, *settings, x, y, noise.relative)


def _noise_settings(y, n) -> Noise:
    """The grid of noise settings.

    Evaluations repeat the same problems, so they differ by less than their binomial noise, which
    is that of a level. The noise of a change is seen in second differences; n gives the points
    their relative weights, and the noise itself where there are too few points to see it."""
    relative = np.ones(len(y))
    centre = point_noise(y)
    if n is not None:
        right = (np.clip(y, 0, TOP) * n / TOP + 1) / (n + 2)  # +1, +2: above 0 at 0 and at 100
        binomial = TOP**2 * right * (1 - right) / n
        relative = binomial / binomial.mean()
        if len(y) < LEAST_SEEN:
            centre = math.sqrt(binomial.mean())
    axes = np.meshgrid(SIGMA_FACTORS, DRIFT_SIZES, DRIFT_LENGTHS, indexing="ij")
    factor, tau, length = (axis.ravel() for axis in axes)
    log_prior = -0.5 * (tau / 2) ** 2 - 0.5 * (np.log(factor) / 0.5) ** 2
    return Noise(centre * factor, tau, length, log_prior, relative)


def _grid_posterior(x, y, noise: Noise) -> Grid:
    """The posterior of (B, C_mid) on 20 x 20 cells, zoomed in until they lie where the mass is."""
    last = x.max()
    frames = _frames(x, y, noise)
    box = np.log([B_RANGE, (C_RANGE[0] * last, C_RANGE[1] * last)])
    for _ in range(4):
        edges = np.linspace(box[:, 0], box[:, 1], 21)
        half = (edges[1] - edges[0]) / 2
        centres = np.meshgrid(*(edges[:-1] + half).T, indexing="ij")
        log_b, log_c = (axis.ravel() for axis in centres)  # (K,)
        curves = sigmoid(x, np.exp(log_b), np.exp(log_c))
        design = np.stack(np.broadcast_arrays(1.0, x > 0, curves))  # (3, K, N)
        mean = np.zeros((len(noise.sigma), len(log_b), 3))
        covariance = np.zeros((*mean.shape, 3))
        log_fit = np.zeros(mean.shape[:2])
        for at, rotate, weight, log_noise in frames:
            found = _linear_posterior(weight, design @ rotate, y @ rotate)
            mean[at], covariance[at], log_fit[at] = found
            log_fit[at] += log_noise[:, None]
        # priors: log B ~ N(0.2, 0.6^2); log(C_mid / last x) ~ -1 + 0.5 t with 3 degrees of freedom
        z = (log_c - np.log(last) + 1) / 0.5
        log_prior = -0.5 * ((log_b - 0.2) / 0.6) ** 2 - 2 * np.log1p(z**2 / 3)
        log_posterior = log_fit + log_prior
        mass = np.exp(log_posterior - log_posterior.max())  # (H, K)
        near = mass.max(0) > 1e-4
        low = np.array([log_b[near].min(), log_c[near].min()]) - half
        high = np.array([log_b[near].max(), log_c[near].max()]) + half
        if np.prod(high - low) > 0.3 * np.prod(np.ptp(box, 1)):
            break
        box = np.stack([low, high], 1)
    return Grid(log_b, log_c, half, mass, mean, covariance)


def _frames(x, y, noise: Noise) -> list[tuple]:
    """For each length of the drift, the frame in which noise and drift are independent.

    [(which settings (H,) bool, rotation (N, N), weight of each rotated point (h, N), log prior and
    evidence of the noise (h,))]"""
    frames = []
    scale = 1 / np.sqrt(noise.relative)
    for length in sorted(set(noise.length)):
        at = noise.length == length
        values, vectors = np.linalg.eigh(scale[:, None] * _kernel(x, x, length * x.max()) * scale)
        rotate = scale[:, None] * vectors
        drift = noise.tau[at, None] ** 2 * np.maximum(values, 0)
        weight = 1 / (noise.sigma[at, None] ** 2 + drift)
        evidence = 0.5 * np.log(weight).sum(1) - 0.5 * weight @ (y @ rotate) ** 2
        frames.append((at, rotate, weight, noise.log_prior[at] + evidence))
    return frames


def _kernel(a, b, length: float) -> np.ndarray:
    """Correlation of the drift at a (A,) and b (B,) -> (A, B); none at 0, which is before RL."""
    near = np.exp(-np.abs(a[:, None] - b) / length)
    return near * (a[:, None] > 0) * (b > 0)


def _linear_posterior(weight, design, target):
    """Posterior of (p_sft, eps, gain) in closed form, in every cell and noise setting.

    weight (H, N), design (3, K, N), target (N,), all rotated -> mean (H, K, 3), covariance
    (H, K, 3, 3), log marginal likelihood (H, K) up to what no cell changes. Priors in points:
    p_sft ~ N(0, 100^2), as good as flat; eps ~ |N(0, 0.3^2)|; gain ~ N(0, 20^2)."""
    pairs = np.einsum("ikn,jkn->nkij", design, design).reshape(len(target), -1)
    prior = np.diag([1 / 100.0**2, 1 / 0.3**2, 1 / 20.0**2])
    precision = (weight @ pairs).reshape(len(weight), -1, 3, 3) + prior
    moment = ((weight * target) @ design.transpose(0, 2, 1)).transpose(1, 2, 0)
    covariance = np.linalg.inv(precision)
    mean = np.einsum("hkij,hkj->hki", covariance, moment)
    log_fit = 0.5 * (moment * mean).sum(-1) - 0.5 * np.linalg.slogdet(precision)[1]
    return mean, covariance, log_fit


def curve(posterior: Posterior, x) -> np.ndarray:
    """Eq. (2) for each draw: x (X,) FLOPs -> (M, X) points."""
    x = np.asarray(x, float)
    base = posterior.p_sft[:, None] + posterior.eps[:, None] * (x > 0)
    return base + posterior.gain[:, None] * sigmoid(x, posterior.b, posterior.c)


def predict(posterior: Posterior, x, seed: int = 0):
    """Forecast of an evaluation at x (X,) FLOPs, its own noise included: mean, low, high (X,)."""
    x = np.asarray(x, float)
    last = posterior.x.max()
    value = curve(posterior, x)  # (M, X)
    variance = np.repeat(posterior.sigma[:, None] ** 2, len(x), 1)
    residual = posterior.y - curve(posterior, posterior.x)  # (M, N)
    for sigma, tau, length in set(zip(posterior.sigma, posterior.tau, posterior.length)):
        # the drift at the last points is carried on, and fades with its length
        at = (posterior.sigma == sigma) & (posterior.tau == tau) & (posterior.length == length)
        near = _kernel(posterior.x, posterior.x, length * last)
        far = _kernel(x, posterior.x, length * last)
        covariance = sigma**2 * np.diag(posterior.relative) + tau**2 * near
        carried = np.linalg.solve(covariance, tau**2 * far.T)  # (N, X)
        value[at] += residual[at] @ carried
        variance[at] += np.maximum(tau**2 * ((x > 0) - (far.T * carried).sum(0)), 0)
    draw = value + np.sqrt(variance) * np.random.default_rng(seed).normal(size=value.shape)
    low, high = np.quantile(np.clip(draw, 0, TOP), (0.05, 0.95), axis=0)
    return np.clip(value.mean(0), 0, TOP), low, high


def entropy_law(entropy, y, seed: int = 0) -> np.ndarray | None:
    """Draws (M,) of the performance at zero entropy, b - a, by R = b - a exp(H), 2505.22617.

    entropy, y (N,): nats per token and points. The posterior of a straight line in exp(H) under a
    flat prior; None where a is not surely above 0 or there are fewer than 5 points."""
    known = np.isfinite(entropy) & np.isfinite(y)
    if known.sum() < UNKNOWNS or np.ptp(entropy[known]) == 0:
        return None
    design = np.stack([np.ones(known.sum()), -np.exp(entropy[known])], 1)  # (N, 2) of b and a
    found, *_ = np.linalg.lstsq(design, y[known], rcond=None)
    df = len(design) - 2
    variance = ((y[known] - design @ found) ** 2).sum() / df
    covariance = variance * np.linalg.inv(design.T @ design)
    if found[1] <= 2 * math.sqrt(covariance[1, 1]):
        return None
    ends = np.array([1.0, -1.0])
    spread = math.sqrt(max(ends @ covariance @ ends, 0.0))
    unit = np.random.default_rng(seed).standard_t(df, N_DRAWS)
    return np.clip(ends @ found + spread * unit, 0, TOP)


# --------------------------------------------------------------- least squares, as in Table 4
class LeastSquares(NamedTuple):
    """A bounded least-squares fit of the gain y - P_sft."""

    b: float
    c: float
    top: float  # U = PL_rl, points
    eps: float
    keep: np.ndarray  # (N,) points that were fitted
    at_bound: bool  # U is the bound, so the data do not determine it

    def __call__(self, x) -> np.ndarray:
        return self.eps + (self.top - self.eps) * sigmoid(x, [self.b], [self.c])[0]


def least_squares_fit(x, y, tau=2.5, lts_alpha=None, free_epsilon=False) -> LeastSquares:
    """Appendix F as Table 4 has it: U <= 1.5 x the largest fitted gain, B <= 20, MAD, C-steps.

    x (N,) FLOPs, y (N,) gains in points; tau: modified z above which a point is dropped;
    lts_alpha: share of the points that the C-steps keep, None for no C-steps."""
    good = np.ones(len(x), bool)
    while good.sum() >= UNKNOWNS:
        keep = good
        found = _bounded(x, y, keep, free_epsilon)
        residual = y - found(x) - np.median((y - found(x))[keep])
        deviation = max(np.median(np.abs(residual[keep])), 1e-9)
        good = keep & (0.6745 * np.abs(residual) <= tau * deviation)
        if (good == keep).all():
            break
    clean = np.flatnonzero(keep)
    for _ in range(50 if lts_alpha else 0):  # refit on the best points until they stay the same
        best = np.argsort(np.abs(y - found(x))[clean], kind="stable")
        kept = np.zeros(len(x), bool)
        kept[clean[best[: int(lts_alpha * len(clean))]]] = True
        if (kept == found.keep).all():
            break
        found = _bounded(x, y, kept, free_epsilon)
    return found


def _bounded(x, y, keep, free_epsilon: bool) -> LeastSquares:
    """Least squares of eps + (U - eps) s(x) on a zooming grid of (log B, log C)."""
    x = x[keep]
    y = y[keep]
    bound = 1.5 * max(float(y.max()), 0.0)
    limit = np.log([(0.1, 20.0), (1e-3 * x.max(), 10 * x.max())])
    box = limit
    for _ in range(6):  # 40 x 40 cells, then two of them to each side of the best
        axes = np.linspace(box[:, 0], box[:, 1], 40)
        log_b, log_c = (axis.ravel() for axis in np.meshgrid(*axes.T, indexing="ij"))
        shape = sigmoid(x, np.exp(log_b), np.exp(log_c))  # (K, N)
        top, eps, loss = _best_ends(shape, y, bound, free_epsilon)
        best = int(np.argmin(loss))
        step = 2 * (axes[1] - axes[0])
        middle = np.array([log_b[best], log_c[best]])
        box = np.clip(np.stack([middle - step, middle + step], 1), limit[:, :1], limit[:, 1:])
    b = float(np.exp(log_b)[best])
    c = float(np.exp(log_c)[best])
    return LeastSquares(b, c, float(top[best]), float(eps[best]), keep, top[best] >= 0.999 * bound)


def _best_ends(shape, y, bound: float, free_epsilon: bool):
    """U, eps and the squared error of the best fit in each cell: shape (K, N), y (N,) -> (K,) each.

    Both have a closed form; U is then bounded, and eps is the best one for that U."""
    ss = (shape * shape).sum(1)
    sy = shape @ y
    top = np.clip(sy / np.maximum(ss, 1e-12), 0, bound)
    eps = np.zeros(len(shape))
    loss = ((y - top[:, None] * shape) ** 2).sum(1)
    if not free_epsilon:
        return top, eps, loss
    rest = 1 - shape
    rr = (rest * rest).sum(1)
    rs = (rest * shape).sum(1)
    ry = rest @ y
    free_top = np.clip((sy * rr - ry * rs) / np.maximum(rr * ss - rs**2, 1e-12), 0, bound)
    free_eps = (ry - rs * free_top) / np.maximum(rr, 1e-12)
    free_loss = ((y - free_top[:, None] * shape - free_eps[:, None] * rest) ** 2).sum(1)
    better = (free_eps > 0) & (free_loss < loss)
    return np.where(better, [free_top, free_eps, free_loss], [top, eps, loss])
