"""Words by which a text leans on what stands before it, in the languages of the tests; and how long a text is.

A language that is missing here loses precision, not correctness: its answers fork by their form alone.
"""

import re

# scripts that put no space between words: two letters count as a word
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNSPACED_LETTER = re.compile(f"[{_UNSPACED}]")


def count_words(text: str) -> int:
    """Return how many words ``text`` has; where a script has no spaces, two letters are one.

    >>> count_words("a green tea"), count_words("绿茶对身体很好")
    (3, 4)
    """
    letters = len(_UNSPACED_LETTER.findall(text))
    return len(text.split()) + max(0, (letters + 1) // 2 - 1) if letters else len(text.split())


def _opening(words: str) -> re.Pattern[str]:
    """Match a text that opens with one of ``words`` (``|`` between them), whatever marks stand before."""
    return re.compile(rf"[\s#*_\"'“«„¿¡(]*(?:{words})(?![^\W{_UNSPACED}])", re.IGNORECASE)


def _joined(*alternatives: str) -> str:
    return "|".join(" ".join(words.split()) for words in alternatives)


CONCLUSION = _opening(
    _joined(
        "in conclusion|to conclude|conclusions?|in summary|to summari[sz]e|to sum up|summary|overall|all in all|in short",
        "ultimately|remember|by (?:following|incorporating|implementing|using|understanding|doing)",
        "zusammenfassend|zusammenfassung|fazit|insgesamt|abschließend|alles in allem",
        "en conclusion|conclusion|en résumé|en somme|pour conclure|pour résumer|au final",
        "en conclusión|conclusión|en resumen|para concluir|para resumir|en definitiva",
        "em conclusão|conclusão|em resumo|em suma|para concluir",
        "in conclusione|conclusione|in sintesi|in breve|riassumendo",
        "в заключение|заключение|в итоге|таким образом|подводя итог|итак",
        "总之|總之|综上所述|总而言之|总的来说|结论|まとめ|結論|以上のように|要するに",
        "निष्कर्ष|संक्षेप में|अंत में|في الختام|ختامًا|ختاما|الخلاصة|خلاصة|باختصار|לסיכום|sonuç olarak|özetle",
    )
)

# what opens an item that goes on from the one before
SEQUENCE = _opening(
    _joined(
        "then|and then|next,|after (?:that|this|doing (?:so|that|this)|which)|afterwards?|subsequently|consequently",
        "as a (?:result|consequence)|therefore|thus|hence|accordingly|for this reason|because of (?:this|that)",
        "building (?:up)?on|based on (?:this|that|these|those|the (?:above|previous))|following (?:this|that)",
        "with (?:this|that) in mind|once (?:this|that|these|those)|now that|continuing from|in addition to (?:this|that)",
        "dann|danach|anschließend|daraufhin|deshalb|daher|folglich|somit|darauf aufbauend|infolgedessen",
        "puis|ensuite|après (?:cela|ça)|par conséquent|donc|c'est pourquoi|ainsi,",
        "luego|después(?: de (?:eso|esto))?|a continuación|por (?:lo )?tanto|por consiguiente|en consecuencia",
        "depois(?: disso)?|em seguida|portanto|por isso|consequentemente",
        "poi|dopo(?: di che| ciò)|successivamente|quindi|perciò|di conseguenza",
        "затем|потом|после этого|далее|поэтому|следовательно|вследствие этого",
        "然后|接着|接下来|随后|之后|因此|所以|于是|そして|次に|その後|それから|したがって|だから|そのため",
        "फिर|इसके बाद|उसके बाद|इसलिए|अतः|ثم|بعد ذلك|لذلك|وبالتالي|بناء على ذلك|אחר כך|לאחר מכן|לכן|daha sonra|bu nedenle",
    )
)

# what opens a paragraph whose meaning the one before it gives
ANAPHORA = _opening(
    _joined(
        "th(?:is|at|ese|ose)|he|she|they|his|her|their|its|it (?!(?:is|was|has been|can be|may be|should be) \\w+ "
        "(?:that|to)\\b)|such|the (?:former|latter|same)|however|but|yet|nevertheless|nonetheless|instead|so|otherwise",
        "in (?:this|that|these|those|contrast|other words|response)|by contrast|on the (?:other hand|contrary)",
        "dies(?:e|er|es|em|en)?|jene[rs]?|er|sie|jedoch|aber|dennoch|stattdessen|also|im gegensatz dazu",
        "cela|cette?|ces|celui-ci|celle-ci|ils?|elles?|cependant|mais|toutefois|pourtant|en revanche|au contraire",
        "est[aeo]s?|es[aeo]s?|ellos|ellas|él|ella|sin embargo|pero|no obstante|en cambio|por el contrario",
        "ist[oa]|esses?|essas?|eles?|elas?|no entanto|porém|mas|quest[oaei]|tuttavia|però|invece",
        "это|этот|эта|эти|он|она|они|однако|но|тем не менее|напротив|в отличие от этого",
        "这|那|他|她|它|但是|但|然而|不过|相反|これ|それ|この|その|しかし|だが|でも|一方",
        "यह|ये|वह|वे|इस|इन|उस|लेकिन|परंतु|हालांकि|هذا|هذه|ذلك|تلك|هو|هي|لكن|ولكن|ومع ذلك|זה|זאת|הוא|היא|אבל|אולם|bu|ancak",
    )
)

# a salutation on a line of its own
LETTER = re.compile(
    r"^[*_ ]{0,3}(?:dear|sehr geehrte[rs]?|liebe[rs]?|ch[eè]re?s?|madame|monsieur|estimad[oa]s?|querid[oa]s?|"
    r"gentile|egregi[oa]|car[oaie]s?|prezad[oa]s?)\b[^\n.?]{0,60}[,:!，][*_ ]{0,3}$",
    re.IGNORECASE | re.MULTILINE,
)

# what points at another part, wherever it stands
REFERENCE = re.compile(
    _joined(
        r"\b(?:steps?|points?|items?|tips?|parts?|sections?|rules?|ideas?|options?|methods?|numbers?) (?:#|no\. ?)?\d+\b",
        r"\b(?:as|see|like|than) (?:\w+ ){0,3}(?:above|earlier|before)\b|\b(?:aforementioned|above-mentioned)\b",
        r"\b(?:mentioned|described|discussed|listed|explained|noted|outlined|defined) (?:above|earlier|previously)\b",
        r"\b(?:previous|preceding|prior|last|first|second|third|next|earlier|above|following) "
        r"(?:step|point|item|tip|section|paragraph|bullet|entry)s?\b",
        r"\bbuild(?:s|ing)? (?:up)?on (?:this|that|these|those|the (?:previous|first|last|above))\b",
        r"\b(?:schritt|punkt|tipp|abschnitt|étape|point|paso|punto|passo|etapa|passaggio|adım) \d+\b",
        r"\b(?:шаг|пункт)\w* (?:№ ?)?\d+\b",
        r"\b(?:wie oben|oben (?:genannt|erwähnt|beschrieben)\w*|siehe oben|im vorherigen|vorige[nr]?)\b",
        r"\b(?:ci-dessus|étape précédente|mentionné\w* (?:plus haut|précédemment))\b",
        r"\b(?:paso anterior|mencionad\w+ (?:arriba|anteriormente|acima)|passo anterior|passaggio precedente)\b",
        r"\b(?:предыдущ\w+ (?:шаг\w*|пункт\w*)|как (?:сказано|указано|упомянуто|описано) выше|вышеупомянут\w+)\b",
        r"第\s*[一二三四五六七八九十\d]+\s*(?:步|点|條|条|项|項)|步骤\s*[一二三四五六七八九十\d]+|上述|如上|前面提到|上一步",
        r"(?:手順|ステップ)\s*\d|前述|上記|先ほど|前の(?:手順|ステップ|項目)",
        r"चरण \d|पिछले चरण|ऊपर (?:बताए|दिए|उल्लिखित)",
        r"الخطوة (?:\d|رقم|السابقة|الأولى|الثانية)|(?:المذكور\w*|ذكرنا|كما ورد) (?:أعلاه|سابق)",
        r"(?:השלב|בשלב|לשלב) (?:\d|הקודם|הראשון)|כאמור לעיל",
    ),
    re.IGNORECASE,
)  # fmt: skip
