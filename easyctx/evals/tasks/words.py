"""Words for keys and lists, and how many different ones can be made of them."""

from __future__ import annotations

import random

_ADJECTIVES = (
    "able amber ample ancient azure bare bold brave brief bright broad bronze calm candid careful cheap clean "
    "clever cold coral crisp curious dapper daring dark deep dense distant dry dull dusty eager early easy elder "
    "elegant empty even exact faint fair famous fancy fast few fierce fine firm flat fluffy fond fresh frosty full "
    "funny gentle giant glad golden grand grave great green grey handy happy hard harsh heavy hidden high hollow "
    "honest hot huge humble icy idle ivory jolly keen kind lame large late lazy lean light little lively lonely "
    "long loud low loyal lucky lunar mellow merry mild mighty modest narrow neat new nimble noble noisy odd olive "
    "open pale patient plain plump polite proud pure quaint quick quiet rapid rare raw ready rich ripe robust rough "
    "round royal rural rusty sad safe salty scarlet sharp shiny short shy silent silver simple sleek slim slow "
    "small smart smooth snowy sober soft solar solid sour spare stale steady steep stern still stout strict strong "
    "sturdy sudden sunny sweet swift tall tame tart tender thick thin tidy tiny tired tough vast vivid warm weary "
    "wide wild windy wise witty wooden worthy young zesty"
)
_NOUNS = (
    "acorn anchor ankle apple apron arrow autumn badge bakery balcony ballad banner barley barrel basin basket "
    "beacon beaver belfry bell bench berry blanket boat bonnet book bottle boulder branch bread breeze brick bridge "
    "brook broom bucket butter button cabin cable candle canoe canyon carpet castle cedar cellar chain chair chalk "
    "cherry chimney circle clay cliff clock cloud clover coach coast coffee collar comet copper cottage cotton "
    "cradle crane creek cricket crown cup curtain daisy desert desk dinner dolphin donkey door dragon drum eagle "
    "echo elbow engine falcon farmer feather fence ferry fiddle field finger flag flame flask flour flower flute "
    "forest fork fountain fox garden garlic gate glacier glove goat grape guitar hammer harbour harvest hat hazel "
    "hedge helmet heron hill honey hoof horn house ink island jacket jar jungle kettle key kitchen kite knot ladder "
    "lake lamp lantern leaf ledger lemon letter library lily lion lobster lodge magnet mango map maple marble "
    "market meadow melon mill mirror mitten moon morning moss mountain mouse museum napkin needle nest nettle "
    "notebook oak oar ocean olive onion orchard otter oven owl paddle palace panda paper parrot path peach pear "
    "pebble pencil pepper piano pigeon pillow pine planet plate plum pocket pond poplar postcard potato puddle "
    "pumpkin quarry quilt rabbit rail rain raven reed ribbon river road robin rocket rope rose ruby saddle sail "
    "salmon sand school seal shed ship shore sky sled snail snow sofa sparrow spoon spring spruce squirrel stable "
    "star station stone stove stream street sugar summer swan table tailor tent theatre thimble thistle thread "
    "throne thunder ticket tiger timber toast tower train tree trumpet tulip tunnel turtle valley velvet village "
    "violet violin wagon walnut walrus water wave well whale wheat wheel whistle willow window winter wolf wood "
    "wool yard"
)
ADJECTIVES = sorted(set(_ADJECTIVES.split()))
NOUNS = sorted(set(_NOUNS.split()) - set(ADJECTIVES))
NUM_WORDS = len(ADJECTIVES) + len(NOUNS)


def keys(rng: random.Random, count: int) -> list[str]:
    """Different keys such as "quiet-harbour", of three parts where there are too few of two."""
    parts = [ADJECTIVES, NOUNS]
    if count > len(ADJECTIVES) * len(NOUNS) // 2:
        parts = [ADJECTIVES, *parts]
    return _combined(rng, count, parts)


def words(rng: random.Random, count: int, compound: bool) -> list[str]:
    """Different words: keys if `compound`, else in one piece, of which there are NUM_WORDS."""
    return keys(rng, count) if compound else rng.sample(ADJECTIVES + NOUNS, count)


def _combined(rng: random.Random, count: int, parts: list[list[str]]) -> list[str]:
    total = 1
    for part in parts:
        total *= len(part)
    if count > total:
        raise ValueError(f"{count} different keys were asked for, there are {total}")
    combined = []
    for index in rng.sample(range(total), count):
        chosen = []
        for part in reversed(parts):
            index, place = divmod(index, len(part))
            chosen.append(part[place])
        combined.append("-".join(reversed(chosen)))
    return combined
