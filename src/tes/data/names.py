"""Readable class names from folder names and labels, and matching names that are written differently."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

# "n02085620-Chihuahua" (WordNet), "001.Black_footed_Albatross" (CUB), "07_tulip": numbers that say nothing.
_NUMBERING = re.compile(r"^(?:n\d{8}[-_ ]+|\d{1,4}\.\s*(?=\D)|0\d*[-_ ]+(?=[^\W\d]))+")
_CAMEL_CASE = re.compile(r"(?<=[^\W\d_]{2})(?<![^\W\d_]Mc)(?<!\bMc)(?=[A-Z][a-z])|(?<=[A-Z])(?=[A-Z][a-z]{2})")
# A hyphen is part of the name between digits ("747-400") and after a short letter code ("F-16", "Il-76").
_KEPT_HYPHEN = re.compile(r"(?<=\d)-(?=\d)|(?<![^\W\d_])([^\W\d_]{1,3})-(?=\d)")
_UNINFORMATIVE = re.compile(
    r"(?:class|label|category|group|cluster|folder|type|id|c)?[\s#.]*\d[\d\s.]*|n\d{8}|[a-z]|[\W_]*|"
    r"(?:class|label|category|group|cluster) .|unknown|others?|misc|unlabell?ed|none|null|nan",
    re.IGNORECASE,
)


def readable_name(label: str) -> str:
    """Return a label as a person would write it: `Faces_easy` is "faces easy", `GoldenRetriever` "golden retriever".

    Numbering (WordNet ids, "001.") is dropped; hyphens that belong to a name stay ("747-400", "F-16A/B"). The result
    is lower-case and never empty: a label without a letter or digit is returned as it is.
    """
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", label))
    text = "".join(character for character in text if unicodedata.category(character) not in ("Cf", "Cc", "Cs"))
    text = _NUMBERING.sub("", text.strip())
    if not re.search(r"[\s_-]", text):
        text = _CAMEL_CASE.sub(" ", text)
    text = _KEPT_HYPHEN.sub(lambda found: found.group().replace("-", "\0"), text)
    text = re.sub(r"[\s_-]+", " ", text).replace("\0", "-").strip()
    text = unicodedata.normalize("NFKC", text.lower())
    return text if any(map(str.isalnum, text)) else label


def match_key(text: str) -> str:
    """Return what two spellings of one name share: no case, no spaces, no punctuation.

    Digits that something separates stay apart, so that "1 11" and "11 1" differ.
    """
    text = unicodedata.normalize("NFKC", readable_name(text).casefold())
    # Marks are kept beside letters and digits: in many scripts the vowels are marks.
    spelled = "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in text)
    return re.sub(r"(?<=\d) +(?=\d)", "-", spelled).replace(" ", "") or text


def is_uninformative(name: str) -> bool:
    """Tell whether a name says nothing to a text encoder: "class 3", "17", "x", "unknown"."""
    return bool(_UNINFORMATIVE.fullmatch(readable_name(name)))


class NameIndex:
    """Finds names among `options` by exact spelling, else by readable name.

    Args:
        options: Each option, or each with further spellings of it.
    """

    def __init__(self, options: Iterable[str] | Mapping[str, Iterable[str]]) -> None:
        self._spellings = {
            option: [option, *(options[option] if isinstance(options, Mapping) else ())] for option in options
        }
        self._by_key: dict[str, list[str]] = defaultdict(list)
        for option, spellings in self._spellings.items():
            for key in {match_key(spelling) for spelling in spellings}:
                self._by_key[key].append(option)

    def find(self, name: str) -> list[str]:
        """Return the options that `name` can mean: none, one, or (ambiguous) several."""
        return [name] if name in self._spellings else list(self._by_key.get(match_key(name), ()))

    def nearest(self, name: str) -> str | None:
        """Return the option written most like `name`, if any is close."""
        close = difflib.get_close_matches(match_key(name), self._by_key, n=1, cutoff=0.7)
        return self._by_key[close[0]][0] if close else None

    def describe_unknown(self, name: str) -> str:
        """Return "`name`" with why it was not found: what it could mean, or, if anything is close, what is."""
        if len(options := self.find(name)) > 1:
            return f"`{name}` (it could mean {' or '.join(f'`{option}`' for option in options)})"
        nearest = self.nearest(name)
        return f"`{name}`" + (f" (did you mean `{nearest}`?)" if nearest is not None else "")
