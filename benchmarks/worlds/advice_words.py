"""Hold the phrases of the advice dialogues: one record per topic, and banks that every topic shares."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """What can be said about one subject. All phrases fit any sentence skeleton of their kind."""

    goals: tuple[str, ...]  # "How can I ..."
    worries: tuple[str, ...]  # a whole clause
    actions: tuple[str, ...]  # imperative
    tools: tuple[str, ...]  # a noun phrase
    benefits: tuple[str, ...]  # "it ..."
    traps: tuple[str, ...]  # gerund, "the trap is ..."


TOPICS: dict[str, Topic] = {
    "sleep": Topic(
        ("sleep better", "fall asleep earlier", "wake up rested"),
        ("my mind races at night", "the street is noisy", "I work late shifts", "I wake at four"),
        (
            "dim the lamps an hour before bed",
            "leave the phone in the kitchen",
            "keep the bedroom cool",
            "get up at a fixed hour",
        )
        + ("write tomorrow's worries on paper", "stretch slowly on the floor", "skip coffee after lunch"),
        ("a paper notebook", "dark curtains", "an old alarm clock", "herbal tea", "a breathing exercise"),
        (
            "tells the body that the day is over",
            "quiets the nervous system",
            "makes mornings gentler",
            "sets the inner clock",
        ),
        ("scrolling under the blanket", "napping at six in the evening", "counting the hours that are left"),
    ),
    "garden": Topic(
        ("start a vegetable garden", "grow tomatoes on a balcony", "keep my herbs alive"),
        ("the soil is heavy clay", "I only get morning sun", "slugs eat everything", "I travel every other week"),
        (
            "mix compost into the top layer",
            "water deeply but rarely",
            "plant basil beside the tomatoes",
            "cover bare soil with straw",
        )
        + ("pinch off the side shoots", "sow a short row every two weeks", "collect rain in a barrel"),
        ("a sharp trowel", "a soil thermometer", "raised beds", "a watering can with a rose", "clay pots"),
        (
            "feeds the roots for months",
            "keeps pests guessing",
            "holds moisture through hot days",
            "saves a lot of weeding",
        ),
        ("drowning the seedlings", "planting before the last frost", "buying twenty packets at once"),
    ),
    "budget": Topic(
        ("save money every month", "pay off my debts", "stop overspending"),
        (
            "my income changes a lot",
            "rent takes half of it",
            "I never know where it goes",
            "birthdays always surprise me",
        ),
        ("move savings on payday", "list the fixed bills first", "cancel two subscriptions", "shop with a written list")
        + ("pay the smallest debt first", "set a weekly cash limit", "wait three days before a large purchase"),
        ("a simple spreadsheet", "labelled envelopes", "a separate account", "a shared calendar", "an old receipt box"),
        ("makes the leaks visible", "takes willpower out of it", "builds a cushion quietly", "turns panic into a plan"),
        ("budgeting down to the last cent", "hiding bills in a drawer", "treating credit as income"),
    ),
    "cooking": Topic(
        ("cook at home more often", "make better soup", "feed a picky family"),
        ("I come home exhausted", "my kitchen is tiny", "nobody likes vegetables", "I burn the onions"),
        (
            "roast a tray of roots on Sunday",
            "taste before adding salt",
            "chop everything before the heat is on",
            "freeze broth in small jars",
        )
        + ("toast the spices in a dry pan", "finish the dish with lemon", "let the meat rest"),
        ("a heavy pan", "one good knife", "a rice cooker", "a pot with a tight lid", "a jar of pickled onions"),
        (
            "adds depth without effort",
            "turns leftovers into dinner",
            "keeps the texture crisp",
            "makes weeknights calmer",
        ),
        ("crowding the pan", "starting five recipes at once", "trusting the clock over your nose"),
    ),
    "running": Topic(
        ("run my first ten kilometres", "get faster without injury", "enjoy running again"),
        ("my knees ache", "I lose my breath at once", "winter evenings are dark", "I always quit in week three"),
        (
            "slow down until you can chat",
            "walk for a minute between blocks",
            "strengthen your hips",
            "add distance in small doses",
        )
        + ("run on soft paths", "rest after each hard day", "lay out your clothes the night before"),
        ("a pair of fitted shoes", "a reflective vest", "a training diary", "a foam roller", "a running partner"),
        ("lets the tendons catch up", "builds a base that lasts", "keeps the joy in it", "protects the calves"),
        ("racing every session", "copying a champion's schedule", "ignoring a sharp pain"),
    ),
    "exam": Topic(
        ("prepare for a big exam", "remember what I read", "stop cramming"),
        ("there are only two weeks left", "I panic in the hall", "my notes are a mess", "the textbook bores me"),
        (
            "test yourself with the book closed",
            "explain the idea to a friend",
            "study in short rounds",
            "solve one old paper a day",
        )
        + ("begin with the hardest chapter", "sketch a map of the subject", "review mistakes on the same evening"),
        ("flash cards", "a kitchen timer", "a quiet corner of the library", "coloured index tabs", "a study group"),
        ("forces the memory to work", "shows the gaps early", "steadies the nerves", "beats rereading by far"),
        ("highlighting whole pages", "studying until dawn", "comparing yourself with others"),
    ),
    "moving": Topic(
        ("move to a new flat", "pack without chaos", "settle in a strange city"),
        ("I own too many books", "the lift is broken", "I know nobody there", "the lease starts in a week"),
        (
            "label every box on two sides",
            "give away what you have not touched in a year",
            "photograph the cables",
            "book the van early",
        )
        + ("pack one bag for the first night", "wrap plates in towels", "greet the neighbours with cake"),
        ("strong tape", "a floor plan", "a hand truck", "borrowed blankets", "a box of basic tools"),
        (
            "saves hours on the other side",
            "lightens the load",
            "makes the place feel like yours",
            "prevents quarrels on the stairs",
        ),
        ("packing the kettle first", "lifting with your back", "leaving the paperwork to the end"),
    ),
    "guitar": Topic(
        ("learn the guitar", "change chords smoothly", "play in front of people"),
        ("my fingers hurt", "I have no teacher", "my rhythm drifts", "the barre chords buzz"),
        (
            "practise slowly with a metronome",
            "loop the two hardest bars",
            "sing the melody first",
            "record yourself on Fridays",
        )
        + ("keep the thumb behind the neck", "end with a song you love", "tune before you touch anything"),
        ("a clip-on tuner", "lighter strings", "a wooden footstool", "a small recorder", "a songbook"),
        ("trains the hand to relax", "makes progress audible", "keeps boredom away", "cleans up the timing"),
        ("rushing the easy parts", "buying gear instead of practising", "skipping days and then overdoing it"),
    ),
    "interview": Topic(
        ("do well in a job interview", "explain a gap in my career", "ask for a higher salary"),
        ("I ramble when nervous", "the role is slightly above me", "I was fired once", "it is a video call"),
        (
            "prepare three short stories",
            "read the advert line by line",
            "pause before you answer",
            "ask what success looks like",
        )
        + ("practise aloud with a friend", "name a figure and stop talking", "send a brief note of thanks"),
        ("a one-page summary", "a glass of water", "a list of questions", "a tidy background", "a mock interviewer"),
        ("keeps answers concrete", "shows honest interest", "gives you time to think", "moves the talk to facts"),
        ("memorising whole speeches", "criticising the last boss", "apologising for every weakness"),
    ),
    "dog": Topic(
        ("train my young dog", "stop the barking", "walk without pulling"),
        ("he jumps on guests", "we live upstairs", "she fears other dogs", "the whole family says different words"),
        (
            "reward the quiet moments",
            "keep each lesson under five minutes",
            "turn around when the leash goes tight",
            "use one word per command",
        )
        + ("tire the nose before the legs", "practise beside a calm dog", "ignore the begging completely"),
        ("tiny treats", "a long line", "a chew toy", "a mat by the door", "a front-clip harness"),
        ("teaches that calm pays", "keeps trust intact", "burns energy without frenzy", "makes the rule easy to read"),
        ("shouting over the noise", "repeating a command ten times", "punishing after the fact"),
    ),
    "clutter": Topic(
        ("declutter my house", "keep my desk tidy", "deal with old photographs"),
        ("everything feels precious", "the children undo it daily", "I have no storage", "I get lost in memories"),
        (
            "empty one drawer at a time",
            "give each object a home",
            "carry a donation bag to the car",
            "finish with a clear table",
        )
        + ("scan letters and let the paper go", "put hooks beside the door", "decide on the first touch"),
        ("clear bins", "a label maker", "a donation bag", "a tray for keys", "open shelves"),
        (
            "makes cleaning quick",
            "stops the piles from growing back",
            "frees a surprising amount of space",
            "lets you see what you own",
        ),
        ("buying boxes before sorting", "starting with the attic", "keeping things out of guilt"),
    ),
    "language": Topic(
        ("learn a new language", "speak without fear", "remember more words"),
        ("I freeze in conversation", "grammar confuses me", "I have twenty minutes a day", "native speakers talk fast"),
        (
            "shadow a short recording",
            "keep a diary of three sentences",
            "learn phrases instead of single words",
            "talk to yourself while cooking",
        )
        + ("read children's books", "meet a partner every Tuesday", "guess before you look it up"),
        ("a podcast for learners", "a pocket notebook", "subtitled films", "a patient friend", "picture cards"),
        ("gives words a context", "loosens the tongue", "makes errors harmless", "tunes the ear to real speed"),
        ("translating word by word", "waiting until you are ready", "switching courses every month"),
    ),
    "photo": Topic(
        ("take better pictures", "photograph my children indoors", "shoot at night"),
        ("everything comes out blurry", "the light is always yellow", "they never stand still", "I only own a phone"),
        (
            "move closer to the window",
            "get down to eye level",
            "wait for the second smile",
            "lock the focus before the action",
        )
        + ("look at the edges of the frame", "take fewer but slower shots", "turn off the ceiling light"),
        ("a bright lens", "a small tripod", "a white bed sheet", "a cleaning cloth", "the burst mode"),
        ("softens every shadow", "brings the viewer inside", "leaves room for surprise", "keeps noise low"),
        ("zooming with your fingers", "editing until it glows", "hiding behind the camera all day"),
    ),
    "friend": Topic(
        ("make up with a friend", "say no without guilt", "support a grieving friend"),
        (
            "we have not spoken since spring",
            "she cancels all the time",
            "I said something cruel",
            "he never asks about me",
        ),
        (
            "write a short honest message",
            "listen twice as long as you speak",
            "name the thing you regret",
            "suggest a walk",
        )
        + ("leave room for an answer", "remember the small dates", "offer one concrete favour"),
        ("a handwritten card", "a quiet bench", "a shared meal", "a voice message", "a calendar reminder"),
        (
            "lowers the wall a little",
            "shows that you mean it",
            "keeps resentment from growing",
            "gives both of you dignity",
        ),
        ("explaining instead of apologising", "keeping a tally", "asking others to choose sides"),
    ),
    "bicycle": Topic(
        ("commute by bicycle", "repair a flat tyre", "ride in the rain"),
        ("the traffic scares me", "my chain keeps slipping", "I arrive soaked", "the hills are steep"),
        (
            "test the route on a Sunday",
            "oil the chain every fortnight",
            "shift down before the climb",
            "take the whole lane at the bend",
        )
        + ("check the pressure with a gauge", "carry a dry shirt", "signal earlier than seems needed"),
        ("a floor pump", "mudguards", "tyre levers", "a bright rear lamp", "a waterproof pannier"),
        (
            "makes you visible to drivers",
            "spares your legs",
            "prevents most punctures",
            "turns the ride into the best hour",
        ),
        ("hugging the parked cars", "overtightening the bolts", "locking only the wheel"),
    ),
    "writing": Topic(
        ("finish my novel", "write clearer reports", "beat the blank page"),
        ("I edit every sentence to death", "the middle sags", "my boss wants it shorter", "I write only when inspired"),
        ("draft badly on purpose", "stop in the middle of a scene", "cut the first paragraph", "put the answer on top")
        + ("read it aloud to the cat", "set a timer for twenty minutes", "swap vague verbs for exact ones"),
        ("a cheap pen", "index cards", "a locked door", "a first reader", "a plain text editor"),
        (
            "keeps the engine warm",
            "silences the inner critic",
            "shows where the rhythm breaks",
            "respects the reader's time",
        ),
        ("polishing before the end exists", "hoarding advice", "explaining the joke"),
    ),
}

TONES: dict[str, tuple[str, ...]] = {
    "warm": (
        "That sounds tiring, and it is more common than you think.",
        "I am glad you asked.",
        "Be kind to yourself here.",
    )
    + ("You have already done the hard part by asking.", "Many people struggle with this, so you are in good company."),
    "brisk": (
        "Sure.",
        "Here is the short version.",
        "Good question.",
        "Let us get to it.",
        "Three things matter most.",
    ),
    "curious": (
        "Interesting, there are several angles to this.",
        "It depends a little on your week.",
        "Let me think along with you.",
    )
    + ("What surprises most people is how small the change can be.",),
    "formal": (
        "Thank you for the question.",
        "In general, the following approach is sound.",
        "A gradual method works best.",
    )
    + ("There are two considerations.",),
}
WHEN = (
    *("in the first week", "every evening", "on weekends", "before breakfast", "for about ten days", "twice a week"),
    *("whenever you feel stuck", "at the start", "on a calm afternoon", "once things are steady", "from tomorrow on"),
)
SOFTENERS = (
    "If you can,",
    "Where possible,",
    "To begin with,",
    "Even on bad days,",
    "Most of all,",
    "Little by little,",
    "Honestly,",
)
LINKS = ("because it", "since it", "which", "as it", "and this")
CLOSINGS = (
    *("Give it two weeks before you judge.", "Small steps count.", "Start with one of these and see how it feels."),
    *("You can always adjust it later.", "Progress will be uneven, and that is fine.", "Tell me how it goes."),
    *("Keep what works and drop the rest.", "The rest follows from that.", "Patience pays here."),
)
EFFORTS = (
    "takes five minutes",
    "costs almost nothing",
    "feels odd at first",
    "needs some patience",
    "is easier than it sounds",
)
