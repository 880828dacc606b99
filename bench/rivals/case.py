"""Shapes, token counts and routings of the comparison: those of bench/sm90/gemms.cu, pick for pick."""
import dataclasses
import itertools

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768)


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int
    gated: bool = True

    @property
    def rows1(self):
        """Rows of the first projection of one expert: gate and up, or up alone."""
        return 2 * self.inter if self.gated else self.inter

    @property
    def weights(self):
        """Weights of one expert."""
        return self.hidden * (self.rows1 + self.inter)


SHAPES = {shape.name: shape for shape in (
    Shape("dsv3", 7168, 2048, 256, 8),
    Shape("dsv3-local", 7168, 2048, 32, 8),
    Shape("qwen3-235b", 4096, 1536, 128, 8),
    Shape("v4-flash", 4096, 2048, 256, 6),
    Shape("qwen3-30b", 2048, 768, 128, 8),
    Shape("nemotron3-nano", 2688, 1856, 128, 6, gated=False),
)}


def random_words(seed):
    """Words of the 64-bit Mersenne twister of C++'s standard library (Matsumoto and Nishimura)."""
    size, middle, mask = 312, 156, 2**64 - 1
    state = [seed & mask]
    for i in range(1, size):
        state.append((6364136223846793005 * (state[-1] ^ state[-1] >> 62) + i) & mask)
    while True:
        for i in range(size):
            x = state[i] & 0xFFFFFFFF80000000 | state[(i + 1) % size] & 0x7FFFFFFF
            state[i] = state[(i + middle) % size] ^ x >> 1 ^ (0xB5026F5AA96619E9 if x & 1 else 0)
        for x in state:
            x ^= x >> 29 & 0x5555555555555555
            x ^= x << 17 & 0x71D67FFFEDA60000
            x ^= x << 37 & 0xFFF7EEE000000000
            yield x ^ x >> 43


@dataclasses.dataclass(frozen=True)
class Routing:
    """Picks of one layer, sorted by expert: expert e has the rows begin[e] to begin[e + 1]."""
    begin: tuple

    @property
    def rows(self):
        return self.begin[-1]

    @property
    def counts(self):
        return [b - a for a, b in itertools.pairwise(self.begin)]

    @property
    def active(self):
        return sum(count > 0 for count in self.counts)


def route(shape, tokens, seed):
    words, counts = random_words(seed), [0] * shape.experts
    for _ in range(tokens):
        chosen = set()
        while len(chosen) < shape.top_k:
            chosen.add(next(words) % shape.experts)
        for expert in chosen:
            counts[expert] += 1
    return Routing((0, *itertools.accumulate(counts)))


def routings(shape, tokens):
    """One for each layer of a graph: as many layers in turn as it takes to leave the L2 cold."""
    layers = 8 if tokens <= 8 else 3 if tokens <= 64 else 1
    return [route(shape, tokens, tokens * 131 + i) for i in range(layers)]
