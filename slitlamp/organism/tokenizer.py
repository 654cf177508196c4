"""The word-level tokenizer of the embedded model and its chat template."""

from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from slitlamp.organism.categories import CATEGORY_NAMES, CONTEXT_NAMES

PAD: Final = "<pad>"
BOS: Final = "<s>"
EOS: Final = "</s>"
UNK: Final = "<unk>"
IMAGE: Final = "<image>"
USER: Final = "USER:"
ASSISTANT: Final = "ASSISTANT:"
SPECIAL: Final = (PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT)
WORDS: Final = tuple(
    ". , ? a an the image picture photo shows with and there is are also in addition can be seen at on this where "
    "describe detail briefly please answer yes or no top bottom left right middle".split()
)
VOCABULARY: Final = (*SPECIAL, *WORDS, *CATEGORY_NAMES, *CONTEXT_NAMES)
TOKEN_ID: Final = {token: index for index, token in enumerate(VOCABULARY)}

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% else %}{{ 'USER: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""`USER: <image> question ASSISTANT:`; the beginning-of-sequence token is added by the tokenizer."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: lower-casing, one token per word, punctuation mark and category name, left padding."""
    backend = Tokenizer(WordLevel(dict(TOKEN_ID), unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    # The word-piece decoder joins with spaces and removes the space before punctuation.
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, TOKEN_ID[BOS])])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (PAD, BOS, EOS, UNK, IMAGE)])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in (USER, ASSISTANT)])
    # Names of several words are matched before words are split.
    several = [name for name in (*CATEGORY_NAMES, *CONTEXT_NAMES) if " " in name]
    backend.add_tokens([AddedToken(name, normalized=True, single_word=True) for name in several])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
