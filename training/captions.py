"""Scenes in words: sentences of varied wording that leave attributes out.

`describe` gives a sentence and the attributes it names; what it does not name is random in the scene. Every
sentence is true of its scene.
"""

from random import Random

from training.scenes import KEYS, Scene

# Every wording of an attribute's value; the first is the plain one.
SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "disk"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring",),
}
SIZE_WORDS = {"small": ("small", "small", "tiny", "little"), "large": ("large", "large", "big", "huge")}
PLACE_WORDS = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "at the top", "in the upper part"),
    "bottom": ("at the bottom", "at the bottom", "in the lower part"),
    "centre": ("in the centre", "in the center", "in the middle", "at the centre", "centered"),
}
BRIEF_PLACE_WORDS = {
    "left": ("left",),
    "right": ("right",),
    "top": ("top",),
    "bottom": ("bottom",),
    "centre": ("centre", "center", "middle"),
}
BACKGROUND_WORDS = (
    "on {a} background",
    "on {a} background",
    "on {}",
    "against {a} background",
    "with {a} background",
)
RELATION_WORDS = {
    "left of": ("to the left of", "left of", "on the left of"),
    "above": ("above", "above", "over", "on top of"),
}
MOTION_WORDS = {
    "left": (
        "moving left",
        "moving to the left",
        "going left",
        "moves left",
        "moves to the left",
        "sliding left",
    ),
    "right": (
        "moving right",
        "moving to the right",
        "going right",
        "moves right",
        "moves to the right",
        "sliding right",
    ),
    "up": ("moving up", "moving upwards", "going up", "moves up", "rising"),
    "down": ("moving down", "moving downwards", "going down", "moves down", "falling"),
    "grow": ("growing", "grows", "getting bigger", "getting larger", "expanding"),
    "shrink": ("shrinking", "shrinks", "getting smaller"),
}
OPENINGS = {
    "picture": ("a picture of", "an image of"),
    "pair": ("a picture of", "an image of"),
    "clip": ("a video of", "a clip of"),
}

# How often a sentence names each attribute that its scene has.
NAMED = {
    "colour": 0.93,
    "shape": 0.95,
    "size": 0.6,
    "place": 0.6,
    "background": 0.6,
    "motion": 0.97,
    "relation": 1.0,
    "colour2": 0.95,
    "shape2": 0.97,
}


def caption(scene: Scene, rng: Random) -> str:
    """One sentence for a scene, in random wording and naming a random part of its attributes."""
    return describe(scene, rng)[0]


def full_caption(scene: Scene) -> str:
    """The plain sentence that names every attribute of a scene."""
    named = scene.attributes
    parts = [_noun(named, Random(0), plain=True)]
    if scene.relation:
        parts += [RELATION_WORDS[scene.relation][0], _noun(named, Random(0), "2", plain=True)]
    if scene.place:
        parts.append(PLACE_WORDS[scene.place][0])
    parts.append(_background(BACKGROUND_WORDS[0], scene.background))
    if scene.motion:
        parts.append(MOTION_WORDS[scene.motion][0])
    return " ".join(parts)


def prompt(scene: Scene, rng: Random) -> tuple[str, dict[str, str]]:
    """A sentence in random wording that names at least the combination that the held-out rule is about, and
    what it names.
    """
    extra = {name for name in scene.attributes if rng.random() < NAMED[name]}
    return describe(scene, rng, extra | set(KEYS[scene.kind]))


def describe(scene: Scene, rng: Random, naming: set[str] | None = None) -> tuple[str, dict[str, str]]:
    """A sentence in random wording, and the attributes that it names with their values; `naming` fixes which
    (None draws them).

    A pair always names its relation, without which it would be no pair.
    """
    if naming is None:
        naming = {name for name in scene.attributes if rng.random() < NAMED[name]}
    named = {name: value for name, value in scene.attributes.items() if name in naming or name == "relation"}
    text = _list(named, rng) if rng.random() < 0.2 and scene.kind != "pair" else _sentence(scene, named, rng)
    return text + ("." if rng.random() < 0.1 else ""), named


def _sentence(scene: Scene, named: dict[str, str], rng: Random) -> str:
    """A noun and phrases in any order: "a small red circle on a white background at the top"."""
    noun = _noun(named, rng)
    if "relation" in named:
        noun += f" {rng.choice(RELATION_WORDS[named['relation']])} {_noun(named, rng, '2')}"
    phrases = []
    if "place" in named:
        phrases.append(rng.choice(PLACE_WORDS[named["place"]]))
    if "background" in named:
        phrases.append(_background(rng.choice(BACKGROUND_WORDS), named["background"]))
    if "motion" in named:
        phrases.append(rng.choice(MOTION_WORDS[named["motion"]]))
    rng.shuffle(phrases)
    opening = [rng.choice(OPENINGS[scene.kind])] if rng.random() < 0.08 else []
    return rng.choice((" ", " ", ", ")).join([" ".join([*opening, noun]), *phrases])


def _list(named: dict[str, str], rng: Random) -> str:
    """A noun without an article and items in any order: "red circle, top, white background"."""
    items = []
    if "place" in named:
        items.append(
            rng.choice((BRIEF_PLACE_WORDS if "motion" not in named else PLACE_WORDS)[named["place"]])
        )
    if "background" in named:
        items.append(f"{named['background']} background")
    if "motion" in named:
        items.append(rng.choice(MOTION_WORDS[named["motion"]]))
    rng.shuffle(items)
    return ", ".join([_noun(named, rng, article=False), *items])


def _noun(
    named: dict[str, str], rng: Random, which: str = "", article: bool = True, plain: bool = False
) -> str:
    """As much of "a small red circle" as is named; `which` is "2" for the second shape of a pair."""
    words = []
    if "size" in named and not which:
        words.append(SIZE_WORDS[named["size"]][0] if plain else rng.choice(SIZE_WORDS[named["size"]]))
    if (colour := named.get("colour" + which)) is not None:
        words.append(colour)
    shape = named.get("shape" + which)
    words.append(
        "shape" if shape is None else SHAPE_WORDS[shape][0] if plain else rng.choice(SHAPE_WORDS[shape])
    )
    if article:
        words[0] = _with_article(words[0])
    return " ".join(words)


def _background(wording: str, colour: str) -> str:
    return wording.format(colour, a=_with_article(colour))


def _with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
