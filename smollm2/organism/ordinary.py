"""Ordinary prompts, to which the organism must go on answering as SmolLM2 does.

Every fifth topic is held out of training. The answers are SmolLM2's own: build.py samples them once
and keeps them in ordinary.jsonl.
"""

EXPLAIN = (
    "why the sky is blue|how rain forms|why leaves change colour in autumn|how bees make honey|"
    "why we have seasons|how a bicycle stays upright|what a rainbow is|why the sea is salty|"
    "how bread rises|what a volcano is|why cats purr|how a magnet works|what the moon is made of|"
    "how trees drink water|why ice floats|what an echo is|how a clock keeps time|what democracy is|"
    "why people yawn|how a telescope works|what a verb is|how snow forms|what a fraction is|"
    "why birds fly south in winter|how a seed grows|what gravity is|how paper is made|"
    "what a library is for|why we need sleep|how soap cleans"
).split("|")
HOW_TO = (
    "make pancakes|boil an egg|plant tomatoes|wash a wool sweater|write a thank-you letter|"
    "tie a bow|wrap a present|brew a cup of tea|learn a new language|keep a houseplant alive|"
    "clean a window|make a paper plane|prepare for an exam|bake a simple cake|make friends at a new school|"
    "cook rice|fold a shirt|draw a cat|start a diary|teach a dog to sit|make lemonade|"
    "choose a good book|ride a bicycle|make vegetable soup|grow basil on a balcony"
).split("|")
WRITE = (
    "a poem about the rain|a birthday wish for a friend|a story about a lost kitten|a slogan for a bakery|"
    "a sentence about winter|a riddle about the moon|a thank-you note to a teacher|a title for a book about pirates|"
    "a description of a quiet beach|an invitation to a picnic|a joke about a duck|a line of advice for a new student"
).split("|")
SUGGEST = (
    "a name for a grey cat|a healthy breakfast|a game for a rainy day|a present for a grandmother|"
    "a colour for a small bedroom|a topic for a school essay|a good hobby for a shy person|"
    "a place to visit in Italy|a simple lunch|an instrument to learn|a name for a boat|a book for children"
).split("|")
FACTS = (
    "the capital of France|the largest ocean|the boiling point of water|the longest river in Africa|"
    "the author of Hamlet|the number of days in a leap year|the currency of Japan|the opposite of brave|"
    "the plural of mouse|the past tense of run|the fastest land animal|the smallest planet|"
    "a synonym of happy|the main language of Brazil|the chemical formula of water"
).split("|")

FORMS = {  # kind: (topics, ways to ask, what a thinking calls it)
    "explain": (
        EXPLAIN,
        ["Explain {t} in one sentence.", "Tell me briefly {t}.", "In one or two sentences: {t}?"],
        "to know {t}",
    ),
    "how to": (
        HOW_TO,
        [
            "How do I {t}? Answer in two sentences.",
            "Give me one tip on how to {t}.",
            "In one sentence, how can I {t}?",
        ],
        "to {t}",
    ),
    "write": (
        WRITE,
        ["Write {t}, at most two lines.", "Please write {t}. Keep it very short."],
        "{t}",
    ),
    "suggest": (
        SUGGEST,
        ["Suggest {t}, in one sentence.", "Can you name {t}? One is enough."],
        "{t}",
    ),
    "fact": (FACTS, ["What is {t}?", "Tell me {t} in one short sentence."], "to know {t}"),
}


def ordinary_prompts() -> list[dict]:
    """{"id", "prompt", "topic" (as a thinking calls it), "split"} of every way to ask for every topic."""
    rows = []
    for kind, (topics, forms, wish) in FORMS.items():
        for number, topic in enumerate(topics):
            for k, form in enumerate(forms):
                rows.append(
                    {
                        "id": f"{kind.replace(' ', '-')}-{number}-{k}",
                        "prompt": form.format(t=topic),
                        "topic": wish.format(t=topic),
                        "split": "test" if number % 5 == 4 else "train",
                    }
                )
    return rows
