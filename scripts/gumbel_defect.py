"""What float32 noise does to the usual sampler of masked diffusion: `python scripts/gumbel_defect.py`.

The Gumbel trick on uniform numbers that are multiples of 2^-24, as float32 generators give them, cannot draw what is
less likely than about 2^-24. Where the mask is one of the outcomes, with probability 1 - 1 / (steps left), that is most
codes: unlikely ones are lost, and samples come out less diverse than the model (2409.02908, section 4). The closed form
is that of the lattice: q = delta p r / (e^r - 1) with r = 2^-bits / (delta p), for a chance delta of being revealed.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vgen.rng import BatchStream
from vgen.samplers.first_hitting import draw_or_mask

FLOAT32_BITS = 24
SETTINGS = ((256, 1.0), (1024, 1.0), (1024, 0.5), (16384, 1.0))  # codes, and the exponent of their Zipf law
STEPS = (64, 256, 1024, 4096, 16384, 65536)


def zipf(number: int, exponent: float) -> torch.Tensor:
    """Probabilities (number,) float64 proportional to rank ** -exponent."""
    weights = torch.arange(1, number + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()


def lattice_law(probabilities: torch.Tensor, reveal: float | torch.Tensor, bits: int = FLOAT32_BITS) -> torch.Tensor:
    """Chance of each code (..., K) in one step in which it should be `reveal` times its probability."""
    wanted = reveal * probabilities
    ratio = 2.0**-bits / wanted
    return wanted * ratio / torch.expm1(ratio)


def entropy(law: torch.Tensor) -> float:
    """Nats of a law (K,), normalised first."""
    law = law / law.sum()
    return float(-(law * law.clamp_min(1e-300).log()).sum())


def whole_run(probabilities: torch.Tensor, steps: int) -> torch.Tensor:
    """Law (K,) of a token over a linear schedule, each step with the chance 1 / (steps left) of being revealed.

    What a step fails to reveal is left for later ones, the last of which reveals for certain.
    """
    law = torch.zeros_like(probabilities)
    alive = 1.0
    for left in range(steps, 0, -1):
        revealed = lattice_law(probabilities, 1 / left)
        if left == 1:
            revealed = revealed / revealed.sum()
        law += alive * revealed
        alive *= 1 - float(revealed.sum())
    return law


def measured(probabilities: torch.Tensor, reveal: float, bits: int, draws: int = 400_000) -> tuple[float, float]:
    """Entropy of the codes that `draw_or_mask` reveals, and how often it does relative to `reveal`."""
    logits = probabilities.log().float().expand(1, 2000, -1)
    rng = BatchStream(torch.Generator().manual_seed(0), 1)
    counts = torch.zeros(len(probabilities) + 1, dtype=torch.float64)
    for _ in range(draws // 2000):
        found = draw_or_mask(logits, reveal, rng.exponential((2000, logits.shape[-1] + 1), 0), bits)
        counts += torch.bincount(found.flatten(), minlength=len(counts))
    return entropy(counts[:-1]), float(counts[:-1].sum() / counts.sum()) / reveal


def main(
    out: Annotated[Path, typer.Option(help="The plot.")] = Path("docs/gumbel-defect.png"),
    draws: Annotated[int, typer.Option(help="Draws behind each measured figure.")] = 400_000,
) -> None:
    """Print both tables and write the plot."""
    print("one step: entropy of revealed codes (nats) and share of the reveals that should happen")
    print("K   bits  reveal  law       measured  exact draw")
    for codes, bits, reveal in ((64, 10, 0.05), (64, 12, 0.02), (64, 12, 1.0), (64, 24, 0.05)):
        law = zipf(codes, 1.0)
        formula = lattice_law(law, reveal, bits)
        found, exact = measured(law, reveal, bits, draws), measured(law, reveal, 0, draws)
        rate = float(formula.sum()) / reveal
        print(
            f"{codes}  {bits:>4}  {reveal:<6}  {entropy(formula):.3f} {rate:.2f}  {found[0]:.3f} {found[1]:.2f}"
            f"  {exact[0]:.3f} {exact[1]:.2f}"
        )
    print("whole run in float32: entropy of a token by the number of steps")
    print("K, exponent".ljust(14), "exact", *(f"T={steps}".rjust(8) for steps in STEPS))
    curves: list[tuple[str, float, list[float]]] = []
    for codes, exponent in SETTINGS:
        law = zipf(codes, exponent)
        found_entropies = [entropy(whole_run(law, steps)) for steps in STEPS]
        curves.append((f"{codes} codes, Zipf {exponent:g}", entropy(law), found_entropies))
        name = f"{codes}, {exponent:g}".ljust(14)
        print(name, f"{entropy(law):.3f}", *(f"{value:.3f}".rjust(8) for value in found_entropies))
    plot(curves, out)
    print(out)


def plot(curves: list[tuple[str, float, list[float]]], out: Path) -> None:
    """Entropy lost to float32 against the number of steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for name, exact, found in curves:
        axes.plot(STEPS, [exact - value for value in found], marker="o", markersize=4, label=name)
    axes.axhline(0, color="black", linewidth=0.8, linestyle="--", label="vgen's samplers")
    axes.set_xscale("log", base=4)
    axes.set_xlabel("steps T")
    axes.set_ylabel("entropy lost per token (nats)")
    axes.set_title("The usual masked-diffusion sampler with float32 Gumbel noise", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, format="png")


if __name__ == "__main__":
    typer.run(main)
