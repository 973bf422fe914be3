"""Will the model stop where its turns end? The tokens that end generation, against the one that ends a reply.

Called by `build` at its end. A model that learns to write `<|im_end|>` goes on for ever if generation waits for
`</s>`; dft-train adds the token to its checkpoints' generation config, but other copies of the model do not have it.
"""

from __future__ import annotations

from dft_prep.tokenizer_files import CONFIG_NAME, GENERATION_NAME, TokenizerFiles


def stop_warnings(tokenizer: TokenizerFiles, end_of_turn: str | None) -> list[str]:
    """What to warn of. end_of_turn: the control token that ends a reply, or None where the template has none."""
    if end_of_turn is None:
        return [
            "the chat template ends a reply with no control token: the model will not learn to stop. "
            "Give a template whose assistant turns end in one (--chat_template)"
        ]
    ids = {token.text: token.id for token in tokenizer.control_tokens()}
    stops = set(tokenizer.generation_stops)
    eos = tokenizer.named_tokens().get("eos_token")
    if eos in ids:
        stops.add(ids[eos])
    token_id = ids.get(end_of_turn)
    if token_id in stops or end_of_turn == eos:
        return []
    named = {token_id: text for text, token_id in ids.items()}
    shown = ", ".join(named.get(stop, f"id {stop}") for stop in sorted(stops)) or "nothing"
    return [
        f"turns end in {end_of_turn}, but generation ends at {shown} (eos_token of {CONFIG_NAME}, {GENERATION_NAME}). "
        f"The checkpoints of dft-train get {end_of_turn} too; for any other copy of the model, add its id"
        + (f" {token_id}" if token_id is not None else "")
        + f" to eos_token_id in {GENERATION_NAME}, or make it the eos_token in {CONFIG_NAME}"
    ]
