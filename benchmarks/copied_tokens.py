"""How often is a copied token right, by the length of the match that it was found by?

    python benchmarks/copied_tokens.py MODEL

Measured on source files of Python's library, cut into tokens by the tokenizer of MODEL:
at each of 200 tokens after the first 150, what `source_context` would copy is compared
with what follows. Texts that a model makes repeat themselves more. Sources start from
the first two columns (`GUESSES`); while serving all of it is learnt.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from corpus import texts

from vllm_selfspec.plan.source_context import KINDS, Copier

NUM_FILES, SEED = 120, 1
FIRST, LAST = 150, 350
DEPTH = 8


def files(tokenizer: Path) -> Iterator[np.ndarray]:
    """Token ids of files that are long enough, `[LAST]`."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer)).encode
    known = sorted(texts(held_out=False))
    for _, text in random.Random(SEED).sample(known, NUM_FILES):
        ids = encode(text[: 20 * LAST]).ids[:LAST]
        if len(ids) == LAST:
            yield np.array(ids, np.int32)


def main(
    model: Annotated[Path, typer.Argument(help="Directory with a tokenizer.json.")],
) -> None:
    """Prints how often tokens 1, 2, ... of a copy were right, given those before."""
    tried, right = np.zeros((2, len(KINDS), DEPTH))
    copier = Copier(KINDS[0], KINDS[-1], DEPTH)
    for tokens in files(model / "tokenizer.json"):
        for end in range(FIRST, LAST):
            before, after = tokens[:end], tokens[end : end + DEPTH]
            proposal = copier.propose("", before)
            copied, kind = proposal.token_ids[: len(after)], proposal.kind
            if not len(copied):
                continue
            is_right = np.cumprod(copied == after[: len(copied)])
            num_right = int(is_right.sum())
            tried[kind, : min(num_right + 1, len(copied))] += 1
            right[kind, :num_right] += 1
    for kind, length in enumerate(KINDS):
        shares = right[kind] / np.maximum(tried[kind], 1)
        figures = "  ".join(f"{share:.2f}" for share in shares)
        print(f"match of {length:2}: {figures}  ({int(tried[kind, 0])} copies)")


if __name__ == "__main__":
    typer.run(main)
