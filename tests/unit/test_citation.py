"""The paper of BandPO is cited in one way: in the code, in CITATION.cff, and on the pages that name it in full."""

import re
from pathlib import Path

import yaml

from bandpo import OBJECTIVES
from bandpo._system import citation

ROOT = Path(__file__).parents[2]


def test_citation_file_is_a_citation_and_agrees_with_the_code():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys()  # what the format requires
    paper = found["preferred-citation"]
    assert paper["title"] == citation.TITLE
    assert tuple(f"{a['given-names']} {a['family-names']}" for a in paper["authors"]) == citation.AUTHORS
    assert paper["year"] == citation.YEAR
    assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{citation.ARXIV}"}]
    assert paper["url"].endswith(citation.ARXIV)


def test_bibtex_has_every_field_in_braces_that_close():
    text = citation.bibtex()
    fields = dict(re.findall(r"^    (\w+) += \{(.*)\},$", text, flags=re.M))
    assert (
        fields["title"] == f"{{{citation.TITLE}}}" and fields["year"] == "2026" and fields["eprint"] == citation.ARXIV
    )
    assert fields["author"].split(" and ")[0] == "Li, Yuan" and fields["author"].split(" and ")[-1] == "Qiu, Xipeng"
    assert len(fields["author"].split(" and ")) == len(citation.AUTHORS) == 7
    assert text.startswith("@article{") and text.endswith("}") and text.count("{") == text.count("}")


def test_the_page_of_papers_and_the_zoo_name_the_same_paper():
    page = " ".join((ROOT / "docs" / "papers.md").read_text().split())
    assert f"*{citation.TITLE}*" in page and ", ".join(citation.AUTHORS) in page
    assert citation.ARXIV in OBJECTIVES["bandpo-kl"].paper
