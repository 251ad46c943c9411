"""What people read is in short sentences and in plain words."""

from __future__ import annotations

import ast
import itertools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.pages import marks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: Records of decisions keep the words of their day.
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"))
    if not path.is_relative_to(DOCS / "adr")
}
MEDIAN = 18
LONGEST = 36
#: Quotes errors of other people's programs.
LISTS = {"docs/coverage.md"}


def prose(text: str) -> list[str]:
    """Paragraphs and entries of lists: no code, tables, headings or what scripts write."""
    for name in set(re.findall(r"<!-- (\S+):begin -->", text)):
        begin, end = map(re.escape, marks(name))
        text = re.sub(f"{begin}.*?{end}", "\n", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<[^>]+>|\$\$.*?\$\$", "", text, flags=re.DOTALL)
    text = re.sub(r"^(#|\||    \S|:::|!\[).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^(\d+\.|[-*]) +", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def sentences(text: str) -> list[str]:
    """A sentence ends with a full stop, a question mark or an exclamation mark before a space."""
    found = []
    for part in prose(text):
        part = re.sub(r"\b(e\.g|i\.e|et al|vs)\.", r"\1", part)
        found += re.split(r"(?<=[.!?])[*_)]*\s+", part)
    return [one for one in found if re.search(r"\w", one)]


def words(sentence: str) -> int:
    """How many words a reader sees; code between backticks is one."""
    return len(re.sub(r"`[^`]*`", "code", sentence).split())


#: Words not to use, and what to write instead.
AVOIDED = {
    r"mend(s|ed|ing)?": "fix",
    r"hand(s|ed|ing)? over": "return",
    r"(stands?|standing|stood) in": "is in, or replaces",
    r"(stands?|standing|stood) (there|beside)": "is",
    r"refus(e|es|ed|ing)": "reject",
    r"(sent|sends?|sending) (it )?back": "reject",
    r"vouch(es)?": "verify",
    r"ledgers?": "constraints",
    r"twins": "counterpart",
    r"fore(tell|tells|told)": "predict",
    r"so many of them": "at most",
    r"examines?": "check",
    r"whole way": "all steps",
    r"that there (is|are) not": "missing",
    r"the host|hosts": "base member",
    r"lays? open|laid open": "show",
}


def avoided(text: str) -> list[str]:
    """What in a text is not to be used, and what to write instead."""
    text = " ".join(text.split())
    return [
        f"{found[0]!r}, better {better!r}: {text[max(0, found.start() - 30) : found.end() + 30]}"
        for pattern, better in AVOIDED.items()
        for found in re.finditer(rf"\b({pattern})\b", text, re.IGNORECASE)
    ]


PAGE = """# A title

One `long piece of code` ends. See [a page](x.md).

```python
x = 1.
```
<!-- a:begin -->
Written. By. Scripts.
<!-- a:end -->
| a | table |

- An item
  of two lines
"""


def test_prose_is_told_from_code_and_split_into_sentences():
    found = ["One `long piece of code` ends.", "See a page.", "An item of two lines"]
    assert sentences(PAGE) == found
    assert [words(one) for one in found] == [3, 3, 5]
    assert avoided("The network\nis handed over.")[0].startswith("'handed over', better 'return'")
    assert avoided("It depends on an outstanding interest.") == []


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_page_is_in_short_sentences_and_plain_words(page: str):
    text = PAGES[page].read_text(encoding="utf-8")
    found = sentences(text)
    lengths = [words(one) for one in found]
    assert statistics.median(lengths or [0]) <= MEDIAN
    assert [one for one in found if words(one) > LONGEST and page not in LISTS] == []
    without = re.sub(r"^```.*?^```$|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)
    assert avoided(without) == []


def strings(path: Path) -> Iterator[str]:
    """Docstrings, messages and help texts of a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value


def test_what_the_program_says_is_in_plain_words():
    found = {
        str(path.relative_to(ROOT)): list(itertools.chain(*map(avoided, strings(path))))
        for path in (ROOT / "fxfuse").rglob("*.py")
    }
    assert {path: said for path, said in found.items() if said} == {}
