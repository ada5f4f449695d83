"""Intervals of shares and means."""

from collections.abc import Callable


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


def bootstrap(
    values: list[float], weights: list[int] | None = None, draws: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values`, one per prompt, resampled with a fixed
    seed; `weights`: how many responses each of them is the mean of, where they differ."""
    import torch

    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    drawn = torch.tensor(values, dtype=torch.float64)[picks]  # (draws, prompts)
    means = drawn.mean(1)
    if weights:
        counts = torch.tensor(weights, dtype=torch.float64)[picks]
        means = (drawn * counts).sum(1) / counts.sum(1)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return tuple(means.quantile(ends).tolist())


def f1_of(share: float) -> float:
    """F1 from tp / (tp + fp + fn)."""
    return 2 * share / (1 + share)


class Measure(dict):
    """{prompt id: [flag of each response]} of one metric; its value is the share of true flags."""

    def add(self, prompt_id: str, flag):
        self.setdefault(prompt_id, []).append(flag)

    def means(self) -> dict[str, float]:
        return {prompt_id: sum(flags) / len(flags) for prompt_id, flags in self.items()}

    def over_samples(self, rule: Callable) -> "Measure":
        """One flag for each prompt, any or all of its responses'; empty where each has only one."""
        if max(map(len, self.values()), default=0) < 2:
            return Measure()
        return Measure((prompt_id, [rule(flags)]) for prompt_id, flags in self.items())

    def row(self, curve: Callable = lambda share: share) -> dict:
        """{"value", "low", "high", "n" flags}, seen through a monotone function of the share."""
        flags = [flag for one in self.values() for flag in one]
        share = sum(flags) / len(flags)
        is_share = set(flags) <= {True, False}
        if is_share and (len(flags) == len(self) or share in (0, 1) or len(self) == 1):
            low, high = wilson(share, len(self))  # one flag a prompt, or all agree
        else:  # several responses of a prompt are not independent, scores are no shares
            counts = [len(one) for one in self.values()]
            differ = len(set(counts)) > 1  # such as the verdicts that count for F1
            low, high = bootstrap(list(self.means().values()), counts if differ else None)
        return {"value": curve(share), "low": curve(low), "high": curve(high), "n": len(flags)}

    def against(self, first: "Measure") -> dict:
        """The paired difference to the first model, on the prompts that both have. Fewer than six
        show nothing: five that all change have p = 2 * 2^-5 = 0.06 (sign test)."""
        own, other = self.means(), first.means()
        differences = [own[key] - other[key] for key in own if key in other]
        if not differences:
            return {}
        low, high = bootstrap(differences)
        change = {"value": sum(differences) / len(differences), "low": low, "high": high}
        inside = low <= 0 <= high or len(differences) < 6
        return {"change": {**change, "inside the noise": inside}}
