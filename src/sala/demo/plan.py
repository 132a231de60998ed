"""How much the demo measures: lengths, questions, repeats."""

from dataclasses import dataclass, field

# share of time that goes with the square of the length: at this length attention costs as much as everything else
EVEN_LENGTH = 8192


@dataclass(frozen=True, slots=True)
class Amount:
    """Questions asked at one length. The teacher, four softmax layers, is by far the slowest to ask at long ones."""

    teacher: int
    hybrid: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers of one demo.

    recipe: name or file of the conversion.
    questions: length -> questions a point, in each haystack.
    needles: needles and questions in one document.
    repeats: length -> how often time and memory are measured there.
    needle_length, needle_depth: the one needle in a real document.
    """

    recipe: str
    questions: dict[int, Amount]
    repeats: dict[int, int]
    needle_length: int
    needle_depth: float = 0.35
    needles: int = 16
    haystacks: tuple[str, ...] = field(default=("text", "noise"))

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sorted(self.questions))


FULL = Plan(
    recipe="demo",
    questions={
        512: Amount(256, 256),
        1024: Amount(256, 256),
        2048: Amount(256, 256),
        4096: Amount(128, 256),
        8192: Amount(64, 128),
        16384: Amount(64, 128),
    },
    repeats={512: 3, 1024: 3, 2048: 3, 4096: 3, 8192: 3, 16384: 1},
    needle_length=65536,
)
QUICK = Plan(
    recipe="demo-quick",
    questions={512: Amount(64, 64), 2048: Amount(64, 64), 8192: Amount(64, 64)},
    repeats={512: 1, 2048: 1, 8192: 1},
    needle_length=16384,
)


def work(length: int) -> float:
    """Return what reading `length` tokens costs, in tokens of a short document, for a forecast of the time left."""
    return length * (1 + length / EVEN_LENGTH)
