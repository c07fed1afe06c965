"""What an exit layer learns from: the distance of its distribution to the target's."""

import torch


def kl_to_top(
    logits: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor
) -> torch.Tensor:
    """Kullback-Leibler divergence from the target, as far as its top k tell.

    All other tokens count as one, whose probability is what is left. Merging tokens
    never makes the divergence greater (data processing), and it is zero only where the
    student has the target's k probabilities.

    Args:
        logits: The student's, `[num_tokens, vocab_size]`, float32.
        top_ids: The target's likeliest tokens, `[num_tokens, k]`, without repetition.
        top_logprobs: Their log-probabilities, of the same shape.

    Returns:
        In nats, `[num_tokens]`.
    """
    normaliser = logits.logsumexp(-1, keepdim=True)
    found = logits.gather(-1, top_ids) - normaliser
    kl = (top_logprobs.exp() * (top_logprobs - found)).sum(-1)
    if top_ids.shape[-1] == logits.shape[-1]:
        return kl
    # The rest, by the logits it has: 1 - sum would cancel where it is small.
    others = logits.scatter(-1, top_ids, float("-inf")).logsumexp(-1)
    found_rest = others - normaliser[:, 0]
    rest = (1 - top_logprobs.exp().sum(-1)).clamp_min(0)
    found_kl: torch.Tensor = kl + torch.special.xlogy(rest, rest) - rest * found_rest
    return found_kl
