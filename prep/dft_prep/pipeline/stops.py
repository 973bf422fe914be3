"""Will the model stop where its turns end? The tokens that end generation, against the one that ends a reply.

Called by `build` at its end. A model that learns to write `<|im_end|>` goes on for ever if generation waits for
`</s>`; dft-train adds the token to its checkpoints' generation config, but other copies of the model do not have it.
"""

from __future__ import annotations

from dft_prep.tokenizer_files import CONFIG_NAME, GENERATION_NAME, TOKEN_MAP_NAME, TokenizerFiles


def stop_warnings(tokenizer: TokenizerFiles, end_of_turn: str | None) -> list[str]:
    """What to warn of. end_of_turn: the control token that ends a reply, or None where the template has none."""
    if end_of_turn is None:
        return [
            "the chat template ends a reply with no control token: the model will not learn to stop. "
            "Give a template whose assistant turns end in one (--chat_template)"
        ]
    ids = {token.text: token.id for token in tokenizer.control_tokens()}
    eos = tokenizer.named_tokens().get("eos_token")
    if end_of_turn == eos or ids.get(end_of_turn) in tokenizer.generation_stops:
        return []
    token_id = f" {ids[end_of_turn]}" if end_of_turn in ids else ""
    return [
        f"turns end in {end_of_turn}, but {_what_ends_generation(tokenizer, eos)}. "
        f"The checkpoints of dft-train get {end_of_turn} too; for any other copy of the model, add its id{token_id} "
        f"to eos_token_id in {GENERATION_NAME}, or make it the eos_token in {_eos_file(tokenizer)}"
    ]


def _eos_file(tokenizer: TokenizerFiles) -> str:
    return TOKEN_MAP_NAME if "eos_token" in tokenizer.token_map() else CONFIG_NAME


def _what_ends_generation(tokenizer: TokenizerFiles, eos: str | None) -> str:
    """Each token that ends generation, and the file that says so."""
    texts = {token["id"]: token["content"] for token in tokenizer.parsed().get("added_tokens") or []}
    found = []
    if eos is not None:
        found.append(f"{eos} (eos_token in {_eos_file(tokenizer)})")
    if tokenizer.generation_stops:
        shown = ", ".join(texts.get(stop, f"id {stop}") for stop in tokenizer.generation_stops)
        found.append(f"{shown} (eos_token_id in {GENERATION_NAME})")
    if not found:
        return f"no token ends generation (no eos_token in {CONFIG_NAME}, no eos_token_id in {GENERATION_NAME})"
    return "generation ends at " + " and ".join(found)
