"""What tokenizers and chat templates do each in their own way: special tokens, errors, the end
token."""

import re
from contextlib import suppress
from functools import cache

from plumbing.process import fail

# Characters of no language, which stand for texts while a template is rendered around them
OPEN, CLOSE, THINKING = "\ue000", "\ue001", "\ue002"
# The mark of a text, with a thinking before it where the template keeps that
MARKED = re.compile(f"((?:<think>\\s*{THINKING}\\s*</think>\\s*)?{OPEN}\\d+{CLOSE})")


@cache
def added_tokens(tokenizer, size: int) -> re.Pattern:
    """Where in a text one of the tokenizer's added tokens stands (group 1), `size` tokens in all;
    those of blanks, as Gemma has, are plain text."""
    tokens = [re.escape(token) for token in tokenizer.get_added_vocab() if token.strip()]
    return re.compile(f"(?=({'|'.join(tokens) or '(?!)'}))")


def encode_plain(tokenizer, text: str, plain: list[tuple[int, int]] | None = None) -> list[int]:
    """Ids of `text` with nothing in it read as a special token, whatever it contains (trap 7); if
    told, nothing in those stretches (start, end) of it, which are somebody's texts in a template.

    A user's prompt or a judged answer may hold `<|im_end|>` or `</think>`. Each such string is cut
    after its first character, so that the tokenizer meets two harmless halves. All else is read in
    one piece: SentencePiece puts a blank before whatever begins."""
    plain, cuts = [(0, len(text))] if plain is None else plain, []
    for match in added_tokens(tokenizer, len(tokenizer)).finditer(text):
        if any(match.start(1) < end and match.end(1) > start for start, end in plain):
            cuts.append(match.start(1) + 1)
    ids: list[int] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        if start < end:
            ids += tokenizer.encode(text[start:end], add_special_tokens=False)
    return ids


def begun_ids(tokenizer, messages: list[dict], opened: bool) -> list[int]:
    """Ids of the response that a chat's last turn has begun, none if that is the user's.

    A `<think>` at its beginning and the first `</think>` are the model's own tags, all else is
    plain text. A thinking that the template has `opened` is not opened again."""
    if messages[-1]["role"] != "assistant":
        return []
    text, ids = messages[-1]["content"], []
    if text.lstrip().startswith("<think>"):
        text = text.lstrip().removeprefix("<think>")
        if opened:
            text = text.removeprefix("\n")  # the template's
        else:
            ids = tokenizer.encode("<think>", add_special_tokens=False)
    thinking, closed, answer = text.partition("</think>")
    ids = ids + encode_plain(tokenizer, thinking)
    if closed:
        ids = ids + tokenizer.encode(closed, add_special_tokens=False)
    return ids + encode_plain(tokenizer, answer)


def apply_template(tokenizer, messages: list[dict], generate: bool, **options) -> str:
    """The chat template's text, up to where the model goes on if `generate`."""
    from jinja2 import TemplateError

    options |= {"tokenize": False, "add_generation_prompt": generate}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:  # Gemma's takes no system turn
        roles = [turn["role"] for turn in messages]
        fail(f"the chat template of {tokenizer.name_or_path} refuses {roles}: {error}")


def end_token(tokenizer) -> int:
    """The special token that the chat template writes after an assistant's text, such as Gemma's
    <end_of_turn>, or the tokenizer's own where it writes none."""
    from jinja2 import TemplateError

    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": OPEN}]
    with suppress(TemplateError, ValueError):  # no such chat, no template
        after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(OPEN)[2].lstrip()
        for token in tokenizer.encode(after, add_special_tokens=False)[:1]:
            if token in tokenizer.get_added_vocab().values():
                return token
    return tokenizer.eos_token_id
