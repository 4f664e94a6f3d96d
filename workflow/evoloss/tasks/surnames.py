"""Surnames and their languages, from the name lists that Faker ships."""

from __future__ import annotations

import importlib
import unicodedata
from collections import Counter
from importlib import metadata

import numpy as np

from evoloss.errors import DataError
from evoloss.tasks.sources import Source

MAX_CHARACTERS = 16
"""Length of every encoded name; longer names (about 1 %) are cut."""

SURNAME_LISTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Azerbaijani": ("az_AZ", ("last_names_male", "last_names_unisex")),
    "Croatian": ("hr_HR", ("last_names",)),
    "Dutch": ("nl_NL", ("last_names",)),
    "English": ("en_GB", ("last_names",)),
    "Estonian": ("et_EE", ("last_names_est",)),
    "Finnish": ("fi_FI", ("last_names",)),
    "French": ("fr_FR", ("last_names",)),
    "German": ("de_AT", ("last_names",)),
    "Hungarian": ("hu_HU", ("last_names",)),
    "Indonesian": ("id_ID", ("last_names_male",)),
    "Irish": ("ga_IE", ("last_names",)),
    "Italian": ("it_IT", ("last_names",)),
    "Polish": ("pl_PL", ("male_last_names", "unisex_last_names")),
    "Slovak": ("sk_SK", ("last_names_male",)),
    "Slovene": ("sl_SI", ("last_names",)),
    "Spanish": ("es_ES", ("last_names",)),
    "Swedish": ("sv_SE", ("last_names",)),
    "Uzbek": ("uz_UZ", ("last_names_male",)),
    "Yoruba": ("yo_NG", ("last_names",)),
    "Zulu": ("zu_ZA", ("last_names",)),
}
"""Language: (Faker locale, attributes of its person provider).

One locale for each of 20 languages written in Latin script, chosen for its number of distinct
names. Where women's names are derived from men's (Novák, Nováková) only the men's form is taken:
the pair is one family name, and its halves must not fall on both sides of a split.
"""


def normalise_name(name: str) -> str:
    """Return ``name`` in lower case and NFC, with straight apostrophes, at most 16 characters.

    >>> normalise_name("O\u2019Brien ")
    "o'brien"
    """
    text = unicodedata.normalize("NFC", name).lower()
    # Python lowers a dotted capital I to two characters; who writes it means a plain i.
    text = text.replace("i\u0307", "i")
    for quote in "\u2018\u2019\u02bb\u02bc`":
        text = text.replace(quote, "'")
    return " ".join(text.split())[:MAX_CHARACTERS].rstrip()


def read_surnames(language: str) -> set[str]:
    """Return the distinct normalised names of one language of `SURNAME_LISTS`.

    Raises
    ------
    DataError
        If the installed Faker does not have the list.
    """
    locale, attributes = SURNAME_LISTS[language]
    try:
        provider = importlib.import_module(f"faker.providers.person.{locale}").Provider
        # A list may be a tuple or a dict of weights: iterating gives the names either way.
        names = {normalise_name(name) for key in attributes for name in getattr(provider, key)}
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"dataset 'surnames': Faker {metadata.version('Faker')} has no surname list for "
            f"{language} (locale {locale}, {', '.join(attributes)}); install the version of "
            "envs/lock.txt"
        ) from error
    return names - {""}


def load_surnames(name: str) -> Source:
    """Return about 15,000 surnames in 20 languages, without those found in two languages."""
    languages = sorted(SURNAME_LISTS)
    by_language = {language: read_surnames(language) for language in languages}
    occurrences = Counter(surname for names in by_language.values() for surname in names)
    pairs = [
        (surname, label)
        for label, language in enumerate(languages)
        for surname in sorted(by_language[language])
        if occurrences[surname] == 1
    ]
    return Source(
        name=name,
        kind="classification",
        encoding="text",
        x=np.array([surname for surname, _ in pairs], dtype=np.str_),
        y=np.array([label for _, label in pairs], dtype=np.int64),
        class_names=tuple(languages),
        source="Faker person providers, last-name lists of 20 locales",
        source_version=f"Faker {metadata.version('Faker')}",
        licence="MIT (Faker)",
    )
