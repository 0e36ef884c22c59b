"""What text to train on depends on where it is not English: how lists are opened and closed, and words for numbers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

FIRST_NUMBER = 2
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Language:
    """A language in which prompts can be asked and answers closed.

    Attributes:
        openings: beginnings of an answer that make a small model write a list whose items have a title and a detail; the
            model's own words take the place of the three dots.
        closings: the first words of a sentence that closes an answer: left to itself, a small model goes on with its list.
        numbers: from two on; ``|`` stands between the forms of one.
        words: frequent ones, by which a text in it is known.
    """

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    numbers: tuple[str, ...]
    words: frozenset[str]

    def number(self, word: str) -> int:
        """Return what ``word`` counts, one of the ``numbers`` or digits."""
        if word.isdigit():
            return int(word)
        return FIRST_NUMBER + next(place for place, one in enumerate(self.numbers) if word.lower() in one.split("|"))


def _language(begins: Iterable[str], closings: str, numbers: str, words: str) -> Language:
    openings = tuple(f"{begin}:\n\n1. **" for begin in begins)
    return Language(openings, tuple(closings.split("; ")), tuple(numbers.split()), frozenset(words.split()))


LANGUAGES = {
    "en": _language(
        ("Here are ...", "Here are some ...", "Here are a few ...", "Some of the ...", "There are several ...",
         "These are the ...", "Consider the following ..."),
        "Overall,; In short,; All in all,; In summary,",
        "two three four five six seven eight nine ten eleven twelve",
        """the of and to is are was what how which why who when where do does did for with that this these my you your it be
        can should would could about from by if not give write list explain describe some or at as in on an a i me most""",
    ),
    "de": _language(
        ("Hier sind ...", "Hier sind einige ...", "Hier sind ein paar ...", "Einige der ...", "Es gibt mehrere ...",
         "Das sind die ...", "Dies sind einige ..."),
        "Insgesamt; Kurz gesagt:; Alles in allem; Zusammenfassend",
        "zwei drei vier fünf sechs sieben acht neun zehn elf zwölf",
        """der die das den dem des ein eine einen einem einer und oder ist sind war was wie welche welcher warum wer wann wo
        nicht zu zum zur für mit von vom auf über man ich mir mein du es sie sich kann sollte wird werden haben hat wenn dass
        im in an als auch bei aus nach dabei hilft nenne schreibe erkläre""",
    ),
    "fr": _language(
        ("Voici ... ", "Voici quelques ... ", "Voici plusieurs ... ", "Voici les ... ", "Il y a plusieurs ... "),
        "En résumé,; En somme,; Dans l'ensemble,; En bref,",
        "deux trois quatre cinq six sept huit neuf dix onze douze",
        """le la les l un une des du de d et ou est sont qu que quel quelle quels quelles comment pourquoi qui quand où ne
        pas pour avec par sur dans en au aux ce cette ces je j me mon ma il elle on se s peut faut ont si donne écris
        explique à n t plus comme tu toi""",
    ),
    "es": _language(
        ("Aquí tienes ...", "Aquí tienes algunos ...", "Estos son los ...", "Estas son las ...", "Hay varios ...",
         "Estos son algunos de los ..."),
        "En resumen,; En definitiva,; En general,; En pocas palabras,",
        "dos tres cuatro cinco seis siete ocho nueve diez once doce",
        """el la los las un una unos unas y o es son del de que qué cómo cuál cuáles quién cuándo dónde por no para con sin
        sobre en al lo este esta estos estas yo mi me se su puede hay han si da dame escribe explica más a debo""",
    ),
    "it": _language(
        ("Ecco ...", "Ecco alcuni ...", "Ecco alcune ...", "Questi sono i ...", "Queste sono le ...", "Ci sono diversi ..."),
        "In sintesi,; In breve,; Nel complesso,; Tutto sommato,",
        "due tre quattro cinque sei sette otto nove dieci undici dodici",
        """il lo la i gli le l un uno una e o è sono del della dei delle di che cosa come quale quali chi quando dove perché
        non per con su nel nella in al alla da questo questa io mi mio si può bisogna hanno ha se dammi scrivi spiega a
        più deve su""",
    ),
    "pt": _language(
        ("Aqui estão ...", "Aqui estão alguns ...", "Aqui estão algumas ...", "Estes são os ...", "Estas são as ...",
         "Há vários ..."),
        "Em resumo,; Em suma,; No geral,; Em poucas palavras,",
        "dois|duas três quatro cinco seis sete oito nove dez onze doze",
        """o os as um uma uns umas e ou é são do da dos das de que quê como qual quais quem quando onde por não para com sem
        sobre em no na nos nas ao à este esta estes estas eu me meu minha se pode é há têm tem dê escreva explique mais a
        devo bem ajudam""",
    ),
}  # fmt: skip
"""By the letters of ISO 639; what is asked, a prompts file of each has."""


_OTHERS = tuple(frozenset(words.split()) for words in (
    "de het een van en is dat die in te zijn op met voor niet aan er om ook als wat hoe ik je kan bij of naar uit mijn geef",
    "och att det som en på är av för med till den har inte om ett jag du kan hur vad de så från man ska mig min ge bättre",
    "og at det som en på er af for med til den har ikke om et jeg du kan hvordan hvad de så fra man skal mig min av å hva",
    "și de la în un o pe nu cu care se din mai este sunt ce să pentru al ale cum ai am fi sau te poate îmi",
    "el la els les un una i de que en per amb del dels és són no com què quins quines més als al es molts seva",
    "i w na z do nie to jest się o jak co że po dla od za czy są przez może a ten ta mi moje jakie",
    "a v na se je že o s z do to jak co pro ale za by si jsou jaké jako od po k mi můj která který",
    "ve bir bu da de için ne mi ile çok daha olarak nasıl var gibi en ben sen bana ya nelerdir her olan",
    "dan yang di dari untuk dengan ini itu tidak pada adalah dalam ke apa bagaimana saya anda bisa atau akan",
    "ja on ei että se hän en mitä miten kun niin mutta joka voi ovat myös kuin tai minun olla miksi mitkä",
    "a az és hogy nem is egy van ez mi meg de csak mint már ha vagy miért hogyan milyen lehet ami el nekem mik",
))  # fmt: skip
# Frequent words of Dutch, Swedish, Danish or Norwegian, Romanian, Catalan, Polish, Czech, Turkish, Indonesian, Finnish,
# Hungarian, whose texts hold words of the languages above.
_LEAST = 0.1  # of the words of a text are frequent ones of its language


def language_of(text: str) -> Language | None:
    """Return the one of ``LANGUAGES`` most of whose frequent words stand in ``text``.

    ``None`` where hardly any of them does, or another language has more: what is of a language that nobody knows here is to
    be taken for none of these.

    >>> language_of("Nenne fünf Gründe dafür, früh aufzustehen.") is LANGUAGES["de"]
    True
    >>> language_of("Пять причин") is language_of("Wat zijn de voordelen van thee?") is None
    True
    """
    words = _WORD.findall(text.lower())
    said = set(words)
    best = max(LANGUAGES.values(), key=lambda language: len(said & language.words))  # of equals the first
    count = len(said & best.words)
    if not count or count < max(len(said & frequent) for frequent in _OTHERS):
        return None
    return best if sum(word in best.words for word in words) >= _LEAST * len(words) else None


def announced(*texts: str) -> int | None:
    """Return the number among the first five words of the first of ``texts`` that has one: digits, or a word.

    A word is one of the language of ``texts``, English where that is unknown.

    >>> announced("How do I rest?", "Here are five ways to rest"), announced("List 8 trees."), announced("In 1900, trees")
    (5, 8, None)
    >>> announced("Wie schläft man besser?", "Hier sind fünf Tipps")
    5
    """
    language = language_of(" ".join(texts)) or LANGUAGES["en"]
    words = "|".join(language.numbers)
    count = re.compile(rf"(?:\S+\s+){{0,4}}?[¿¡]?(?P<count>{words}|[2-9]|1\d|20)\b(?!\s*%)", re.IGNORECASE)
    found = next((match for text in texts if (match := count.match(text))), None)
    return None if found is None else language.number(found["count"])
