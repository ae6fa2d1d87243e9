"""Draws docs/assets/kl-gradients.png, the figure of docs/kl.md: `python tools/kl.py`."""

from pathlib import Path

from bandpo.plots.reference import plot_reference_kl

FIGURE = Path(__file__).parents[1] / "docs" / "assets" / "kl-gradients.png"

if __name__ == "__main__":
    plot_reference_kl().savefig(FIGURE, dpi=110)
    print(f"figure: {FIGURE}")
