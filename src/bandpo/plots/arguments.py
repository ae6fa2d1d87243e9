"""Options of `bandpo bounds` and `bandpo objectives`."""

import argparse
from pathlib import Path

from bandpo._system.options import add_examples


def add_bounds_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bandpo bounds`.

    Args:
        parser: Parser of the command.
    """
    parser.description = (
        "Shows the interval that a trust region leaves to the ratio, over the probability of the token."
    )
    add = parser.add_argument
    add(
        "--divergence",
        default="kl",
        help="kl, reverse_kl, tv, chi2, ..., alpha:VALUE, or package.module:NAME of your own FDivergence; several separated by "
        "commas (default: kl)",
    )
    add("--radius", type=float, default=0.05, help="δ, in the units of the (first) divergence (default: 0.05)")
    add(
        "--match",
        help="with several divergences, choose the radii of the others so that they agree with the first one in: upper@P or "
        "lower@P (the bound of a token of probability P) or max_shift (default: the same radius for all)",
    )
    add("--max-ratio", type=float, help="cap on the upper bound; the paper's runs use 10 (default: none)")
    add("--output", type=Path, default=Path("bounds.png"), help="figure: .png, .svg or .pdf (default: bounds.png)")
    add("--no-figure", action="store_true", help="print the table only")
    add_examples(
        parser,
        "bounds                                             # the KL ball of the paper",
        "bounds --divergence kl,tv,chi2 --match upper@0.01  # three families that agree at p = 0.01",
        "bounds --divergence own:NAME --no-figure",
    )


def add_objectives_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bandpo objectives`.

    Args:
        parser: Parser of the command.
    """
    parser.description = (
        "Lists the named objectives, each with its formula and its paper; with names, all that each of them expects."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="named objective, or package.module:NAME of your own")
    parser.add_argument("--filter", metavar="TEXT", help="only objectives with this text in name, formula or paper")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        help="also draw the gradient weight of each over p and r: one figure (.png, .svg, .pdf), or a folder of figures",
    )
    add_examples(parser, "objectives --filter clip", "objectives bandpo-kl own:mine --plot weights.svg")
