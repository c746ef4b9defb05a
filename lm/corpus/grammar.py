"""English short stories whose entropy is known exactly: the floor for a model that reads them.

    (seed, i) --story--> text --bits--> -log2 P(text), on average entropy_bits()

The stories come from a probabilistic context-free grammar, the table below: `<place>` is one of the
texts of `place`, drawn by its weight, and `{place}` repeats the last one drawn. A model has to
remember these words: the hero, the lost thing, and the friend and the food of each errand within an
errand. They come from finite lists, so symbols could carry them in their names: with more symbols,
the grammar is context-free in the strict sense.

No text has two derivations. At every choice each alternative begins with its own words, none a
prefix of another's (`Rule` asserts it). Read from left to right, a text shows which one was taken:
the grammar is LL, hence unambiguous (Rosenkrantz and Stearns 1970). The probability of a text is
the product of its choices' probabilities, and no story is a prefix of another.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, count, pairwise

import numpy as np

from lm.base import rng

# Alternatives with their weights; `/` begins a new line. The line of `hero` also sets the pronouns
# {he}, {him}, {his}. Words after "a" begin with a consonant. Every story begins with "Once": the
# first token of a split is never a target, so it must not hold a choice.
TABLE = """
story    = 1 Once <opening> / {He} had a <hue> <thing>, <bond> / <plot> / <end>

opening  = 3 upon a time <trait> <hero> lived <home> with {his} <trait> <kin>.
           3 there lived <home> a <trait> child called <hero> and {his} <trait> <kin>.
           3 in a <weather> <season> <hero> and {his} <trait> <kin> <walked> to a <look> house\
 <home>.
home     = 3 by the sea | 5 on a <look> farm | 4 near a <look> mill | 4 under a <look> hill
           4 in the <look> <place>
bond     = 2 from {his} {kin}. | 6 found <spot>. | 3 which {he} <manner> hid <spot>.
           3 but {he} <manner> wished for a <kind> <animal>.

plot     = 5 One <weather> <daytime> {hero} <walked> to the <place> and <losing> / {He} <search>
           3 Then a <kind> <friend> <walked> by. <visit>
           3 But {his} {kin} was ill. <illness>

losing   = 5 played for <number> <hours>. <scene> Then the {thing} was gone!
           3 fell asleep <spot>. <scene> When {he} woke, there was no {thing}.
           3 met a <kind> crow. The {kind} crow <manner> took the {thing}.
scene    = 4 The <weather> wind blew <manner>. | 4 It rained <manner>. | 3 Someone sang <manner>.
           3 Only a <kind> <animal> saw {him}.
search   = 5 looked <spot> and <spot>, but saw only a <kind> <animal>. {He} <search>
           4 cried until a <kind> <friend> <walked> by. <help>
           3 asked a <kind> <friend> <manner> for help. <help>
help     = 5 "I lost my {hue} {thing}," <said> {hero} <manner>. <errand> Then the {friend} <giving>
           3 They searched <manner> for <number> <hours>. Then the {friend} <giving>
giving   = 4 found the {thing} <spot> and <manner> gave it to {hero}.
           3 pointed <manner> at a <look> <shade> <object>, and there it was!
           2 whispered <manner>, "Look <spot>!" And {hero} saw the {thing}.

errand   = 1 The {friend} wanted a <taste> <food>. <way> So {hero} <manner> gave it the {food}.
way      = 5 There was one <spot>. | 3 Only a <kind> <friend> had one. <errand>
           3 It took {him} <number> <hours> to find one.

visit    = 1 They shared a <taste> <food> and a <taste> <food>, and the {friend} <manner> told of a\
 <being> who <deed>. Then they <manner> played with the {thing}.
deed     = 5 slept for <number> <hours> | 4 lived <spot> | 3 feared a <being> who <deed>
           3 married a <being> who <deed> | 3 baked a <taste> <food> | 2 spoke to a <kind> <animal>

illness  = 1 So {he} packed a <taste> <food>, <more> On the way {he} met a <kind> <friend>.\
 <errand> The {kind} {friend} <walked> along, and the {kin} <thanks>
more     = 4 a <taste> <food>, <more> | 5 and a <taste> <food> in a <look> basket.
thanks   = 4 kissed {him} <manner>. | 3 slept for <number> <hours>.
           2 danced <manner> with the {friend}.

end      = 5 They were <trait> friends for <number> <hours>.
           4 That <weather> <daytime> {hero} <walked> <manner> home to {his} {kin}.
           3 And the {thing}? It lies <spot>.
           2 The <trait> {friend} <walked> away <manner>. / <end>

hero he him his
         = 9 Lily she her her | 9 Tom he him his | 8 Mia she her her | 8 Ben he him his
           7 Anna she her her | 7 Max he him his | 6 Rosa she her her | 5 Leo he him his
           5 Nora she her her | 4 Finn he him his | 4 Clara she her her | 3 Hugo he him his
           3 Ruth she her her | 3 Sam he him his | 2 Greta she her her | 2 Jack he him his
           2 Zoe she her her | 2 Peter he him his | 1 Jane she her her | 1 Carl he him his
kin      = 6 mother | 6 father | 4 grandmother | 4 grandfather | 4 sister | 4 brother | 3 aunt
           3 uncle | 2 cousin | 1 teacher
friend   = 9 fox | 8 bear | 8 mouse | 7 goat | 7 wolf | 6 duck | 6 hare | 5 frog | 5 cat | 5 dog
           4 heron | 4 snail | 3 badger | 3 turtle | 3 lion | 2 raven | 2 donkey | 2 giraffe
           1 parrot | 1 whale
animal   = 6 robin | 6 sheep | 5 rabbit | 5 pony | 4 kitten | 4 bee | 4 toad | 3 seal | 3 swan
           3 lamb | 2 moth | 2 hen | 1 camel | 1 tiger
being    = 7 king | 6 witch | 6 sailor | 5 giant | 5 queen | 4 knight | 4 baker | 3 dragon | 3 ghost
           2 monk | 2 pirate | 1 robot
thing    = 8 kite | 8 key | 7 boat | 7 ball | 6 bell | 6 lantern | 5 drum | 5 doll | 4 coin | 4 ring
           3 book | 3 whistle | 3 cup | 2 marble | 2 scarf | 2 hat | 1 comb | 1 flute
food     = 8 pear | 8 cake | 7 plum | 6 carrot | 6 cherry | 5 biscuit | 5 pie | 4 cookie | 4 peach
           4 nut | 3 mushroom | 3 berry | 2 pancake | 2 melon | 2 bun | 1 turnip
place    = 8 forest | 8 river | 7 market | 6 beach | 6 meadow | 5 harbour | 4 castle | 4 valley
           3 lake | 3 station | 3 garden | 2 desert | 2 tower | 1 swamp
object   = 7 rock | 7 bench | 6 tree | 6 wall | 5 bush | 5 fence | 5 log | 4 gate | 4 barn | 3 cart
           3 statue | 3 ladder | 2 barrel | 2 haystack | 1 piano | 1 sofa
spot     = 1 <side> the <look> <shade> <object>
side     = 6 under | 6 behind | 5 beside | 4 near | 2 inside | 2 above
look     = 8 little | 8 big | 7 small | 6 dusty | 6 strange | 5 round | 5 wet | 5 crooked | 4 pretty
           4 broken | 3 muddy | 3 tall | 3 narrow | 2 quiet | 2 dark | 1 steep | 1 very <look>
shade    = 7 grey | 7 green | 6 white | 6 black | 5 brown | 5 red | 3 blue | 2 yellow
hue      = 7 red | 7 blue | 6 golden | 6 silver | 5 yellow | 5 wooden | 4 purple | 3 shiny | 3 paper
           2 striped | 2 pink | 1 copper
kind     = 7 young | 7 hungry | 6 friendly | 6 clever | 6 sleepy | 6 brown | 5 lonely | 5 fat
           5 thirsty | 5 proud | 4 tired | 4 lame | 4 noisy | 4 wise | 4 hairy | 3 silent | 3 greedy
           3 tame | 3 bold | 2 cross | 2 dizzy | 1 very <kind>
taste    = 7 sweet | 7 fresh | 6 ripe | 6 warm | 6 tiny | 5 huge | 5 sour | 5 frozen | 4 salty
           4 mouldy | 4 magic | 3 juicy | 3 fine | 2 bitter | 2 burnt | 1 very <taste>
trait    = 7 brave | 7 curious | 6 shy | 6 gentle | 6 stubborn | 6 cheerful | 5 patient | 5 lazy
           5 loyal | 5 careful | 4 famous | 4 jolly | 4 nervous | 3 merry | 3 polite | 3 silly
           2 graceful | 2 fearless | 1 very <trait>
manner   = 7 slowly | 7 quietly | 7 happily | 7 softly | 6 quickly | 6 gladly | 6 sadly | 6 loudly
           5 kindly | 5 bravely | 5 carefully | 5 politely | 4 nervously | 4 secretly | 4 calmly
           4 proudly | 3 eagerly | 3 boldly | 3 warmly | 2 gently | 2 wildly | 1 rudely
walked   = 7 walked | 7 ran | 7 went | 6 hurried | 6 wandered | 6 strolled | 5 skipped | 5 rode
           5 marched | 4 crept | 4 danced | 4 hopped | 3 jumped | 3 limped | 2 flew | 2 rolled
said     = 6 said | 5 sighed | 4 sobbed | 3 whispered | 1 sang
weather  = 6 sunny | 6 rainy | 5 stormy | 4 cold | 4 warm | 3 foggy | 3 quiet | 2 snowy | 1 frosty
daytime  = 7 morning | 6 evening | 5 afternoon | 3 night
season   = 4 spring | 4 summer | 3 winter | 2 year
hours    = 6 hours | 4 days | 3 weeks | 1 years
number   = 7 two | 7 three | 5 four | 5 five | 4 seven | 4 nine | 3 ten | 2 twelve | 1 thirty
"""
SCOPED = frozenset({"way"})  # its words are forgotten at its end, where the outer errand goes on

_PART = re.compile(r"(<\w+>|{\w+})")


class Rule:
    """The alternatives of one symbol, with their probabilities."""

    def __init__(self, names: str, alternatives: str):
        self.symbol, *agreeing = names.split()
        self.parts: list[list[str]] = []  # text, <symbol> and {word} of each alternative
        self.says: list[dict[str, str]] = []  # what {word} repeats, set by plain alternatives only
        weights = []
        for alternative in re.split(r"\n|\|", alternatives.strip()):
            weight, text = alternative.strip().split(maxsplit=1)
            weights.append(int(weight))
            words = text.split() if agreeing else [text.replace(" / ", "\n")]
            self.parts.append([part for part in _PART.split(words[0]) if part])
            plain = len(self.parts[-1]) == 1 and not _PART.match(words[0])
            says = dict(zip((self.symbol, *agreeing), words, strict=True)) if plain else {}
            self.says.append(says | {name.capitalize(): _capital(says[name]) for name in says})
        self.p = [weight / sum(weights) for weight in weights]
        self.cumulative = list(accumulate(self.p[:-1]))
        leads = ["" if _PART.match(parts[0]) else parts[0] for parts in self.parts]
        assert not any(b.startswith(a) for a, b in pairwise(sorted(leads))), self.symbol
        self._lead = re.compile("|".join(f"({re.escape(lead)})" for lead in leads))

    def taken(self, text: str, offset: int) -> int:
        """Return the number of the alternative that the text takes here, or raise ValueError."""
        if len(self.p) == 1:
            return 0
        match = self._lead.match(text, offset)
        if match is None or match.lastindex is None:
            raise ValueError(f"offset {offset}: no <{self.symbol}>: {text[offset : offset + 20]!r}")
        return match.lastindex - 1

    def entropy_bits(self) -> float:
        """Return the entropy of the choice alone: -sum p log2 p."""
        return -sum(p * math.log2(p) for p in self.p)

    def mean(self, value: Callable[[str], float]) -> float:
        """Return the expected sum of a value over the parts of an alternative."""
        return sum(p * sum(map(value, parts)) for p, parts in zip(self.p, self.parts, strict=True))

    def mean_bytes(self, name: str) -> float:
        """Return the expected length of {name}, which plain alternatives of this symbol set."""
        plain = [(p, says[name]) for p, says in zip(self.p, self.says, strict=True) if says]
        return sum(p * len(word) for p, word in plain) / sum(p for p, _ in plain)


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


class Grammar:
    """An unambiguous grammar, from a table like TABLE; its first symbol is the whole text."""

    def __init__(self, table: str, scoped: frozenset[str] = frozenset()):
        entries = re.findall(r"^(\w[\w ]*?)\s*=(.*?)(?=^\w|\Z)", table, re.S | re.M)
        self.rules = {rule.symbol: rule for rule in (Rule(*entry) for entry in entries)}
        self.root, self.scoped = next(iter(self.rules)), scoped
        self._sayers = {
            name: rule for rule in self.rules.values() for says in rule.says for name in says
        }

    def pieces(self, choose: Callable[[Rule], int]) -> Iterator[str]:
        """Yield the pieces of a text in order; `choose` returns the number of an alternative."""
        words: dict[str, str] = {}
        todo: list[str | dict[str, str]] = [f"<{self.root}>"]
        while todo:
            part = todo.pop()
            if isinstance(part, dict):  # the end of a scoped symbol
                words = part
            elif part[0] == "<":
                rule = self.rules[part[1:-1]]
                number = choose(rule)
                if rule.symbol in self.scoped:
                    todo.append(words.copy())
                todo += reversed(rule.parts[number])
                words |= rule.says[number]
            else:
                yield words[part[1:-1]] if part[0] == "{" else part

    def bits(self, text: str) -> float:
        """Return -log2 P(text): the sum of -log2 p over the choices of its only derivation.

        Raises ValueError, with the offset, for a text that the grammar cannot make.
        """
        offset, total = 0, 0.0

        def choose(rule: Rule) -> int:
            nonlocal total
            number = rule.taken(text, offset)
            total -= math.log2(rule.p[number])
            return number

        for piece in self.pieces(choose):
            if not text.startswith(piece, offset):
                found = text[offset : offset + 20]
                raise ValueError(f"offset {offset}: expected {piece!r}, found {found!r}")
            offset += len(piece)
        if offset < len(text):
            raise ValueError(f"offset {offset}: the text goes on after its end")
        return total

    def entropy_bits(self) -> float:
        """Return the exact entropy of a text in bits: that of its derivation, since it has one.

        H(A) = h(A) + sum over B of m(A, B) H(B), where h is the entropy of the choice at A and m
        the expected number of B in an alternative: Grenander 1967, Nederhof and Satta 2008.
        """
        return self._expected({symbol: rule.entropy_bits() for symbol, rule in self.rules.items()})

    def mean_bytes(self) -> float:
        """Return the expected length of a text, exactly, by the same recursion.

        A {word} counts with its mean length, since the word does not change how often it repeats.
        """

        def length(part: str) -> float:
            if part[0] == "{":
                return self._sayers[part[1:-1]].mean_bytes(part[1:-1])
            return 0 if part[0] == "<" else len(part)

        return self._expected({symbol: rule.mean(length) for symbol, rule in self.rules.items()})

    def bits_per_byte(self) -> float:
        """Return the entropy rate of endless text: the lowest loss of any model, on average."""
        return self.entropy_bits() / self.mean_bytes()

    def _expected(self, own: Mapping[str, float]) -> float:
        """Return the expected sum of a value over all choices, (I - M)^-1 own, at the root."""
        symbols = list(self.rules)
        m = np.zeros((len(symbols), len(symbols)))
        for a, rule in enumerate(self.rules.values()):
            for b, symbol in enumerate(symbols):
                m[a, b] = rule.mean(f"<{symbol}>".__eq__)
        values = np.linalg.solve(np.eye(len(m)) - m, np.array([own[a] for a in self.rules]))
        return float(values[0])


STORIES = Grammar(TABLE, SCOPED)


def story(seed: int, number: int) -> str:
    """Return story `number` of a seed: its k-th choice takes the k-th draw."""

    def draws() -> Iterator[float]:
        for block in count():
            yield from rng.random_uniforms(rng.seed(seed, "story", number, block), 128).tolist()

    draw = draws()
    return "".join(STORIES.pieces(lambda rule: bisect_right(rule.cumulative, next(draw))))


def stories(seed: int, size_bytes: int) -> Iterator[str]:
    """Yield independent stories until they have `size_bytes` or just more."""
    written, numbers = 0, count()
    while written < size_bytes:
        text = story(seed, next(numbers))
        yield text
        written += len(text.encode())
