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

# The example of the Hugging Face inference documentation, with the cosines to the first sentence that it
# prints for this very model: a check from outside that the encoder here is the real one.
PUBLISHED_SENTENCES = (
    "That is a happy person",
    "That is a happy dog",
    "That is a very happy person",
    "Today is a sunny day",
)
PUBLISHED_COSINES = (0.6945773, 0.9429151, 0.2568761)
