"""Prompts of our own writing: a seeded mix of questions, most of which ask for an answer in parts.

The parts of a kind are joined by :func:`itertools.product`, so a handful of templates and topics gives some
thousand prompts; :func:`template_questions` draws from them evenly over the kinds.
"""

import random
from itertools import product

from hf_apar.data.distill import Question

_ADVICE_TOPICS = (
    "learning to cook at home", "saving for a first car", "training for a half marathon", "keeping houseplants alive",
    "sleeping through the night", "learning the guitar as an adult", "moving to a new city", "writing a first novel",
    "preparing for a job interview", "reducing food waste", "running a small bakery", "raising a puppy",
    "speaking in front of a large audience", "learning Spanish", "hiking in the mountains", "decluttering a small flat",
    "making friends after thirty", "planning a family holiday", "starting a vegetable garden", "leading a new team",
    "taking better photographs", "studying for exams", "cutting the electricity bill", "cycling to work every day",
    "organising a community event", "teaching children to read", "buying a used laptop", "recovering after an injury",
)  # fmt: skip
_ADVICE_TEMPLATES = (
    "What are the best tips for {}?",
    "Give me five practical ideas for {}.",
    "How should a beginner approach {}?",
    "What mistakes should I avoid when {}?",
    "List the most important things to know about {}.",
    "I am thinking about {}. What should I consider first?",
    "Which habits make {} easier?",
    "What are some common challenges with {}, and how can they be overcome?",
)
_SUBJECTS = (
    "volcanoes", "the Roman Empire", "public libraries", "renewable energy", "the human heart", "coral reefs",
    "the printing press", "electric cars", "bees", "inflation", "the water cycle", "classical music", "democracy",
    "sleep", "online shopping", "the Silk Road", "antibiotics", "satellites", "chess", "tropical rainforests",
    "bread making", "urban parks", "the immune system", "tea", "railways", "ocean currents", "team sports",
    "insurance", "museums", "glaciers", "open-source software", "tourism", "photosynthesis", "the stock market",
)  # fmt: skip
_SUBJECT_TEMPLATES = (
    "What are the main features of {}?",
    "Explain the importance of {}.",
    "What are the advantages and disadvantages of {}?",
    "Describe how {} changed everyday life.",
    "What are some interesting facts about {}?",
    "Why do people care about {}?",
    "What factors have the greatest effect on {}?",
    "Write a short essay about {}.",
    "Give an overview of {} for a curious student.",
    "What does the future hold for {}?",
    "What would happen if {} suddenly disappeared?",
    "How might the world be different without {}?",
)
_PAIRS = (
    "trains and aeroplanes", "cats and dogs", "novels and films", "renting and buying a home", "coffee and tea",
    "winter and summer holidays", "solar and wind power", "running and swimming", "city life and country life",
    "paper books and e-books", "fixed and variable loans", "wooden and metal furniture",
)  # fmt: skip
_PAIR_TEMPLATES = ("Compare {}.", "What are the main differences between {}?", "Which is better: {}? Explain your view.")
_ROLES = (
    "a lighthouse keeper", "a deep-sea diver", "a village doctor in 1900", "an old oak tree", "a museum guide",
    "a young inventor", "a ship's cook", "a retired detective", "a beekeeper", "a train driver", "a palace gardener",
)  # fmt: skip
_ROLE_TEMPLATES = (
    "Imagine you are {}. Describe an ordinary day.",
    "Pretend to be {} and tell us what you have learnt in life.",
    "As {}, what advice would you give to a visitor?",
)
_PIECES = (
    "a letter to a neighbour about a noisy dog", "an invitation to a school concert", "a review of a new restaurant",
    "an email asking for a day off", "a speech for a wedding", "an article on healthy breakfasts",
    "a welcome note for new staff",
    "a travel guide to a small island", "a thank-you letter to a teacher", "a press note about a new library",
    "a blog post about winter walks", "a plan for a charity run", "a script for a radio show on gardens",
)  # fmt: skip
_PIECE_TEMPLATES = ("Write {}.", "Help me to write {}.")
_SHORT = (
    "What is the capital of {}?", "Which language is spoken in {}?", "On which continent is {}?",
)  # fmt: skip
_COUNTRIES = ("Norway", "Peru", "Kenya", "Vietnam", "Portugal", "Canada", "Egypt", "Poland", "Japan", "Brazil")
_SUMS = (
    "What is 17 times 6?", "Solve 4x - 7 = 21 for x.", "A train travels 180 km in 2.5 hours. What is its speed?",
    "What is the area of a circle of radius 3?", "Write a Python function that reverses a string.",
    "Write a Python program that prints the first ten square numbers.", "How do I sort a list in Python?",
    "If g(x) = 2x + 9, what is g(5)?", "Write a JavaScript function that adds two numbers.",
    "What is 15 percent of 240?", "Write a SQL query that counts the rows of a table named orders.",
)  # fmt: skip


OPENINGS = (
    "Here are five points to consider:\n\n1. **",
    "Here are four important things to know:\n\n1. **",
    "Here are some key points:\n\n1. **",
    "There are several sides to this question:\n\n1. **",
    "Here is an overview:\n\n1. **",
    "1. **",
    "Let us look at the main points one by one:\n\n1. **",
    "Here are six ideas:\n\n1. **",
    "To answer this question, here are a few points:\n\n- **",
    "Here are the most important points:\n\n- **",
)
"""Openings of an answer that make a small model write a list whose items have a title and a detail."""


def template_questions(count: int, *, opened_share: float = 0.7, seed: int = 0) -> list[Question]:
    """Return ``count`` different questions, the same ones for the same ``seed``.

    Args:
        opened_share: the share of the questions that an answer in parts fits which get one of :data:`OPENINGS`.

    Raises:
        ValueError: if more are asked for than the templates can give.

    >>> template_questions(2, seed=1) == template_questions(2, seed=1)
    True
    """
    in_parts = (
        (_ADVICE_TEMPLATES, _ADVICE_TOPICS),
        (_SUBJECT_TEMPLATES, _SUBJECTS),
        (_PAIR_TEMPLATES, _PAIRS),
        (_ROLE_TEMPLATES, _ROLES),
    )
    whole = ((_PIECE_TEMPLATES, _PIECES), (_SHORT, _COUNTRIES), (_SUMS, ("",)))
    pool = [(prompt, True) for prompt in _fill(in_parts)] + [(prompt, False) for prompt in _fill(whole)]
    if count > len(pool):
        raise ValueError(f"the templates give {len(pool)} different prompts, {count} were asked for")
    draw = random.Random(seed)
    return [
        Question(prompt, draw.choice(OPENINGS) if fits and draw.random() < opened_share else "")
        for prompt, fits in draw.sample(pool, count)
    ]


def _fill(families: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]) -> list[str]:
    return [template.format(topic) for templates, topics in families for template, topic in product(templates, topics)]
