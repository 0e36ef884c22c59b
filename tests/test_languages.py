"""Prompts, openings, closings and numbers in other languages than English."""

import pytest

from byte_tokenizer import byte_tokenizer
from hf_apar.data.distillation.batches import BatchReport, TextAnswer
from hf_apar.data.distillation.distill import TOO_MANY, Question, distill, read_answers, with_lead
from hf_apar.data.distillation.elaborate import elaborate
from hf_apar.data.distillation.languages import LANGUAGES, announced, language_of
from hf_apar.data.distillation.questions import OPENINGS, families, open_lists, template_questions
from hf_apar.data.distillation.samplers import LEAD_TOKENS, Continuation
from hf_apar.data.extraction.markdown import extract
from hf_apar.data.settings import PromptChoice
from hf_apar.errors import ConfigurationError

OTHERS = [code for code in LANGUAGES if code != "en"]
ANSWERS = {
    "en": "Here are three ways to rest:\n\n1. **Sleep**: go to bed early every night.\n"
    "2. **Walks**: walk in the park every day.\n3. **Music**: play the piano in the evening.",
    "de": "Hier sind drei Wege zur Ruhe:\n\n1. **Schlaf**: Gehen Sie jeden Abend früh zu Bett.\n"
    "2. **Gehen**: Gehen Sie jeden Tag in den Park.\n3. **Musik**: Spielen Sie am Abend etwas Klavier.",
    "fr": "Voici trois façons de se reposer :\n\n1. **Sommeil** : couchez-vous tôt tous les soirs.\n"
    "2. **Marche** : marchez dans le parc tous les jours.\n3. **Musique** : jouez du piano le soir venu.",
    "es": "Aquí tienes tres maneras de descansar:\n\n1. **Sueño**: acuéstate temprano todas las noches.\n"
    "2. **Paseos**: pasea por el parque todos los días.\n3. **Música**: toca el piano por la tarde.",
    "it": "Ecco tre modi per riposare:\n\n1. **Sonno**: vai a letto presto ogni sera.\n"
    "2. **Passeggiate**: cammina nel parco tutti i giorni.\n3. **Musica**: suona il pianoforte la sera tardi.",
    "pt": "Aqui estão três maneiras de descansar:\n\n1. **Sono**: vá para a cama cedo todas as noites.\n"
    "2. **Passeios**: caminhe no parque todos os dias.\n3. **Música**: toque piano à noite em casa.",
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("code", OTHERS)
def test_a_language_has_prompts_of_its_own_with_a_place_for_each_slot(code):
    prompts = [prompt for family in families(code).values() for prompt in family.prompts()]
    assert len(prompts) == len(set(prompts)) >= 200
    for name, family in families(code).items():
        assert {template.count("{}") for template in family.templates} == {len(family.slots)}, name
        assert family.openings == LANGUAGES[code].openings, name
    assert families(code).keys() >= {"advice", "subjects", "counts", "facts", "pieces"}
    for opening in LANGUAGES[code].openings:
        assert opening.count("...") == 1 and opening.endswith(":\n\n1. **"), opening


@pytest.mark.parametrize("code", LANGUAGES)
def test_prompts_and_answers_are_known_by_their_language(code):
    prompts = [prompt for family in families(code).values() for prompt in family.prompts()]
    known = [language_of(prompt) for prompt in prompts]
    own = sum(one is LANGUAGES[code] for one in known)
    assert own >= 0.98 * len(prompts)
    if code == "en":
        assert own + known.count(None) == len(prompts), "English prompts are drawn for as before"
    assert language_of(ANSWERS[code]) is LANGUAGES[code]


STRANGERS = {
    "nl": "Thee is een drank die in veel landen wordt gedronken, en de smaak is anders. Wat helpt je om te slapen?",
    "ro": "Ceaiul este o băutură care se bea în multe țări și te poate ajuta să te relaxezi. Cum pot să dorm mai bine?",
    "ca": "El te és una beguda que es pren a molts països i que té beneficis per a la salut. Quins són els avantatges?",
    "da": "Te er en drik, som man kan drikke i mange lande, og den er god for helbredet. Hvordan laver man den?",
    "hu": "A tea egy ital, és sok országban isszák. Az emberek szerint is nagyon egészséges, de mik az előnyei?",
}


@pytest.mark.parametrize("code", STRANGERS)
def test_a_language_that_nobody_knows_here_is_taken_for_none_of_these(code):
    """Each has words of the six: a Dutch question was opened in French, a Romanian list closed in Spanish."""
    for sentence in (STRANGERS[code], *STRANGERS[code].split(". ")):
        assert language_of(sentence) is None, sentence


def test_a_long_answer_is_known_as_a_short_one_is():
    """The more words there are, the fewer of the different ones are frequent."""
    rare = " ".join("word" + "".join(chr(97 + int(digit)) for digit in str(number)) for number in range(700))
    text = " ".join(f"the {one} of" for one in rare.split())
    assert language_of(text) is LANGUAGES["en"]


def test_without_a_known_word_there_is_no_language():
    assert language_of("Пять причин рано вставать") is language_of("17 * 6 = ?") is language_of("") is None


@pytest.mark.parametrize("code", LANGUAGES)
def test_the_number_that_is_announced_is_read_in_each_language(code):
    assert announced("?", ANSWERS[code]) == 3
    for value, words in enumerate(LANGUAGES[code].numbers, start=2):
        for word in words.split("|"):
            assert announced(ANSWERS[code].replace(LANGUAGES[code].numbers[1], word)) == value, word
    if code != "en":
        counts = families(code)["counts"]
        assert [announced(prompt) for prompt in counts.prompts()] == [
            number for _ in counts.templates for number in (3, 4, 5, 6) for _ in counts.slots[1]
        ]


def test_a_word_that_counts_in_another_language_alone_announces_nothing():
    """Spanish once, Italian sei and due, German acht."""
    assert announced("How can I once more learn to swim?") is None
    assert announced("What is the rent due for this flat?") is None
    assert announced("Wie sei das zu verstehen?") is None


@pytest.mark.parametrize("code", LANGUAGES)
def test_answers_in_parts_fork_in_each_language(code):
    tree = extract(ANSWERS[code])
    assert tree.text == ANSWERS[code] and len(tree.children) == 3


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_list_of_others_prompts_is_opened_in_their_language(code):
    questions = [Question(prompt) for prompt in families(code)["advice"].prompts()]
    assert {one.opening for one in open_lists(questions, 1.0)} == {*LANGUAGES[code].openings}
    assert {one.opening for one in open_lists([Question("Пять причин?")] * 100, 1.0)} == {*OPENINGS}


def test_an_opening_takes_the_models_words_where_a_blank_stands_before_the_colon():
    lead = with_lead(LANGUAGES["fr"].openings[1], " conseils pour dormir :\n\n1.")
    assert lead == "Voici quelques conseils pour dormir :\n\n1. **"


class Told:
    """Writes a lead, then items without end, and closing sentences; keeps to each task's stop."""

    def __init__(self, lead):
        self.lead, self.tasks = lead, []

    def __call__(self, tasks):
        self.tasks += tasks
        items = "".join(f"A{number}**: er hilft\n{number + 1}. **" for number in range(1, 12))
        texts = [(self.lead if task.max_new_tokens == LEAD_TOKENS else items).partition(task.stop)[0] for task in tasks]
        return [Continuation(text, True) for text in texts]


@pytest.mark.parametrize(("lead", "items"), [(" fünf Wege zur Ruhe:", 5), (" Wege zur Ruhe:", 6), (" sieben Wege:", None)])
def test_a_list_ends_after_as_many_items_as_it_announces_in_german(tokenizer, tmp_path, lead, items):
    path, question = tmp_path / "a.jsonl", Question("Wie kommt man zur Ruhe?", LANGUAGES["de"].openings[0])
    list(distill(Told(lead), tokenizer, [question], path, max_items=6))
    if items is None:
        assert BatchReport.of(path).dropped == {TOO_MANY: 1}
    else:
        (answer,) = read_answers(path)
        assert answer.response.startswith(f"Hier sind{lead}\n\n1. **") and answer.response.count("er hilft") == items


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_list_is_closed_in_its_language(tokenizer, tmp_path, code):
    def sample(tasks):
        return [Continuation(" that is that." if task.stop else "", bool(task.stop)) for task in tasks]

    path = tmp_path / "a.jsonl"
    list(elaborate(sample, tokenizer, [TextAnswer("?", ANSWERS[code])], path, min_detail_tokens=8))
    (answer,) = read_answers(path)
    assert answer.response in {f"{ANSWERS[code]}\n\n{closing} that is that." for closing in LANGUAGES[code].closings}


def test_a_list_in_an_unknown_language_is_not_closed(tokenizer, tmp_path):
    russian = (
        "Три совета:\n\n1. **Сон**: ложитесь спать рано каждый вечер.\n2. **Парк**: гуляйте там час каждый день.\n"
        "3. **Музыка**: играйте по вечерам на пианино."
    )
    assert len(extract(russian).children) == 3
    path = tmp_path / "a.jsonl"
    list(elaborate(lambda tasks: [], tokenizer, [TextAnswer("?", russian)], path, min_detail_tokens=8))
    assert [answer.response for answer in read_answers(path)] == [russian]


def test_templates_are_drawn_from_the_languages_that_are_asked_for():
    assert template_questions(50, seed=3) == template_questions(50, seed=3, languages=("en",))
    german = {prompt for family in families("de").values() for prompt in family.prompts()}
    assert {one.prompt for one in template_questions(len(german), languages=["de"])} == german
    both = template_questions(300, seed=1, languages=("de", "fr"))
    assert 100 < sum(one.prompt in german for one in both) < 200
    assert {one.opening for one in both} == {"", *LANGUAGES["de"].openings, *LANGUAGES["fr"].openings}


@pytest.mark.parametrize("languages", [(), ("de", "xx"), ("German",), ([],)])
def test_an_unknown_language_is_refused_by_name(languages):
    with pytest.raises(ConfigurationError, match=r"languages is .*; the package's own prompts are in en, de, fr"):
        PromptChoice(languages=languages)
