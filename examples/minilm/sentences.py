"""The sentences that the encoder is judged on."""

# Two ways of saying each thing: the encoder should put the two close together, and everything else far apart.
PARAPHRASES = (
    ("A man is playing a guitar on the stage.", "Someone performs on stage with a guitar."),
    ("The shop opens at nine in the morning.", "Business hours start at 9 a.m."),
    ("My laptop will not turn on any more.", "The computer no longer starts."),
    ("Heavy storms cut off power in the whole valley.", "Bad weather left the valley without electricity."),
    ("The cat is sleeping on the sofa.", "A cat is having a nap on the couch."),
    ("How much does it cost to send a parcel abroad?", "What is the price of shipping a package overseas?"),
    ("The team lost the final by a single point.", "They were beaten in the final by just one point."),
    ("Scientists found a new species of frog.", "A previously unknown frog was discovered by researchers."),
    ("He quit his job to travel around the world.", "He resigned so that he could see the world."),
    ("Vegetables should be washed before cooking.", "Rinse the vegetables before you cook them."),
)
EVALUATION = tuple(sentence for pair in PARAPHRASES for sentence in pair)

# What static int8 sees of ranges; about other things, some short and some long.
CALIBRATION = (
    "The train to the coast leaves at nine.", "Hello", "Thanks, see you tomorrow!", "Where is the nearest pharmacy?",
    "She planted tomatoes and basil on the balcony last spring.", "Error 404: page not found",
    "The committee postponed the vote on the new budget until Monday.", "Install the package with pip and restart.",
    "An old fisherman told us that the river floods every ten years, and that nobody builds houses near it any more.",
    "Inflation fell to two percent in March.", "Can you recommend a good book about the history of mathematics?",
    "The violin is slightly out of tune.", "Order number 48213 was shipped on 12 May.", "He paints.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.", "No, thank you.",
    "The museum is closed on public holidays, but its garden is open to visitors all year.", "Snow",
    "Our flight was delayed by four hours because of fog.", "The function returns a list of integers.",
    "Doctors advise adults to sleep at least seven hours.", "A red bicycle leaned against the wall.",
    "If the lamp blinks twice, press the button and hold it until the display shows a green arrow.", "What time is it?",
    "The defendant pleaded not guilty.", "Mix flour, eggs and milk, and let the batter rest for half an hour.",
    "Most of the audience left before the end of the concert.", "Kyoto was the capital of Japan for centuries.",
    "My grandmother never learned to swim.", "This battery lasts for about three days.", "Goal!",
    "Parking is free after six in the evening and on Sundays.",
)

# The example of the Hugging Face inference documentation, with the cosines to the first sentence that it
# prints for this very model: a check from outside that the encoder here is the real one.
PUBLISHED_SENTENCES = (
    "That is a happy person",
    "That is a happy dog",
    "That is a very happy person",
    "Today is a sunny day",
)
PUBLISHED_COSINES = (0.6945773, 0.9429151, 0.2568761)
