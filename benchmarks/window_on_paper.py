"""What would a window of the KV cache bring on a GPU? From shares, not from a run.

    python benchmarks/window_on_paper.py

A step reads its weights once and the cache of every request; a draft step reads the
weights it keeps and a window of each cache. A verification also computes, and takes
whichever is longer:

    step(r) = max((W + B L kv) / bandwidth, 2 P r / peak)
    draft   = (d W + B min(w, L) kv) / bandwidth
    speed-up = E(a, k) step(B) / (step(B (1 + k)) + k draft),  E = 1 + a + ... + a^k

with W bytes of weights of P parameters, B requests of L tokens, kv bytes of cache a
token, r rows, d the share of the weights that a draft reads, w the window, a the chance
of a draft token and k the length that brings most. No overhead beside the forwards is
in it, and no limit of acceptance by depth: it is a bound.
"""

from dataclasses import dataclass

BANDWIDTH, PEAK, MEMORY = 3.35e12, 989e12, 80e9  # one H100 SXM, bfloat16
MOST_DRAFTS = 16
WINDOW = 512
CONTEXTS = (16 << 10, 64 << 10)
BATCHES = (1, 4, 16, 64)
INT4_SHARE = 4.25 / 16  # with a scale of 16 bits for each group of 64


@dataclass(frozen=True)
class Target:
    """A model as it is served.

    Attributes:
        name: Shown.
        num_parameters: P, of what a step reads: without the embeddings.
        weight_bytes: W.
        kv_bytes: Of one token.
    """

    name: str
    num_parameters: float
    weight_bytes: float
    kv_bytes: int

    def step(self, num_requests: int, context: int, rows: int) -> float:
        """Seconds of a forward that verifies."""
        read = self.weight_bytes + num_requests * context * self.kv_bytes
        return max(read / BANDWIDTH, 2 * self.num_parameters * rows / PEAK)

    def fits(self, num_requests: int, context: int) -> bool:
        """Whether one GPU holds it, nine tenths of its memory being given to vLLM."""
        held = self.weight_bytes + num_requests * context * self.kv_bytes
        return held <= 0.9 * MEMORY


@dataclass(frozen=True)
class Draft:
    """A plan, and how often its tokens are right.

    Attributes:
        name: Shown.
        weights: d.
        window: w; None for the whole context.
        acceptance: a.
    """

    name: str
    weights: float
    window: int | None
    acceptance: float

    def speed_up(self, target: Target, num_requests: int, context: int) -> float:
        """Over plain steps, at the best length."""
        read = min(self.window or context, context)
        draft = self.weights * target.weight_bytes + num_requests * read * (
            target.kv_bytes
        )
        plain = target.step(num_requests, context, num_requests)
        found = [1.0]
        for k in range(1, MOST_DRAFTS + 1):
            emitted = sum(self.acceptance**i for i in range(k + 1))
            verify = target.step(num_requests, context, num_requests * (1 + k))
            found.append(emitted * plain / (verify + k * draft / BANDWIDTH))
        return max(found)


# As published; the cache's bytes are 2 (K, V) x layers x KV heads x their size x 2.
TARGETS = (
    Target("8 B, bfloat16", 7.5e9, 15.0e9, 2 * 32 * 8 * 128 * 2),
    Target("70 B in 4 bits", 69.5e9, 69.5e9 * 0.53, 2 * 80 * 8 * 128 * 2),
)
# Published of a window on questions about documents and on summaries; measured of int4
# on Qwen2.5-Coder-0.5B. Together as if each erred by itself.
QUESTIONS, SUMMARIES, INT4 = 0.957, 0.535, 0.92
DRAFTS = {
    TARGETS[0].name: (
        Draft("window, questions", 1.0, WINDOW, QUESTIONS),
        Draft("window, summaries", 1.0, WINDOW, SUMMARIES),
        Draft("int4", INT4_SHARE, None, INT4),
        Draft("int4 and window, questions", INT4_SHARE, WINDOW, INT4 * QUESTIONS),
        Draft("int4 and window, summaries", INT4_SHARE, WINDOW, INT4 * SUMMARIES),
    ),
    # Its weights are in 4 bits already: there is no narrower copy.
    TARGETS[1].name: (
        Draft("window, questions", 1.0, WINDOW, QUESTIONS),
        Draft("window, summaries", 1.0, WINDOW, SUMMARIES),
    ),
}


def markdown() -> str:
    """A row for each target, draft and context; a dash where the cache does not fit."""
    head = ["target", "draft", "context", *(f"batch {num}" for num in BATCHES)]
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|" + "---:|" * len(BATCHES)]
    for target in TARGETS:
        for draft in DRAFTS[target.name]:
            for context in CONTEXTS:
                figures = [
                    f"{draft.speed_up(target, num, context):.2f}x"
                    if target.fits(num, context)
                    else "-"
                    for num in BATCHES
                ]
                row = [target.name, draft.name, f"{context >> 10}k", *figures]
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
