"""The paper of BandPO, as the cards of models cite it. `CITATION.cff` says the same, and a test compares both."""

TITLE = "BandPO: Bridging Trust Regions and Ratio Clipping via Probability-Aware Bounds for LLM Reinforcement Learning"
AUTHORS = ("Yuan Li", "Bo Wang", "Yufei Gao", "Yuqian Yao", "Xinyuan Wang", "Zhangyue Yin", "Xipeng Qiu")
YEAR = 2026
ARXIV = "2603.04918"


def bibtex() -> str:
    """The entry of the paper for BibTeX.

    Examples:
        >>> print(bibtex().splitlines()[0])
        @article{li2026bandpo,
    """
    authors = " and ".join(", ".join(reversed(name.split())) for name in AUTHORS)
    fields = {
        "title": f"{{{TITLE}}}",
        "author": authors,
        "year": YEAR,
        "journal": f"arXiv preprint arXiv:{ARXIV}",
        "eprint": ARXIV,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{ARXIV}",
    }
    lines = [f"    {name:<13} = {{{value}}}," for name, value in fields.items()]
    return "\n".join(["@article{li2026bandpo,", *lines, "}"])
