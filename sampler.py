"""Who answers prompts of token ids: generate.py in this process."""
from collections.abc import Collection, Iterable, Iterator, Sequence

import common
import generate
from generate import Sample


class Embedded:
    """generate.sample with a plain copy of the weights, in this process: the default."""

    def __init__(self, model=None):
        self.model = model  # a plain module (common.unsharded_copy)

    def update(self, model) -> None:
        """Answers are by this model from now on."""
        self.model = model

    def pieces(self, *arguments) -> list[Sequence[int]]:
        return fixed_pieces(*arguments)

    def sample(self, prompts: list[list[int]], n: int = 1, *, max_rows: int = 256,
               numbers: Sequence[int] | None = None,
               **settings) -> Iterator[dict[int, list[Sample]]]:
        """Yields {place of a prompt: its n Samples} of some prompts after the other.

        The arguments are those of generate.sample.
        """
        if numbers is None:
            numbers = range(len(prompts))
        for places in common.cut(range(len(prompts)), max(1, max_rows // n)):
            answers = generate.sample(
                self.model, [prompts[i] for i in places], n, max_rows=max_rows,
                numbers=[numbers[i] for i in places], **settings)
            yield dict(zip(places, answers))


def fixed_pieces(items: Sequence[int], done: Collection[int], n: int, max_rows: int,
                 dist: common.Dist) -> list[Sequence[int]]:
    """What is handed out to the ranks: pieces of some problems, without those that are done.

    A problem's piece is the same whatever is done, since what is decoded together is rounded
    together. n: samples of each problem; max_rows: that are decoded together.
    """
    size = dist.piece_size(len(items), n, max_rows)
    return [piece for piece in common.cut(items, size) if not set(piece).issubset(done)]


def in_order(batches: Iterable[dict]) -> list:
    """What batches of {place: value} hold, by place."""
    values = {}
    for batch in batches:
        values |= batch
    return [values[place] for place in sorted(values)]
