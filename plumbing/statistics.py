"""Intervals of shares and means."""


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n.

    >>> [round(x, 4) for x in wilson(0.8, 10)]
    [0.4902, 0.9433]
    """
    scale = 1 + z * z / n
    center = share + z * z / (2 * n)
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    low, high = (center - half) / scale, (center + half) / scale
    return low if share else 0.0, high if share < 1 else 1.0  # exact where rounding is not


def bootstrap(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values`, one per prompt, resampled with a fixed
    seed."""
    import torch

    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = torch.tensor(values, dtype=torch.float64)[picks].mean(1)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return tuple(means.quantile(ends).tolist())
