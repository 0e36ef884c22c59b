"""Prompts of our own writing: a seeded mix of questions, most of which ask for an answer in parts.

The parts of a kind are joined by :func:`itertools.product`, so a handful of templates and topics gives some
thousand prompts; :func:`template_questions` draws from them evenly over the kinds.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
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
    "keeping a diary", "growing tomatoes on a balcony", "repairing an old bicycle", "starting a podcast",
    "getting up early", "painting a room", "choosing a university course", "looking after an elderly parent",
    "travelling alone", "brewing good coffee", "learning to swim as an adult", "working from home",
    "paying off a debt", "starting a book club", "adopting a rescue cat", "giving up sugar", "drawing portraits",
    "negotiating a salary", "managing anger", "camping with small children", "building a birdhouse",
    "learning to type faster", "baking sourdough bread", "teaching a dog to walk on a lead", "choosing a mobile phone plan",
    "keeping a flat warm in winter", "starting to meditate", "knitting a first scarf", "running a small online shop",
    "staying calm in traffic", "learning to ski", "preparing for a long flight", "making a family budget",
    "helping a shy child at school", "writing a good cover letter", "planting fruit trees", "giving honest feedback",
    "keeping the kitchen clean", "learning to sing", "reading more books", "spending less time on the phone",
    "living with a flatmate", "returning to work after a long break", "remembering names", "hosting a dinner party",
    "buying a house", "caring for a horse", "setting up a home network", "recording a piece of music",
    "keeping bees", "choosing a first bicycle for a child", "building muscle without a gym", "learning to dance",
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
    "How can I get better at {}?",
    "What are the most effective strategies for {}?",
    "Which factors matter most when it comes to {}?",
    "What should I keep in mind before {}?",
)
_SUBJECTS = (
    "volcanoes", "the Roman Empire", "public libraries", "renewable energy", "the human heart", "coral reefs",
    "the printing press", "electric cars", "bees", "inflation", "the water cycle", "classical music", "democracy",
    "sleep", "online shopping", "the Silk Road", "antibiotics", "satellites", "chess", "tropical rainforests",
    "bread making", "urban parks", "the immune system", "tea", "railways", "ocean currents", "team sports",
    "insurance", "museums", "glaciers", "open-source software", "tourism", "photosynthesis", "the stock market",
    "earthquakes", "vaccines", "the telephone", "bridges", "forest fires", "taxation", "jazz", "the Industrial Revolution",
    "whales", "recycling", "space telescopes", "the olive tree", "trade unions", "lighthouses", "deserts", "honey",
    "the compass", "gravity", "universities", "the ozone layer", "rice farming", "castles", "the Olympic Games",
    "microplastics", "advertising", "mountains", "memory", "refrigerators", "newspapers", "migration of birds",
    "artificial satellites", "the aeroplane", "working hours", "school uniforms", "nuclear energy", "genetic engineering",
    "robots in factories", "public transport", "video games", "wetlands", "the piano", "minimum wages", "zoos", "fashion",
    "family traditions", "mobile payments", "windmills", "the alphabet", "clean drinking water", "volunteering", "poetry",
    "the moon landing", "ancient Egypt", "the Renaissance", "street food", "hospitals", "sharks", "soil", "radio",
    "electric light", "the bicycle", "friendship", "lifelong learning", "sugar", "cotton", "the stars", "small businesses",
    "free trade", "noise in cities", "plastic packaging", "physical exercise", "theatre", "the brain", "dreams", "laughter",
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
    "What are the main causes and consequences of changes in {}?",
    "How does science explain {}?",
    "How can society make better use of {}?",
    "What is the place of {} in modern life, and which problems come with it?",
)
_PAIRS = (
    "trains and aeroplanes", "cats and dogs", "novels and films", "renting and buying a home", "coffee and tea",
    "winter and summer holidays", "solar and wind power", "running and swimming", "city life and country life",
    "paper books and e-books", "fixed and variable loans", "wooden and metal furniture", "bees and wasps",
    "working alone and working in a team", "the violin and the guitar", "lakes and rivers", "butter and olive oil",
    "public and private schools", "cash and card payments", "planets and stars", "lions and tigers",
    "a diary and a blog", "learning from books and learning from videos", "small and large companies",
)  # fmt: skip
_PAIR_TEMPLATES = (
    "Compare {}.",
    "What do {} have in common, and where do they differ?",
    "What are the main differences between {}?",
    "Which is better: {}? Explain your view.",
)
_ROLES = (
    "a lighthouse keeper", "a deep-sea diver", "a village doctor in 1900", "an old oak tree", "a museum guide",
    "a young inventor", "a ship's cook", "a retired detective", "a beekeeper", "a train driver", "a palace gardener",
    "a robot in a museum", "a mountain guide", "a court jester", "a wise old tortoise", "a football coach", "a clockmaker",
    "a visitor from another planet", "a queen in exile", "a night watchman", "a travelling storyteller", "a castle ghost",
)  # fmt: skip
_ROLE_TEMPLATES = (
    "Imagine you are {}. Describe an ordinary day.",
    "Pretend to be {} and tell us what you have learnt in life.",
    "As {}, what advice would you give to a visitor?",
    "You are {}. Describe your work and the difficulties that you meet.",
    "Pretend to be {}: what are you proud of, and what do you fear?",
    "If you were {}, how would you spend a free afternoon?",
    "As {}, explain your craft to a child.",
)
_SPOKEN_TEMPLATES = (
    "Introduce yourself as {}.",
    "You are {}. Greet the guests at a feast.",
    "Speak as {}: what do you say to a frightened child?",
    "Pretend that you are {}. What do you say to those who do not believe in you?",
)
_PIECES = (
    "a letter to a neighbour about a noisy dog", "an invitation to a school concert", "an email asking for a day off",
    "a speech for a wedding", "a welcome note for new staff", "a thank-you letter to a teacher",
    "a short story about a lost key", "a poem about rain", "a complaint about a late parcel",
    "a diary entry from a rainy day", "a letter of application to a bookshop", "an apology to a friend",
    "a toast for a birthday", "an advertisement for handmade soap", "a note to the parents of a class",
    "a scene between two old friends", "the opening of a ghost story", "a farewell email to colleagues",
)  # fmt: skip
_PIECE_TEMPLATES = ("Write {}.", "Help me to write {}.", "Draft {}, in a friendly tone.")
_EVERYDAY = (
    "Why do leaves change colour in autumn?", "Why does bread go stale?", "Why do people yawn?",
    "Why do some people write with their left hand?", "How can you tell that a melon is ripe?",
    "Why do we put salt on icy roads?", "How do children learn their first language?", "Why do shops hold sales?",
    "Why do cats purr?", "How can you tell that somebody is bored?", "Why do people keep souvenirs?",
    "Why does the moon seem to change its shape?", "How does a thermos flask keep tea hot?",
    "Why are manhole covers round?", "Why do people move to big cities?", "How do we remember faces?",
    "Why do onions make us cry?", "How can you tell whether a used car is in good condition?",
    "Why do some songs stay in our heads?", "How does a dishwasher work?", "Why do people tell jokes?",
    "How can you tell that a plant needs water?", "Why do companies sponsor sports teams?",
    "Why is it hard to change a habit?", "How do birds find their way south?", "Why do people collect stamps?",
)  # fmt: skip
_COUNTS = (
    "piano tuners work in a large city", "cups of tea are drunk in England on one day", "books stand in a town library",
    "trees grow in a big park", "bicycles are sold in a year in a small country", "litres of water a family uses in a year",
    "steps a postman walks in his life", "words a person says in a week", "eggs a bakery needs in a month",
    "light bulbs are there in a hospital", "phone calls are made in a city in an hour", "bricks are in a family house",
    "loaves of bread are baked in a country in a week", "leaves fall in a wood in autumn",
    "letters a post office handles in a day", "umbrellas are lost on buses in a year", "grains of sand are on a beach",
    "birds cross the Alps in spring", "shoes a person wears out in a lifetime", "fish live in a large lake",
    "photographs are taken in the world in a second", "hours a person spends asleep in a lifetime",
    "drops of rain fall in a storm", "cars cross a bridge in a month", "pencils a school uses up in a year",
    "stars can be seen on a clear night", "ants live in a forest",
)  # fmt: skip
_COUNT_TEMPLATES = (
    "How could one estimate how many {}? Explain the steps.",
    "Roughly how many {}? Think it through.",
    "How many {}? Say what one has to consider.",
)
_SURVEYS = (
    "a review of a new restaurant", "an article on healthy breakfasts", "a travel guide to a small island",
    "a blog post about winter walks", "a plan for a charity run", "a script for a radio show on gardens",
    "a review of a concert", "a product description of a rucksack", "a press note about a new library",
    "a programme for a school fair", "a report on a visit to a factory", "a guide for new members of a choir",
    "an advertisement for a language school", "a talk on the history of a village", "a leaflet about safe cycling",
    "a column on good manners", "a text that presents a new bakery to its customers", "a review of a detective novel",
    "an outline of a novel about two sisters", "a handout for a course on first aid", "a newsletter of a sailing club",
)  # fmt: skip
_SURVEY_TEMPLATES = ("Write {}.", "Structure {}.", "Compose {} with several parts.")
_TURNS = (
    "the wheel had never been invented", "people could breathe under water", "the Vikings had settled all of America",
    "electricity had been found in Roman times", "there were no mosquitoes", "everybody spoke the same language",
    "the dinosaurs had survived", "money did not exist", "humans lived for two hundred years", "paper was never invented",
    "the earth had two moons", "nobody could lie", "Columbus had never sailed west", "plants could walk",
)  # fmt: skip
_TURN_TEMPLATES = ("What if {}?", "How would the world look if {}?", "Imagine that {}. What would be different?")
_SHORT = (
    "What is the capital of {}?", "Which language is spoken in {}?", "On which continent is {}?",
)  # fmt: skip
_COUNTRIES = (
    "Norway", "Peru", "Kenya", "Vietnam", "Portugal", "Canada", "Egypt", "Poland", "Japan", "Brazil", "Greece", "Mexico",
    "India", "Ireland", "Morocco", "Finland", "Chile", "Turkey", "Thailand", "Hungary",
)  # fmt: skip
_FACTS = (
    "How many legs does a spider have?", "Who wrote Hamlet?", "What colour is a ripe banana?",
    "How many days has a leap year?",
    "What is the chemical symbol of gold?", "Which planet is the largest?", "What is the opposite of generous?",
    "In which year did the Second World War end?", "What do you call a young cow?", "What is frozen water called?",
    "Is a tomato a fruit?", "Translate good morning into French.", "What does the word nocturnal mean?",
    "Who painted the Mona Lisa?", "How many metres has a kilometre?", "What is the plural of mouse?",
    "Which gas do plants take in?", "What is the currency of Japan?", "Correct this sentence: He go to school yesterday.",
    "Is Pluto a planet?", "What is a synonym of happy?", "How long does it take to boil an egg?",
    "Which ocean is the largest?", "Spell the number 40 in English.", "What sound does an owl make?",
)  # fmt: skip
_PASSAGES = (
    "Anna bought four apples and two pears in Leeds on Monday, and paid five pounds.",
    "The ferry from Oslo to Copenhagen leaves at half past four and carries 300 passengers.",
    "Dr Miller opened a clinic in Boston in 1998; her sister Ruth runs it today.",
    "The restaurant was lovely, but the soup came cold and nobody said sorry.",
    "Last year the town planted 120 oaks, 80 limes and 45 maples along the river.",
    "Our train was late, yet the staff were so kind that we hardly minded.",
    "The new laptop weighs one kilogram, costs 900 dollars and comes in blue or grey.",
    "In 1969 two men walked on the moon while a third one waited in orbit.",
)  # fmt: skip
_PASSAGE_TEMPLATES = (
    "Which names occur in this text? {}",
    "Extract all numbers from the following text. {}",
    "Is the following text positive or negative? Answer with one word. {}",
    "Summarise in one sentence: {}",
    "Which places and dates are mentioned here? Reply as JSON. {}",
    "Rewrite this text in the present tense: {}",
)  # fmt: skip
_SUMS = (
    "What is 17 times 6?", "Solve 4x - 7 = 21 for x.", "A train travels 180 km in 2.5 hours. What is its speed?",
    "What is the area of a circle of radius 3?", "Write a Python function that reverses a string.",
    "Write a Python program that prints the first ten square numbers.", "How do I sort a list in Python?",
    "If g(x) = 2x + 9, what is g(5)?", "Write a JavaScript function that adds two numbers.",
    "What is 15 percent of 240?", "Write a SQL query that counts the rows of a table named orders.",
    "What is the sum of the first ten whole numbers?", "Simplify 3(x + 2) - x.", "What is the square root of 144?",
    "A shirt costs 40 dollars and is reduced by a quarter. What does it cost now?", "Convert 5 miles to kilometres.",
    "How many minutes are there in a week?", "If three pens cost 4.50, what do seven pens cost?", "Is 91 a prime number?",
    "Write a C program that prints the numbers from 1 to 10.", "Write a Python function that counts the vowels of a word.",
    "Write a regular expression that matches a date.", "Write a Java method that returns the larger of two numbers.",
    "Implement a class for a bank account in Python.", "Write a shell command that finds all text files in a folder.",
    "Write a Python function that checks whether a number is even.", "Write HTML for a page with a heading and a picture.",
    "Write a Ruby program that asks for a name and greets.", "Write a function that merges two sorted lists.",
    "What does this code print? print(2 ** 5)",
    "Two cyclists ride towards each other, 60 km apart, at 15 and 25 km an hour. When do they meet?",
)  # fmt: skip


OPENINGS = (
    "Here are ...:\n\n1. **",
    "Here are some ...:\n\n1. **",
    "Here are a few ...:\n\n1. **",
    "Some of the ...:\n\n1. **",
    "There are several ...:\n\n1. **",
    "These are the ...:\n\n1. **",
    "Consider the following ...:\n\n1. **",
)
"""Beginnings of an answer that make a small model write a list whose items have a title and a detail."""


def template_questions(count: int, *, opened_share: float = 1.0, seed: int = 0) -> list[Question]:
    """Return ``count`` different questions, the same ones for the same ``seed``.

    Args:
        opened_share: the share of the questions that an answer in parts fits which get one of :data:`OPENINGS`; the rest
            is often answered in prose, which teaches not to fork there.

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
        (_EVERYDAY, ("",)),
        (_COUNT_TEMPLATES, _COUNTS),
        (_SURVEY_TEMPLATES, _SURVEYS),
        (_TURN_TEMPLATES, _TURNS),
    )
    whole = (
        (_PIECE_TEMPLATES, _PIECES),
        (_SPOKEN_TEMPLATES, _ROLES),
        (_SHORT, _COUNTRIES),
        (_FACTS, ("",)),
        (_PASSAGE_TEMPLATES, _PASSAGES),
        (_SUMS, ("",)),
    )
    pool = [(prompt, True) for prompt in dict.fromkeys(_fill(in_parts))] + [(prompt, False) for prompt in _fill(whole)]
    if count > len(pool):
        raise ValueError(f"the templates give {len(pool)} different prompts, {count} were asked for")
    draw = random.Random(seed)
    return [
        Question(prompt, draw.choice(OPENINGS) if fits and draw.random() < opened_share else "")
        for prompt, fits in draw.sample(pool, count)
    ]


def _fill(families: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]) -> list[str]:
    return [template.format(topic) for templates, topics in families for template, topic in product(templates, topics)]


def open_lists(questions: Sequence[Question], share: float, *, seed: int = 0) -> list[Question]:
    """Return ``questions`` with one of :data:`OPENINGS` for about ``share`` of those that have no opening yet."""
    draw = random.Random(seed)
    return [
        question if question.opening or draw.random() >= share else replace(question, opening=draw.choice(OPENINGS))
        for question in questions
    ]
