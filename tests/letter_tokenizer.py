"""A tokenizer with a letter for each token of the tiny models; the control tokens are special."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import CHILD, FORK

LETTERS = "0abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRST"


def letter_tokenizer():
    vocabulary = {letter: index for index, letter in enumerate(LETTERS[:FORK])} | {"[Fork]": FORK, "[Child]": CHILD}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="0", pad_token="0", padding_side="left")
    made.add_tokens(["[Fork]", "[Child]"], special_tokens=True)
    return made
